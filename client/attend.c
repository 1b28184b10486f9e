/* Attend, select, audit. Direct: the worker enters its epoch, copies the references, and runs the kernels on the daemon's
 * memory; the daemon is not asked. Served: the same steps with a mover of the daemon in the middle (served.c). */
#include "client/internal.h"

int budget_policy(const struct pkv_budget *b, struct gpu_policy *ret)
{
    if (b->size != sizeof(*b) || b->rule >= PKV_RULES || b->dense > 1)
        return -PKV_ERR_INVALID;
    *ret = (struct gpu_policy){.k = b->k,
                               .top_p = b->top_p,
                               .scale = b->scale,
                               .sinks = b->sinks,
                               .recent = b->recent,
                               .rule = b->rule,
                               .dense_below = b->dense ? UINT32_MAX : b->dense_below};
    if (b->k > PKV_SELECT_MAX)
        return -PKV_ERR_BUDGET;
    return b->sinks > PKV_SINKS_MAX || b->recent > PKV_RECENT_MAX ? -PKV_ERR_SHAPE : 0;
}

/* Everything but the references of the views. */
static int views_of(struct pkv_seq *const *seqs, const uint32_t *queries, uint32_t count, uint32_t layer,
                    struct gpu_view *views)
{
    uint64_t total = 0;
    if (!count || count > PKV_BATCH_MAX)
        return -PKV_ERR_SHAPE;
    for (uint32_t i = 0; i < count; i++) {
        int r = seqs[i]->model == seqs[0]->model ? seq_check(seqs[i], layer) : -PKV_ERR_INVALID;
        r = r ? r : seq_settle(seqs[i], queries[i]);
        if (r)
            return r;
        views[i] = (struct gpu_view){.tokens = seq_layer_tokens(seqs[i], layer), .queries = queries[i]};
        total += queries[i];
        if (!queries[i] || queries[i] > views[i].tokens)
            return -PKV_ERR_SHAPE;
    }
    return total <= PKV_QUERIES_MAX ? 0 : -PKV_ERR_SHAPE;
}

/* Inside an epoch. */
static int views_fill(struct pkv_seq *const *seqs, uint32_t count, uint32_t layer, struct gpu_view *views)
{
    uint64_t blocks = 0;
    for (uint32_t i = 0; i < count; i++)
        blocks += pkv_tokens_blocks(views[i].tokens);
    struct pkv_block_ref *refs = region_refs(seqs[0]->model->kv, blocks);
    int r = refs ? 0 : -PKV_ERR_NO_MEMORY;
    for (uint32_t i = 0; i < count && !r; i++) {
        uint32_t n = pkv_tokens_blocks(views[i].tokens);
        r = seq_refs(seqs[i], layer, 0, n, refs);
        views[i].blocks = refs;
        refs += n;
    }
    return r;
}

static void count_up(struct pkv *kv, const struct gpu_explain *e, struct pkv_explain *ret)
{
    struct pkv_worker_counters *c = &kv->region->counters;
    c->attend_calls++;
    c->attend_dense += e->dense, c->attend_sparse += e->sparse;
    c->tokens_seen += e->seen, c->tokens_attended += e->attended;
    c->rows_pool += e->rows_pool, c->rows_arena += e->rows_arena;
    c->sign_ns += e->sign_ns, c->scan_ns += e->scan_ns, c->select_ns += e->select_ns;
    c->gather_ns += e->gather_ns, c->attend_ns += e->attend_ns;
    if (ret)
        *ret = (struct pkv_explain){e->dense,   e->sparse,  e->seen,      e->attended,  e->rows_pool, e->rows_arena,
                                    e->sign_ns, e->scan_ns, e->select_ns, e->gather_ns, e->attend_ns};
}

static int attend_served(struct pkv_seq *const *seqs, uint32_t count, uint32_t layer, const struct gpu_view *views,
                         const struct gpu_policy *policy, const char *q, float *out, float *lse, struct gpu_explain *explain)
{
    const struct pkv_geom *g = &seqs[0]->model->geom;
    uint64_t done = 0, q_bytes = (uint64_t)g->q_heads * g->head_dim * pkv_dtype_bytes(g->dtype);
    int r = 0;
    for (uint32_t i = 0; i < count && !r; done += views[i++].queries) {
        struct attend_part part = {.seq = seqs[i],
                                   .layer = layer,
                                   .view = views[i],
                                   .policy = *policy,
                                   .q = q + done * q_bytes,
                                   .out = out + done * g->q_heads * g->head_dim,
                                   .lse = lse ? lse + done * g->q_heads : NULL};
        r = served_attend(&part, explain);
    }
    return r;
}

/* One call of the kernels for each run of sequences that are signed alike. */
static int attend_direct(struct pkv_seq *const *seqs, uint32_t count, uint32_t layer, const struct gpu_view *views,
                         const struct gpu_policy *policy, const char *q, float *out, float *lse, struct gpu_explain *explain)
{
    struct pkv_model *m = seqs[0]->model;
    uint64_t vectors = (uint64_t)m->geom.q_heads * m->geom.head_dim, tokens = 0;
    int r = 0;
    for (uint32_t i = 0, n; i < count && !r; i += n) {
        for (n = 1; i + n < count && seq_scheme(seqs[i + n], layer) == seq_scheme(seqs[i], layer); n++)
            ;
        struct gpu_attend_args args = {.geom = &m->geom,
                                       .space = region_readable(m->kv),
                                       .policy = *policy,
                                       .scheme = seq_scheme(seqs[i], layer),
                                       .layer = layer,
                                       .seqs = n,
                                       .views = views + i,
                                       .q = q + tokens * vectors * pkv_dtype_bytes(m->geom.dtype),
                                       .out = out + tokens * vectors,
                                       .lse = lse ? lse + tokens * m->geom.q_heads : NULL,
                                       .explain = explain};
        r = gpu_attend(m->kv->gpu, &args);
        for (uint32_t s = i; s < i + n; s++)
            tokens += views[s].queries;
    }
    return r;
}

/* Queries of a writer, to a scheme that still learns from them. */
static int learn_queries(struct pkv_seq *const *seqs, const struct gpu_view *views, uint32_t count, uint32_t layer,
                         const char *q)
{
    const struct pkv_model *m = seqs[0]->model;
    uint64_t each = (uint64_t)m->geom.q_heads * m->geom.head_dim * pkv_dtype_bytes(m->geom.dtype);
    int r = 0;
    bool learns = m->learns && (!model_published(m).latest || model_published(m).wanted || m->calibration.number);
    for (uint32_t i = 0; i < count && !r && learns; q += views[i++].queries * each) {
        struct gpu_observation o = {.layer = layer,
                                    .tokens = views[i].queries,
                                    .first_token = views[i].tokens - views[i].queries,
                                    .context = seqs[i]->max_tokens,
                                    .q = q};
        if (seqs[i]->writer)
            r = model_learn(seqs[i], &o);
    }
    return r;
}

static int attend(struct pkv_seq *const *seqs, const uint32_t *queries, uint32_t count, uint32_t layer, const void *q,
                  const struct gpu_policy *policy, float *out, float *lse, struct gpu_explain *explain)
{
    struct gpu_view views[PKV_BATCH_MAX];
    struct pkv *kv = seqs[0]->model->kv;
    int r = views_of(seqs, queries, count, layer, views);
    r = r ? r : learn_queries(seqs, views, count, layer, q);
    if (r)
        return r;
    pkv_epoch_enter(kv->region, kv->control);
    r = views_fill(seqs, count, layer, views);
    if (!r && kv->served)
        r = attend_served(seqs, count, layer, views, policy, q, out, lse, explain);
    else if (!r)
        r = attend_direct(seqs, count, layer, views, policy, q, out, lse, explain);
    pkv_epoch_leave(kv->region);
    return r;
}

int pkv_attend(struct pkv_seq *const *seqs, const uint32_t *queries, uint32_t count, uint32_t layer, const void *q,
               const struct pkv_budget *budget, float *out, float *lse, struct pkv_explain *explain)
{
    struct gpu_explain e = {0};
    struct gpu_policy policy;
    struct pkv *kv = seqs[0]->model->kv;
    int r = budget_policy(budget, &policy);
    lse = audit_begin(seqs, queries, count, layer, lse);
    r = r ? r : attend(seqs, queries, count, layer, q, &policy, out, lse, &e);
    if (!r) {
        count_up(kv, &e, explain);
        audit_end(kv, &(struct audit_call){&policy, q, out, lse, e.sparse});
    }
    return kv_done(kv, r);
}

static int select_direct(const struct attend_part *p, const struct gpu_rows *rows, void *gathered)
{
    struct pkv_model *m = p->seq->model;
    uint64_t heads = (uint64_t)p->view.queries * m->geom.q_heads;
    int8_t *weights = malloc(heads * PKV_MAX(m->geom.sig_bits, 1u));
    float *scales = malloc(heads * sizeof(*scales));
    struct gpu_weights_args sign = {.geom = &m->geom,
                                    .scheme = seq_scheme(p->seq, p->layer),
                                    .layer = p->layer,
                                    .queries = p->view.queries,
                                    .scale = p->policy.scale,
                                    .q = p->q,
                                    .ret_weights = weights,
                                    .ret_scales = scales};
    struct gpu_select_args args = {.geom = &m->geom,
                                   .space = region_readable(m->kv),
                                   .policy = p->policy,
                                   .seqs = 1,
                                   .views = &p->view,
                                   .q = p->q,
                                   .weights = weights,
                                   .scales = scales};
    int r = weights && scales ? gpu_weights(m->kv->gpu, &sign) : -PKV_ERR_NO_MEMORY;
    r = r ? r : gpu_select(m->kv->gpu, &args, rows);
    if (!r && gathered)
        r = gpu_gather(m->kv->gpu, &args, rows, gathered);
    free(weights);
    free(scales);
    return r;
}

int pkv_select(struct pkv_seq *seq, uint32_t queries, uint32_t layer, const void *q, const struct pkv_budget *budget,
               uint32_t *index, uint32_t *count, uint16_t *score, void *rows)
{
    struct pkv *kv = seq->model->kv;
    struct attend_part part = {.seq = seq, .layer = layer, .q = q};
    int r = budget_policy(budget, &part.policy);
    if (!r && budget->dense)
        r = -PKV_ERR_INVALID;
    r = r ? r : views_of(&seq, &queries, 1, layer, &part.view);
    if (!r) {
        struct gpu_rows lists = {
            .rows_max = budget->sinks + budget->recent + budget->k, .index = index, .count = count, .score = score};
        pkv_epoch_enter(kv->region, kv->control);
        r = views_fill(&seq, 1, layer, &part.view);
        if (!r)
            r = kv->served ? served_select(&part, &lists, rows) : select_direct(&part, &lists, rows);
        pkv_epoch_leave(kv->region);
    }
    return kv_done(kv, r);
}

int pkv_audit(struct pkv_seq *seq, uint32_t queries, uint32_t layer, const void *q, const struct pkv_budget *budget,
              double *ret_mass, double *ret_error)
{
    struct pkv *kv = seq->model->kv;
    const struct pkv_geom *g = &seq->model->geom;
    struct gpu_policy policy, dense;
    struct gpu_explain ignored = {0};
    uint64_t heads = (uint64_t)PKV_MIN(queries, PKV_QUERIES_MAX) * g->q_heads;
    float *out = malloc(heads * (2ull * g->head_dim + 2) * sizeof(*out));
    int r = out ? budget_policy(budget, &policy) : -PKV_ERR_NO_MEMORY;
    if (!r) {
        float *exact = out + heads * g->head_dim, *lse = exact + heads * g->head_dim, *exact_lse = lse + heads;
        dense = policy, dense.dense_below = UINT32_MAX;
        r = attend(&seq, &queries, 1, layer, q, &policy, out, lse, &ignored);
        r = r ? r : attend(&seq, &queries, 1, layer, q, &dense, exact, exact_lse, &ignored);
        double mass = 0, error = 0;
        for (uint64_t h = 0; h < heads && !r; h++) {
            mass += audit_mass(lse[h], exact_lse[h]);
            error += audit_error(out + h * g->head_dim, exact + h * g->head_dim, g->head_dim);
        }
        if (!r) {
            *ret_mass = mass / (double)heads, *ret_error = error / (double)heads;
            kv->region->counters.audits++;
            kv->region->counters.audit_mass_ppm += (uint64_t)(*ret_mass * 1e6);
            kv->region->counters.audit_error_ppm += (uint64_t)(*ret_error * 1e6);
        }
    }
    free(out);
    return kv_done(kv, r);
}
