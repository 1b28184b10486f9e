/* Signature schemes. `sign`: which channels of a fixed random rotation of (k - mean) are positive; the query's weights are its
 * rotated channels times the keys' spread there, so that the sum over the bits estimates q . k. The mean and the spread
 * are learnt once per layer from the first keys that a model is shown, sinks left out; they are the scheme's state, which
 * workers share. A self-calibrated `code` learns in the same place. */
#include "gpu/internal.h"

#include "proto/check.h"

#include <stdlib.h>
#include <string.h>

#define SKIP      16u   /* the first tokens of a sequence are outliers */
#define LEARN_MIN 64u   /* tokens that a layer's mean needs */
#define LEARN_MAX 4096u /* and how many it looks at */

static uint64_t random_bits(uint64_t *state)
{
    *state += 0x9e3779b97f4a7c15ull; /* splitmix64 */
    uint64_t z = *state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

void scheme_rotate(const struct gpu_scheme *s, const struct gpu_kernels *kernels, const float *from, float *to)
{
    uint32_t dim = s->geom.head_dim;
    for (uint32_t b = 0; b < s->bases; b++)
        kernels->rotate(from, s->signs + 2ull * b * dim, dim, to + (uint64_t)b * dim);
    float norm = 1.0f / gpu_rotate_norm(dim);
    for (uint32_t i = 0; i < s->bases * dim; i++)
        to[i] *= norm;
}

int gpu_scheme_open(uint32_t kind, const struct pkv_geom *geom, const char *path, struct gpu_scheme **ret,
                    uint8_t ret_digest[PKV_DIGEST_BYTES])
{
    enum pkv_err e = pkv_check_geom(geom);
    if (e == PKV_ERR_OK)
        e = pkv_check_scheme(kind, geom);
    if (e != PKV_ERR_OK)
        return -(int)e;
    if (kind != PKV_SCHEME_SIGN || path)
        return -PKV_ERR_UNSUPPORTED;
    struct gpu_scheme *s = calloc(1, sizeof(*s));
    if (!s)
        return -PKV_ERR_NO_MEMORY;
    uint64_t heads = (uint64_t)geom->layers * geom->kv_heads;
    *s = (struct gpu_scheme){.kind = kind, .geom = *geom, .seed = 0x70766b76ull};
    s->bases = PKV_DIV_UP(geom->sig_bits, geom->head_dim);
    s->signs = malloc(2ull * s->bases * geom->head_dim * sizeof(float));
    s->mean = calloc(heads * geom->head_dim, sizeof(float));
    s->deviation = malloc(heads * geom->sig_bits * sizeof(float));
    s->learnt = calloc(geom->layers, 1);
    if (!s->signs || !s->mean || !s->deviation || !s->learnt) {
        gpu_scheme_close(s);
        return -PKV_ERR_NO_MEMORY;
    }
    uint64_t state = s->seed;
    for (uint32_t i = 0; i < 2 * s->bases * geom->head_dim; i++)
        s->signs[i] = random_bits(&state) >> 63 ? 1.0f : -1.0f;
    for (uint64_t i = 0; i < heads * geom->sig_bits; i++)
        s->deviation[i] = 1.0f;
    memset(ret_digest, 0, PKV_DIGEST_BYTES);
    *ret = s;
    return 0;
}

void gpu_scheme_close(struct gpu_scheme *s)
{
    if (!s)
        return;
    free(s->signs);
    free(s->mean);
    free(s->deviation);
    free(s->learnt);
    free(s);
}

/* Mean of the keys, then the mean magnitude of each rotated channel: for a Gaussian channel E[x sign(x)] = E|x|, the
 * factor by which a bit's weight estimates the channel. */
static void learn_head(struct gpu_scheme *s, uint32_t layer, uint32_t head, uint32_t first, uint32_t tokens, const void *k)
{
    const struct pkv_geom *g = &s->geom;
    uint64_t at = (uint64_t)layer * g->kv_heads + head, bytes = (uint64_t)g->head_dim * pkv_dtype_bytes(g->dtype);
    float *mean = s->mean + at * g->head_dim, *deviation = s->deviation + at * g->sig_bits, key[PKV_HEAD_DIM_MAX];
    float rotated[2 * PKV_SIG_BITS_MAX];
    memset(deviation, 0, g->sig_bits * sizeof(float));
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint32_t t = first; t < tokens; t++) {
            gpu_kernels_c.to_float((const char *)k + ((uint64_t)t * g->kv_heads + head) * bytes, g->dtype, key, g->head_dim);
            if (pass == 0) {
                for (uint32_t d = 0; d < g->head_dim; d++)
                    mean[d] += key[d] / (float)(tokens - first);
                continue;
            }
            for (uint32_t d = 0; d < g->head_dim; d++)
                key[d] -= mean[d];
            scheme_rotate(s, &gpu_kernels_c, key, rotated);
            for (uint32_t b = 0; b < g->sig_bits; b++)
                deviation[b] += fabsf(rotated[b]) / (float)(tokens - first);
        }
    }
}

bool gpu_scheme_observe(struct gpu_scheme *s, uint32_t layer, uint64_t first_token, uint32_t tokens, const void *k)
{
    if (layer >= s->geom.layers || s->learnt[layer])
        return false;
    uint32_t skip = first_token < SKIP ? (uint32_t)(SKIP - first_token) : 0;
    tokens = PKV_MIN(tokens, LEARN_MAX);
    if (tokens < skip + LEARN_MIN)
        return false;
    for (uint32_t h = 0; h < s->geom.kv_heads; h++)
        learn_head(s, layer, h, skip, tokens, k);
    s->learnt[layer] = 1;
    return true;
}

bool gpu_scheme_settled(const struct gpu_scheme *s)
{
    return !memchr(s->learnt, 0, s->geom.layers);
}

/* ---- state: magic, geometry, then mean and deviation ---- */

struct state_head {
    uint32_t magic, kind;
    struct pkv_geom geom;
    uint64_t seed;
};
#define STATE_MAGIC 0x32545350u

static uint64_t mean_bytes(const struct pkv_geom *g)
{
    return (uint64_t)g->layers * g->kv_heads * g->head_dim * sizeof(float);
}

static uint64_t deviation_bytes(const struct pkv_geom *g)
{
    return (uint64_t)g->layers * g->kv_heads * g->sig_bits * sizeof(float);
}

uint64_t gpu_scheme_state_bytes(const struct gpu_scheme *s)
{
    return sizeof(struct state_head) + mean_bytes(&s->geom) + deviation_bytes(&s->geom);
}

void gpu_scheme_state_export(const struct gpu_scheme *s, void *ret)
{
    struct state_head head = {STATE_MAGIC, s->kind, s->geom, s->seed};
    char *to = ret;
    memcpy(to, &head, sizeof(head));
    memcpy(to + sizeof(head), s->mean, mean_bytes(&s->geom));
    memcpy(to + sizeof(head) + mean_bytes(&s->geom), s->deviation, deviation_bytes(&s->geom));
}

int gpu_scheme_state_import(struct gpu_scheme *s, const void *state, uint64_t bytes)
{
    struct state_head want = {STATE_MAGIC, s->kind, s->geom, s->seed};
    const char *from = state;
    if (bytes != gpu_scheme_state_bytes(s) || memcmp(from, &want, sizeof(want)))
        return -PKV_ERR_FILE_FIT;
    if (!gpu_kernels_c.finite(from + sizeof(want), PKV_F32, (bytes - sizeof(want)) / sizeof(float)))
        return -PKV_ERR_FILE_FIT;
    memcpy(s->mean, from + sizeof(want), mean_bytes(&s->geom));
    memcpy(s->deviation, from + sizeof(want) + mean_bytes(&s->geom), deviation_bytes(&s->geom));
    memset(s->learnt, 1, s->geom.layers);
    return 0;
}

/* ---- queries ---- */

struct weigh {
    struct gpu *gpu;
    const struct gpu_weights_args *a;
    float scale;
};

static void weigh_one(void *context, uint64_t item, uint32_t thread)
{
    (void)thread;
    struct weigh *p = context;
    const struct pkv_geom *g = p->a->geom;
    const struct gpu_scheme *s = p->a->scheme;
    uint32_t head = (uint32_t)(item % g->q_heads) / pkv_geom_group(g);
    const float *deviation = s->deviation + ((uint64_t)p->a->layer * g->kv_heads + head) * g->sig_bits;
    float q[PKV_HEAD_DIM_MAX], w[2 * PKV_SIG_BITS_MAX], max = 0;
    const struct gpu_kernels *k = p->gpu->kernels;
    k->to_float((const char *)p->a->q + item * g->head_dim * pkv_dtype_bytes(g->dtype), g->dtype, q, g->head_dim);
    scheme_rotate(s, k, q, w);
    for (uint32_t b = 0; b < g->sig_bits; b++) {
        w[b] *= deviation[b];
        max = fabsf(w[b]) > max ? fabsf(w[b]) : max;
    }
    float step = max > 0 ? 127.0f / max : 0.0f;
    for (uint32_t b = 0; b < g->sig_bits; b++)
        p->a->ret_weights[item * g->sig_bits + b] = (int8_t)lrintf(w[b] * step);
    /* A bit moves its channel from -E|x| to +E|x|: twice its weight. Several bases estimate the same product. */
    float bases = (float)PKV_DIV_UP(g->sig_bits, g->head_dim);
    float partial = g->sig_bits < g->head_dim ? (float)g->head_dim / (float)g->sig_bits : 1.0f;
    p->a->ret_scales[item] = max / 127.0f * 2.0f * p->scale * 1.44269504f * sqrtf(partial) / bases;
}

int gpu_weights(struct gpu *gpu, const struct gpu_weights_args *a)
{
    if (!a->queries || a->queries > PKV_QUERIES_MAX || a->layer >= a->geom->layers)
        return -PKV_ERR_SHAPE;
    if (memcmp(a->geom, &a->scheme->geom, sizeof(*a->geom)))
        return -PKV_ERR_FILE_FIT;
    if (!gpu->kernels->finite(a->q, a->geom->dtype, (uint64_t)a->queries * a->geom->q_heads * a->geom->head_dim))
        return -PKV_ERR_NOT_FINITE;
    struct weigh p = {gpu, a, gpu_scale(a->scale, a->geom)};
    gpu_team_run(&gpu->team, weigh_one, &p, (uint64_t)a->queries * a->geom->q_heads);
    return 0;
}
