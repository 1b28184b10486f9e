/* Weights of schemes to measure with, as safetensors: the header's length, the header, the floats. What they are does not
 * matter to the clock, but that they are there. */
#include "client/cli/bench_gpu.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct tensor {
    const char *name;
    uint64_t inner;    /* floats of a layer, head and bit */
    float least, span; /* random between; span 0: all the same */
};

static const struct tensor linear[] = {{"k.weight", DIM, -1, 2}, {NULL, 0, 0, 0}};
static const struct tensor code[] = {{"k.weight", DIM, -1, 2}, {"q.weight", DIM, -1, 2}, {"k.low", 1, -1, 0},
                                     {"k.step", 1, 1, 0},      {"k.bits", 1, 1, 0},      {NULL, 0, 0, 0}};

static bool write_all(int fd, const void *data, uint64_t bytes)
{
    for (uint64_t done = 0; done < bytes;) {
        ssize_t n = write(fd, (const char *)data + done, bytes - done);
        if (n <= 0)
            return false;
        done += (uint64_t)n;
    }
    return true;
}

static bool write_header(int fd, const struct tensor *tensors, const char *scheme, uint32_t layers, uint32_t bits)
{
    char header[1024];
    uint64_t at = 0, length = (uint64_t)snprintf(header, sizeof(header), "{\"__metadata__\":{\"scheme\":\"%s\"%s}", scheme,
                                                 tensors == linear ? ",\"query\":\"sign\"" : "");
    for (const struct tensor *t = tensors; t->name; t++) {
        uint64_t end = at + (uint64_t)layers * KV_HEADS * bits * t->inner * sizeof(float);
        char inner[24] = "";
        if (t->inner > 1)
            snprintf(inner, sizeof(inner), ",%llu", (unsigned long long)t->inner);
        length += (uint64_t)snprintf(header + length, sizeof(header) - length,
                                     ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%u,%d,%u%s],\"data_offsets\":[%llu,%llu]}", t->name,
                                     layers, KV_HEADS, bits, inner, (unsigned long long)at, (unsigned long long)end);
        at = end;
    }
    length += (uint64_t)snprintf(header + length, sizeof(header) - length, "}");
    return write_all(fd, &length, sizeof(length)) && write_all(fd, header, length);
}

static bool write_tensor(int fd, const struct tensor *t, uint64_t count)
{
    uint64_t state = 1;
    float *x = malloc(count * sizeof(float));
    for (uint64_t i = 0; x && i < count; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = t->least + t->span * (float)(state >> 40) * 0x1p-24f;
    }
    bool ok = x && write_all(fd, x, count * sizeof(float));
    free(x);
    return ok;
}

int bench_weights(uint32_t signature, uint32_t layers, uint32_t bits)
{
    const struct tensor *tensors = signature == PKV_CODE ? code : linear;
    int fd = memfd_create("weights", MFD_CLOEXEC);
    bool ok = fd >= 0 && write_header(fd, tensors, signature == PKV_CODE ? "code" : "linear", layers, bits);
    for (const struct tensor *t = tensors; t->name && ok; t++)
        ok = write_tensor(fd, t, (uint64_t)layers * KV_HEADS * bits * t->inner);
    if (!ok && fd >= 0)
        close(fd);
    return ok ? fd : -1;
}
