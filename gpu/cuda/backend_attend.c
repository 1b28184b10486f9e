/* Select, gather and attend of the synchronous calls: the caller's arrays to the device, the kernels of cuda.h, results back. A
 * call of many queries goes in pieces, so that the work area stays bounded. */
#include "gpu/cuda/backend.h"
#include "gpu/cuda/rows.h"

#include <math.h>
#include <string.h>

#define CODES_BYTES  (512ull << 20) /* of the work area */
#define ROWS_BYTES   (64ull << 20)  /* gathered at a time */
#define QUERIES_MAX  512u
#define TOKENS_GRAIN 8192u /* a growing sequence keeps its work area's layout */

/* Queries [first, first + count) of all views' queries. */
struct piece {
    const struct pkv_geom *geom;
    const struct gpu_space *space;
    const struct gpu_view *views;
    uint32_t seqs, first, count;
    uint64_t seq, query; /* offsets in `in` */
};

static uint32_t all_queries(const struct gpu_view *views, uint32_t seqs)
{
    uint32_t total = 0;
    for (uint32_t s = 0; s < seqs; s++)
        total += views[s].queries;
    return total;
}

static uint32_t longest(const struct gpu_view *views, uint32_t seqs)
{
    uint64_t tokens = 0;
    for (uint32_t s = 0; s < seqs; s++)
        tokens = PKV_MAX(tokens, views[s].tokens);
    return (uint32_t)tokens;
}

static uint64_t piece_bytes(const struct piece *p)
{
    uint64_t bytes = 512 + p->seqs * sizeof(struct cuda_seq) + p->count * sizeof(struct cuda_query);
    for (uint32_t s = 0; s < p->seqs; s++)
        bytes += PKV_ALIGN_UP(pkv_tokens_blocks(p->views[s].tokens) * sizeof(struct pkv_block_ref), 256ull);
    return bytes;
}

/* References, sequences and queries into `in`, which has room. */
static void piece_put(struct backend *b, struct piece *p)
{
    p->seq = area_take(&b->in, p->seqs * sizeof(struct cuda_seq));
    p->query = area_take(&b->in, p->count * sizeof(struct cuda_query));
    struct cuda_seq *seqs = (struct cuda_seq *)(void *)(b->in.host + p->seq);
    struct cuda_query *queries = (struct cuda_query *)(void *)(b->in.host + p->query);
    for (uint32_t s = 0, query = 0; s < p->seqs; s++) {
        const struct gpu_view *v = &p->views[s];
        uint64_t bytes = pkv_tokens_blocks(v->tokens) * sizeof(struct pkv_block_ref), at = area_take(&b->in, bytes);
        memcpy(b->in.host + at, v->blocks, bytes);
        seqs[s] = (struct cuda_seq){(const struct pkv_block_ref *)(const void *)(b->in.device + at), v->tokens};
        for (uint32_t i = 0; i < v->queries; i++, query++)
            if (query >= p->first && query - p->first < p->count)
                queries[query - p->first] = (struct cuda_query){s, v->queries - 1 - i};
    }
}

/* All queries of the views, at most `most` at a time. */
static int in_pieces(struct backend *b, struct piece p, uint32_t most,
                     int (*run)(struct backend *b, struct piece *p, const void *job), const void *job)
{
    uint32_t total = all_queries(p.views, p.seqs);
    int r = backend_enter(b);
    if (r)
        return r;
    for (p.first = 0; p.first < total && !r; p.first += p.count) {
        p.count = PKV_MIN(most, total - p.first);
        r = run(b, &p, job);
    }
    return backend_leave(b, r);
}

static void visible_of(const struct backend *b, const struct piece *p, uint32_t query, const struct gpu_view **ret_view,
                       uint32_t *ret_visible)
{
    const struct cuda_query *q = (const struct cuda_query *)(const void *)(b->in.host + p->query) + query;
    *ret_view = &p->views[q->seq], *ret_visible = (uint32_t)(p->views[q->seq].tokens - q->back);
}

static struct cuda_policy policy_of(const struct gpu_policy *policy, const struct pkv_geom *g)
{
    struct gpu_policy p = gpu_policy_by_age(g, policy);
    return (struct cuda_policy){.k = p.k,
                                .sinks = p.sinks,
                                .recent = p.recent,
                                .rule = p.rule,
                                .top_p = p.top_p,
                                .scale = p.scale > 0 ? p.scale : 1.0f / sqrtf((float)g->head_dim)};
}

/* Everything but the scheme and what is given. `more` bytes of `in` are left for the caller, whose q goes in here. */
static int piece_start(struct backend *b, struct piece *p, const struct gpu_policy *policy, const void *q, uint64_t more,
                       struct cuda_attend *a)
{
    const struct pkv_geom *g = p->geom;
    uint64_t each = (uint64_t)g->q_heads * g->head_dim * pkv_dtype_bytes(g->dtype), bytes = p->count * each;
    *a = (struct cuda_attend){.geom = *g, .policy = policy_of(policy, g), .queries = p->count};
    a->tokens_max = PKV_MIN(PKV_ALIGN_UP(longest(p->views, p->seqs), TOKENS_GRAIN), PKV_SEQ_TOKENS_MAX);
    int r = area_room(b, &b->in, piece_bytes(p) + bytes + 256 + more, true, true);
    r = r ? r : backend_bases(b, p->space, a->base);
    r = r ? r : backend_work(b, a);
    if (r)
        return r;
    piece_put(b, p);
    uint64_t at = area_take(&b->in, bytes);
    memcpy(b->in.host + at, (const char *)q + p->first * each, bytes);
    a->seqs = (const struct cuda_seq *)(const void *)(b->in.device + p->seq);
    a->query = (const struct cuda_query *)(const void *)(b->in.device + p->query);
    a->q = b->in.device + at;
    return 0;
}

/* Weights that the caller made; `in` has room for them. */
static int give_weights(struct backend *b, const struct piece *p, const int8_t *weights, const float *scales,
                        struct cuda_attend *a)
{
    uint64_t first = (uint64_t)p->first * p->geom->q_heads, heads = (uint64_t)p->count * p->geom->q_heads;
    uint64_t bits = p->geom->sig_bits, w = area_take(&b->in, heads * bits), s = area_take(&b->in, heads * sizeof(*scales));
    memcpy(b->in.host + w, weights + first * bits, heads * bits);
    memcpy(b->in.host + s, scales + first, heads * sizeof(*scales));
    a->weighed = 1;
    int r = backend_error(b, cudaMemcpyAsync(a->work.weights, b->in.host + w, heads * bits, cudaMemcpyHostToDevice, b->stream));
    return r ? r
             : backend_error(b, cudaMemcpyAsync(a->work.scales, b->in.host + s, heads * sizeof(*scales), cudaMemcpyHostToDevice,
                                                b->stream));
}

static uint64_t weights_bytes(const struct piece *p)
{
    return 512 + (uint64_t)p->count * p->geom->q_heads * (p->geom->sig_bits + sizeof(float));
}

static int back(struct backend *b, uint64_t at, const void *from, uint64_t bytes)
{
    return backend_error(b, cudaMemcpyAsync(b->out.host + at, from, bytes, cudaMemcpyDeviceToHost, b->stream));
}

static int mark(struct backend *b, uint32_t i)
{
    return backend_error(b, cudaEventRecord(b->marks[i], b->stream));
}

static uint64_t between(const struct backend *b, uint32_t i)
{
    float ms = 0;
    return cudaEventElapsedTime(&ms, b->marks[i], b->marks[i + 1]) == cudaSuccess ? (uint64_t)(ms * 1e6f) : 0;
}

static int lists_launch(struct backend *b, const struct cuda_attend *a)
{
    const struct cuda_table *t = gpu_cuda_table();
    int r = mark(b, 0);
    r = r || !a->geom.sig_bits ? r : t->query(a, b->stream);
    r = r ? r : mark(b, 1);
    r = r || !a->geom.sig_bits ? r : t->scan(a, b->stream);
    r = r ? r : mark(b, 2);
    r = r ? r : t->pick(a, b->stream);
    return r ? r : mark(b, 3);
}

/* ---- attend ---- */

/* Where a piece's results lie in `out`. */
struct results {
    uint64_t out, lse, chosen, index;
};

static void explain_piece(const struct backend *b, const struct piece *p, const struct cuda_attend *a, const struct results *at,
                          struct gpu_explain *e)
{
    const uint32_t *chosen = (const uint32_t *)(const void *)(b->out.host + at->chosen);
    const uint32_t *index = (const uint32_t *)(const void *)(b->out.host + at->index);
    uint64_t rows_max = cuda_rows_max(&a->policy), pool = 0, attended = 0;
    for (uint32_t list = 0; list < p->count * p->geom->kv_heads; list++) {
        const struct gpu_view *view;
        uint32_t visible;
        visible_of(b, p, list / p->geom->kv_heads, &view, &visible);
        uint32_t count = chosen[list] ? chosen[list] : visible; /* an empty list stands for everything */
        for (uint32_t i = 0; i < count; i++) {
            uint32_t token = chosen[list] ? index[list * rows_max + i] : i;
            pool += pkv_place_tier(view->blocks[token / PKV_BLOCK_TOKENS].rows) == PKV_TIER_POOL;
        }
        attended += count, e->seen += visible;
    }
    e->sparse += p->count;
    e->attended += attended, e->rows_pool += pool, e->rows_arena += attended - pool;
    e->sign_ns += between(b, 0), e->scan_ns += between(b, 1), e->select_ns += between(b, 2), e->attend_ns += between(b, 3);
}

static int attend_piece(struct backend *b, struct piece *p, const void *job)
{
    const struct gpu_attend_args *args = job;
    const struct pkv_geom *g = p->geom;
    struct cuda_attend a;
    uint64_t heads = (uint64_t)p->count * g->q_heads, lists = (uint64_t)p->count * g->kv_heads, numbers = heads * g->head_dim;
    int r = piece_start(b, p, &args->policy, args->q, 0, &a);
    uint64_t rows = lists * cuda_rows_max(&a.policy) * 4;
    r = r ? r : area_room(b, &b->out, numbers * 4 + heads * 4 + lists * 4 + rows + 1024, true, true);
    if (r)
        return r;
    struct results at = {area_take(&b->out, numbers * 4), area_take(&b->out, heads * 4), area_take(&b->out, lists * 4),
                         area_take(&b->out, rows)};
    a.layer = args->layer;
    a.out = (float *)(void *)(b->out.device + at.out), a.lse = (float *)(void *)(b->out.device + at.lse);
    r = backend_scheme(b, args->scheme, args->layer, &a.scheme);
    r = r ? r : area_send(b, &b->in);
    r = r ? r : lists_launch(b, &a);
    r = r ? r : gpu_cuda_table()->attend(&a, b->stream);
    r = r ? r : mark(b, 4);
    r = r ? r : back(b, at.out, a.out, numbers * 4);
    r = r ? r : back(b, at.lse, a.lse, heads * 4);
    if (!r && args->explain) {
        r = back(b, at.chosen, a.work.chosen, lists * 4);
        r = r ? r : back(b, at.index, a.work.index, rows);
    }
    r = r ? r : backend_wait(b);
    if (r)
        return r;
    memcpy(args->out + (uint64_t)p->first * g->q_heads * g->head_dim, b->out.host + at.out, numbers * 4);
    if (args->lse)
        memcpy(args->lse + (uint64_t)p->first * g->q_heads, b->out.host + at.lse, heads * 4);
    if (args->explain)
        explain_piece(b, p, &a, &at, args->explain);
    return 0;
}

static uint32_t queries_at_once(const struct pkv_geom *g, const struct gpu_view *views, uint32_t seqs)
{
    uint64_t each = (uint64_t)g->kv_heads * PKV_ALIGN_UP(longest(views, seqs), TOKENS_GRAIN) * sizeof(uint16_t);
    return (uint32_t)PKV_MIN(PKV_MAX(CODES_BYTES / each, 1ull), QUERIES_MAX);
}

int backend_attend(void *backend, const struct gpu_attend_args *args)
{
    struct piece all = {.geom = args->geom, .space = &args->space, .views = args->views, .seqs = args->seqs};
    return in_pieces(backend, all, queries_at_once(args->geom, args->views, args->seqs), attend_piece, args);
}

/* ---- select ---- */

static void lists_out(const struct backend *b, const struct piece *p, uint32_t stride, const struct results *at, uint64_t score,
                      const struct gpu_rows *rows)
{
    uint64_t first = (uint64_t)p->first * p->geom->kv_heads;
    const uint32_t *chosen = (const uint32_t *)(const void *)(b->out.host + at->chosen);
    const uint32_t *index = (const uint32_t *)(const void *)(b->out.host + at->index);
    const uint16_t *scores = (const uint16_t *)(const void *)(b->out.host + score);
    for (uint64_t list = 0; list < (uint64_t)p->count * p->geom->kv_heads; list++) {
        uint64_t to = (first + list) * rows->rows_max;
        rows->count[first + list] = chosen[list];
        memcpy(rows->index + to, index + list * stride, chosen[list] * sizeof(*index));
        if (!rows->score)
            continue;
        memset(rows->score + to, 0, rows->rows_max * sizeof(*scores));
        memcpy(rows->score + to, scores + list * stride, chosen[list] * sizeof(*scores));
    }
}

struct lists_job {
    const struct gpu_select_args *args;
    const struct gpu_rows *rows;
    char *ret; /* gather's */
};

static int select_piece(struct backend *b, struct piece *p, const void *job)
{
    const struct gpu_select_args *args = ((const struct lists_job *)job)->args;
    const struct gpu_rows *rows = ((const struct lists_job *)job)->rows;
    struct cuda_attend a;
    uint64_t lists = (uint64_t)p->count * p->geom->kv_heads;
    int r = piece_start(b, p, &args->policy, args->q, weights_bytes(p), &a);
    uint64_t entries = lists * cuda_rows_max(&a.policy);
    r = r ? r : area_room(b, &b->out, lists * 4 + entries * 6 + 1024, true, false);
    if (r)
        return r;
    struct results at = {.chosen = area_take(&b->out, lists * 4), .index = area_take(&b->out, entries * 4)};
    uint64_t score = area_take(&b->out, entries * 2);
    a.scheme.kind = PKV_SCHEMES;
    r = give_weights(b, p, args->weights, args->scales, &a);
    r = r ? r : area_send(b, &b->in);
    r = r ? r : lists_launch(b, &a);
    r = r ? r : back(b, at.chosen, a.work.chosen, lists * 4);
    r = r ? r : back(b, at.index, a.work.index, entries * 4);
    r = r ? r : back(b, score, a.work.scores, entries * 2);
    r = r ? r : backend_wait(b);
    if (r)
        return r;
    lists_out(b, p, cuda_rows_max(&a.policy), &at, score, rows);
    if (args->explain)
        args->explain->scan_ns += between(b, 0) + between(b, 1), args->explain->select_ns += between(b, 2);
    return 0;
}

int backend_select(void *backend, const struct gpu_select_args *args, const struct gpu_rows *rows)
{
    struct piece all = {.geom = args->geom, .space = &args->space, .views = args->views, .seqs = args->seqs};
    struct lists_job job = {args, rows, NULL};
    return in_pieces(backend, all, queries_at_once(args->geom, args->views, args->seqs), select_piece, &job);
}

/* ---- gather ---- */

/* Only what was listed: the rest of the buffer may be of another tenant. Straight to memory that is pinned. */
static int rows_out(struct backend *b, const uint32_t *count, uint64_t lists, uint64_t row, uint32_t rows_max, char *to)
{
    uint64_t stride = row * rows_max;
    struct cudaPointerAttributes where = {0};
    bool pinned = cudaPointerGetAttributes(&where, to) == cudaSuccess && where.type == cudaMemoryTypeHost;
    (void)cudaGetLastError();
    int r = pinned ? 0 : area_room(b, &b->rows, lists * stride, true, false);
    for (uint64_t list = 0; list < lists && !r; list++)
        r = backend_error(b, cudaMemcpyAsync((pinned ? to : b->rows.host) + list * stride, b->rows.device + list * stride,
                                             count[list] * row, cudaMemcpyDeviceToHost, b->stream));
    r = r ? r : backend_wait(b);
    for (uint64_t list = 0; list < lists && !r && !pinned; list++)
        memcpy(to + list * stride, b->rows.host + list * stride, count[list] * row);
    return r;
}

static int gather_piece(struct backend *b, struct piece *p, const void *job)
{
    const struct gpu_rows *rows = ((const struct lists_job *)job)->rows;
    const struct pkv_geom *g = p->geom;
    uint64_t lists = (uint64_t)p->count * g->kv_heads, first = (uint64_t)p->first * g->kv_heads;
    uint64_t entries = lists * rows->rows_max, stride = rows->rows_max * pkv_geom_row_bytes(g);
    struct cuda_rows gather = {.geom = *g, .queries = p->count, .rows_max = rows->rows_max};
    int r = area_room(b, &b->in, piece_bytes(p) + (entries + lists) * 4 + 512, true, true);
    r = r ? r : area_room(b, &b->rows, lists * stride, false, true);
    r = r ? r : backend_bases(b, p->space, gather.base);
    if (r)
        return r;
    piece_put(b, p);
    uint64_t index = area_take(&b->in, entries * 4), count = area_take(&b->in, lists * 4);
    memcpy(b->in.host + index, rows->index + first * rows->rows_max, entries * 4);
    memcpy(b->in.host + count, rows->count + first, lists * 4);
    gather.seqs = (const struct cuda_seq *)(const void *)(b->in.device + p->seq);
    gather.query = (const struct cuda_query *)(const void *)(b->in.device + p->query);
    gather.index = (const uint32_t *)(const void *)(b->in.device + index);
    gather.count = (const uint32_t *)(const void *)(b->in.device + count);
    gather.to = b->rows.device;
    r = area_send(b, &b->in);
    r = r ? r : cuda_rows_launch(&gather, b->stream);
    return r ? r
             : rows_out(b, rows->count + first, lists, pkv_geom_row_bytes(g), rows->rows_max,
                        ((const struct lists_job *)job)->ret + first * stride);
}

int backend_gather(void *backend, const struct gpu_select_args *args, const struct gpu_rows *rows, void *ret)
{
    uint64_t each = (uint64_t)args->geom->kv_heads * rows->rows_max * pkv_geom_row_bytes(args->geom);
    struct piece all = {.geom = args->geom, .space = &args->space, .views = args->views, .seqs = args->seqs};
    struct lists_job job = {args, rows, ret};
    return in_pieces(backend, all, (uint32_t)PKV_MAX(ROWS_BYTES / each, 1ull), gather_piece, &job);
}
