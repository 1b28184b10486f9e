/* What the integration tests share: one small model, and text in it. */
#ifndef TESTS_INTEGRATION_SERVICE_H
#define TESTS_INTEGRATION_SERVICE_H

#include "client/pivotkv.h"
#include "tests/lib/daemon.h"
#include "tests/lib/test.h"
#include "tests/lib/text.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LAYERS = 2, Q_HEADS = 4, KV_HEADS = 2, DIM = 64, ROW = KV_HEADS * DIM, QUERY = Q_HEADS * DIM };

#define GOOD(kv, call)                                                                       \
    do {                                                                                     \
        int good_r = (call);                                                                 \
        if (good_r)                                                                          \
            fail_msg("%s:%d: %s: %d, %s", __FILE__, __LINE__, #call, good_r, pkv_error(kv)); \
    } while (0)

static inline struct pkv *attach(const struct test_daemon *d, uint32_t flags)
{
    struct pkv_options o = {.size = sizeof(o), .flags = flags, .threads = 1, .label = "test"};
    struct pkv *kv = NULL;
    GOOD(NULL, pkv_connect(d->socket, &o, &kv));
    return kv;
}

static inline struct pkv_model_desc described(const char *name)
{
    return (struct pkv_model_desc){.size = sizeof(struct pkv_model_desc),
                                   .layers = LAYERS,
                                   .q_heads = Q_HEADS,
                                   .kv_heads = KV_HEADS,
                                   .head_dim = DIM,
                                   .type = PKV_TYPE_F32,
                                   .name = name};
}

static inline struct pkv_model *open_named(struct pkv *kv, const char *name)
{
    struct pkv_model_desc desc = described(name);
    struct pkv_model *model = NULL;
    GOOD(kv, pkv_model_open(kv, &desc, &model));
    return model;
}

static inline struct pkv_model *open_model(struct pkv *kv)
{
    return open_named(kv, "test");
}

static inline struct pkv_budget budget(uint32_t k)
{
    return (struct pkv_budget){.size = sizeof(struct pkv_budget), .k = k, .sinks = 16, .recent = 64, .dense = k == 0};
}

/* The same keys and values in every layer. */
static inline int append_all(struct pkv_seq *seq, const float *k, const float *v, uint32_t tokens)
{
    int r = 0;
    for (uint32_t l = 0; l < LAYERS && !r; l++)
        r = pkv_append(seq, l, tokens, k, v);
    return r;
}

/* A GPU adds up in another order than the CPU; the fake one is the CPU. */
static inline bool on_gpu(void)
{
    const char *backend = getenv("PIVOTKV_TEST_BACKEND"), *module = getenv("PIVOTKV_CUDA_MODULE");
    return backend && !strcmp(backend, "cuda") && !(module && strstr(module, "fake"));
}

/* The same bits, or on a GPU what rounding, and at worst one token at the threshold of a selection, makes of it. */
static inline void assert_alike(const float *a, const float *b, size_t count)
{
    double difference = 0, norm = 0;
    if (!on_gpu()) {
        assert_memory_equal(a, b, count * sizeof(*a));
        return;
    }
    for (size_t i = 0; i < count; i++)
        difference += pow((double)a[i] - b[i], 2), norm += pow(a[i], 2);
    assert_true(difference <= 4e-4 * norm); /* 2 %; false for NaN */
}

static inline void assert_exact(struct pkv *kv, struct pkv_seq *seq, const float *k, const float *v, const float *q,
                                uint32_t tokens)
{
    float out[QUERY];
    double exact[QUERY];
    struct pkv_budget dense = budget(0);
    uint32_t one = 1;
    assert_int_equal(pkv_seq_tokens(seq), tokens);
    test_attention(k, v, q, tokens, Q_HEADS, KV_HEADS, DIM, exact);
    for (uint32_t l = 0; l < LAYERS; l++) {
        GOOD(kv, pkv_attend(&seq, &one, 1, l, q, &dense, out, NULL, NULL));
        for (int i = 0; i < QUERY; i++)
            assert_true(out[i] - exact[i] < 2e-5 && exact[i] - out[i] < 2e-5);
    }
}

#endif
