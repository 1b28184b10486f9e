/* What a scheme has learnt: when it is complete, and as bytes, so that other workers sign alike. */
#include "gpu/scheme.h"

#include <string.h>

bool gpu_scheme_observe(struct gpu_scheme *s, const struct gpu_observation *o)
{
    if (o->layer >= s->geom.layers || !s->learnt || !o->context)
        return false;
    const struct pkv_geom *g = &s->geom;
    uint64_t vector = g->head_dim, keys = o->tokens * g->kv_heads * vector, queries = o->tokens * g->q_heads * vector;
    if ((o->k && !gpu_kernels_c.finite(o->k, g->dtype, keys)) || (o->q && !gpu_kernels_c.finite(o->q, g->dtype, queries)))
        return false; /* whoever uses them says so */
    bool first = scheme_sign_observe(s, o);
    scheme_learn_observe(s, o);
    if (first)
        scheme_changed(s);
    return first;
}

uint64_t gpu_scheme_version(const struct gpu_scheme *s)
{
    return s->version;
}

bool gpu_scheme_settled(const struct gpu_scheme *s)
{
    for (uint32_t l = 0; s->learnt && l < s->geom.layers; l++)
        if (!s->learnt[l])
            return false;
    return !s->moments;
}

/* ---- state: a head, then what each layer has learnt, then the arrays ---- */

struct state_head {
    uint32_t magic, kind;
    struct pkv_geom geom;
    uint64_t seed;
};
#define STATE_MAGIC 0x33545350u
enum { LEARNT, MEAN, DEVIATION, K_MAP, Q_MAP, LOW, STEP, BITS, ARRAYS_MAX }; /* in this order; the last five for `code` */

struct array {
    void *data;
    uint64_t bytes;
};

/* The arrays in their order; how many. What came from a file is there already. */
static uint32_t arrays_of(const struct gpu_scheme *s, struct array *a)
{
    const struct pkv_geom *g = &s->geom;
    uint64_t heads = (uint64_t)g->layers * g->kv_heads, square = (uint64_t)g->head_dim * g->head_dim * sizeof(float);
    uint32_t n = 0;
    if (!s->learnt)
        return 0;
    a[n++] = (struct array){s->learnt, g->layers};
    a[n++] = (struct array){s->mean, heads * g->head_dim * sizeof(float)};
    a[n++] = (struct array){s->deviation, heads * g->sig_bits * sizeof(float)};
    if (s->kind == PKV_SCHEME_CODE) {
        a[n++] = (struct array){s->k[0].weight, heads * square};
        a[n++] = (struct array){s->q[0].weight, heads * square};
        a[n++] = (struct array){s->low, heads * s->dims * sizeof(float)};
        a[n++] = (struct array){s->step, heads * s->dims * sizeof(float)};
        a[n++] = (struct array){s->bits, heads * s->dims};
    }
    return n;
}

uint64_t gpu_scheme_state_bytes(const struct gpu_scheme *s)
{
    struct array a[ARRAYS_MAX];
    uint64_t bytes = sizeof(struct state_head);
    for (uint32_t i = 0, n = arrays_of(s, a); i < n; i++)
        bytes += PKV_ALIGN_UP(a[i].bytes, 8u);
    return bytes;
}

void gpu_scheme_state_export(const struct gpu_scheme *s, void *ret)
{
    struct state_head head = {STATE_MAGIC, s->kind, s->geom, s->seed};
    struct array a[ARRAYS_MAX];
    char *to = ret;
    memset(ret, 0, gpu_scheme_state_bytes(s));
    memcpy(to, &head, sizeof(head));
    to += sizeof(head);
    for (uint32_t i = 0, n = arrays_of(s, a); i < n; i++) {
        memcpy(to, a[i].data, a[i].bytes);
        to += PKV_ALIGN_UP(a[i].bytes, 8u);
    }
}

/* Another process wrote it: levels and bits must be such that signing stays within its arrays. */
static bool sound(const struct gpu_scheme *s, const struct array *from, uint32_t n)
{
    uint64_t dims = (uint64_t)s->geom.layers * s->geom.kv_heads * s->dims;
    const uint8_t *learnt = n ? from[LEARNT].data : NULL;
    for (uint32_t l = 0; n && l < s->geom.layers; l++)
        if (!learnt[l] || learnt[l] > (s->kind == PKV_SCHEME_CODE ? SCHEME_SOLVED : 1))
            return false;
    for (uint32_t i = MEAN; i < n && i < BITS; i++)
        if (!gpu_kernels_c.finite(from[i].data, PKV_F32, from[i].bytes / sizeof(float)))
            return false;
    if (n < ARRAYS_MAX)
        return true;
    const float *step = from[STEP].data;
    const uint8_t *bits = from[BITS].data;
    for (uint64_t d = 0; d < dims; d += s->dims) {
        uint32_t total = 0;
        bool solved = learnt[d / s->dims / s->geom.kv_heads] == SCHEME_SOLVED;
        for (uint32_t i = 0; i < s->dims; i++) {
            total += bits[d + i];
            if (bits[d + i] > SCHEME_BITS_MAX || !(step[d + i] > 0))
                return false;
        }
        if (solved && total != s->geom.sig_bits)
            return false;
    }
    return true;
}

int gpu_scheme_state_import(struct gpu_scheme *s, const void *state, uint64_t bytes)
{
    struct state_head want = {STATE_MAGIC, s->kind, s->geom, s->seed};
    struct array to[ARRAYS_MAX], from[ARRAYS_MAX];
    char *at = (char *)(uintptr_t)state; /* only read */
    if (bytes != gpu_scheme_state_bytes(s) || memcmp(at, &want, sizeof(want)))
        return -PKV_ERR_FILE_FIT;
    at += sizeof(want);
    uint32_t n = arrays_of(s, to);
    for (uint32_t i = 0; i < n; i++) {
        from[i] = (struct array){at, to[i].bytes};
        at += PKV_ALIGN_UP(to[i].bytes, 8u);
    }
    if (!sound(s, from, n))
        return -PKV_ERR_FILE_FIT;
    for (uint32_t i = 0; i < n; i++)
        memcpy(to[i].data, from[i].data, to[i].bytes);
    scheme_moments_free(s);
    scheme_changed(s);
    return 0;
}
