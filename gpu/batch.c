/* The door of batches: checks, and the host backend's batch, which does each step's work in its calls. */
#include "gpu/batch.h"

#include "gpu/internal.h"
#include "gpu/module.h"
#include "gpu/scheme.h"

#include "proto/check.h"
#include "proto/region.h"

#include <stdlib.h>
#include <string.h>

struct gpu_batch {
    struct gpu *gpu;
    void *device; /* the backend's; NULL: host */
    struct gpu_batch_options options;
    struct pkv_geom geom;
    /* host */
    struct gpu_batch_run *runs;
    uint32_t *blocks_max;        /* [seqs] */
    struct pkv_block_ref **refs; /* [seqs] of [layers][blocks_max] */
    struct gpu_view *views;      /* [seqs] */
    struct gpu_space readable, writable;
    struct gpu_batch_wish wish;
    struct gpu_batch_kept kept;
    float *keep; /* lse of a call that brings none; then the kept q, out, lse. NULL: it never keeps */
    bool wished;
};

static int check_options(const struct gpu_batch_options *o)
{
    uint64_t seqs = 0;
    enum pkv_err e = pkv_check_geom(o->geom);
    if (e != PKV_ERR_OK)
        return -(int)e;
    for (uint32_t r = 0; r < o->runs; r++) {
        seqs += o->run[r].seqs;
        if (!o->run[r].seqs || memcmp(&o->run[r].scheme->geom, o->geom, sizeof(*o->geom)))
            return -PKV_ERR_FILE_FIT;
    }
    if (!o->seqs || o->seqs > PKV_BATCH_MAX || seqs != o->seqs || !o->queries ||
        (uint64_t)o->seqs * o->queries > PKV_QUERIES_MAX)
        return -PKV_ERR_SHAPE;
    struct gpu_view longest = {.tokens = PKV_SEQ_TOKENS_MAX, .queries = o->queries};
    return o->policy.dense_below == UINT32_MAX ? 0 : gpu_check_policy(o->geom, &o->policy, 1, &longest);
}

static int host_open(struct gpu_batch *b)
{
    const struct gpu_batch_options *o = &b->options;
    b->runs = malloc(o->runs * sizeof(*b->runs)), b->blocks_max = malloc(o->seqs * sizeof(*b->blocks_max));
    b->refs = calloc(o->seqs, sizeof(*b->refs)), b->views = calloc(o->seqs, sizeof(*b->views));
    if (!b->runs || !b->blocks_max || !b->refs || !b->views)
        return -PKV_ERR_NO_MEMORY;
    memcpy(b->runs, o->run, o->runs * sizeof(*b->runs));
    memcpy(b->blocks_max, o->blocks_max, o->seqs * sizeof(*b->blocks_max));
    uint64_t heads = (uint64_t)o->seqs * o->queries * b->geom.q_heads;
    uint64_t kept = pkv_geom_group(&b->geom) * (2ull * b->geom.head_dim + 1);
    b->keep = o->keeps ? malloc((heads + kept) * sizeof(*b->keep)) : NULL;
    if (o->keeps && !b->keep)
        return -PKV_ERR_NO_MEMORY;
    for (uint32_t s = 0; s < o->seqs; s++) {
        b->refs[s] = calloc((uint64_t)b->geom.layers * b->blocks_max[s], sizeof(**b->refs));
        if (!b->refs[s])
            return -PKV_ERR_NO_MEMORY;
    }
    return 0;
}

int gpu_batch_open(struct gpu *gpu, const struct gpu_batch_options *options, struct gpu_batch **ret)
{
    int r = check_options(options);
    struct gpu_batch *b = r ? NULL : calloc(1, sizeof(*b));
    if (!b)
        return r ? r : -PKV_ERR_NO_MEMORY;
    b->gpu = gpu, b->geom = *options->geom, b->options = *options, b->options.geom = &b->geom;
    /* A short sequence is attended densely here as it is on a device, which cannot refuse a length. */
    uint64_t dense = (uint64_t)options->policy.sinks + options->policy.recent + options->policy.k + 1;
    dense = PKV_MAX(dense, (uint64_t)options->policy.dense_below);
    b->options.policy.dense_below = (uint32_t)PKV_MIN(dense, (uint64_t)UINT32_MAX);
    r = !gpu->backend               ? host_open(b)
        : !gpu->backend->batch_open ? -PKV_ERR_UNSUPPORTED
                                    : gpu->backend->batch_open(gpu->device, &b->options, &b->device);
    if (r) {
        gpu_batch_close(b);
        return r;
    }
    *ret = b;
    return 0;
}

void gpu_batch_close(struct gpu_batch *b)
{
    if (!b)
        return;
    if (b->device)
        b->gpu->backend->batch_close(b->device);
    for (uint32_t s = 0; b->refs && s < b->options.seqs; s++)
        free(b->refs[s]);
    free(b->runs), free(b->blocks_max), free(b->refs), free(b->views), free(b->keep);
    free(b);
}

int gpu_batch_spaces(struct gpu_batch *b, const struct gpu_space *readable, const struct gpu_space *writable)
{
    b->readable = *readable, b->writable = *writable;
    return b->device ? b->gpu->backend->batch_spaces(b->device, readable, writable) : 0;
}

int gpu_batch_forget(struct gpu_batch *b, uint32_t seq, void *stream)
{
    return b->device ? b->gpu->backend->batch_forget(b->device, seq, stream) : 0;
}

int gpu_batch_step(struct gpu_batch *b, const struct gpu_batch_step *step, void *stream)
{
    const struct gpu_batch_ref *refs = step->refs;
    if (b->device)
        return b->gpu->backend->batch_step(b->device, step, stream);
    for (uint32_t s = 0; s < b->options.seqs; s++)
        b->views[s] = (struct gpu_view){.tokens = step->tokens[s], .queries = b->options.queries};
    for (uint32_t i = 0; i < step->count; i++)
        b->refs[refs[i].seq][(uint64_t)refs[i].layer * b->blocks_max[refs[i].seq] + refs[i].block] = refs[i].ref;
    b->wished = step->wish != NULL;
    if (step->wish)
        b->wish = *step->wish, b->kept.found = false;
    return 0;
}

/* ---- host: a layer's calls ---- */

static const struct pkv_block_ref *refs_of(const struct gpu_batch *b, uint32_t seq, uint32_t layer)
{
    return b->refs[seq] + (uint64_t)layer * b->blocks_max[seq];
}

static int host_append(struct gpu_batch *b, const struct gpu_scheme *scheme, uint32_t seq, uint32_t layer, const char *k,
                       const char *v)
{
    uint32_t tokens = b->options.queries;
    uint64_t bytes = (uint64_t)b->geom.kv_heads * b->geom.head_dim * pkv_dtype_bytes(b->geom.dtype) * tokens * seq;
    struct gpu_append_args rows = {.geom = &b->geom,
                                   .space = b->writable,
                                   .blocks = refs_of(b, seq, layer),
                                   .first_token = b->views[seq].tokens - tokens,
                                   .tokens = tokens,
                                   .k = k + bytes,
                                   .v = v + bytes};
    struct gpu_sign_args sign = {&b->geom, b->writable, scheme, layer, rows.blocks, rows.first_token, tokens};
    int r = gpu_append(b->gpu, &rows);
    return r ? r : gpu_sign(b->gpu, &sign);
}

int gpu_batch_append(struct gpu_batch *b, uint32_t layer, const void *k, const void *v, void *stream)
{
    if (layer >= b->geom.layers)
        return -PKV_ERR_INVALID;
    if (b->device)
        return b->gpu->backend->batch_append(b->device, layer, k, v, stream);
    int r = 0;
    for (uint32_t run = 0, seq = 0; run < b->options.runs; run++)
        for (uint32_t i = 0; i < b->runs[run].seqs && !r; i++)
            r = host_append(b, b->runs[run].scheme, seq++, layer, k, v);
    return r;
}

static int host_attend(struct gpu_batch *b, uint32_t layer, const void *q, float *out, float *lse)
{
    uint64_t heads = (uint64_t)b->options.queries * b->geom.q_heads, numbers = heads * b->geom.head_dim;
    int r = 0;
    for (uint32_t run = 0, seq = 0; run < b->options.runs && !r; seq += b->runs[run++].seqs) {
        for (uint32_t i = 0; i < b->runs[run].seqs; i++)
            b->views[seq + i].blocks = refs_of(b, seq + i, layer);
        struct gpu_attend_args args = {.geom = &b->geom,
                                       .space = b->readable,
                                       .policy = b->options.policy,
                                       .scheme = b->runs[run].scheme,
                                       .layer = layer,
                                       .seqs = b->runs[run].seqs,
                                       .views = b->views + seq,
                                       .q = (const char *)q + seq * numbers * pkv_dtype_bytes(b->geom.dtype),
                                       .out = out + seq * numbers,
                                       .lse = lse ? lse + seq * heads : NULL};
        r = gpu_attend(b->gpu, &args);
    }
    return r;
}

static void host_keep(struct gpu_batch *b, uint32_t layer, const void *q, const float *out, const float *lse)
{
    const struct pkv_geom *g = &b->geom;
    uint64_t group = pkv_geom_group(g), numbers = group * g->head_dim;
    uint64_t first = (uint64_t)b->wish.query * g->q_heads + b->wish.head * group, bytes = pkv_dtype_bytes(g->dtype);
    float *kept = b->keep + (uint64_t)b->options.seqs * b->options.queries * g->q_heads;
    memcpy(kept, (const char *)q + first * g->head_dim * bytes, numbers * bytes);
    memcpy(kept + numbers, out + first * g->head_dim, numbers * sizeof(*out));
    memcpy(kept + 2 * numbers, lse + first, group * sizeof(*lse));
    b->kept.q = kept, b->kept.out = kept + numbers, b->kept.lse = kept + 2 * numbers;
    b->kept.layer = layer, b->kept.found = true, b->wished = false;
}

int gpu_batch_attend(struct gpu_batch *b, uint32_t layer, const void *q, float *out, float *lse, bool keeps, void *stream)
{
    if (layer >= b->geom.layers || (keeps && !b->options.keeps))
        return -PKV_ERR_INVALID;
    if (b->device)
        return b->gpu->backend->batch_attend(b->device, layer, q, out, lse, keeps, stream);
    uint64_t begin = gpu_now_ns();
    lse = keeps && !lse ? b->keep : lse;
    int r = host_attend(b, layer, q, out, lse);
    if (keeps && !r)
        b->kept.ns = gpu_now_ns() - begin;
    if (keeps && !r && b->wished)
        host_keep(b, layer, q, out, lse);
    return r;
}

struct gpu_batch_kept gpu_batch_kept(const struct gpu_batch *b)
{
    return b->device ? b->gpu->backend->batch_kept(b->device) : b->kept;
}

int gpu_batch_end(struct gpu_batch *b, uint32_t slot, uint64_t epoch, void *stream)
{
    if (b->device)
        return b->gpu->backend->batch_end(b->device, slot, epoch, stream);
    __atomic_store_n((uint64_t *)(uintptr_t)epoch, PKV_EPOCH_IDLE, __ATOMIC_RELEASE);
    return 0;
}

bool gpu_batch_bad(struct gpu_batch *b, uint32_t slot)
{
    return b->device && b->gpu->backend->batch_bad(b->device, slot);
}

int gpu_batch_reset(struct gpu_batch *b)
{
    return b->device ? b->gpu->backend->batch_reset(b->device) : 0;
}

int gpu_batch_page(struct gpu_batch *b, void *base, uint64_t *ret_address)
{
    if (b->device)
        return b->gpu->backend->batch_page(b->device, base, ret_address);
    *ret_address = (uint64_t)(uintptr_t)base;
    return 0;
}

bool gpu_batch_captures(struct gpu_batch *b, void *stream)
{
    return b->device && b->gpu->backend->batch_captures(b->device, stream);
}

int gpu_batch_check(struct gpu_batch *b)
{
    return b->device ? b->gpu->backend->batch_check(b->device) : 0;
}

int gpu_batch_counters(struct gpu_batch *b, uint64_t *ret_hits, uint64_t *ret_misses)
{
    *ret_hits = *ret_misses = 0;
    return b->device ? b->gpu->backend->batch_counters(b->device, ret_hits, ret_misses) : 0;
}
