/* `code` without a file: the transform comes from the model's own first keys and queries.
 *
 * Per layer and kv head: take post-RoPE keys and queries as they come (the first tokens of a sequence left out: sinks are
 * outliers), turn each to a random position of the context that is to be served - a prefix says nothing about RoPE's slow
 * dimensions - and add up moments, until there are GPU_LEARN_TOKENS of both. Somebody else solves (scheme_solve.c), once there
 * are GPU_LEARN_EARLY or more. Until then the scheme signs as `sign` does.
 *
 * The context is a sequence's max_tokens, and later sequences of the model may be longer: one vector in FAR_SHARE goes to
 * a position of FAR times the context. That costs about 1 % of the error within it, and beyond it keeps the slow dimensions
 * from getting no bits at all: with 4 times the context it more than halves the error.
 *
 * States of a layer (learnt[layer]): 0 nothing known -> 1 `sign` has its mean -> 2 solved. Failures: no memory for scratch:
 * what was to be gathered is not; a solve that fails (numbers that are not finite) leaves the layer to `sign`. Owner: whichever
 * thread has the scheme. OpenBLAS's number of threads is the process's, so all who compute here set it together. */
#include "gpu/scheme.h"

#ifdef PKV_LAPACK
#include <cblas.h>

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define SKIP      16u /* the first tokens of a sequence */
#define FAR       16u
#define FAR_SHARE 16u
#define PIECE     256u /* tokens turned at a time */

/* One thread: the matrices are small, and sums must not depend on the machine. */
static void one_thread(bool begin)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static int users, threads;
    pthread_mutex_lock(&lock);
    if (begin && !users++)
        threads = openblas_get_num_threads();
    openblas_set_num_threads(begin || --users ? 1 : threads);
    pthread_mutex_unlock(&lock);
}

/* Cosines and sines of the angles from position `from` to `to`: [rope_dims / 2] each. */
static void angles(const struct scheme_moments *m, double from, double to, float *cosines, float *sines)
{
    for (uint32_t j = 0; j < m->rope_dims / 2; j++) {
        double angle = (to - from) * m->frequencies[j];
        cosines[j] = (float)cos(angle), sines[j] = (float)sin(angle);
    }
}

static void turn(const struct scheme_moments *m, const float *cosines, const float *sines, float *x)
{
    uint32_t half = m->rope_dims / 2;
    for (uint32_t j = 0; j < half; j++) {
        float *a = m->rope_interleaved ? x + 2 * j : x + j, *b = m->rope_interleaved ? x + 2 * j + 1 : x + j + half;
        float p = *a * cosines[j] - *b * sines[j], q = *a * sines[j] + *b * cosines[j];
        *a = p, *b = q;
    }
}

/* Where to turn the vectors of token `at`. */
static double random_position(uint64_t seed, uint64_t at, uint64_t context)
{
    uint64_t random = scheme_mix(seed + at * 0x9e3779b97f4a7c15ull);
    return (double)(random / FAR_SHARE % (random % FAR_SHARE ? context : FAR * context));
}

/* Vectors of `heads` heads of each token, turned, as [heads][tokens][head_dim]. */
static void turned(const struct gpu_scheme *s, const struct gpu_observation *o, const void *from, uint32_t heads,
                   uint32_t first, uint32_t tokens, uint64_t seed, float *to)
{
    const struct pkv_geom *g = &s->geom;
    const struct scheme_moments *m = s->moments;
    float cosines[PKV_HEAD_DIM_MAX / 2], sines[PKV_HEAD_DIM_MAX / 2];
    uint64_t bytes = (uint64_t)g->head_dim * pkv_dtype_bytes(g->dtype);
    for (uint32_t t = 0; t < tokens; t++) {
        uint64_t at = o->first_token + first + t;
        if (m->rope_dims)
            angles(m, (double)at, random_position(seed, at, o->context), cosines, sines);
        for (uint32_t h = 0; h < heads; h++) {
            float *x = to + ((uint64_t)h * tokens + t) * g->head_dim;
            gpu_kernels_c.to_float((const char *)from + ((uint64_t)(first + t) * heads + h) * bytes, g->dtype, x, g->head_dim);
            if (m->rope_dims)
                turn(m, cosines, sines, x);
        }
    }
}

/* `rows` vectors into a second moment (lower triangle, column-major) and, if wanted, a sum. */
static void add_up(const float *x, uint32_t rows, uint32_t dim, float *moment, double *sum)
{
    cblas_ssyrk(CblasColMajor, CblasLower, CblasNoTrans, (int)dim, (int)rows, 1.0f, x, (int)dim, 1.0f, moment, (int)dim);
    for (uint32_t r = 0; sum && r < rows; r++)
        for (uint32_t d = 0; d < dim; d++)
            sum[d] += x[(uint64_t)r * dim + d];
}

/* One side's vectors of tokens [first, first + tokens) of an observation: its moments and, for keys, its sums. */
struct side {
    const void *from;
    uint32_t heads; /* a multiple of kv_heads */
    uint64_t seed;
    float *moments;
    double *sums;     /* NULL: none */
    uint32_t *tokens; /* of this layer */
};

static void gather(const struct gpu_scheme *s, const struct gpu_observation *o, const struct side *x, uint32_t first,
                   uint32_t tokens, float *scratch)
{
    const struct pkv_geom *g = &s->geom;
    uint32_t rows = tokens * (x->heads / g->kv_heads);
    turned(s, o, x->from, x->heads, first, tokens, x->seed, scratch);
    for (uint32_t h = 0; h < g->kv_heads; h++) {
        uint64_t at = (uint64_t)o->layer * g->kv_heads + h;
        add_up(scratch + (uint64_t)h * rows * g->head_dim, rows, g->head_dim, x->moments + at * g->head_dim * g->head_dim,
               x->sums ? x->sums + at * g->head_dim : NULL);
    }
    *x->tokens += tokens;
}

static bool wanted(const struct side *x)
{
    return x->from && *x->tokens < GPU_LEARN_TOKENS;
}

void scheme_learn_observe(struct gpu_scheme *s, const struct gpu_observation *o)
{
    const struct pkv_geom *g = &s->geom;
    struct scheme_moments *m = s->moments;
    uint32_t skip = o->first_token < SKIP ? (uint32_t)PKV_MIN(SKIP - o->first_token, (uint64_t)o->tokens) : 0;
    if (!m)
        return;
    const struct side sides[] = {
        {o->k, g->kv_heads, scheme_mix(o->layer + 1), m->k, m->k_sum, m->k_tokens + o->layer},
        {o->q, g->q_heads, scheme_mix(o->layer + 1000003), m->q, NULL, m->q_tokens + o->layer},
    };
    uint64_t room = (uint64_t)PKV_MIN(PIECE, o->tokens) * g->q_heads * g->head_dim;
    float *scratch = wanted(&sides[0]) || wanted(&sides[1]) ? malloc(room * sizeof(float)) : NULL;
    if (!scratch)
        return;
    one_thread(true);
    for (uint32_t at = skip; at < o->tokens; at += PIECE)
        for (uint32_t i = 0; i < PKV_ARRAY_LEN(sides); i++)
            if (wanted(&sides[i]))
                gather(s, o, &sides[i], at, PKV_MIN(PIECE, o->tokens - at), scratch);
    one_thread(false);
    free(scratch);
}

bool gpu_scheme_calibrates(void)
{
    return true;
}

bool gpu_scheme_gathered(const struct gpu_scheme *s, uint32_t layer, uint32_t tokens)
{
    const struct scheme_moments *m = s->moments;
    return m && PKV_MIN(m->k_tokens[layer], m->q_tokens[layer]) >= tokens;
}

void gpu_scheme_gathered_copy(const struct gpu_scheme *s, uint32_t layer, struct gpu_scheme *to)
{
    const struct pkv_geom *g = &s->geom;
    const struct scheme_moments *m = s->moments;
    uint64_t dim = g->head_dim, heads = g->kv_heads, first = layer * heads, square = dim * dim;
    memcpy(to->moments->k + first * square, m->k + first * square, heads * square * sizeof(float));
    memcpy(to->moments->q + first * square, m->q + first * square, heads * square * sizeof(float));
    memcpy(to->moments->k_sum + first * dim, m->k_sum + first * dim, heads * dim * sizeof(double));
    to->moments->k_tokens[layer] = m->k_tokens[layer], to->moments->q_tokens[layer] = m->q_tokens[layer];
    memcpy(to->mean + first * dim, s->mean + first * dim, heads * dim * sizeof(float));
    memcpy(to->deviation + first * g->sig_bits, s->deviation + first * g->sig_bits, heads * g->sig_bits * sizeof(float));
    to->learnt[layer] = s->learnt[layer];
}

int gpu_scheme_solve(struct gpu_scheme *s, bool all, const bool *stop)
{
    uint32_t solved = 0;
    int r = 0;
    one_thread(true);
    for (uint32_t l = 0; l < s->geom.layers && !r; l++) {
        if (stop && __atomic_load_n(stop, __ATOMIC_RELAXED))
            r = -PKV_ERR_BUSY;
        else if (gpu_scheme_gathered(s, l, GPU_LEARN_EARLY) && scheme_solve_layer(s, l) == 0)
            s->learnt[l] = SCHEME_SOLVED, solved++;
        else if (all || !s->learnt[l])
            r = -PKV_ERR_NOT_FINITE;
    }
    one_thread(false);
    scheme_moments_free(s);
    scheme_changed(s);
    return r || solved ? r : -PKV_ERR_NOT_FINITE;
}

void scheme_moments_free(struct gpu_scheme *s)
{
    struct scheme_moments *m = s->moments;
    if (!m)
        return;
    free(m->k), free(m->q), free(m->k_sum), free(m->k_tokens), free(m->q_tokens);
    free(m);
    s->moments = NULL;
}

static int moments_open(struct gpu_scheme *s)
{
    const struct pkv_geom *g = &s->geom;
    uint64_t heads = (uint64_t)g->layers * g->kv_heads, square = (uint64_t)g->head_dim * g->head_dim;
    struct scheme_moments *m = s->moments = calloc(1, sizeof(*m));
    if (!m)
        return -PKV_ERR_NO_MEMORY;
    m->k = calloc(heads * square, sizeof(float)), m->q = calloc(heads * square, sizeof(float));
    m->k_sum = calloc(heads * g->head_dim, sizeof(double));
    m->k_tokens = calloc(g->layers, sizeof(uint32_t)), m->q_tokens = calloc(g->layers, sizeof(uint32_t));
    return m->k && m->q && m->k_sum && m->k_tokens && m->q_tokens ? 0 : -PKV_ERR_NO_MEMORY;
}

int gpu_scheme_gather(struct gpu_scheme *s, float base, uint32_t dims, bool interleaved)
{
    int r = s->verbs != &scheme_learn_verbs ? -PKV_ERR_UNSUPPORTED : s->moments ? 0 : moments_open(s);
    if (r) {
        scheme_moments_free(s);
        return r;
    }
    struct scheme_moments *m = s->moments;
    m->rope_dims = base > 0 ? PKV_MIN(dims, s->geom.head_dim) : 0, m->rope_interleaved = interleaved;
    for (uint32_t j = 0; j < m->rope_dims / 2; j++)
        m->frequencies[j] = pow(base, -2.0 * j / m->rope_dims);
    return 0;
}

/* `sign` for the meantime, and room for what will be solved. */
int scheme_learn_open(struct gpu_scheme *s)
{
    const struct pkv_geom *g = &s->geom;
    uint64_t heads = (uint64_t)g->layers * g->kv_heads, square = (uint64_t)g->head_dim * g->head_dim;
    int r = scheme_sign_open(s);
    s->dims = g->head_dim, s->k_stages = s->q_stages = 1, s->verbs = &scheme_learn_verbs;
    s->k[0] = (struct scheme_map){calloc(heads * square, sizeof(float)), NULL, g->head_dim, g->head_dim};
    s->q[0] = (struct scheme_map){calloc(heads * square, sizeof(float)), NULL, g->head_dim, g->head_dim};
    s->low = calloc(heads * g->head_dim, sizeof(float)), s->step = malloc(heads * g->head_dim * sizeof(float));
    s->bits = calloc(heads * g->head_dim, 1);
    if (!r && (!s->k[0].weight || !s->q[0].weight || !s->low || !s->step || !s->bits))
        r = -PKV_ERR_NO_MEMORY;
    for (uint64_t i = 0; !r && i < heads * g->head_dim; i++)
        s->step[i] = 1;
    return r;
}

#else

bool gpu_scheme_calibrates(void)
{
    return false;
}

int gpu_scheme_gather(struct gpu_scheme *s, float base, uint32_t dims, bool interleaved)
{
    (void)s, (void)base, (void)dims, (void)interleaved;
    return -PKV_ERR_UNSUPPORTED;
}

bool gpu_scheme_gathered(const struct gpu_scheme *s, uint32_t layer, uint32_t tokens)
{
    (void)s, (void)layer, (void)tokens;
    return false;
}

void gpu_scheme_gathered_copy(const struct gpu_scheme *s, uint32_t layer, struct gpu_scheme *to)
{
    (void)s, (void)layer, (void)to;
}

int gpu_scheme_solve(struct gpu_scheme *s, bool all, const bool *stop)
{
    (void)s, (void)all, (void)stop;
    return -PKV_ERR_UNSUPPORTED;
}

void scheme_learn_observe(struct gpu_scheme *s, const struct gpu_observation *o)
{
    (void)s, (void)o;
}

void scheme_moments_free(struct gpu_scheme *s)
{
    (void)s;
}

int scheme_learn_open(struct gpu_scheme *s)
{
    (void)s;
    return -PKV_ERR_LAPACK;
}

#endif

static bool solved(const struct gpu_scheme *s, uint32_t layer)
{
    return s->learnt[layer] == SCHEME_SOLVED;
}

static void sign(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t head,
                 const float *keys, uint32_t count, uint32_t *words)
{
    const struct scheme_verbs *verbs = solved(s, layer) ? &scheme_code_verbs : &scheme_sign_verbs;
    verbs->sign(s, kernels, layer, head, keys, count, words);
}

static void weigh(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t q_head,
                  const float *queries, uint32_t count, float scale, float *weights, float *unit)
{
    const struct scheme_verbs *verbs = solved(s, layer) ? &scheme_code_verbs : &scheme_sign_verbs;
    verbs->weigh(s, kernels, layer, q_head, queries, count, scale, weights, unit);
}

const struct scheme_verbs scheme_learn_verbs = {sign, weigh};
