/* `sign`: which channels of a fixed random rotation of (k - mean) are positive; the query's weights are its rotated channels
 * times the keys' spread there, so that the sum over the bits estimates q . k. The mean and the spread are learnt once per
 * layer from the first keys that a model is shown, sinks left out; they are the scheme's state, which workers share. A
 * `code` without a file serves as this until it is calibrated. */
#include "gpu/scheme.h"

#include <stdlib.h>
#include <string.h>

#define SKIP      16u   /* the first tokens of a sequence are outliers */
#define LEARN_MIN 64u   /* tokens that a layer's mean needs */
#define LEARN_MAX 4096u /* and how many it looks at */

static uint64_t random_bits(uint64_t *state)
{
    return scheme_mix(*state += 0x9e3779b97f4a7c15ull); /* splitmix64 */
}

static void rotate(const struct gpu_scheme *s, const struct gpu_kernels *kernels, const float *from, float *to)
{
    uint32_t dim = s->geom.head_dim;
    for (uint32_t b = 0; b < s->bases; b++)
        kernels->rotate(from, s->signs + 2ull * b * dim, dim, to + (uint64_t)b * dim);
    float norm = 1.0f / gpu_rotate_norm(dim);
    for (uint32_t i = 0; i < s->bases * dim; i++)
        to[i] *= norm;
}

static void sign(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t head,
                 const float *keys, uint32_t count, uint32_t *words)
{
    const struct pkv_geom *g = &s->geom;
    const float *mean = s->mean + ((uint64_t)layer * g->kv_heads + head) * g->head_dim;
    float k[PKV_HEAD_DIM_MAX], rotated[2 * PKV_SIG_BITS_MAX];
    for (uint32_t i = 0; i < count; i++, keys += g->head_dim) {
        for (uint32_t d = 0; d < g->head_dim; d++)
            k[d] = keys[d] - mean[d];
        rotate(s, kernels, k, rotated);
        for (uint32_t w = 0; w < pkv_geom_words(g); w++)
            *words++ = kernels->positive(rotated + w * 32ull);
    }
}

static void weigh(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t q_head,
                  const float *queries, uint32_t count, float scale, float *weights, float *ret_unit)
{
    const struct pkv_geom *g = &s->geom;
    uint64_t at = (uint64_t)layer * g->kv_heads + q_head / pkv_geom_group(g);
    float rotated[2 * PKV_SIG_BITS_MAX];
    for (uint32_t i = 0; i < count; i++, weights += g->sig_bits) {
        rotate(s, kernels, queries + (uint64_t)i * g->head_dim, rotated);
        for (uint32_t b = 0; b < g->sig_bits; b++)
            weights[b] = rotated[b] * s->deviation[at * g->sig_bits + b];
    }
    /* A bit moves its channel from -E|x| to +E|x|: twice its weight. Several bases estimate the same product. */
    float partial = g->sig_bits < g->head_dim ? (float)g->head_dim / (float)g->sig_bits : 1.0f;
    *ret_unit = 2.0f * scale * 1.44269504f * sqrtf(partial) / (float)s->bases;
}

const struct scheme_verbs scheme_sign_verbs = {sign, weigh};

int scheme_sign_open(struct gpu_scheme *s)
{
    const struct pkv_geom *g = &s->geom;
    uint64_t heads = (uint64_t)g->layers * g->kv_heads;
    s->verbs = &scheme_sign_verbs, s->seed = 0x70766b76ull;
    s->bases = PKV_DIV_UP(g->sig_bits, g->head_dim);
    s->signs = malloc(2ull * s->bases * g->head_dim * sizeof(float));
    s->mean = calloc(heads * g->head_dim, sizeof(float));
    s->deviation = malloc(heads * g->sig_bits * sizeof(float));
    s->learnt = calloc(g->layers, 1);
    if (!s->signs || !s->mean || !s->deviation || !s->learnt)
        return -PKV_ERR_NO_MEMORY;
    uint64_t state = s->seed;
    for (uint32_t i = 0; i < 2 * s->bases * g->head_dim; i++)
        s->signs[i] = random_bits(&state) >> 63 ? 1.0f : -1.0f;
    for (uint64_t i = 0; i < heads * g->sig_bits; i++)
        s->deviation[i] = 1.0f;
    return 0;
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
            rotate(s, &gpu_kernels_c, key, rotated);
            for (uint32_t b = 0; b < g->sig_bits; b++)
                deviation[b] += fabsf(rotated[b]) / (float)(tokens - first);
        }
    }
}

bool scheme_sign_observe(struct gpu_scheme *s, const struct gpu_observation *o)
{
    if (s->learnt[o->layer] || !o->k)
        return false;
    uint32_t skip = o->first_token < SKIP ? (uint32_t)(SKIP - o->first_token) : 0, tokens = PKV_MIN(o->tokens, LEARN_MAX);
    if (tokens < skip + LEARN_MIN)
        return false;
    for (uint32_t h = 0; h < s->geom.kv_heads; h++)
        learn_head(s, o->layer, h, skip, tokens, o->k);
    s->learnt[o->layer] = 1;
    return true;
}
