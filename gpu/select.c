/* Select: which rows each query token and kv head attends. Reads like the paper: reference over sinks and recent, scan,
 * exact counting top-k, ascending lists. One task is one query token and kv head. */
#include "gpu/code.h"
#include "gpu/internal.h"
#include "gpu/module.h"

#include "proto/check.h"

#include <stdlib.h>
#include <string.h>

struct select {
    struct gpu *gpu;
    const struct gpu_select_args *a;
    const struct gpu_rows *rows;
    float scale;
    uint64_t scan_ns, select_ns;
    int no_memory;
};

/* The candidates of one query: tokens that are neither sinks nor recent. */
struct span {
    uint32_t visible, first, last;
};

static struct span span_of(const struct gpu_policy *p, uint32_t visible)
{
    struct span s = {visible, PKV_MIN(p->sinks, visible), visible};
    uint32_t recent = PKV_MIN(p->recent, visible - s.first);
    s.last = visible - recent;
    return s;
}

static const char *row_of(const struct gpu_select_args *a, const struct gpu_view *view, uint32_t head, uint32_t token)
{
    const char *block = gpu_place(&a->space, view->blocks[token / PKV_BLOCK_TOKENS].rows, pkv_geom_block_bytes(a->geom));
    return block + pkv_geom_row_offset(a->geom, head, token % PKV_BLOCK_TOKENS);
}

/* What a bias is made of, per q head of the group. */
struct reference {
    float max, sum; /* of 2^exact */
    float shift;    /* sum of exact minus estimate */
};

static void look_at(const struct select *s, const struct gpu_view *view, uint32_t head, uint32_t token, bool fit,
                    const float *queries, const int8_t *weights, const float *units, const uint32_t *const *signatures,
                    struct reference *refs)
{
    const struct pkv_geom *g = s->a->geom;
    const struct gpu_kernels *k = s->gpu->kernels;
    uint32_t words = pkv_geom_words(g), in = token % PKV_BLOCK_TOKENS;
    const uint32_t *signature = signatures[token / PKV_BLOCK_TOKENS] + in / 4 * 4 * words + in % 4;
    float key[PKV_HEAD_DIM_MAX];
    k->to_float(row_of(s->a, view, head, token), g->dtype, key, g->head_dim);
    for (uint32_t h = 0; h < pkv_geom_group(g); h++) {
        struct reference *r = &refs[h];
        float exact = k->dot(queries + (uint64_t)h * g->head_dim, key, g->head_dim) * s->scale * 1.44269504f;
        float above = exact > r->max ? exact : r->max;
        r->sum = r->sum * exp2f(r->max - above) + exp2f(exact - above);
        r->max = above;
        if (fit)
            r->shift += exact - units[h] * (float)k->score(signature, words, weights + (uint64_t)h * g->sig_bits);
    }
}

/* Biases of the group's q heads, log2 units: minus the log-sum-exp of the exact scores over sinks and recent, plus the mean
 * difference of exact and estimated scores over the recent tokens (over the sinks where there are none): signatures know a
 * score up to a constant per query. */
static void biases_of(const struct select *s, const struct gpu_view *view, uint32_t head, const void *q, const int8_t *weights,
                      const float *units, const struct span *span, const uint32_t *const *signatures, float *ret)
{
    const struct pkv_geom *g = s->a->geom;
    uint32_t group = pkv_geom_group(g), recent = span->visible - span->last, fitted = recent ? recent : span->first;
    float queries[PKV_GROUP_MAX * PKV_HEAD_DIM_MAX];
    struct reference refs[PKV_GROUP_MAX];
    s->gpu->kernels->to_float(q, g->dtype, queries, (uint64_t)group * g->head_dim);
    for (uint32_t h = 0; h < group; h++)
        refs[h] = (struct reference){-INFINITY, 0, 0};
    for (uint32_t t = 0; t < span->first; t++)
        look_at(s, view, head, t, !recent, queries, weights, units, signatures, refs);
    for (uint32_t t = span->last; t < span->visible; t++)
        look_at(s, view, head, t, true, queries, weights, units, signatures, refs);
    for (uint32_t h = 0; h < group; h++) {
        ret[h] = fitted ? refs[h].shift / (float)fitted - (refs[h].max + log2f(refs[h].sum)) : 0;
        ret[h] = isfinite(ret[h]) ? ret[h] : 0; /* huge q and k: any order is as good */
    }
}

/* How many of the best to take: k, or fewer under top-p. */
static uint32_t budget_of(const struct gpu_policy *p, const uint32_t *histogram, uint32_t candidates, uint32_t group)
{
    uint32_t k = PKV_MIN(p->k, candidates);
    if (p->top_p <= 0)
        return k;
    double total = group; /* the reference: sinks and recent weigh one per q head */
    for (uint32_t c = 1; c <= GPU_CODE_SOFTMAX_MAX; c++)
        total += histogram[c] * gpu_code_mass(c);
    double missing = p->top_p * total - group;
    uint32_t taken = 0;
    for (uint32_t c = GPU_CODE_SOFTMAX_MAX; c > 0 && missing > 0 && taken < k; c--) {
        double each = gpu_code_mass(c);
        if (histogram[c] * each < missing) {
            missing -= histogram[c] * each;
            taken += histogram[c];
        } else {
            taken += (uint32_t)ceil(missing / each);
            missing = 0;
        }
    }
    return PKV_MIN(taken, k);
}

/* Sinks, the k best in ascending order with ties to the lower index, recent. Returns the length. */
static uint32_t write_list(const struct gpu_kernels *kernels, const struct span *span, const uint16_t *codes,
                           const uint32_t *histogram, uint32_t codes_end, uint32_t k, uint32_t *index, uint16_t *score)
{
    uint32_t threshold = codes_end, above = 0, n = 0;
    while (k && threshold > 1 && above + histogram[threshold - 1] < k)
        above += histogram[--threshold];
    threshold--;
    uint32_t ties = k - above;
    for (uint32_t t = 0; t < span->first; t++)
        index[n++] = t;
    if (k)
        n += kernels->pick(codes, span->first, span->last, threshold, ties, index + n);
    for (uint32_t i = span->first; score && i < n; i++)
        score[i] = codes[index[i]];
    for (uint32_t t = span->last; t < span->visible; t++)
        index[n++] = t;
    return n;
}

static void scan_args(const struct select *s, struct gpu_scan *scan)
{
    if (scan->rule == PKV_RULE_SOFTMAX)
        return;
    int32_t low = 0, high = 0, least = INT32_MAX, most = INT32_MIN;
    uint32_t bits = s->a->geom->sig_bits;
    for (uint32_t h = 0; h < scan->group; h++) {
        int32_t negative = 0, positive = 0;
        for (uint32_t b = 0; b < bits; b++) {
            int32_t w = scan->weights[(uint64_t)h * bits + b];
            negative += w < 0 ? w : 0;
            positive += w > 0 ? w : 0;
        }
        low += negative, high += positive;
        least = PKV_MIN(least, negative), most = PKV_MAX(most, positive);
    }
    scan->low = scan->rule == PKV_RULE_SUM ? low : least;
    scan->shift = gpu_code_shift(scan->low, scan->rule == PKV_RULE_SUM ? high : most);
}

/* Without signatures: sinks, the k latest candidates, recent. */
static void select_latest(struct select *s, uint64_t item, uint32_t visible)
{
    struct gpu_policy policy = gpu_policy_by_age(s->a->geom, &s->a->policy);
    struct span span = span_of(&policy, visible);
    uint64_t list = item * s->rows->rows_max;
    if (s->rows->score)
        memset(s->rows->score + list, 0, s->rows->rows_max * sizeof(uint16_t));
    s->rows->count[item] = write_list(s->gpu->kernels, &span, NULL, NULL, 0, 0, s->rows->index + list, NULL);
}

struct scratch {
    uint16_t *codes;
    uint32_t *histogram;
    int16_t *tables;
    const uint32_t **signatures;
};

static bool scratch_get(struct gpu *gpu, uint32_t thread, const struct pkv_geom *g, uint32_t visible, struct scratch *s)
{
    struct gpu_buffer *b = gpu->buffers[thread];
    s->codes = gpu_buffer_get(&b[GPU_BUF_CODES], (uint64_t)visible * sizeof(uint16_t));
    s->histogram = gpu_buffer_get(&b[GPU_BUF_HISTOGRAM], GPU_CODES * sizeof(uint32_t));
    s->tables = gpu_buffer_get(&b[GPU_BUF_TABLES], (uint64_t)PKV_GROUP_MAX * g->sig_bits / 8 * 256 * sizeof(int16_t));
    s->signatures = gpu_buffer_get(&b[GPU_BUF_POINTERS], pkv_tokens_blocks(visible) * sizeof(void *));
    return s->codes && s->histogram && s->tables && s->signatures;
}

static void select_one(void *context, uint64_t item, uint32_t thread)
{
    struct select *s = context;
    const struct gpu_select_args *a = s->a;
    const struct pkv_geom *g = a->geom;
    uint32_t query = (uint32_t)(item / g->kv_heads), head = (uint32_t)(item % g->kv_heads), group = pkv_geom_group(g);
    struct gpu_query where = gpu_query_find(a->views, a->seqs, query);
    if (!g->sig_bits) {
        select_latest(s, item, where.visible);
        return;
    }
    struct span span = span_of(&a->policy, where.visible);
    struct scratch x;
    if (!scratch_get(s->gpu, thread, g, where.visible, &x)) {
        __atomic_store_n(&s->no_memory, 1, __ATOMIC_RELAXED);
        return;
    }
    uint64_t begin = gpu_now_ns();
    for (uint32_t b = 0; b < pkv_tokens_blocks(where.visible); b++)
        x.signatures[b] = (const uint32_t *)(const void *)(gpu_place(&a->space, where.view->blocks[b].signatures,
                                                                     pkv_geom_sig_block_bytes(g)) +
                                                           pkv_geom_sig_index(g, head, 0, 0) * 4ull);
    bool softmax = a->policy.rule == PKV_RULE_SOFTMAX;
    memset(x.histogram, 0, (softmax ? GPU_CODE_SOFTMAX_MAX + 1 : GPU_CODES) * sizeof(uint32_t));
    uint64_t q_head = (uint64_t)query * g->q_heads + (uint64_t)head * group;
    const int8_t *weights = a->weights + q_head * g->sig_bits;
    float biases[PKV_GROUP_MAX] = {0};
    if (softmax)
        biases_of(s, where.view, head, (const char *)a->q + q_head * g->head_dim * pkv_dtype_bytes(g->dtype), weights,
                  a->scales + q_head, &span, x.signatures, biases);
    struct gpu_scan scan = {.signatures = x.signatures,
                            .first = span.first,
                            .last = span.last,
                            .group = group,
                            .words = pkv_geom_words(g),
                            .weights = weights,
                            .scales = a->scales + q_head,
                            .biases = biases,
                            .rule = a->policy.rule,
                            .k = a->policy.top_p > 0 ? 0 : a->policy.k,
                            .tables = x.tables,
                            .codes = x.codes,
                            .histogram = x.histogram};
    scan_args(s, &scan);
    s->gpu->kernels->scan(&scan);
    uint64_t scanned = gpu_now_ns();
    uint32_t k = budget_of(&a->policy, x.histogram, span.last - span.first, group);
    uint64_t list = item * s->rows->rows_max;
    if (s->rows->score)
        memset(s->rows->score + list, 0, s->rows->rows_max * sizeof(uint16_t));
    s->rows->count[item] =
        write_list(s->gpu->kernels, &span, x.codes, x.histogram, softmax ? GPU_CODE_SOFTMAX_MAX + 1 : GPU_CODES, k,
                   s->rows->index + list, s->rows->score ? s->rows->score + list : NULL);
    __atomic_fetch_add(&s->scan_ns, scanned - begin, __ATOMIC_RELAXED);
    __atomic_fetch_add(&s->select_ns, gpu_now_ns() - scanned, __ATOMIC_RELAXED);
}

int gpu_check_policy(const struct pkv_geom *geom, const struct gpu_policy *policy, uint32_t seqs, const struct gpu_view *views)
{
    for (uint32_t s = 0; s < seqs; s++) {
        struct pkv_select_args wire = {.tokens = views[s].tokens,
                                       .queries = views[s].queries,
                                       .k = policy->k,
                                       .top_p = policy->top_p,
                                       .scale = gpu_scale(policy->scale, geom),
                                       .sinks = policy->sinks,
                                       .recent = policy->recent,
                                       .rule = policy->rule};
        enum pkv_err e = pkv_check_select(&wire);
        if (e != PKV_ERR_OK)
            return -(int)e;
    }
    return 0;
}

int host_select(struct gpu *gpu, const struct gpu_select_args *a, const struct gpu_rows *rows)
{
    struct select s = {.gpu = gpu, .a = a, .rows = rows, .scale = gpu_scale(a->policy.scale, a->geom)};
    uint64_t items = (uint64_t)gpu_queries(a->views, a->seqs) * a->geom->kv_heads;
    gpu_team_run(&gpu->team, select_one, &s, items);
    if (s.no_memory)
        return -PKV_ERR_NO_MEMORY;
    if (a->explain) {
        a->explain->scan_ns += s.scan_ns;
        a->explain->select_ns += s.select_ns;
    }
    return 0;
}

/* The device's kernels leave lists empty that would hold everything. */
static bool sparse(const struct gpu_select_args *a, const struct gpu_rows *rows)
{
    for (uint32_t s = 0; s < a->seqs; s++)
        if (a->views[s].tokens - a->views[s].queries < rows->rows_max)
            return false;
    return true;
}

int gpu_select(struct gpu *gpu, const struct gpu_select_args *a, const struct gpu_rows *rows)
{
    int r = gpu_check_views(gpu, a->geom, &a->space, a->seqs, a->views, a->q, true);
    if (!r)
        r = gpu_check_policy(a->geom, &a->policy, a->seqs, a->views);
    if (r)
        return r;
    if (rows->rows_max < a->policy.sinks + a->policy.recent + a->policy.k)
        return -PKV_ERR_SHAPE;
    if (!gpu->backend)
        return host_select(gpu, a, rows);
    return sparse(a, rows) ? gpu->backend->select(gpu->device, a, rows) : staged_select(gpu, a, rows);
}

struct gather {
    const struct gpu_select_args *a;
    const struct gpu_rows *rows;
    char *to;
};

static void gather_one(void *context, uint64_t item, uint32_t thread)
{
    (void)thread;
    struct gather *p = context;
    const struct pkv_geom *g = p->a->geom;
    uint32_t query = (uint32_t)(item / g->kv_heads), head = (uint32_t)(item % g->kv_heads);
    const struct gpu_view *view = gpu_query_find(p->a->views, p->a->seqs, query).view;
    uint64_t bytes = pkv_geom_row_bytes(g), list = item * p->rows->rows_max;
    for (uint32_t i = 0; i < p->rows->count[item]; i++)
        memcpy(p->to + (list + i) * bytes, row_of(p->a, view, head, p->rows->index[list + i]), bytes);
}

int gpu_gather(struct gpu *gpu, const struct gpu_select_args *a, const struct gpu_rows *rows, void *ret)
{
    uint64_t begin = gpu_now_ns();
    struct gather p = {a, rows, ret};
    int r = gpu->backend ? gpu->backend->gather(gpu->device, a, rows, ret) : 0;
    if (!gpu->backend)
        gpu_team_run(&gpu->team, gather_one, &p, (uint64_t)gpu_queries(a->views, a->seqs) * a->geom->kv_heads);
    if (a->explain)
        a->explain->gather_ns += gpu_now_ns() - begin;
    return r;
}
