/* The format: huggingface/safetensors, README "Format". Its own rules are kept: no overlaps, no holes, no duplicate names. */
#include "gpu/safetensors.h"

#include "gpu/kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define HEADER_MAX (16u << 20)
#define FILE_MAX   (1ull << 34)
#define META       "__metadata__"

struct tensor {
    uint64_t begin, end;
};

static int read_file(const char *path, char **ret, uint64_t *ret_bytes)
{
    struct stat s;
    int fd = open(path, O_RDONLY | O_CLOEXEC), r = 0;
    if (fd < 0 || fstat(fd, &s) || !S_ISREG(s.st_mode)) {
        if (fd >= 0)
            close(fd);
        return -PKV_ERR_FILE_OPEN;
    }
    uint64_t bytes = (uint64_t)s.st_size, at = 0;
    char *file = bytes > FILE_MAX ? NULL : malloc(bytes + 1);
    if (!file)
        r = bytes > FILE_MAX ? -PKV_ERR_FILE_FORMAT : -PKV_ERR_NO_MEMORY;
    while (!r && at < bytes) {
        ssize_t n = read(fd, file + at, bytes - at);
        if (n == 0 || (n < 0 && errno != EINTR))
            r = n == 0 ? -PKV_ERR_FILE_FORMAT : -PKV_ERR_FILE_OPEN;
        at += n > 0 ? (uint64_t)n : 0;
    }
    close(fd);
    if (r) {
        free(file);
        return r;
    }
    *ret = file, *ret_bytes = bytes;
    return 0;
}

static uint32_t dtype_bytes(const json_t *tensor)
{
    const char *name = json_string_value(json_object_get(tensor, "dtype"));
    return !name                   ? 0
           : !strcmp(name, "F32")  ? 4
           : !strcmp(name, "F16")  ? 2
           : !strcmp(name, "BF16") ? 2
           : !strcmp(name, "U8")   ? 1
                                   : 0;
}

static bool natural(const json_t *value, uint64_t *ret)
{
    if (!json_is_integer(value) || json_integer_value(value) < 0)
        return false;
    *ret = (uint64_t)json_integer_value(value);
    return true;
}

/* dtype x shape is what the offsets span, inside of the data. */
static bool tensor_check(const json_t *tensor, uint64_t data_bytes, struct tensor *ret)
{
    const json_t *shape = json_object_get(tensor, "shape"), *offsets = json_object_get(tensor, "data_offsets");
    uint64_t bytes = dtype_bytes(tensor), n;
    if (!bytes || !json_is_array(shape) || json_array_size(shape) > 8 || json_array_size(offsets) != 2)
        return false;
    for (size_t i = 0; i < json_array_size(shape); i++)
        if (!natural(json_array_get(shape, i), &n) || __builtin_mul_overflow(bytes, n, &bytes))
            return false;
    return natural(json_array_get(offsets, 0), &ret->begin) && natural(json_array_get(offsets, 1), &ret->end) &&
           ret->begin <= ret->end && ret->end <= data_bytes && ret->end - ret->begin == bytes;
}

static int by_begin(const void *a, const void *b)
{
    const struct tensor *x = a, *y = b;
    return x->begin != y->begin ? (x->begin > y->begin ? 1 : -1) : (x->end > y->end) - (x->end < y->end);
}

static int header_check(json_t *header, uint64_t data_bytes)
{
    const char *name;
    json_t *tensor;
    size_t count = 0;
    struct tensor *all = calloc(json_object_size(header) + 1, sizeof(*all));
    if (!all)
        return -PKV_ERR_NO_MEMORY;
    bool good = json_is_object(header);
    json_object_foreach(header, name, tensor)
    {
        if (strcmp(name, META))
            good = good && tensor_check(tensor, data_bytes, &all[count++]);
    }
    qsort(all, good ? count : 0, sizeof(*all), by_begin);
    uint64_t at = 0;
    for (size_t i = 0; i < count && good; i++) {
        good = all[i].begin == at;
        at = all[i].end;
    }
    free(all);
    return good && at == data_bytes ? 0 : -PKV_ERR_FILE_FORMAT;
}

static void digest(const char *file, uint64_t bytes, uint8_t ret[PKV_DIGEST_BYTES])
{
    for (uint32_t i = 0; i < 2; i++) {
        XXH128_canonical_t half;
        XXH128_canonicalFromHash(&half, XXH3_128bits_withSeed(file, bytes, i));
        memcpy(ret + i * sizeof(half), &half, sizeof(half));
    }
}

int safetensors_open(const char *path, struct safetensors *st, uint8_t ret_digest[PKV_DIGEST_BYTES])
{
    *st = (struct safetensors){0};
    uint64_t header = 0;
    int r = read_file(path, &st->file, &st->bytes);
    if (r)
        return r;
    if (st->bytes >= 8)
        memcpy(&header, st->file, 8);
    if (st->bytes < 8 || header > HEADER_MAX || header > st->bytes - 8)
        r = -PKV_ERR_FILE_FORMAT;
    if (!r) {
        json_error_t error;
        st->header = json_loadb(st->file + 8, header, JSON_REJECT_DUPLICATES, &error);
        st->data = st->file + 8 + header;
        r = st->header ? header_check(st->header, st->bytes - 8 - header) : -PKV_ERR_FILE_FORMAT;
    }
    if (r) {
        safetensors_close(st);
        return r;
    }
    digest(st->file, st->bytes, ret_digest);
    return 0;
}

void safetensors_close(struct safetensors *st)
{
    json_decref(st->header);
    free(st->file);
    *st = (struct safetensors){0};
}

bool safetensors_has(const struct safetensors *st, const char *name)
{
    return strcmp(name, META) && json_object_get(st->header, name);
}

const char *safetensors_meta(const struct safetensors *st, const char *key)
{
    return json_string_value(json_object_get(json_object_get(st->header, META), key));
}

uint64_t safetensors_size(const struct safetensors *st, const char *name, uint32_t axis)
{
    const json_t *tensor = safetensors_has(st, name) ? json_object_get(st->header, name) : NULL;
    return (uint64_t)json_integer_value(json_array_get(json_object_get(tensor, "shape"), axis));
}

static void convert(const char *from, const char *dtype, uint64_t count, float *to)
{
    if (!strcmp(dtype, "U8"))
        for (uint64_t i = 0; i < count; i++)
            to[i] = (float)(uint8_t)from[i];
    else
        gpu_kernels_c.to_float(from, !strcmp(dtype, "F32") ? PKV_F32 : !strcmp(dtype, "F16") ? PKV_F16 : PKV_BF16, to, count);
}

int safetensors_floats(const struct safetensors *st, const char *name, const uint64_t *shape, uint32_t axes, float **ret)
{
    const json_t *tensor = safetensors_has(st, name) ? json_object_get(st->header, name) : NULL;
    const json_t *has = json_object_get(tensor, "shape");
    uint64_t count = 1;
    if (!tensor || json_array_size(has) != axes)
        return -PKV_ERR_FILE_FIT;
    for (uint32_t i = 0; i < axes; i++) {
        if ((uint64_t)json_integer_value(json_array_get(has, i)) != shape[i])
            return -PKV_ERR_FILE_FIT;
        count *= shape[i]; /* fits: the file's own product did */
    }
    float *to = aligned_alloc(64, PKV_ALIGN_UP(count * sizeof(*to) + 1, 64));
    if (!to)
        return -PKV_ERR_NO_MEMORY;
    uint64_t begin = (uint64_t)json_integer_value(json_array_get(json_object_get(tensor, "data_offsets"), 0));
    convert(st->data + begin, json_string_value(json_object_get(tensor, "dtype")), count, to);
    if (!gpu_kernels_c.finite(to, PKV_F32, count)) {
        free(to);
        return -PKV_ERR_FILE_FORMAT;
    }
    *ret = to;
    return 0;
}
