/* append and sign on the device against the host: rows and signatures, bit for bit. For check_cuda. */
#ifndef TESTS_KERNELS_CHECK_APPEND_H
#define TESTS_KERNELS_CHECK_APPEND_H

#include "tests/kernels/on_device.h"

static inline void check_written(const struct world *w, const struct on_device *d)
{
    uint64_t rows = w->blocks * pkv_geom_block_bytes(&w->g), signatures = w->blocks * pkv_geom_sig_block_bytes(&w->g);
    char *pool = host_copy(d->pool, rows), *sig = host_copy(d->signatures, signatures);
    MUST(!memcmp(sig, (void *)(uintptr_t)w->pool[5], signatures) || d->a.scheme.kind == PKV_SCHEME_HASH);
    MUST(bits_apart(sig, (void *)(uintptr_t)w->pool[5], signatures / 4) <= 2); /* `hash`: the exponentials' last bits */
    for (uint32_t t = 0; t < w->tokens; t++)
        for (uint32_t h = 0; h < w->g.kv_heads; h++) {
            uint64_t place = w->refs[t / 64].rows, at = pkv_place_slot(place) * pkv_geom_block_bytes(&w->g);
            bool hot = pkv_place_tier(place) == PKV_TIER_POOL;
            at += pkv_geom_row_offset(&w->g, h, t % 64);
            MUST(!memcmp((hot ? pool : d->arena) + at, (char *)(uintptr_t)(hot ? w->pool[3] : w->arena[7]) + at,
                         pkv_geom_row_bytes(&w->g)));
        }
    free(pool), free(sig);
}

/* Rows alone, then their signatures where they lie. */
static inline void check_apart(const struct world *w, const struct on_device *d, struct cuda_append append)
{
    uint64_t rows = w->blocks * pkv_geom_block_bytes(&w->g), signatures = w->blocks * pkv_geom_sig_block_bytes(&w->g);
    struct cuda_seq seq = {d->refs, w->tokens};
    CUDA(cudaMemset(d->pool, 0, rows));
    CUDA(cudaMemset(d->signatures, 0, signatures));
    memset(d->arena, 0, rows);
    CUDA(cudaMemcpy(d->seqs, &seq, sizeof(seq), cudaMemcpyHostToDevice));
    append.tokens = w->tokens, append.scheme.kind = PKV_SCHEME_NONE;
    MUST(table->append(&append, NULL) == 0);
    append.k = append.v = NULL;
    MUST(table->append(&append, NULL) == -PKV_ERR_SHAPE);
    append.scheme = d->a.scheme;
    MUST(!w->g.sig_bits || table->append(&append, NULL) == 0);
    CUDA(cudaDeviceSynchronize());
    check_written(w, d);
}

static inline void check_append(const struct world *w, struct on_device *d)
{
    uint64_t numbers = (uint64_t)w->tokens * w->g.kv_heads * w->g.head_dim, bytes = numbers * pkv_dtype_bytes(w->g.dtype);
    uint32_t cut = below(w->tokens), zero = 0;
    char *k = device_copy(w->k, bytes), *v = device_copy(w->v, bytes);
    uint64_t each = bytes / w->tokens;
    struct cuda_append append = {.geom = w->g,
                                 .scheme = d->a.scheme,
                                 .base = {NULL, d->a.base[1], d->a.base[2]},
                                 .seqs = d->seqs,
                                 .bad = device_copy(&zero, 4),
                                 .layer = 1,
                                 .count = 1};
    struct cuda_seq seq = {d->refs, cut};
    for (uint32_t first = 0; first < w->tokens; first = first ? w->tokens : cut ? cut : w->tokens) {
        append.tokens = first || !cut ? w->tokens - first : cut;
        append.k = k + first * each, append.v = v + first * each, seq.tokens = first + append.tokens;
        CUDA(cudaMemcpy(d->seqs, &seq, sizeof(seq), cudaMemcpyHostToDevice));
        MUST(table->append(&append, NULL) == 0);
        CUDA(cudaDeviceSynchronize());
    }
    check_written(w, d);
    append.k = k, append.v = v;
    check_apart(w, d, append);
    uint32_t *bad = host_copy(append.bad, 4);
    MUST(*bad == 0);
    CUDA(cudaFree(k));
    CUDA(cudaFree(v));
    CUDA(cudaFree(append.bad));
    free(bad);
}

#endif
