/* What the kernels' checks share: random worlds (one sequence, its blocks strewn over both tiers) and exact attention in double
 * precision. Included by one file of each program. */
#ifndef TESTS_KERNELS_WORLD_H
#define TESTS_KERNELS_WORLD_H

#include "gpu/code.h"
#include "gpu/gpu.h"

#include <stdio.h>
#include <stdlib.h>

static uint64_t state;

static inline uint64_t random_next(void)
{
    state += 0x9e3779b97f4a7c15ull; /* splitmix64 */
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
static inline uint32_t below(uint32_t n)
{
    return (uint32_t)(random_next() % n);
}
static inline float gaussian(void)
{
    float u = ((float)(random_next() >> 40) + 0.5f) * 0x1p-24f, v = (float)(random_next() >> 40) * 0x1p-24f;
    return sqrtf(-2 * logf(u)) * cosf(6.2831853f * v);
}

#define MUST(holds)                                                                               \
    do {                                                                                          \
        if (!(holds)) {                                                                           \
            printf("%s:%d: %s does not hold (see the case above)\n", __FILE__, __LINE__, #holds); \
            exit(1);                                                                              \
        }                                                                                         \
    } while (0)

static inline void *take(uint64_t bytes)
{
    void *p = aligned_alloc(64, PKV_ALIGN_UP(bytes + 1, 64));
    MUST(p);
    return p;
}

/* Halves whose lowest mantissa bits are zero, so that a float holds them exactly. */
static inline void put(void *to, uint32_t dtype, uint64_t i, float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    if (dtype == PKV_F32) {
        ((float *)to)[i] = v;
    } else if (dtype == PKV_BF16) {
        ((uint16_t *)to)[i] = (uint16_t)(bits >> 16);
    } else {
        int exponent = (int)(bits >> 23 & 255) - 112;
        uint32_t half = exponent <= 0 ? 0 : exponent >= 31 ? 0x7bffu : (uint32_t)exponent << 10 | (bits >> 13 & 0x3ff);
        ((uint16_t *)to)[i] = (uint16_t)(half | (bits >> 16 & 0x8000));
    }
}
static inline double get(const void *from, uint32_t dtype, uint64_t i)
{
    if (dtype == PKV_F32)
        return ((const float *)from)[i];
    uint16_t h = ((const uint16_t *)from)[i];
    if (dtype == PKV_BF16) {
        uint32_t bits = (uint32_t)h << 16;
        float v;
        memcpy(&v, &bits, sizeof(v));
        return v;
    }
    double m = (h >> 10 & 31) ? ldexp(1024 + (h & 1023), (h >> 10 & 31) - 25) : ldexp(h & 1023, -24);
    return h & 0x8000 ? -m : m;
}

/* One sequence in one chunk of each tier: even blocks in the pool, odd ones in the arena. */
struct world {
    struct pkv_geom g;
    uint32_t tokens, queries, blocks;
    struct gpu_policy policy;
    uint64_t *pool, *arena;
    struct pkv_block_ref *refs;
    struct gpu_space space;
    struct gpu_view view;
    void *k, *v, *q;
    int8_t *weights;
    float *scales;
};

static inline void world_data(struct world *w)
{
    const struct pkv_geom *g = &w->g;
    uint64_t kv = (uint64_t)w->tokens * g->kv_heads * g->head_dim, nq = (uint64_t)w->queries * g->q_heads * g->head_dim;
    w->k = take(kv * 4), w->v = take(kv * 4), w->q = take(nq * 4);
    for (uint64_t i = 0; i < kv; i++)
        put(w->k, g->dtype, i, gaussian() + 0.5f), put(w->v, g->dtype, i, gaussian());
    for (uint64_t i = 0; i < nq; i++)
        put(w->q, g->dtype, i, gaussian() * 2);
    w->weights = take((uint64_t)w->queries * g->q_heads * g->sig_bits);
    w->scales = take((uint64_t)w->queries * g->q_heads * 4);
}

static inline void world_places(struct world *w)
{
    uint64_t rows = pkv_geom_block_bytes(&w->g), signatures = pkv_geom_sig_block_bytes(&w->g);
    w->blocks = pkv_tokens_blocks(w->tokens);
    char *pool = take(w->blocks * rows), *arena = take(w->blocks * rows), *sig = take(w->blocks * signatures);
    memset(sig, 0, w->blocks * signatures);
    w->pool = calloc(PKV_CHUNKS_MAX, 8), w->arena = calloc(PKV_CHUNKS_MAX, 8);
    w->refs = calloc(w->blocks, sizeof(*w->refs));
    MUST(w->pool && w->arena && w->refs);
    w->pool[3] = (uintptr_t)pool, w->arena[7] = (uintptr_t)arena, w->pool[5] = (uintptr_t)sig;
    for (uint32_t b = 0; b < w->blocks; b++) {
        w->refs[b].rows = b % 2 ? pkv_place(PKV_TIER_ARENA, 7, b, 1) : pkv_place(PKV_TIER_POOL, 3, w->blocks - 1 - b, 2);
        w->refs[b].signatures = pkv_place(PKV_TIER_POOL, 5, b, 3);
    }
    w->space.base[PKV_TIER_POOL] = w->pool, w->space.base[PKV_TIER_ARENA] = w->arena;
    w->view = (struct gpu_view){.blocks = w->refs, .tokens = w->tokens, .queries = w->queries};
}

static inline void world_free(struct world *w)
{
    free((void *)(uintptr_t)w->pool[3]), free((void *)(uintptr_t)w->arena[7]), free((void *)(uintptr_t)w->pool[5]);
    free(w->pool), free(w->arena), free(w->refs), free(w->k), free(w->v), free(w->q), free(w->weights), free(w->scales);
}

static const uint16_t world_dims[] = {64, 96, 128, 256}, world_groups[] = {1, 2, 3, 4, 7, 16};

static inline void world_make(struct world *w)
{
    printf("kv %u group %u dim %u dtype %u bits %u tokens %u queries %u k %u sinks %u recent %u rule %u top_p %g\n",
           w->g.kv_heads, pkv_geom_group(&w->g), w->g.head_dim, w->g.dtype, w->g.sig_bits, w->tokens, w->queries, w->policy.k,
           w->policy.sinks, w->policy.recent, w->policy.rule, w->policy.top_p);
    world_data(w);
    world_places(w);
}

static inline struct world world_random(void)
{
    struct world w = {0};
    w.g.kv_heads = (uint16_t)(1 + below(3)), w.g.q_heads = (uint16_t)(w.g.kv_heads * world_groups[below(6)]);
    w.g.layers = 2, w.g.head_dim = world_dims[below(4)], w.g.dtype = (uint16_t)below(3);
    w.g.sig_bits = (uint16_t)(32 * (1 + below(8)));
    w.tokens = 1 + below(below(4) ? 700 : 3000), w.queries = 1 + below(PKV_MIN(3u, w.tokens));
    w.policy = (struct gpu_policy){.k = 1 + below(w.tokens), .sinks = below(100), .recent = below(100), .rule = below(3)};
    if (w.policy.rule == PKV_RULE_SOFTMAX && below(3) == 0)
        w.policy.top_p = 0.05f + 0.01f * (float)below(95), w.policy.recent = PKV_MAX(w.policy.recent, 1u);
    world_make(&w);
    return w;
}

/* So long that a warp's blocks pass several times through what holds some of them. */
#define LONG 70000u
static inline struct world world_long(void)
{
    struct world w = {
        .g = {2, world_groups[below(5)], 1, 64, (uint16_t)(PKV_F16 + below(2)), (uint16_t)(32 * (1 + below(4))), 0},
        .tokens = LONG + below(50000),
        .queries = 1,
        .policy = {.k = 1 + below(1500), .sinks = below(100), .recent = below(100), .rule = below(3)}};
    world_make(&w);
    return w;
}

/* Without signatures, and so with a policy by age. */
static inline void world_drop_signatures(struct world *w)
{
    w->g.sig_bits = 0;
    for (uint32_t b = 0; b < w->blocks; b++)
        w->refs[b].signatures = 0;
    w->policy.recent += w->policy.k, w->policy.k = 0, w->policy.top_p = 0;
}

/* Exact attention of one query and q head over a list (NULL: the first `count` tokens), in double. */
static inline void naive_attend(const struct world *w, uint32_t query, uint32_t q_head, const uint32_t *index, uint32_t count,
                                const float *out, float lse)
{
    const struct pkv_geom *g = &w->g;
    uint32_t head = q_head / pkv_geom_group(g);
    double sum = 0, got[PKV_HEAD_DIM_MAX] = {0}, max = -INFINITY, *score = take(count * 8ull);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t t = index ? index[i] : i;
        score[i] = 0;
        for (uint32_t d = 0; d < g->head_dim; d++)
            score[i] += get(w->q, g->dtype, ((uint64_t)query * g->q_heads + q_head) * g->head_dim + d) *
                        get(w->k, g->dtype, (t * g->kv_heads + head) * g->head_dim + d) / sqrt(g->head_dim);
        max = score[i] > max ? score[i] : max;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint64_t t = index ? index[i] : i;
        double p = exp(score[i] - max);
        sum += p;
        for (uint32_t d = 0; d < g->head_dim; d++)
            got[d] += p * get(w->v, g->dtype, (t * g->kv_heads + head) * g->head_dim + d);
    }
    MUST(fabs(lse - (max + log(sum))) < 1e-4 * (1 + fabs(max)));
    for (uint32_t d = 0; d < g->head_dim; d++)
        MUST(fabs(out[d] - got[d] / sum) < 1e-4);
    free(score);
}

#endif
