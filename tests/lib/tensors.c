/* The writer knows nothing of the reader. */
#include "tests/lib/tensors.h"

#include "tests/lib/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

char *test_tensor_file(uint64_t header_bytes, const char *header, const void *data, uint64_t data_bytes)
{
    char *path = strdup("/tmp/pivotkv-tensors-XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    FILE *f = fdopen(fd, "wb");
    assert_non_null(f);
    fwrite(&header_bytes, 1, 8, f);
    fwrite(header, 1, strlen(header), f);
    if (data_bytes)
        fwrite(data, 1, data_bytes, f);
    fclose(f);
    return path;
}

char *test_tensors(const char *meta, const struct test_tensor *tensors, uint32_t count)
{
    char header[4096];
    uint64_t at = 0, total = 0;
    int n = snprintf(header, sizeof(header), "{%s%s%s", meta ? "\"__metadata__\":{" : "", meta ? meta : "", meta ? "}" : "");
    for (uint32_t i = 0; i < count; i++) {
        uint64_t values = 1;
        n += snprintf(header + n, sizeof(header) - (size_t)n, "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[", i || meta ? "," : "",
                      tensors[i].name);
        for (uint32_t a = 0; a < tensors[i].axes; a++) {
            values *= tensors[i].shape[a];
            n += snprintf(header + n, sizeof(header) - (size_t)n, "%s%llu", a ? "," : "",
                          (unsigned long long)tensors[i].shape[a]);
        }
        n += snprintf(header + n, sizeof(header) - (size_t)n, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at,
                      (unsigned long long)(at + values * 4));
        at += values * 4;
    }
    snprintf(header + n, sizeof(header) - (size_t)n, "}");
    char *data = malloc(at + 1);
    assert_non_null(data);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t values = 1;
        for (uint32_t a = 0; a < tensors[i].axes; a++)
            values *= tensors[i].shape[a];
        memcpy(data + total, tensors[i].values, values * 4);
        total += values * 4;
    }
    char *path = test_tensor_file(strlen(header), header, data, total);
    free(data);
    return path;
}
