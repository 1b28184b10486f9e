/* Attention over lists of rows, and over everything. */
#include "gpu/internal.h"
#include "gpu/module.h"

#include <stdlib.h>
#include <string.h>

struct attend {
    struct gpu *gpu;
    const struct gpu_select_args *a;
    const struct gpu_rows *rows;
    const char *gathered;
    float scale;
    float *out, *lse;
    uint64_t pool, arena, attended, seen;
};

static void load_queries(const struct gpu_kernels *k, const struct pkv_geom *g, const void *q, uint64_t q_head, uint32_t group,
                         float scale, float *to)
{
    k->to_float((const char *)q + q_head * g->head_dim * pkv_dtype_bytes(g->dtype), g->dtype, to,
                (uint64_t)group * g->head_dim);
    for (uint32_t i = 0; i < group * g->head_dim; i++)
        to[i] *= scale;
}

static void finish(const struct gpu_softmax *s, uint32_t head_dim, float *out, float *lse)
{
    for (uint32_t d = 0; d < head_dim; d++)
        out[d] = s->out[d] / s->sum;
    if (lse)
        *lse = s->max + logf(s->sum);
}

static void attend_one(void *context, uint64_t item, uint32_t thread)
{
    (void)thread;
    struct attend *p = context;
    const struct pkv_geom *g = p->a->geom;
    uint32_t query = (uint32_t)(item / g->kv_heads), head = (uint32_t)(item % g->kv_heads), group = pkv_geom_group(g);
    struct gpu_query where = gpu_query_find(p->a->views, p->a->seqs, query);
    uint64_t bytes = pkv_geom_row_bytes(g), list = item * p->rows->rows_max, pool = 0;
    uint64_t q_head = (uint64_t)query * g->q_heads + (uint64_t)head * group;
    float q[PKV_GROUP_MAX * PKV_HEAD_DIM_MAX], out[PKV_GROUP_MAX * PKV_HEAD_DIM_MAX] = {0};
    struct gpu_softmax states[PKV_GROUP_MAX];
    load_queries(p->gpu->kernels, g, p->a->q, q_head, group, p->scale, q);
    for (uint32_t h = 0; h < group; h++)
        states[h] = (struct gpu_softmax){-INFINITY, 0, out + (uint64_t)h * g->head_dim};
    const void *rows[GPU_ATTEND_STEP];
    uint32_t count = p->rows->count[item];
    for (uint32_t at = 0; at < count; at += GPU_ATTEND_STEP) {
        uint32_t n = PKV_MIN(GPU_ATTEND_STEP, count - at);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t token = p->rows->index[list + at + i];
            uint64_t place = where.view->blocks[token / PKV_BLOCK_TOKENS].rows;
            pool += pkv_place_tier(place) == PKV_TIER_POOL;
            rows[i] = p->gathered ? p->gathered + (list + at + i) * bytes
                                  : gpu_place(&p->a->space, place, pkv_geom_block_bytes(g)) +
                                        pkv_geom_row_offset(g, head, token % PKV_BLOCK_TOKENS);
            __builtin_prefetch(rows[i]);
        }
        struct gpu_step step = {rows, n, group, g->head_dim, g->dtype, 1, &n, q, states};
        p->gpu->kernels->step(&step);
    }
    for (uint32_t h = 0; h < group; h++)
        finish(&states[h], g->head_dim, p->out + (q_head + h) * g->head_dim, p->lse ? p->lse + q_head + h : NULL);
    __atomic_fetch_add(&p->pool, pool, __ATOMIC_RELAXED);
    __atomic_fetch_add(&p->attended, count, __ATOMIC_RELAXED);
    __atomic_fetch_add(&p->seen, where.visible, __ATOMIC_RELAXED);
}

int gpu_attend_rows(struct gpu *gpu, const struct gpu_select_args *a, const struct gpu_rows *rows, const void *gathered,
                    float *out, float *lse)
{
    /* Gathered rows are on the CPU already, and so is who asks for one list after the other. */
    return gpu->backend && !gathered ? staged_attend_rows(gpu, a, rows, out, lse)
                                     : host_attend_rows(gpu, a, rows, gathered, out, lse);
}

int host_attend_rows(struct gpu *gpu, const struct gpu_select_args *a, const struct gpu_rows *rows, const void *gathered,
                     float *out, float *lse)
{
    uint64_t begin = gpu_now_ns();
    struct attend p = {.gpu = gpu,
                       .a = a,
                       .rows = rows,
                       .gathered = gathered,
                       .scale = gpu_scale(a->policy.scale, a->geom),
                       .out = out,
                       .lse = lse};
    uint32_t queries = gpu_queries(a->views, a->seqs);
    gpu_team_run(&gpu->team, attend_one, &p, (uint64_t)queries * a->geom->kv_heads);
    if (a->explain) {
        a->explain->sparse += queries;
        a->explain->attended += p.attended;
        a->explain->seen += p.seen;
        a->explain->rows_pool += p.pool;
        a->explain->rows_arena += p.attended - p.pool;
        a->explain->attend_ns += gpu_now_ns() - begin;
    }
    return 0;
}

/* ---- dense ---- */

struct dense {
    struct gpu *gpu;
    const struct gpu_dense_args *a;
    float scale;
    uint64_t pool, arena;
};

/* Query tokens [first, first + count) of a view: they share the conversion of each block. */
struct tile {
    const struct gpu_view *view;
    uint32_t query, first, count; /* query: of the whole batch */
};

static uint32_t tile_queries(const struct pkv_geom *g)
{
    return PKV_MIN(GPU_TILE_HEADS / pkv_geom_group(g), GPU_TILE);
}

static uint32_t tiles_of(const struct gpu_dense_args *a, uint32_t wanted, struct tile *ret)
{
    uint32_t each = tile_queries(a->geom), n = 0, query = 0;
    for (uint32_t s = 0; s < a->seqs; query += a->views[s++].queries) {
        uint32_t here = PKV_DIV_UP(a->views[s].queries, each);
        if (wanted - n < here) {
            uint32_t first = (wanted - n) * each;
            *ret = (struct tile){&a->views[s], query + first, first, PKV_MIN(each, a->views[s].queries - first)};
        }
        n += here;
    }
    return n;
}

/* What one query token's q heads of this kv head remember between pieces. */
static void states_open(const struct gpu_dense_args *a, uint64_t q_head, uint32_t group, struct gpu_softmax *states)
{
    uint32_t dim = a->geom->head_dim;
    for (uint32_t h = 0; h < group; h++) {
        if (a->start) {
            a->max[q_head + h] = -INFINITY;
            a->sum[q_head + h] = 0;
            memset(a->out + (q_head + h) * dim, 0, dim * sizeof(float));
        }
        states[h] = (struct gpu_softmax){a->max[q_head + h], a->sum[q_head + h], a->out + (q_head + h) * dim};
    }
}

static void states_close(const struct gpu_dense_args *a, uint64_t q_head, uint32_t group, const struct gpu_softmax *states)
{
    for (uint32_t h = 0; h < group; h++) {
        a->max[q_head + h] = states[h].max;
        a->sum[q_head + h] = states[h].sum;
        if (a->finish)
            finish(&states[h], a->geom->head_dim, states[h].out, a->lse ? a->lse + q_head + h : NULL);
    }
}

/* One block for all queries of a tile; returns the rows that were attended, over all of them. */
static uint64_t tile_block(const struct dense *p, const struct tile *t, uint32_t head, uint64_t block, const float *q,
                           struct gpu_softmax *states)
{
    const struct gpu_dense_args *a = p->a;
    const struct pkv_geom *g = a->geom;
    const void *rows[PKV_BLOCK_TOKENS];
    uint32_t visible[GPU_TILE], most = 0;
    uint64_t total = 0, sees = t->view->tokens - t->view->queries + 1 + t->first, begin = block * PKV_BLOCK_TOKENS;
    for (uint32_t i = 0; i < t->count; i++) {
        visible[i] = sees + i > begin ? (uint32_t)PKV_MIN(PKV_BLOCK_TOKENS, sees + i - begin) : 0;
        most = PKV_MAX(most, visible[i]);
        total += visible[i];
    }
    const char *base = gpu_place(&a->space, t->view->blocks[block].rows, pkv_geom_block_bytes(g));
    for (uint32_t i = 0; i < most; i++)
        rows[i] = base + pkv_geom_row_offset(g, head, i);
    struct gpu_step step = {rows, most, pkv_geom_group(g), g->head_dim, g->dtype, t->count, visible, q, states};
    p->gpu->kernels->step(&step);
    return total;
}

static uint32_t dense_heads(const struct gpu_dense_args *a)
{
    return a->heads ? a->heads : a->geom->kv_heads;
}

static void dense_one(void *context, uint64_t item, uint32_t thread)
{
    (void)thread;
    struct dense *p = context;
    const struct gpu_dense_args *a = p->a;
    const struct pkv_geom *g = a->geom;
    uint32_t heads = dense_heads(a), head = a->first_head + (uint32_t)(item % heads), group = pkv_geom_group(g);
    struct tile t = {0};
    tiles_of(a, (uint32_t)(item / heads), &t);
    float q[GPU_TILE_HEADS * PKV_HEAD_DIM_MAX];
    struct gpu_softmax states[GPU_TILE_HEADS];
    for (uint32_t i = 0; i < t.count; i++) {
        uint64_t q_head = (uint64_t)(t.query + i) * g->q_heads + (uint64_t)head * group;
        load_queries(p->gpu->kernels, g, a->q, q_head, group, p->scale, q + (uint64_t)i * group * g->head_dim);
        states_open(a, q_head, group, states + (uint64_t)i * group);
    }
    uint64_t last = t.view->tokens - t.view->queries + t.first + t.count, pool = 0, arena = 0;
    uint64_t end = PKV_MIN((uint64_t)pkv_tokens_blocks(last), (uint64_t)a->first_block + a->blocks);
    for (uint64_t b = a->first_block; b < end; b++) {
        bool hot = pkv_place_tier(t.view->blocks[b].rows) == PKV_TIER_POOL;
        *(hot ? &pool : &arena) += tile_block(p, &t, head, b, q, states);
    }
    for (uint32_t i = 0; i < t.count; i++)
        states_close(a, (uint64_t)(t.query + i) * g->q_heads + (uint64_t)head * group, group, states + (uint64_t)i * group);
    __atomic_fetch_add(&p->pool, pool, __ATOMIC_RELAXED);
    __atomic_fetch_add(&p->arena, arena, __ATOMIC_RELAXED);
}

int gpu_dense(struct gpu *gpu, const struct gpu_dense_args *a)
{
    int r = gpu_check_views(gpu, a->geom, &a->space, a->seqs, a->views, a->q, false);
    if (!r && (uint64_t)a->first_head + dense_heads(a) > a->geom->kv_heads)
        r = -PKV_ERR_SHAPE;
    if (r)
        return r;
    if (gpu->backend)
        return gpu->backend->dense(gpu->device, a);
    uint64_t begin = gpu_now_ns();
    struct dense p = {.gpu = gpu, .a = a, .scale = gpu_scale(a->scale, a->geom)};
    uint32_t queries = gpu_queries(a->views, a->seqs);
    struct tile ignored;
    gpu_team_run(&gpu->team, dense_one, &p, (uint64_t)tiles_of(a, UINT32_MAX, &ignored) * dense_heads(a));
    if (a->explain) {
        a->explain->dense += a->finish ? queries : 0;
        a->explain->attended += p.pool + p.arena;
        a->explain->seen += p.pool + p.arena;
        a->explain->rows_pool += p.pool;
        a->explain->rows_arena += p.arena;
        a->explain->attend_ns += gpu_now_ns() - begin;
    }
    return 0;
}
