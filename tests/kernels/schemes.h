/* Schemes of every kind with random numbers, for the kernels' checks. Included by one file of each program. */
#ifndef TESTS_KERNELS_SCHEMES_H
#define TESTS_KERNELS_SCHEMES_H

#include "tests/kernels/world.h"
#include "tests/lib/tensors.h"
#include "tests/lib/text.h"

#include <unistd.h>

/* Two stages a side, 32 wide between. */
static inline struct gpu_scheme *hash_scheme(const struct pkv_geom *g)
{
    uint64_t heads = (uint64_t)g->layers * g->q_heads, each = g->sig_bits / pkv_geom_group(g);
    float *w[4] = {test_floats(11, heads * 32 * g->head_dim), test_floats(12, heads * each * 32),
                   test_floats(13, heads * 32 * g->head_dim), test_floats(14, heads * each * 32)};
    struct gpu_scheme *s;
    uint8_t digest[PKV_DIGEST_BYTES];
    char *path = test_tensors(NULL,
                              (struct test_tensor[]){{"k.0.weight", 4, {g->layers, g->q_heads, 32, g->head_dim}, w[0]},
                                                     {"k.1.weight", 4, {g->layers, g->q_heads, each, 32}, w[1]},
                                                     {"q.0.weight", 4, {g->layers, g->q_heads, 32, g->head_dim}, w[2]},
                                                     {"q.1.weight", 4, {g->layers, g->q_heads, each, 32}, w[3]}},
                              4);
    MUST(gpu_scheme_open(PKV_SCHEME_HASH, g, path, &s, digest) == 0);
    unlink(path);
    free(path), free(w[0]), free(w[1]), free(w[2]), free(w[3]);
    return s;
}

static inline struct gpu_scheme *scheme_of_kind(const struct world *w, uint32_t kind)
{
    const struct pkv_geom *g = &w->g;
    struct gpu_scheme *s;
    uint8_t digest[PKV_DIGEST_BYTES];
    if (kind == PKV_SCHEME_SIGN || kind == PKV_SCHEME_NONE) {
        MUST(gpu_scheme_open(kind, g, NULL, &s, digest) == 0);
        return s;
    }
    if (kind == PKV_SCHEME_HASH)
        return hash_scheme(g);
    uint64_t heads = (uint64_t)g->layers * g->kv_heads, q_heads = (uint64_t)g->layers * g->q_heads, out = g->sig_bits;
    bool code = kind == PKV_SCHEME_CODE, own = !code && below(2);
    if (code)
        out = PKV_MIN((uint64_t)g->head_dim, (uint64_t)g->sig_bits);
    float *k = test_floats(below(1000), heads * out * g->head_dim), *q = test_floats(below(1000), q_heads * out * g->head_dim);
    float *mean = test_floats(3, heads * g->head_dim), *low = test_floats(4, heads * out), *bits = take(heads * out * 4);
    float *step = take(heads * out * 4);
    for (uint64_t i = 0; i < heads * out; i++) {
        uint64_t each = g->sig_bits / out, more = g->sig_bits % out;
        bits[i] = (float)(each + (i % out < more)), step[i] = 1.5f + 0.01f * (float)(i % 7);
    }
    struct test_tensor tensors[7] = {{"k.weight", 4, {g->layers, g->kv_heads, out, g->head_dim}, k},
                                     {"k.mean", 3, {g->layers, g->kv_heads, g->head_dim}, mean}};
    uint32_t count = 2;
    if (code || own)
        tensors[count++] =
            (struct test_tensor){"q.weight", 4, {g->layers, code ? g->kv_heads : g->q_heads, out, g->head_dim}, q};
    if (code) {
        tensors[count++] = (struct test_tensor){"k.low", 3, {g->layers, g->kv_heads, out}, low};
        tensors[count++] = (struct test_tensor){"k.step", 3, {g->layers, g->kv_heads, out}, step};
        tensors[count++] = (struct test_tensor){"k.bits", 3, {g->layers, g->kv_heads, out}, bits};
    }
    char *path = test_tensors(NULL, tensors, count);
    MUST(gpu_scheme_open(kind, g, path, &s, digest) == 0);
    unlink(path);
    free(path), free(k), free(q), free(mean), free(low), free(bits), free(step);
    return s;
}

static inline uint32_t bits_apart(const void *x, const void *y, uint64_t words)
{
    uint32_t apart = 0;
    for (uint64_t i = 0; i < words; i++)
        apart += (uint32_t)__builtin_popcount(((const uint32_t *)x)[i] ^ ((const uint32_t *)y)[i]);
    return apart;
}

#endif
