/* Schemes that map keys and queries (scheme_file.c says how): linear, hash, code.
 *
 * Vectors are mapped GPU_COLUMNS at a time, so that a weight that is loaded serves all of them; a few go one by one. Every sum
 * is added in the same order either way (kernel.h), so bits do not depend on how tokens were cut into calls. */
#include "gpu/scheme.h"

#include <string.h>

#define FEW 4u /* vectors: columns would be mostly empty */

/* Vectors as columns: x [dim][stride], stride 1 for one vector, or GPU_COLUMNS. */
struct columns {
    uint32_t stride, count;
    float x[PKV_HEAD_DIM_MAX * GPU_COLUMNS];
};

static void columns_of(struct columns *c, const float *vectors, uint32_t count, uint32_t dim, const float *mean)
{
    c->stride = count == 1 ? 1 : GPU_COLUMNS, c->count = count;
    if (count < c->stride)
        memset(c->x, 0, (uint64_t)dim * c->stride * sizeof(float));
    for (uint32_t v = 0; v < count; v++)
        for (uint32_t d = 0; d < dim; d++)
            c->x[d * c->stride + v] = vectors[(uint64_t)v * dim + d] - (mean ? mean[d] : 0.0f);
}

/* The first `rows` outputs of a map: to [rows][stride]. */
static void apply(const struct gpu_kernels *kernels, const struct scheme_map *map, uint64_t at, uint32_t rows, const float *x,
                  uint32_t stride, float *to)
{
    const float *weight = map->weight + at * map->out * map->in;
    for (uint32_t o = 0; o < rows && stride == 1; o++)
        to[o] = kernels->dot(weight + (uint64_t)o * map->in, x, map->in);
    if (stride > 1)
        kernels->products(weight, rows, map->in, x, to);
    for (uint32_t o = 0; o < rows && map->bias; o++)
        for (uint32_t v = 0; v < stride; v++)
            to[o * stride + v] += map->bias[at * map->out + o];
}

static void apply_mlp(const struct gpu_kernels *kernels, const struct scheme_map *maps, uint32_t stages, uint64_t at,
                      const struct columns *c, float *ret)
{
    float a[SCHEME_WIDTH_MAX * GPU_COLUMNS], b[SCHEME_WIDTH_MAX * GPU_COLUMNS];
    const float *from = c->x;
    for (uint32_t i = 0; i < stages; i++) {
        bool last = i + 1 == stages;
        float *to = last ? ret : i % 2 ? b : a;
        apply(kernels, &maps[i], at, maps[i].out, from, c->stride, to);
        if (!last)
            kernels->silu(to, maps[i].out * c->stride);
        from = to;
    }
}

/* ---- keys ---- */

typedef void sign_columns(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t head,
                          const struct columns *c, uint32_t *words);

static void sign_by(sign_columns *go, const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer,
                    uint32_t head, const float *keys, uint32_t count, uint32_t *words)
{
    const struct pkv_geom *g = &s->geom;
    const float *mean = s->mean ? s->mean + ((uint64_t)layer * g->kv_heads + head) * g->head_dim : NULL;
    uint32_t step = count < FEW ? 1 : GPU_COLUMNS, each = pkv_geom_words(g);
    struct columns c;
    memset(words, 0, (uint64_t)count * each * sizeof(*words));
    for (uint32_t v = 0; v < count; v += step) {
        columns_of(&c, keys + (uint64_t)v * g->head_dim, PKV_MIN(step, count - v), g->head_dim, mean);
        go(s, kernels, layer, head, &c, words + (uint64_t)v * each);
    }
}

/* Bit `first` + i of every vector: whether values [bits][stride] are positive. */
static void bits_of_signs(const struct gpu_scheme *s, const struct columns *c, const float *values, uint32_t first,
                          uint32_t bits, uint32_t *words)
{
    for (uint32_t v = 0; v < c->count; v++, words += pkv_geom_words(&s->geom))
        for (uint32_t i = 0; i < bits; i++)
            words[(first + i) / 32] |= (uint32_t)(values[i * c->stride + v] > 0) << (first + i) % 32;
}

static void linear_columns(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t head,
                           const struct columns *c, uint32_t *words)
{
    float values[PKV_SIG_BITS_MAX * GPU_COLUMNS];
    apply(kernels, &s->k[0], (uint64_t)layer * s->geom.kv_heads + head, s->geom.sig_bits, c->x, c->stride, values);
    bits_of_signs(s, c, values, 0, s->geom.sig_bits, words);
}

static void hash_columns(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t head,
                         const struct columns *c, uint32_t *words)
{
    uint32_t group = pkv_geom_group(&s->geom), bits = s->geom.sig_bits / group;
    float values[PKV_SIG_BITS_MAX * GPU_COLUMNS];
    for (uint32_t i = 0; i < group; i++) {
        apply_mlp(kernels, s->k, s->k_stages, (uint64_t)layer * s->geom.q_heads + head * group + i, c, values);
        bits_of_signs(s, c, values, i * bits, bits, words);
    }
}

/* Dimensions up to the last one that has bits. */
static uint32_t dims_used(const struct gpu_scheme *s, uint64_t at)
{
    uint32_t used = s->dims;
    while (used && !s->bits[at * s->dims + used - 1])
        used--;
    return used;
}

static void code_columns(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t head,
                         const struct columns *c, uint32_t *words)
{
    uint64_t at = (uint64_t)layer * s->geom.kv_heads + head;
    uint32_t bit = 0, used = dims_used(s, at), each = pkv_geom_words(&s->geom);
    float values[PKV_HEAD_DIM_MAX * GPU_COLUMNS];
    apply(kernels, &s->k[0], at, used, c->x, c->stride, values);
    for (uint32_t i = 0; i < used; bit += s->bits[at * s->dims + i++]) {
        uint64_t dim = at * s->dims + i;
        float most = (float)((1u << s->bits[dim]) - 1);
        for (uint32_t v = 0; v < c->count; v++) {
            float level = floorf((values[i * c->stride + v] - s->low[dim]) / s->step[dim]);
            uint32_t code = (uint32_t)(level < 0 ? 0 : level > most ? most : level);
            for (uint32_t p = 0; p < s->bits[dim]; p++)
                words[v * each + (bit + p) / 32] |= (code >> p & 1) << (bit + p) % 32;
        }
    }
}

static void linear_sign(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t head,
                        const float *keys, uint32_t count, uint32_t *words)
{
    sign_by(linear_columns, s, kernels, layer, head, keys, count, words);
}

static void hash_sign(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t head,
                      const float *keys, uint32_t count, uint32_t *words)
{
    sign_by(hash_columns, s, kernels, layer, head, keys, count, words);
}

static void code_sign(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t head,
                      const float *keys, uint32_t count, uint32_t *words)
{
    sign_by(code_columns, s, kernels, layer, head, keys, count, words);
}

/* ---- queries ---- */

/* What a query is mapped by: values [rows][stride]. */
static uint32_t linear_query(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t q_head,
                             const struct columns *c, float *values)
{
    const struct pkv_geom *g = &s->geom;
    const struct scheme_map *map = s->q_stages ? &s->q[0] : &s->k[0];
    uint64_t at =
        s->q_stages ? (uint64_t)layer * g->q_heads + q_head : (uint64_t)layer * g->kv_heads + q_head / pkv_geom_group(g);
    apply(kernels, map, at, map->out, c->x, c->stride, values);
    return map->out;
}

static uint32_t hash_query(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t q_head,
                           const struct columns *c, float *values)
{
    apply_mlp(kernels, s->q, s->q_stages, (uint64_t)layer * s->geom.q_heads + q_head, c, values);
    return s->geom.sig_bits / pkv_geom_group(&s->geom);
}

static uint32_t code_query(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t q_head,
                           const struct columns *c, float *values)
{
    uint64_t at = (uint64_t)layer * s->geom.kv_heads + q_head / pkv_geom_group(&s->geom);
    uint32_t used = dims_used(s, at);
    apply(kernels, &s->q[0], at, used, c->x, c->stride, values);
    return used;
}

typedef uint32_t map_query(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t q_head,
                           const struct columns *c, float *values);

/* to [count][rows_max]: the mapped values of each query, row by row; how many rows. */
static uint32_t queries_by(map_query *go, const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer,
                           uint32_t q_head, const float *queries, uint32_t count, float *to)
{
    uint32_t step = count < FEW ? 1 : GPU_COLUMNS, rows = 0;
    float values[PKV_SIG_BITS_MAX * GPU_COLUMNS];
    struct columns c;
    for (uint32_t first = 0; first < count; first += step) {
        columns_of(&c, queries + (uint64_t)first * s->geom.head_dim, PKV_MIN(step, count - first), s->geom.head_dim, NULL);
        rows = go(s, kernels, layer, q_head, &c, values);
        for (uint32_t v = 0; v < c.count; v++)
            for (uint32_t i = 0; i < rows; i++)
                to[(uint64_t)(first + v) * PKV_SIG_BITS_MAX + i] = values[i * c.stride + v];
    }
    return rows;
}

static void linear_weigh(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t q_head,
                         const float *queries, uint32_t count, float scale, float *weights, float *ret_unit)
{
    float values[GPU_COLUMNS * PKV_SIG_BITS_MAX];
    queries_by(linear_query, s, kernels, layer, q_head, queries, count, values);
    for (uint32_t v = 0; v < count; v++)
        for (uint32_t b = 0; b < s->geom.sig_bits; b++) {
            float w = values[v * PKV_SIG_BITS_MAX + b];
            weights[v * s->geom.sig_bits + b] = !s->q_signs ? w : w > 0 ? 1.0f : -1.0f;
        }
    *ret_unit = s->unit * (s->q_signs ? 1.0f : 2.0f * scale * 1.44269504f);
}

static void hash_weigh(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t q_head,
                       const float *queries, uint32_t count, float scale, float *weights, float *ret_unit)
{
    (void)scale;
    float values[GPU_COLUMNS * PKV_SIG_BITS_MAX];
    uint32_t bits = queries_by(hash_query, s, kernels, layer, q_head, queries, count, values);
    uint32_t own = q_head % pkv_geom_group(&s->geom) * bits;
    memset(weights, 0, (uint64_t)count * s->geom.sig_bits * sizeof(*weights));
    for (uint32_t v = 0; v < count; v++)
        for (uint32_t i = 0; i < bits; i++)
            weights[v * s->geom.sig_bits + own + i] = values[v * PKV_SIG_BITS_MAX + i] > 0 ? 1.0f : -1.0f;
    *ret_unit = s->unit;
}

static void code_weigh(const struct gpu_scheme *s, const struct gpu_kernels *kernels, uint32_t layer, uint32_t q_head,
                       const float *queries, uint32_t count, float scale, float *weights, float *ret_unit)
{
    uint64_t at = (uint64_t)layer * s->geom.kv_heads + q_head / pkv_geom_group(&s->geom);
    float values[GPU_COLUMNS * PKV_SIG_BITS_MAX];
    uint32_t used = queries_by(code_query, s, kernels, layer, q_head, queries, count, values);
    for (uint32_t v = 0; v < count; v++, weights += s->geom.sig_bits)
        for (uint32_t i = 0, bit = 0; i < used; i++) {
            uint64_t dim = at * s->dims + i;
            for (uint32_t p = 0; p < s->bits[dim]; p++)
                weights[bit++] = values[v * PKV_SIG_BITS_MAX + i] * s->step[dim] * (float)(1u << p);
        }
    *ret_unit = s->unit * scale * 1.44269504f;
}

const struct scheme_verbs scheme_linear_verbs = {linear_sign, linear_weigh}, scheme_hash_verbs = {hash_sign, hash_weigh};
const struct scheme_verbs scheme_code_verbs = {code_sign, code_weigh};
