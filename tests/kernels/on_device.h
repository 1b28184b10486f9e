/* A random world on the host and its copy on the device: two sequences over the same blocks. For check_cuda. */
#ifndef TESTS_KERNELS_ON_DEVICE_H
#define TESTS_KERNELS_ON_DEVICE_H

#include "tests/kernels/device.h"
#include "tests/kernels/schemes.h"

#include <string.h>

static const struct cuda_table *table;

struct on_device {
    char *pool, *arena, *signatures;
    uint64_t *bases;
    struct pkv_block_ref *refs;
    struct cuda_seq *seqs;
    struct cuda_query *queries;
    void *q, *work, *scheme_memory;
    uint64_t entries; /* bytes */
    struct cuda_attend a;
};

static inline void host_fill(struct gpu *gpu, struct gpu_scheme *scheme, struct world *w)
{
    gpu_scheme_observe(scheme, &(struct gpu_observation){.layer = 1, .tokens = w->tokens, .context = w->tokens, .k = w->k});
    struct gpu_append_args a = {&w->g, w->space, w->refs, 0, w->tokens, w->k, w->v, 0, 0};
    struct gpu_sign_args s = {&w->g, w->space, scheme, 1, w->refs, 0, w->tokens};
    MUST(gpu_append(gpu, &a) == 0);
    MUST(!w->g.sig_bits || gpu_sign(gpu, &s) == 0);
}

/* From one set, where nearly everything is pushed out, to more than all rows need. */
static inline void cache_open(const struct world *w, struct on_device *d)
{
    uint32_t sets = below(4) ? 1 + below(w->tokens) : 0;
    uint64_t ways = 2ull * w->g.kv_heads * sets * CUDA_WAYS;
    if (!sets)
        return;
    d->entries = ways * 8;
    d->a.cache = (struct cuda_cache){.entries = device_take(d->entries),
                                     .rows = device_take(ways * pkv_geom_row_bytes(&w->g)),
                                     .counters = device_take(CUDA_COUNTERS * 8),
                                     .sets = sets};
    CUDA(cudaMemset(d->a.cache.entries, 0, d->entries));
    CUDA(cudaMemset(d->a.cache.counters, 0, CUDA_COUNTERS * 8));
}

/* Query i of the world sees what it sees on the host; a second sequence, shorter, shares the blocks. */
static inline void device_open(const struct world *w, const struct gpu_scheme *scheme, struct on_device *d)
{
    uint64_t rows = w->blocks * pkv_geom_block_bytes(&w->g), signatures = w->blocks * pkv_geom_sig_block_bytes(&w->g);
    uint64_t *bases = calloc(2ull * PKV_CHUNKS_MAX, 8);
    MUST(bases);
    *d = (struct on_device){.pool = device_take(rows), .signatures = device_take(signatures)};
    CUDA(cudaHostAlloc((void **)&d->arena, rows, cudaHostAllocMapped)); /* the arena is the CPU's memory */
    CUDA(cudaMemset(d->pool, 0, rows));
    CUDA(cudaMemset(d->signatures, 0, signatures));
    memset(d->arena, 0, rows);
    bases[3] = (uintptr_t)d->pool, bases[5] = (uintptr_t)d->signatures;
    bases[PKV_CHUNKS_MAX + 7] = (uintptr_t)d->arena;
    d->bases = device_copy(bases, 2ull * PKV_CHUNKS_MAX * 8);
    d->refs = device_copy(w->refs, w->blocks * sizeof(*w->refs));
    struct cuda_seq seqs[2] = {{d->refs, w->tokens}, {d->refs, 1 + below(w->tokens)}};
    d->seqs = device_copy(seqs, sizeof(seqs));
    struct cuda_query *queries = take((w->queries + 1) * sizeof(*queries));
    for (uint32_t i = 0; i < w->queries; i++)
        queries[i] = (struct cuda_query){0, w->queries - 1 - i};
    queries[w->queries] = (struct cuda_query){1, 0};
    d->queries = device_copy(queries, (w->queries + 1) * sizeof(*queries));
    uint64_t each = (uint64_t)w->g.q_heads * w->g.head_dim * pkv_dtype_bytes(w->g.dtype);
    d->q = device_take((w->queries + 1) * each);
    CUDA(cudaMemcpy(d->q, w->q, w->queries * each, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy((char *)d->q + w->queries * each, w->q, each, cudaMemcpyHostToDevice)); /* the first query again */
    free(queries), free(bases);
    d->a = (struct cuda_attend){.geom = w->g,
                                .policy = {.k = w->policy.k,
                                           .sinks = w->policy.sinks,
                                           .recent = w->policy.recent,
                                           .rule = w->policy.rule,
                                           .top_p = w->policy.top_p,
                                           .scale = 1.0f / sqrtf(w->g.head_dim)},
                                .base = {NULL, d->bases, d->bases + PKV_CHUNKS_MAX},
                                .seqs = d->seqs,
                                .query = d->queries,
                                .q = d->q,
                                .layer = 1,
                                .queries = w->queries + 1,
                                .tokens_max = w->tokens};
    MUST(cuda_grid(&d->a) == 0);
    d->a.parts = 1 + below(33), d->a.splits = 1 + below(16);
    uint32_t smaller = w->tokens < LONG ? 2u << below(4) : 2;
    if (d->a.team > smaller && (w->policy.k + w->policy.sinks + w->policy.recent) / smaller < 1000) /* rows of a block */
        d->a.team = smaller;
    d->a.flags = CUDA_KEEP;
    MUST(cuda_scheme_upload(scheme, &d->a.scheme, &d->scheme_memory) == 0);
    uint64_t heads = (uint64_t)d->a.queries * w->g.q_heads, bytes = cuda_work_bytes(&d->a);
    d->work = device_take(bytes);
    CUDA(cudaMemset(d->work, 0, bytes));
    cuda_work_bind(&d->a, d->work);
    d->a.out = device_take(heads * w->g.head_dim * 4), d->a.lse = device_take(heads * 4);
    CUDA(cudaMemset(d->a.out, 0xff, heads * w->g.head_dim * 4));
    cache_open(w, d);
}

static inline void device_close(struct on_device *d)
{
    CUDA(cudaFree(d->a.cache.entries));
    CUDA(cudaFree(d->a.cache.rows));
    CUDA(cudaFree(d->a.cache.counters));
    CUDA(cudaFreeHost(d->arena));
    void *all[] = {d->pool, d->signatures, d->bases, d->refs, d->seqs, d->queries, d->q, d->work, d->a.out, d->a.lse};
    for (size_t i = 0; i < PKV_ARRAY_LEN(all); i++)
        CUDA(cudaFree(all[i]));
    cuda_scheme_free(d->scheme_memory);
}

static inline uint32_t seen_by(const struct world *w, const struct cuda_seq *seqs, uint32_t query)
{
    return query < w->queries ? w->tokens - (w->queries - 1 - query) : (uint32_t)seqs[1].tokens;
}

#endif
