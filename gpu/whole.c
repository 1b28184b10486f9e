/* The whole attend of direct mode: weights, selection, attention. Apart from its pieces, because weights bring the schemes
 * along, and those a linear-algebra library, which a daemon that only selects has no use for. */
#include "gpu/internal.h"
#include "gpu/module.h"

static bool dense_view(const struct gpu_policy *p, uint64_t tokens)
{
    return tokens < p->dense_below || tokens <= (uint64_t)p->sinks + p->recent + p->k;
}

static int attend_dense(struct gpu *gpu, const struct gpu_attend_args *a, const struct gpu_view *view, const void *q,
                        float *out, float *lse)
{
    uint64_t heads = (uint64_t)view->queries * a->geom->q_heads;
    float *state = gpu_buffer_get(&gpu->shared[GPU_SHARED_STATE], 2 * heads * sizeof(float));
    if (!state)
        return -PKV_ERR_NO_MEMORY;
    struct gpu_dense_args dense = {.geom = a->geom,
                                   .space = a->space,
                                   .scale = a->policy.scale,
                                   .seqs = 1,
                                   .views = view,
                                   .q = q,
                                   .blocks = UINT32_MAX,
                                   .start = true,
                                   .finish = true,
                                   .out = out,
                                   .max = state,
                                   .sum = state + heads,
                                   .lse = lse,
                                   .explain = a->explain};
    return gpu_dense(gpu, &dense);
}

static int attend_sparse(struct gpu *gpu, const struct gpu_attend_args *a, const struct gpu_view *view, const void *q,
                         float *out, float *lse)
{
    const struct pkv_geom *g = a->geom;
    uint64_t heads = (uint64_t)view->queries * g->q_heads, lists = (uint64_t)view->queries * g->kv_heads;
    struct gpu_rows rows = {.rows_max = a->policy.sinks + a->policy.recent + a->policy.k};
    int8_t *weights = gpu_buffer_get(&gpu->shared[GPU_SHARED_WEIGHTS], heads * PKV_MAX(g->sig_bits, 1u));
    float *scales = gpu_buffer_get(&gpu->shared[GPU_SHARED_SCALES], heads * sizeof(float));
    rows.count = gpu_buffer_get(&gpu->shared[GPU_SHARED_ROWS], (lists + lists * rows.rows_max) * sizeof(uint32_t));
    if (!weights || !scales || !rows.count)
        return -PKV_ERR_NO_MEMORY;
    rows.index = rows.count + lists;
    uint64_t begin = gpu_now_ns();
    struct gpu_weights_args sign = {g, a->scheme, a->layer, view->queries, a->policy.scale, q, weights, scales};
    int r = gpu_weights(gpu, &sign);
    if (r)
        return r;
    if (a->explain)
        a->explain->sign_ns += gpu_now_ns() - begin;
    struct gpu_select_args select = {g, a->space, a->policy, 1, view, q, weights, scales, a->explain};
    r = gpu_select(gpu, &select, &rows);
    return r ? r : gpu_attend_rows(gpu, &select, &rows, NULL, out, lse);
}

static int attend_device(struct gpu *gpu, const struct gpu_attend_args *a)
{
    int r = gpu_check_policy(a->geom, &a->policy, a->seqs, a->views);
    return r ? r : gpu->backend->attend(gpu->device, a);
}

/* Neighbours that a device attends in one call. */
static uint32_t together(const struct gpu *gpu, const struct gpu_attend_args *a, uint32_t first)
{
    uint32_t n = 1;
    while (gpu->backend && first + n < a->seqs && !dense_view(&a->policy, a->views[first + n].tokens))
        n++;
    return n;
}

int gpu_attend(struct gpu *gpu, const struct gpu_attend_args *a)
{
    int r = gpu_check_views(gpu, a->geom, &a->space, a->seqs, a->views, a->q, true);
    if (r)
        return r;
    const struct pkv_geom *g = a->geom;
    uint64_t done = 0, q_bytes = (uint64_t)g->head_dim * pkv_dtype_bytes(g->dtype);
    for (uint32_t s = 0, n = 1; s < a->seqs && !r; s += n) {
        const struct gpu_view *view = &a->views[s];
        struct gpu_attend_args part = *a;
        part.q = (const char *)a->q + done * g->q_heads * q_bytes;
        part.out = a->out + done * g->q_heads * g->head_dim;
        part.lse = a->lse ? a->lse + done * g->q_heads : NULL;
        bool dense = dense_view(&a->policy, view->tokens);
        /* A k of nothing or beyond the length is the caller's mistake, unless the sequence is dense by its own wish. */
        if (dense && view->tokens >= a->policy.dense_below && (!a->policy.k || a->policy.k > view->tokens))
            return a->policy.k ? -PKV_ERR_BUDGET_LENGTH : -PKV_ERR_BUDGET;
        n = dense ? 1 : together(gpu, a, s);
        part.views = view, part.seqs = n;
        if (dense)
            r = attend_dense(gpu, a, view, part.q, part.out, part.lse);
        else if (gpu->backend)
            r = attend_device(gpu, &part);
        else
            r = attend_sparse(gpu, a, view, part.q, part.out, part.lse);
        done += gpu_queries(view, n);
    }
    return r;
}
