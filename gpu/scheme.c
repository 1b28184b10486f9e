/* Signature schemes: opening, closing, and queries into int8 weights, the same for all. */
#include "gpu/scheme.h"

#include "proto/check.h"

#include <stdlib.h>
#include <string.h>

int gpu_scheme_open(uint32_t kind, const struct pkv_geom *geom, const char *path, struct gpu_scheme **ret,
                    uint8_t ret_digest[PKV_DIGEST_BYTES])
{
    enum pkv_err e = pkv_check_geom(geom);
    if (e == PKV_ERR_OK)
        e = pkv_check_scheme(kind, geom);
    if (e != PKV_ERR_OK)
        return -(int)e;
    /* `sign` and `code` have their weights in a file or learn them; the others need a file. */
    if (!path && kind != PKV_SCHEME_SIGN && kind != PKV_SCHEME_CODE && kind != PKV_SCHEME_NONE)
        return -PKV_ERR_FILE_NEEDED;
    if (path && kind == PKV_SCHEME_NONE)
        return -PKV_ERR_FILE_SCHEME;
    struct gpu_scheme *s = calloc(1, sizeof(*s));
    if (!s)
        return -PKV_ERR_NO_MEMORY;
    s->kind = kind, s->geom = *geom, s->unit = 1.0f;
    memset(ret_digest, 0, PKV_DIGEST_BYTES);
    int r = path                      ? scheme_file_open(s, path, ret_digest)
            : kind == PKV_SCHEME_SIGN ? scheme_sign_open(s)
            : kind == PKV_SCHEME_CODE ? scheme_learn_open(s)
                                      : 0; /* none: never asked */
    if (r) {
        gpu_scheme_close(s);
        return r;
    }
    scheme_changed(s);
    *ret = s;
    return 0;
}

void scheme_changed(struct gpu_scheme *s)
{
    static uint64_t versions;
    s->version = __atomic_add_fetch(&versions, 1, __ATOMIC_RELAXED);
}

void gpu_scheme_close(struct gpu_scheme *s)
{
    if (!s)
        return;
    for (uint32_t i = 0; i < SCHEME_STAGES_MAX; i++) {
        free(s->k[i].weight), free(s->k[i].bias);
        free(s->q[i].weight), free(s->q[i].bias);
    }
    scheme_moments_free(s);
    free(s->signs), free(s->mean), free(s->deviation), free(s->learnt);
    free(s->low), free(s->step), free(s->bits);
    free(s);
}

struct weigh {
    struct gpu *gpu;
    const struct gpu_weights_args *a;
    float scale;
};

/* One scale per q head: the largest weight becomes 127. Weights of +-1 stay what they are: a plain Hamming distance. */
static void round_weights(const struct gpu_weights_args *a, const float *w, float unit, uint64_t item)
{
    uint32_t bits = a->geom->sig_bits;
    float max = 0;
    for (uint32_t b = 0; b < bits; b++)
        max = fabsf(w[b]) > max ? fabsf(w[b]) : max;
    max = isfinite(max) ? max : 0;
    float step = a->scheme->q_signs ? 1.0f : max > 0 ? 127.0f / max : 0.0f;
    for (uint32_t b = 0; b < bits; b++)
        a->ret_weights[item * bits + b] = step > 0 ? (int8_t)lrintf(w[b] * step) : 0;
    a->ret_scales[item] = step > 0 ? unit / step : 0;
}

/* A q head's queries, GPU_COLUMNS of them. */
static void weigh_some(void *context, uint64_t item, uint32_t thread)
{
    (void)thread;
    struct weigh *p = context;
    const struct pkv_geom *g = p->a->geom;
    const struct gpu_kernels *k = p->gpu->kernels;
    uint32_t head = (uint32_t)(item % g->q_heads), first = (uint32_t)(item / g->q_heads) * GPU_COLUMNS;
    uint32_t count = PKV_MIN(GPU_COLUMNS, p->a->queries - first);
    float q[GPU_COLUMNS * PKV_HEAD_DIM_MAX], w[GPU_COLUMNS * PKV_SIG_BITS_MAX], unit;
    uint32_t n = 0;
    do { /* there is one */
        uint64_t at = ((uint64_t)(first + n) * g->q_heads + head) * g->head_dim * pkv_dtype_bytes(g->dtype);
        k->to_float((const char *)p->a->q + at, g->dtype, q + (uint64_t)n * g->head_dim, g->head_dim);
    } while (++n < count);
    p->a->scheme->verbs->weigh(p->a->scheme, k, p->a->layer, head, q, count, p->scale, w, &unit);
    for (uint32_t i = 0; i < count; i++)
        round_weights(p->a, w + (uint64_t)i * g->sig_bits, unit, (uint64_t)(first + i) * g->q_heads + head);
}

int gpu_weights(struct gpu *gpu, const struct gpu_weights_args *a)
{
    if (!a->queries || a->queries > PKV_QUERIES_MAX || a->layer >= a->geom->layers)
        return -PKV_ERR_SHAPE;
    if (memcmp(a->geom, &a->scheme->geom, sizeof(*a->geom)))
        return -PKV_ERR_FILE_FIT;
    if (!gpu->kernels->finite(a->q, a->geom->dtype, (uint64_t)a->queries * a->geom->q_heads * a->geom->head_dim))
        return -PKV_ERR_NOT_FINITE;
    if (!a->geom->sig_bits) {
        memset(a->ret_scales, 0, (uint64_t)a->queries * a->geom->q_heads * sizeof(*a->ret_scales));
        return 0;
    }
    struct weigh p = {gpu, a, gpu_scale(a->scale, a->geom)};
    gpu_team_run(&gpu->team, weigh_some, &p, (uint64_t)PKV_DIV_UP(a->queries, GPU_COLUMNS) * a->geom->q_heads);
    return 0;
}
