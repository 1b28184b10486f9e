/* Dense attention: exact over all blocks, wherever they lie. Blocks of the arena come through two staging chunks on a copy
 * engine, one filled while the other is attended; blocks of the pool are read in place. The state between pieces is the
 * caller's: it goes to the device once and comes back once. */
#include "gpu/cuda/backend.h"
#include "gpu/cuda/rows.h"

#include <math.h>
#include <string.h>

#define STAGE_BYTES  (32ull << 20) /* of one staging chunk: 0.6 ms of a PCIe 5 link, against 10 us to start a piece */
#define QUERIES_MAX  256u          /* of one launch */
#define TOKENS_GRAIN 8192u

struct piece {
    uint32_t first, blocks, staged; /* staged: of them, those that are copied */
};

/* One view's call. */
struct dense {
    struct backend *b;
    const struct gpu_dense_args *args;
    const struct gpu_view *view;
    const char *q;
    uint32_t end;                       /* blocks, from the first of the sequence */
    uint32_t room, pieces;              /* blocks of a staging chunk */
    uint64_t refs, seqs, query, q_at;   /* offsets in `in` */
    uint64_t out, lse, state, max, sum; /* offsets in `out` */
    const uint64_t *base[PKV_TIERS];
};

static bool in_arena(const struct gpu_view *v, uint32_t block)
{
    return pkv_place_tier(v->blocks[block].rows) == PKV_TIER_ARENA;
}

/* As many blocks as a staging chunk allows. */
static struct piece piece_at(const struct dense *d, uint32_t first)
{
    struct piece p = {.first = first};
    while (first + p.blocks < d->end && (p.staged < d->room || !in_arena(d->view, first + p.blocks)))
        p.staged += in_arena(d->view, first + p.blocks++);
    return p;
}

/* Rows of a piece that a query sees. */
static uint32_t visible_in(const struct dense *d, const struct piece *p, uint32_t query)
{
    uint64_t sees = d->view->tokens - d->view->queries + 1 + query, begin = (uint64_t)p->first * PKV_BLOCK_TOKENS;
    return sees > begin ? (uint32_t)PKV_MIN(sees - begin, (uint64_t)p->blocks * PKV_BLOCK_TOKENS) : 0;
}

static int stage_open(struct backend *b)
{
    if (b->stage.device)
        return 0;
    int r = area_room(b, &b->stage, STAGE_CHUNKS * STAGE_BYTES, false, true);
    for (uint32_t i = 0; i < BASE_COPIES && !r; i++) {
        for (uint32_t c = 0; c < STAGE_CHUNKS; c++)
            b->bases[i].host[PKV_CHUNKS_MAX + c] = (uint64_t)(uintptr_t)b->stage.device + c * STAGE_BYTES;
        b->bases[i].used = 0; /* to be uploaded again */
    }
    return r;
}

/* References as the kernels are to see them, a sequence for each piece, and how much of it each query sees. */
static void pieces_put(struct dense *d)
{
    struct area *in = &d->b->in;
    struct pkv_block_ref *refs = (struct pkv_block_ref *)(void *)(in->host + d->refs);
    struct cuda_seq *seqs = (struct cuda_seq *)(void *)(in->host + d->seqs);
    struct cuda_query *query = (struct cuda_query *)(void *)(in->host + d->query);
    uint32_t first = d->args->first_block;
    for (uint32_t i = 0; i < d->pieces; i++) {
        struct piece p = piece_at(d, first);
        uint32_t tokens = p.blocks * PKV_BLOCK_TOKENS, slot = 0;
        for (uint32_t n = 0; n < p.blocks; n++) {
            struct pkv_block_ref *ref = &refs[p.first - d->args->first_block + n];
            *ref = d->view->blocks[p.first + n];
            if (in_arena(d->view, p.first + n))
                ref->rows = pkv_place(PKV_TIER_POOL, PKV_CHUNKS_MAX + i % STAGE_CHUNKS, slot++, 1);
        }
        uint64_t at = d->refs + (p.first - d->args->first_block) * sizeof(*refs);
        seqs[i] = (struct cuda_seq){(const struct pkv_block_ref *)(const void *)(in->device + at), tokens};
        for (uint32_t n = 0; n < d->view->queries; n++)
            *query++ = (struct cuda_query){i, tokens - visible_in(d, &p, n)};
        first += p.blocks;
    }
}

/* Blocks of a piece into a staging chunk; neighbours in the arena in one copy. */
static int piece_copy(const struct dense *d, const struct piece *p, uint32_t chunk)
{
    struct backend *b = d->b;
    uint64_t bytes = pkv_geom_block_bytes(d->args->geom), to = (uint64_t)(uintptr_t)b->stage.device + chunk * STAGE_BYTES;
    uint64_t from = 0, run = 0;
    int r = backend_error(b, cudaStreamWaitEvent(b->copies, b->drained[chunk], 0));
    for (uint32_t n = 0; n <= p->blocks && !r; n++) {
        bool more = n < p->blocks;
        if (more && !in_arena(d->view, p->first + n))
            continue;
        uint64_t place = more ? d->view->blocks[p->first + n].rows : 0;
        uint64_t at = more ? pkv_place_address(d->args->space.base[PKV_TIER_ARENA][pkv_place_chunk(place)], place, bytes) : 0;
        if (run && at != from + run) {
            r = backend_error(
                b, cudaMemcpyAsync((void *)(uintptr_t)to, (const void *)(uintptr_t)from, run, cudaMemcpyDefault, b->copies));
            to += run, run = 0;
        }
        from = run ? from : at, run += bytes;
    }
    return r ? r : backend_error(b, cudaEventRecord(b->filled[chunk], b->copies));
}

/* A launch's queries, over one piece. */
static int piece_attend(struct dense *d, uint32_t piece, uint32_t tokens, uint32_t first, uint32_t count)
{
    struct backend *b = d->b;
    const struct pkv_geom *g = d->args->geom;
    uint64_t each = (uint64_t)g->q_heads * g->head_dim, head = (uint64_t)first * g->q_heads;
    struct cuda_attend a = {.geom = *g, .queries = count};
    a.policy = (struct cuda_policy){.dense_below = UINT32_MAX,
                                    .scale = d->args->scale > 0 ? d->args->scale : 1.0f / sqrtf((float)g->head_dim)};
    a.tokens_max = PKV_ALIGN_UP(tokens, TOKENS_GRAIN);
    memcpy(a.base, d->base, sizeof(a.base));
    int r = backend_work(b, &a);
    a.seqs = (const struct cuda_seq *)(const void *)(b->in.device + d->seqs);
    a.query = (const struct cuda_query *)(const void *)(b->in.device + d->query) + (uint64_t)piece * d->view->queries + first;
    a.q = b->in.device + d->q_at + first * each * pkv_dtype_bytes(g->dtype);
    a.out = (float *)(void *)(b->out.device + d->out), a.lse = (float *)(void *)(b->out.device + d->lse);
    r = r ? r : gpu_cuda_table()->attend(&a, b->stream);
    struct cuda_merge merge = {.heads = count * g->q_heads,
                               .head_dim = g->head_dim,
                               .out = a.out,
                               .lse = a.lse,
                               .state = (float *)(void *)(b->out.device + d->state) + first * each,
                               .max = (float *)(void *)(b->out.device + d->max) + head,
                               .sum = (float *)(void *)(b->out.device + d->sum) + head};
    return r ? r : cuda_merge_launch(&merge, b->stream);
}

static int pieces_run(struct dense *d)
{
    struct backend *b = d->b;
    uint32_t first = d->args->first_block;
    int r = 0;
    for (uint32_t i = 0; i < d->pieces && !r; i++) {
        struct piece p = piece_at(d, first);
        uint32_t chunk = i % STAGE_CHUNKS;
        if (p.staged) {
            r = piece_copy(d, &p, chunk);
            r = r ? r : backend_error(b, cudaStreamWaitEvent(b->stream, b->filled[chunk], 0));
        }
        for (uint32_t at = 0, n; at < d->view->queries && !r; at += n) {
            n = PKV_MIN(QUERIES_MAX, d->view->queries - at);
            r = piece_attend(d, i, p.blocks * PKV_BLOCK_TOKENS, at, n);
        }
        if (p.staged)
            r = r ? r : backend_error(b, cudaEventRecord(b->drained[chunk], b->stream));
        first += p.blocks;
    }
    return r;
}

/* ---- the caller's state ---- */

static uint64_t heads_of(const struct dense *d)
{
    return (uint64_t)d->view->queries * d->args->geom->q_heads;
}

static int state_send(struct dense *d, uint64_t head)
{
    struct backend *b = d->b;
    const struct gpu_dense_args *a = d->args;
    uint64_t heads = heads_of(d), dim = a->geom->head_dim;
    float *max = (float *)(void *)(b->out.host + d->max), *sum = (float *)(void *)(b->out.host + d->sum);
    if (a->start) {
        memset(b->out.host + d->state, 0, heads * dim * 4);
        for (uint64_t h = 0; h < heads; h++)
            max[h] = -INFINITY, sum[h] = 0;
    } else {
        memcpy(b->out.host + d->state, a->out + head * dim, heads * dim * 4);
        memcpy(max, a->max + head, heads * 4), memcpy(sum, a->sum + head, heads * 4);
    }
    return backend_error(b, cudaMemcpyAsync(b->out.device + d->state, b->out.host + d->state, b->out.used - d->state,
                                            cudaMemcpyHostToDevice, b->stream));
}

static bool wanted(const struct gpu_dense_args *a, uint64_t head)
{
    uint32_t kv = (uint32_t)(head % a->geom->q_heads) / pkv_geom_group(a->geom);
    return !a->heads || (kv >= a->first_head && kv - a->first_head < a->heads);
}

static void state_take(const struct dense *d, uint64_t head)
{
    const struct gpu_dense_args *a = d->args;
    const char *host = d->b->out.host;
    const float *state = (const float *)(const void *)(host + d->state), *max = (const float *)(const void *)(host + d->max);
    const float *sum = (const float *)(const void *)(host + d->sum);
    uint32_t dim = a->geom->head_dim;
    for (uint64_t h = 0; h < heads_of(d); h++) {
        if (!wanted(a, h))
            continue;
        float *out = a->out + (head + h) * dim;
        for (uint32_t i = 0; i < dim; i++)
            out[i] = a->finish ? state[h * dim + i] / sum[h] : state[h * dim + i];
        a->max[head + h] = max[h], a->sum[head + h] = sum[h];
        if (a->finish && a->lse)
            a->lse[head + h] = max[h] + logf(sum[h]);
    }
}

static void explain(const struct dense *d)
{
    const struct gpu_dense_args *a = d->args;
    uint64_t heads = a->heads ? a->heads : a->geom->kv_heads;
    for (uint32_t block = a->first_block; block < d->end; block++) {
        struct piece one = {.first = block, .blocks = 1};
        uint64_t rows = 0;
        for (uint32_t q = 0; q < d->view->queries; q++)
            rows += heads * visible_in(d, &one, q);
        *(in_arena(d->view, block) ? &a->explain->rows_arena : &a->explain->rows_pool) += rows;
        a->explain->attended += rows, a->explain->seen += rows;
    }
    a->explain->dense += a->finish ? d->view->queries : 0;
}

/* ---- a view ---- */

static int dense_open(struct dense *d)
{
    struct backend *b = d->b;
    const struct pkv_geom *g = d->args->geom;
    uint64_t heads = heads_of(d), numbers = heads * g->head_dim, blocks = d->end - d->args->first_block;
    uint64_t launch = (uint64_t)PKV_MIN(QUERIES_MAX, d->view->queries) * g->q_heads;
    d->room = (uint32_t)(STAGE_BYTES / pkv_geom_block_bytes(g));
    for (uint32_t first = d->args->first_block; first < d->end; d->pieces++)
        first += piece_at(d, first).blocks;
    uint64_t queries = (uint64_t)d->pieces * d->view->queries * sizeof(struct cuda_query);
    uint64_t q_bytes = numbers * pkv_dtype_bytes(g->dtype), refs = blocks * sizeof(struct pkv_block_ref);
    int r = d->room ? stage_open(b) : -PKV_ERR_BLOCK_TOO_LARGE;
    r = r ? r : area_room(b, &b->in, refs + d->pieces * sizeof(struct cuda_seq) + queries + q_bytes + 1024, true, true);
    r = r ? r : area_room(b, &b->out, (numbers + launch * g->head_dim + launch + 2 * heads) * 4 + 1280, true, true);
    r = r ? r : backend_bases(b, &d->args->space, d->base);
    if (r)
        return r;
    d->refs = area_take(&b->in, refs), d->seqs = area_take(&b->in, d->pieces * sizeof(struct cuda_seq));
    d->query = area_take(&b->in, queries), d->q_at = area_take(&b->in, q_bytes);
    d->out = area_take(&b->out, launch * g->head_dim * 4), d->lse = area_take(&b->out, launch * 4);
    d->state = area_take(&b->out, numbers * 4);
    d->max = area_take(&b->out, heads * 4), d->sum = area_take(&b->out, heads * 4);
    memcpy(b->in.host + d->q_at, d->q, q_bytes);
    pieces_put(d);
    return 0;
}

static int dense_view(struct backend *b, const struct gpu_dense_args *args, const struct gpu_view *view, uint64_t query)
{
    const struct pkv_geom *g = args->geom;
    uint64_t head = query * g->q_heads,
             end = PKV_MIN((uint64_t)pkv_tokens_blocks(view->tokens), (uint64_t)args->first_block + args->blocks);
    struct dense d = {.b = b, .args = args, .view = view, .end = (uint32_t)end};
    d.q = (const char *)args->q + head * g->head_dim * pkv_dtype_bytes(g->dtype);
    d.end = PKV_MAX(d.end, args->first_block); /* a piece behind this view's end */
    int r = dense_open(&d);
    r = r ? r : state_send(&d, head);
    if (d.pieces)
        r = r ? r : area_send(b, &b->in);
    r = r ? r : pieces_run(&d);
    r = r ? r
          : backend_error(b, cudaMemcpyAsync(b->out.host + d.state, b->out.device + d.state, b->out.used - d.state,
                                             cudaMemcpyDeviceToHost, b->stream));
    r = r ? r : backend_wait(b);
    if (r)
        return r;
    state_take(&d, head);
    if (args->explain)
        explain(&d);
    return 0;
}

int backend_dense(void *backend, const struct gpu_dense_args *args)
{
    struct backend *b = backend;
    int r = backend_enter(b);
    if (r)
        return r;
    uint64_t begin = backend_now_ns(), query = 0;
    for (uint32_t s = 0; s < args->seqs && !r; query += args->views[s++].queries)
        r = dense_view(b, args, &args->views[s], query);
    if (!r && args->explain)
        args->explain->attend_ns += backend_now_ns() - begin;
    return backend_leave(b, r);
}
