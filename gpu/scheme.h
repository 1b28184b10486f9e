/* A signature scheme inside of gpu: what every scheme answers, and what each keeps. */
#ifndef GPU_SCHEME_H
#define GPU_SCHEME_H

#include "gpu/internal.h"

#define SCHEME_SOLVED 2 /* learnt[layer]: `code` is calibrated there */

#define SCHEME_BITS_MAX 6u /* of a dimension of `code` */

#define SCHEME_STAGES_MAX 4u    /* of `hash`'s MLPs */
#define SCHEME_WIDTH_MAX  1024u /* of their hidden layers */

/* One linear map per (layer, head): weight [layers][heads][out][in], bias [layers][heads][out] or NULL. */
struct scheme_map {
    float *weight, *bias;
    uint32_t out, in;
};

/* What `code` gathers before it is solved. Moments are sums, lower triangles column by column. */
struct scheme_moments {
    float *k, *q;                         /* [layers][kv_heads][head_dim][head_dim] */
    double *k_sum;                        /* [layers][kv_heads][head_dim] */
    uint32_t *k_tokens, *q_tokens;        /* [layers] */
    uint32_t rope_dims, rope_interleaved; /* 0 dims: no rope */
    double frequencies[PKV_HEAD_DIM_MAX / 2];
};

struct gpu_scheme {
    uint32_t kind;
    uint64_t version; /* another one, of all schemes of the process, after every change; device copies follow it */
    struct scheme_moments *moments; /* `code` that gathers, until it is solved; else NULL */
    struct pkv_geom geom;
    const struct scheme_verbs *verbs;
    /* sign */
    uint64_t seed;
    uint32_t bases;   /* rotations side by side: head_dim bits each, the last one cut */
    float *signs;     /* [bases][2][head_dim] of +-1 */
    float *mean;      /* [layers][kv_heads][head_dim]; linear and code too */
    float *deviation; /* [layers][kv_heads][sig_bits] of the rotated channel; 1 until learnt */
    uint8_t *learnt;  /* [layers]; NULL: nothing to learn */
    /* linear, hash, code: keys' and queries' maps; their stages in a row, SiLU between */
    struct scheme_map k[SCHEME_STAGES_MAX], q[SCHEME_STAGES_MAX];
    uint32_t k_stages, q_stages;
    bool q_signs; /* a query's weights are +-1 */
    float unit;   /* log2-score of one unit of weight, where the scheme's numbers do not say */
    /* code: levels of each dimension */
    float *low, *step; /* [layers][kv_heads][dims] */
    uint8_t *bits;     /* [layers][kv_heads][dims] */
    uint32_t dims;
};

struct scheme_verbs {
    /* Bits of 1 to GPU_COLUMNS keys (float, [count][head_dim]) of a layer and kv head: [count][words]. */
    void (*sign)(const struct gpu_scheme *scheme, const struct gpu_kernels *kernels, uint32_t layer, uint32_t head,
                 const float *keys, uint32_t count, uint32_t *ret_words);
    /* Real weights of 1 to GPU_COLUMNS queries [count][head_dim] of a layer and q head, [count][sig_bits]. Times *ret_unit they
     * estimate log2(e) x scale x (q . k) up to a constant. */
    void (*weigh)(const struct gpu_scheme *scheme, const struct gpu_kernels *kernels, uint32_t layer, uint32_t q_head,
                  const float *queries, uint32_t count, float scale, float *ret_weights, float *ret_unit);
};

/* The end of splitmix64: every bit of the result depends on every bit of z. */
static inline uint64_t scheme_mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

void scheme_changed(struct gpu_scheme *scheme);

/* scheme_sign.c */
int scheme_sign_open(struct gpu_scheme *scheme);
bool scheme_sign_observe(struct gpu_scheme *scheme, const struct gpu_observation *observation);
extern const struct scheme_verbs scheme_sign_verbs, scheme_code_verbs, scheme_learn_verbs;
/* scheme_learn.c: `code` that calibrates itself. -PKV_ERR_LAPACK: built without it. */
int scheme_learn_open(struct gpu_scheme *scheme);
void scheme_learn_observe(struct gpu_scheme *scheme, const struct gpu_observation *observation);
void scheme_moments_free(struct gpu_scheme *scheme);
/* scheme_solve.c: a layer's maps, levels and bits from its moments. */
int scheme_solve_layer(struct gpu_scheme *scheme, uint32_t layer);
/* scheme_map.c */
extern const struct scheme_verbs scheme_linear_verbs, scheme_hash_verbs;
/* scheme_file.c: all of them. */
int scheme_file_open(struct gpu_scheme *scheme, const char *path, uint8_t ret_digest[PKV_DIGEST_BYTES]);

#endif
