/* Served select: scan and select over the queries' weights, then the chosen rows into the data area. Everything that steers
 * the work is copied out of the data area before it is checked and used: its owner may change it at any moment. */
#include "cachesvc/optable.h"
#include "cachesvc/served.h"

#include "proto/check.h"

#include <math.h>
#include <stdlib.h>

struct scratch {
    char *query; /* q, weights and scales as pkv_served_query lays them */
    uint32_t *index, *count;
    uint16_t *score;
};

static bool scratch_get(struct scratch *x, uint64_t query_bytes, uint64_t lists, uint32_t rows_max)
{
    x->query = malloc(query_bytes);
    x->count = malloc(lists * sizeof(*x->count));
    x->index = malloc(lists * rows_max * sizeof(*x->index));
    x->score = malloc(lists * rows_max * sizeof(*x->score));
    return x->query && x->count && x->index && x->score;
}

static void scratch_free(struct scratch *x)
{
    free(x->query);
    free(x->count);
    free(x->index);
    free(x->score);
}

static int select_and_gather(struct served *s, const struct scratch *x, uint32_t rows_max)
{
    struct daemon *d = s->worker->daemon;
    const struct pkv_select_args *a = &s->select;
    struct pkv_served_query in = pkv_served_query(&s->geom, a->queries);
    struct pkv_served_result at = pkv_served_result(&s->geom, a->queries, rows_max, a->flags);
    uint64_t lists = (uint64_t)a->queries * s->geom.kv_heads;
    struct gpu_view view = {.blocks = s->blocks, .tokens = a->tokens, .queries = a->queries};
    const float *scales = (const float *)(const void *)(x->query + in.scales);
    for (uint64_t i = 0; i < (uint64_t)a->queries * s->geom.q_heads; i++)
        if (!isfinite(scales[i]))
            return -PKV_ERR_NOT_FINITE;
    struct gpu_select_args args = {
        .geom = &s->geom,
        .space = memory_space(&d->memory),
        .policy = {.k = a->k, .top_p = a->top_p, .scale = a->scale, .sinks = a->sinks, .recent = a->recent, .rule = a->rule},
        .seqs = 1,
        .views = &view,
        .q = x->query + in.q,
        .weights = (const int8_t *)(x->query + in.weights),
        .scales = scales};
    struct gpu_rows rows = {.rows_max = rows_max, .index = x->index, .count = x->count, .score = x->score};
    int r = gpu_select(s->gpu, &args, &rows);
    if (r)
        return r;
    char *out = worker_data(s->worker) + s->submission.u.select.out_off;
    memcpy(out + at.count, x->count, lists * sizeof(*x->count));
    memcpy(out + at.index, x->index, lists * rows_max * sizeof(*x->index));
    memcpy(out + at.score, x->score, lists * rows_max * sizeof(*x->score));
    for (uint64_t i = 0; i < lists; i++)
        s->value0 += x->count[i];
    return a->flags & PKV_SELECT_NO_ROWS ? 0 : gpu_gather(s->gpu, &args, &rows, out + at.rows);
}

static void work(struct served *s)
{
    const struct pkv_select_args *a = &s->select;
    uint32_t rows_max = a->sinks + a->recent + a->k;
    uint64_t bytes = pkv_served_query(&s->geom, a->queries).bytes;
    struct scratch x = {0};
    if (!scratch_get(&x, bytes, (uint64_t)a->queries * s->geom.kv_heads, rows_max)) {
        s->err = PKV_ERR_NO_MEMORY;
    } else {
        memcpy(x.query, worker_data(s->worker) + s->submission.u.select.data_off, bytes);
        s->err = (enum pkv_err) - select_and_gather(s, &x, rows_max);
    }
    scratch_free(&x);
}

void op_select(struct worker *w, const struct pkv_submission *s)
{
    const struct pkv_op_select *op = &s->u.select;
    struct pkv_select_args args;
    memcpy(&args, worker_data(w) + op->data_off, sizeof(args));
    enum pkv_err e = pkv_check_select(&args);
    if (e != PKV_ERR_OK) {
        worker_complete(w, s->tag, e, 0, 0);
        return;
    }
    struct served_span span = {.tokens = args.tokens};
    struct served *job = served_new(w, s, &span, work);
    if (!job)
        return;
    job->select = args;
    w->daemon->counters.served_selects += args.queries;
    uint32_t rows_max = args.sinks + args.recent + args.k;
    if (pkv_served_query(&job->geom, args.queries).bytes > op->data_bytes ||
        pkv_served_result(&job->geom, args.queries, rows_max, args.flags).bytes > op->out_bytes)
        served_refuse(job, PKV_ERR_DATA_SMALL);
    else
        served_submit(job);
}
