/* Batches on a device (gpu/batch.h): everything at fixed addresses from open to close, so that captured launches stay true.
 *
 * Failures: no memory at open: nothing is left behind; no memory for a step's entries: the step is refused, nothing was
 * launched; a fault of the device: the next call that asks it says lost. What is freed at close is in nobody's flight: the
 * caller has waited, or the device is lost and its memory with it. */
#include "gpu/cuda/backend.h"
#include "gpu/cuda/steps.h"

#include "proto/region.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PAGE        4096u
#define CODES_BYTES (2ull << 30) /* of a run's work area, about: a call of more queries becomes several */

struct run {
    uint32_t first, seqs;
    struct cuda_scheme scheme;
    void *scheme_memory, *work;
    uint32_t kinds[PKV_LAYERS_MAX];
    struct cuda_attend attend; /* but for what a layer and a call add */
};

/* A step's lengths and entries, in pinned memory: its own until it has ended. */
struct step_slot {
    char *host;
    uint64_t bytes;
};

struct batch {
    struct backend *backend;
    struct pkv_geom geom;
    uint32_t seqs, queries, runs;
    struct run *run;
    uint64_t *read_bases, *write_bases; /* [2][PKV_CHUNKS_MAX] on the device: pool, arena */
    struct pkv_block_ref *tables;       /* [layers][blocks of all sequences] */
    struct cuda_seq *seq;               /* [layers][seqs] */
    struct cuda_query *query;           /* [seqs][queries] */
    struct cuda_cache cache;            /* of layer 0; the others follow */
    uint64_t cache_entries, cache_rows; /* of one layer, in entries */
    uint32_t *bad, *bad_words;          /* on the device; pinned, [PKV_EPOCH_SLOTS] */
    struct step_slot slots[PKV_EPOCH_SLOTS];
    struct cuda_keeper *keeper; /* on the device; NULL: it never keeps */
    struct cuda_kept *kept;     /* pinned */
    float *lse;                 /* on the device, of calls that keep and bring none */
    bool page;                  /* it uses the backend's */
};

static int take(struct batch *b, uint64_t bytes, void *ret)
{
    void **to = ret;
    int r = backend_error(b->backend, cudaMalloc(to, PKV_MAX(bytes, 256ull)));
    return r ? r : backend_error(b->backend, cudaMemsetAsync(*to, 0, bytes, b->backend->stream));
}

/* ---- open ---- */

static int open_tables(struct batch *b, const uint32_t *blocks_max)
{
    uint64_t blocks = 0, layer = 0;
    for (uint32_t s = 0; s < b->seqs; s++)
        blocks += blocks_max[s];
    struct cuda_seq *seqs = malloc((uint64_t)b->geom.layers * b->seqs * sizeof(*seqs));
    int r = seqs ? take(b, b->geom.layers * blocks * sizeof(*b->tables), &b->tables) : -PKV_ERR_NO_MEMORY;
    r = r ? r : take(b, (uint64_t)b->geom.layers * b->seqs * sizeof(*seqs), &b->seq);
    for (uint32_t l = 0; l < b->geom.layers && !r; l++)
        for (uint32_t s = 0; s < b->seqs; layer += blocks_max[s++])
            seqs[l * b->seqs + s] = (struct cuda_seq){b->tables + layer, 0};
    r = r ? r : backend_wait(b->backend); /* the zeroes come first */
    r = r ? r
          : backend_error(b->backend,
                          cudaMemcpy(b->seq, seqs, (uint64_t)b->geom.layers * b->seqs * sizeof(*seqs), cudaMemcpyHostToDevice));
    free(seqs);
    return r;
}

static int open_queries(struct batch *b)
{
    struct cuda_query *queries = malloc((uint64_t)b->seqs * b->queries * sizeof(*queries));
    if (!queries)
        return -PKV_ERR_NO_MEMORY;
    /* `seq` counts from the first of its run. */
    for (uint32_t run = 0, at = 0; run < b->runs; run++)
        for (uint32_t s = 0; s < b->run[run].seqs; s++)
            for (uint32_t i = 0; i < b->queries; i++)
                queries[at++] = (struct cuda_query){s, b->queries - 1 - i};
    uint64_t bytes = (uint64_t)b->seqs * b->queries * sizeof(*queries);
    int r = take(b, bytes, &b->query);
    r = r ? r : backend_wait(b->backend);
    r = r ? r : backend_error(b->backend, cudaMemcpy(b->query, queries, bytes, cudaMemcpyHostToDevice));
    free(queries);
    return r;
}

static int open_cache(struct batch *b, uint64_t bytes)
{
    uint64_t caches = (uint64_t)b->seqs * b->geom.kv_heads;
    b->cache.sets = bytes ? cuda_cache_sets(&b->geom, caches, bytes / b->geom.layers) : 0;
    if (!b->cache.sets)
        return 0;
    b->cache_entries = caches * b->cache.sets * CUDA_WAYS;
    int r = take(b, b->geom.layers * b->cache_entries * sizeof(*b->cache.entries), &b->cache.entries);
    r = r ? r : take(b, b->geom.layers * b->cache_entries * pkv_geom_row_bytes(&b->geom), &b->cache.rows);
    return r ? r : take(b, CUDA_COUNTERS * sizeof(*b->cache.counters), &b->cache.counters);
}

static int open_run(struct batch *b, const struct gpu_batch_options *o, uint32_t index, uint32_t tokens_max)
{
    struct run *run = &b->run[index];
    const struct gpu_policy by_age = gpu_policy_by_age(&b->geom, &o->policy), *p = &by_age;
    struct cuda_attend *a = &run->attend;
    uint64_t at_once = CODES_BYTES / sizeof(*a->work.codes) / ((uint64_t)b->geom.kv_heads * PKV_MAX(tokens_max, 1u));
    int r = cuda_scheme_upload(o->run[index].scheme, &run->scheme, &run->scheme_memory);
    for (uint32_t l = 0; l < b->geom.layers; l++)
        run->kinds[l] = cuda_scheme_kind(o->run[index].scheme, l);
    *a = (struct cuda_attend){.geom = b->geom,
                              .policy = {.k = p->k,
                                         .sinks = p->sinks,
                                         .recent = p->recent,
                                         .rule = p->rule,
                                         .dense_below = p->dense_below,
                                         .top_p = p->top_p,
                                         .scale = p->scale > 0 ? p->scale : 1.0f / sqrtf((float)b->geom.head_dim)},
                              .scheme = run->scheme,
                              .base = {NULL, b->read_bases, b->read_bases + PKV_CHUNKS_MAX},
                              .queries = (uint32_t)PKV_MIN((uint64_t)run->seqs * b->queries, PKV_MAX(at_once, 1ull)),
                              .tokens_max = tokens_max};
    r = r ? r : cuda_grid(a);
    r = r ? r : take(b, cuda_work_bytes(a), &run->work);
    if (!r)
        cuda_work_bind(a, run->work);
    return r;
}

static int open_slots(struct batch *b)
{
    uint64_t bytes = PKV_EPOCH_SLOTS * sizeof(*b->bad_words);
    int r = backend_error(b->backend, cudaHostAlloc((void **)&b->bad_words, bytes, cudaHostAllocMapped));
    if (!r)
        memset(b->bad_words, 0, bytes);
    return r;
}

static int open_keeper(struct batch *b)
{
    uint64_t lse = (uint64_t)b->seqs * b->queries * b->geom.q_heads * sizeof(*b->lse);
    uint64_t numbers = pkv_geom_group(&b->geom) * (2ull * b->geom.head_dim + 1);
    uint64_t bytes = sizeof(*b->kept) + numbers * sizeof(float);
    int r = take(b, sizeof(*b->keeper), &b->keeper);
    r = r ? r : take(b, lse, &b->lse);
    r = r ? r : backend_error(b->backend, cudaHostAlloc((void **)&b->kept, bytes, cudaHostAllocMapped));
    if (!r)
        memset(b->kept, 0, bytes);
    return r;
}

static int fill(struct batch *b, const struct gpu_batch_options *o)
{
    uint32_t tokens_max = 0;
    for (uint32_t s = 0; s < b->seqs; s++)
        tokens_max = PKV_MAX(tokens_max, o->blocks_max[s] * PKV_BLOCK_TOKENS);
    uint32_t first = 0;
    for (uint32_t i = 0; i < b->runs; first += b->run[i++].seqs)
        b->run[i].first = first, b->run[i].seqs = o->run[i].seqs;
    int r = take(b, 2ull * PKV_CHUNKS_MAX * sizeof(uint64_t), &b->read_bases);
    r = r ? r : take(b, 2ull * PKV_CHUNKS_MAX * sizeof(uint64_t), &b->write_bases);
    r = r ? r : take(b, sizeof(*b->bad), &b->bad);
    r = r ? r : open_slots(b);
    r = r ? r : open_tables(b, o->blocks_max);
    r = r ? r : open_queries(b);
    r = r ? r : open_cache(b, o->cache_bytes);
    r = r || !o->keeps ? r : open_keeper(b);
    for (uint32_t i = 0; i < b->runs && !r; i++)
        r = open_run(b, o, i, tokens_max);
    /* Everything has arrived before any stream of the caller's looks. */
    r = r ? r : backend_wait(b->backend);
    return r ? r : backend_error(b->backend, cudaStreamSynchronize(cudaStreamLegacy));
}

void backend_batch_close(void *batch)
{
    struct batch *b = batch;
    if (backend_enter(b->backend) == 0) {
        for (uint32_t i = 0; b->run && i < b->runs; i++) {
            cuda_scheme_free(b->run[i].scheme_memory);
            cudaFree(b->run[i].work);
        }
        for (uint32_t s = 0; s < PKV_EPOCH_SLOTS; s++)
            cudaFreeHost(b->slots[s].host);
        cudaFree(b->read_bases), cudaFree(b->write_bases), cudaFree(b->tables), cudaFree(b->seq), cudaFree(b->query);
        cudaFree(b->cache.entries), cudaFree(b->cache.rows), cudaFree(b->cache.counters);
        cudaFree(b->bad), cudaFreeHost(b->bad_words), cudaFree(b->keeper), cudaFree(b->lse), cudaFreeHost(b->kept);
        (void)cudaGetLastError();
        (void)backend_leave(b->backend, 0);
    }
    if (b->page && --b->backend->page_users == 0) {
        b->backend->device->base.verbs->unpin(&b->backend->device->base, b->backend->page);
        b->backend->page = NULL;
    }
    free(b->run);
    free(b);
}

int backend_batch_open(void *backend, const struct gpu_batch_options *o, void **ret)
{
    struct batch *b = calloc(1, sizeof(*b));
    if (!b)
        return -PKV_ERR_NO_MEMORY;
    *b = (struct batch){.backend = backend, .geom = *o->geom, .seqs = o->seqs, .queries = o->queries, .runs = o->runs};
    b->run = calloc(o->runs, sizeof(*b->run));
    int r = b->run ? backend_enter(backend) : -PKV_ERR_NO_MEMORY;
    r = r ? r : backend_leave(backend, fill(b, o));
    if (r) {
        backend_batch_close(b);
        return r == -PKV_ERR_NO_MEMORY ? -PKV_ERR_GPU_MEMORY : r;
    }
    *ret = b;
    return 0;
}

int backend_batch_spaces(void *batch, const struct gpu_space *readable, const struct gpu_space *writable)
{
    struct batch *b = batch;
    int r = backend_enter(b->backend);
    if (r)
        return r;
    uint64_t bytes = PKV_CHUNKS_MAX * sizeof(uint64_t);
    for (uint32_t t = 0; t < 2 && !r; t++) {
        const uint64_t *read = readable->base[PKV_TIER_POOL + t], *write = writable->base[PKV_TIER_POOL + t];
        r = backend_error(b->backend, cudaMemcpy(b->read_bases + t * PKV_CHUNKS_MAX, read, bytes, cudaMemcpyHostToDevice));
        r = r ? r
              : backend_error(b->backend,
                              cudaMemcpy(b->write_bases + t * PKV_CHUNKS_MAX, write, bytes, cudaMemcpyHostToDevice));
    }
    r = r ? r : backend_error(b->backend, cudaStreamSynchronize(cudaStreamLegacy));
    return backend_leave(b->backend, r);
}

/* ---- a step ---- */

static struct cuda_cache cache_of(const struct batch *b, uint32_t layer, uint32_t seq)
{
    struct cuda_cache c = b->cache;
    uint64_t at = layer * b->cache_entries + (uint64_t)seq * b->geom.kv_heads * b->cache.sets * CUDA_WAYS;
    if (c.entries)
        c.entries += at, c.rows = (char *)c.rows + at * pkv_geom_row_bytes(&b->geom);
    return c;
}

int backend_batch_forget(void *batch, uint32_t seq, void *stream)
{
    struct batch *b = batch;
    int r = b->cache.entries ? backend_enter(b->backend) : 0;
    if (r || !b->cache.entries)
        return r;
    uint64_t bytes = (uint64_t)b->geom.kv_heads * b->cache.sets * CUDA_WAYS * sizeof(uint64_t);
    for (uint32_t l = 0; l < b->geom.layers && !r; l++)
        r = backend_error(b->backend, cudaMemsetAsync(cache_of(b, l, seq).entries, 0, bytes, (cudaStream_t)stream));
    return backend_leave(b->backend, r);
}

static int slot_room(struct batch *b, struct step_slot *s, uint64_t bytes)
{
    if (s->bytes >= bytes)
        return 0;
    cudaFreeHost(s->host);
    *s = (struct step_slot){0};
    uint64_t room = PKV_ALIGN_UP(bytes * 2, 4096ull);
    int r = backend_error(b->backend, cudaHostAlloc((void **)&s->host, room, cudaHostAllocMapped));
    s->bytes = r ? 0 : room;
    return r;
}

int backend_batch_step(void *batch, const struct gpu_batch_step *a, void *stream)
{
    struct batch *b = batch;
    struct step_slot *s = &b->slots[a->slot];
    uint64_t lengths = PKV_ALIGN_UP(b->seqs * sizeof(*a->tokens), 256ull);
    int r = backend_enter(b->backend);
    if (r)
        return r;
    r = slot_room(b, s, lengths + a->count * sizeof(*a->refs));
    if (!r) {
        memcpy(s->host, a->tokens, b->seqs * sizeof(*a->tokens));
        memcpy(s->host + lengths, a->refs, a->count * sizeof(*a->refs));
        struct cuda_step step = {.seqs = b->seq,
                                 .tokens = (const uint64_t *)(const void *)s->host,
                                 .refs = (const struct gpu_batch_ref *)(const void *)(s->host + lengths),
                                 .layers = b->geom.layers,
                                 .count = b->seqs,
                                 .changed = a->count,
                                 .wanted = a->wish ? a->wish->query + 1 : 0,
                                 .head = a->wish ? a->wish->head : 0,
                                 .keeper = b->keeper};
        if (a->wish) /* no step in flight has a wish that could write there */
            __atomic_store_n(&b->kept->found, 0, __ATOMIC_RELAXED);
        r = cuda_step_launch(&step, stream);
    }
    return backend_leave(b->backend, r);
}

int backend_batch_append(void *batch, uint32_t layer, const void *k, const void *v, void *stream)
{
    struct batch *b = batch;
    uint64_t each = (uint64_t)b->queries * b->geom.kv_heads * b->geom.head_dim * pkv_dtype_bytes(b->geom.dtype);
    int r = backend_enter(b->backend);
    if (r)
        return r;
    for (uint32_t i = 0; i < b->runs && !r; i++) {
        const struct run *run = &b->run[i];
        struct cuda_append append = {.geom = b->geom,
                                     .scheme = run->scheme,
                                     .base = {NULL, b->write_bases, b->write_bases + PKV_CHUNKS_MAX},
                                     .seqs = b->seq + (uint64_t)layer * b->seqs + run->first,
                                     .k = (const char *)k + run->first * each,
                                     .v = (const char *)v + run->first * each,
                                     .bad = b->bad,
                                     .layer = layer,
                                     .count = run->seqs,
                                     .tokens = b->queries};
        append.scheme.kind = run->kinds[layer];
        r = gpu_cuda_table()->append(&append, stream);
    }
    return backend_leave(b->backend, r);
}

/* As many queries at a time as the work area is made for; how many does not depend on lengths. */
static int attend_run(struct batch *b, const struct run *run, uint32_t layer, const void *q, float *out, float *lse,
                      void *stream)
{
    uint32_t first = run->first * b->queries, last = first + run->seqs * b->queries;
    uint64_t heads = b->geom.q_heads, each = heads * b->geom.head_dim;
    struct cuda_attend a = run->attend;
    int r = 0;
    a.scheme.kind = run->kinds[layer];
    a.cache = cache_of(b, layer, run->first);
    a.seqs = b->seq + (uint64_t)layer * b->seqs + run->first;
    a.layer = layer;
    for (uint32_t at = first; at < last && !r; at += a.queries) {
        a.queries = PKV_MIN(run->attend.queries, last - at);
        a.query = b->query + at;
        a.q = (const char *)q + at * each * pkv_dtype_bytes(b->geom.dtype);
        a.out = out + at * each, a.lse = lse ? lse + at * heads : NULL;
        r = gpu_cuda_table()->call(&a, stream);
    }
    return r;
}

int backend_batch_attend(void *batch, uint32_t layer, const void *q, float *out, float *lse, bool keeps, void *stream)
{
    struct batch *b = batch;
    int r = backend_enter(b->backend);
    if (r)
        return r;
    lse = keeps && !lse ? b->lse : lse;
    r = keeps ? cuda_mark_launch(b->keeper, stream) : 0;
    for (uint32_t i = 0; i < b->runs && !r; i++)
        r = attend_run(b, &b->run[i], layer, q, out, lse, stream);
    struct cuda_keep keep = {b->geom, b->keeper, b->kept, q, out, lse, layer, 0};
    r = r || !keeps ? r : cuda_keep_launch(&keep, stream);
    return backend_leave(b->backend, r);
}

struct gpu_batch_kept backend_batch_kept(const void *batch)
{
    const struct batch *b = batch;
    uint64_t numbers = (uint64_t)pkv_geom_group(&b->geom) * b->geom.head_dim;
    if (!b->kept)
        return (struct gpu_batch_kept){0};
    const float *q = (const float *)(const void *)(b->kept + 1);
    return (struct gpu_batch_kept){.ns = __atomic_load_n(&b->kept->ns, __ATOMIC_RELAXED),
                                   .found = __atomic_load_n(&b->kept->found, __ATOMIC_ACQUIRE),
                                   .layer = b->kept->layer,
                                   .q = q,
                                   .out = q + numbers,
                                   .lse = q + 2 * numbers};
}

int backend_batch_end(void *batch, uint32_t slot, uint64_t epoch, void *stream)
{
    struct batch *b = batch;
    struct cuda_end end = {b->bad, &b->bad_words[slot], (uint64_t *)(uintptr_t)epoch};
    int r = backend_enter(b->backend);
    return r ? r : backend_leave(b->backend, cuda_end_launch(&end, stream));
}

bool backend_batch_bad(void *batch, uint32_t slot)
{
    return __atomic_load_n(&((struct batch *)batch)->bad_words[slot], __ATOMIC_ACQUIRE);
}

int backend_batch_reset(void *batch)
{
    struct batch *b = batch;
    int r = backend_enter(b->backend);
    if (r)
        return r;
    r = backend_error(b->backend, cudaMemsetAsync(b->bad, 0, sizeof(*b->bad), b->backend->stream));
    r = r ? r : backend_wait(b->backend);
    memset(b->bad_words, 0, PKV_EPOCH_SLOTS * sizeof(*b->bad_words));
    return backend_leave(b->backend, r);
}

int backend_batch_page(void *batch, void *base, uint64_t *ret_address)
{
    struct batch *b = batch;
    struct backend *k = b->backend;
    int r = 0;
    if (k->page && k->page != base)
        return -PKV_ERR_INVALID;
    if (!k->page)
        r = k->device->base.verbs->pin(&k->device->base, base, PAGE, false, &k->page_address);
    if (r)
        return r;
    k->page = base, k->page_users++;
    b->page = true;
    *ret_address = k->page_address;
    return 0;
}

bool backend_batch_captures(void *batch, void *stream)
{
    struct batch *b = batch;
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (backend_enter(b->backend))
        return false;
    cudaError_t e = cudaStreamIsCapturing((cudaStream_t)stream, &status);
    (void)backend_leave(b->backend, 0);
    return e == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

int backend_batch_check(void *batch)
{
    struct batch *b = batch;
    int r = backend_enter(b->backend);
    if (r)
        return r;
    cudaError_t e = cudaStreamQuery(b->backend->stream); /* idle: what it says is of the whole context */
    return backend_leave(b->backend, e == cudaErrorNotReady ? 0 : backend_error(b->backend, e));
}

int backend_batch_counters(void *batch, uint64_t *ret_hits, uint64_t *ret_misses)
{
    struct batch *b = batch;
    uint64_t counters[CUDA_COUNTERS];
    int r = b->cache.entries ? backend_enter(b->backend) : 0;
    if (r || !b->cache.entries)
        return r;
    struct backend *k = b->backend;
    r = area_room(k, &k->out, sizeof(counters), true, false);
    r = r ? r
          : backend_error(k,
                          cudaMemcpyAsync(k->out.host, b->cache.counters, sizeof(counters), cudaMemcpyDeviceToHost, k->stream));
    r = r ? r : backend_wait(k);
    if (!r)
        memcpy(counters, k->out.host, sizeof(counters));
    r = backend_leave(k, r);
    if (!r)
        *ret_hits = counters[CUDA_HITS], *ret_misses = counters[CUDA_MISSES];
    return r;
}
