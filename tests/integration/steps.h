/* Steps of a batch on a GPU: their data, their arrays on the device, and what comes out of them against exact attention or
 * against pkv_attend. Included by one file of each program. */
#ifndef TESTS_INTEGRATION_STEPS_H
#define TESTS_INTEGRATION_STEPS_H

#include "tests/integration/service.h"

#include <cuda_runtime_api.h>

enum { SEQS = 3, STEPS = 300, MAX_TOKENS = 1200 };

#define CUDA(call)                                                                            \
    do {                                                                                      \
        cudaError_t cuda_e = (call);                                                          \
        if (cuda_e != cudaSuccess)                                                            \
            fail_msg("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(cuda_e)); \
    } while (0)

static float *k, *v, *q;

static inline void data_make(void)
{
    k = test_floats(21, SEQS * 2 * MAX_TOKENS * ROW), v = test_floats(22, SEQS * 2 * MAX_TOKENS * ROW);
    q = test_floats(23, SEQS * 2 * MAX_TOKENS * QUERY);
}

static inline void data_free(void)
{
    free(k), free(v), free(q);
}

/* The arrays of a step, at addresses that a graph can keep; one output per layer. */
struct arrays {
    float *k, *v, *q, *out, *lse;
    float *host_out, *host_lse;
};

static inline struct arrays arrays_make(void)
{
    struct arrays a;
    CUDA(cudaMalloc((void **)&a.k, SEQS * ROW * 4));
    CUDA(cudaMalloc((void **)&a.v, SEQS * ROW * 4));
    CUDA(cudaMalloc((void **)&a.q, SEQS * QUERY * 4));
    CUDA(cudaMalloc((void **)&a.out, LAYERS * SEQS * QUERY * 4));
    CUDA(cudaMalloc((void **)&a.lse, LAYERS * SEQS * Q_HEADS * 4));
    CUDA(cudaMallocHost((void **)&a.host_out, LAYERS * SEQS * QUERY * 4));
    CUDA(cudaMallocHost((void **)&a.host_lse, LAYERS * SEQS * Q_HEADS * 4));
    return a;
}

static inline void arrays_free(struct arrays *a)
{
    cudaFree(a->k), cudaFree(a->v), cudaFree(a->q), cudaFree(a->out), cudaFree(a->lse);
    cudaFreeHost(a->host_out), cudaFreeHost(a->host_lse);
}

static inline void layers(struct pkv *kv, struct pkv_batch *batch, const struct arrays *a, cudaStream_t stream)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        GOOD(kv, pkv_batch_append(batch, l, a->k, a->v, stream));
        GOOD(kv, pkv_batch_attend(batch, l, a->q, a->out + l * SEQS * QUERY, a->lse + l * SEQS * Q_HEADS, stream));
    }
}

/* Step i appends token i of the second half of the data to every sequence; its keys are new ones for each sequence. */
static inline const float *row_of(const float *data, uint32_t step, uint32_t each)
{
    return data + (uint64_t)(SEQS * MAX_TOKENS + step * SEQS) * each;
}

/* What sequence s holds after its prefill and `steps` steps, side by side. */
static inline void gather(uint32_t s, uint32_t prefill, uint32_t steps, float *to_k, float *to_v)
{
    memcpy(to_k, k + (uint64_t)s * MAX_TOKENS * ROW, (uint64_t)prefill * ROW * 4);
    memcpy(to_v, v + (uint64_t)s * MAX_TOKENS * ROW, (uint64_t)prefill * ROW * 4);
    for (uint32_t i = 0; i < steps; i++) {
        memcpy(to_k + (uint64_t)(prefill + i) * ROW, row_of(k, i, ROW) + s * ROW, ROW * 4);
        memcpy(to_v + (uint64_t)(prefill + i) * ROW, row_of(v, i, ROW) + s * ROW, ROW * 4);
    }
}

static inline void check_exact(const struct arrays *a, const uint32_t *prefill, uint32_t step, float *to_k, float *to_v)
{
    double exact[QUERY];
    for (uint32_t s = 0; s < SEQS; s++) {
        gather(s, prefill[s], step + 1, to_k, to_v);
        test_attention(to_k, to_v, row_of(q, step, QUERY) + s * QUERY, prefill[s] + step + 1, Q_HEADS, KV_HEADS, DIM, exact);
        for (uint32_t l = 0; l < LAYERS; l++)
            for (uint32_t i = 0; i < QUERY; i++)
                if (!(fabs(a->host_out[(l * SEQS + s) * QUERY + i] - exact[i]) < 5e-5))
                    fail_msg("step %u sequence %u layer %u element %u: %g, exact %g", step, s, l, i,
                             (double)a->host_out[(l * SEQS + s) * QUERY + i], exact[i]);
    }
}

/* Against the synchronous call, which lays its tables out anew each time. */
static inline void check_same(struct pkv *kv, struct pkv_batch *batch, struct pkv_seq *const *seqs, const struct pkv_budget *b,
                              const struct arrays *a, uint32_t step)
{
    static float out[SEQS * QUERY], lse[SEQS * Q_HEADS];
    uint32_t queries[SEQS] = {1, 1, 1};
    GOOD(kv, pkv_batch_wait(batch));
    for (uint32_t l = 0; l < LAYERS; l++) {
        GOOD(kv, pkv_attend(seqs, queries, SEQS, l, row_of(q, step, QUERY), b, out, lse, NULL));
        assert_alike(out, a->host_out + l * SEQS * QUERY, SEQS * QUERY);
        assert_alike(lse, a->host_lse + l * SEQS * Q_HEADS, SEQS * Q_HEADS);
    }
}

/* In a stream, in or out of a capture. */
static inline void step_in(const struct arrays *a, uint32_t step, cudaStream_t stream)
{
    CUDA(cudaMemcpyAsync(a->k, row_of(k, step, ROW), SEQS * ROW * 4, cudaMemcpyHostToDevice, stream));
    CUDA(cudaMemcpyAsync(a->v, row_of(v, step, ROW), SEQS * ROW * 4, cudaMemcpyHostToDevice, stream));
    CUDA(cudaMemcpyAsync(a->q, row_of(q, step, QUERY), SEQS * QUERY * 4, cudaMemcpyHostToDevice, stream));
    CUDA(cudaMemsetAsync(a->out, 0xff, LAYERS * SEQS * QUERY * 4, stream));
}

static inline void step_out(const struct arrays *a, cudaStream_t stream)
{
    CUDA(cudaMemcpyAsync(a->host_out, a->out, LAYERS * SEQS * QUERY * 4, cudaMemcpyDeviceToHost, stream));
    CUDA(cudaMemcpyAsync(a->host_lse, a->lse, LAYERS * SEQS * Q_HEADS * 4, cudaMemcpyDeviceToHost, stream));
    CUDA(cudaStreamSynchronize(stream));
}

#endif
