/* The host kernels. Compiled once per instruction set with GPU_KERNELS naming the table; see kernel.h for why the bits
 * agree. */
#include "gpu/code.h"
#include "gpu/host/scan.h"
#include "gpu/host/vector.h"
#include "gpu/kernel.h"

#include <stdbool.h>
#include <stdlib.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "gpu/host/rotate.h"

#ifndef GPU_KERNELS
#define GPU_KERNELS      gpu_kernels_c
#define GPU_KERNELS_NAME "c"
#endif

/* ---- numbers ---- */

static float half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 0x1fu, mantissa = h & 0x3ffu, bits;
    float value;
    if (exponent == 0) {
        value = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &value, sizeof(bits));
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
    }
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static void to_float(const void *from, uint32_t dtype, float *to, uint64_t count)
{
    const uint16_t *half = from;
    if (dtype == PKV_F32) {
        memcpy(to, from, count * sizeof(float));
    } else if (dtype == PKV_BF16) {
        for (uint64_t i = 0; i < count; i++) {
            uint32_t bits = (uint32_t)half[i] << 16;
            memcpy(&to[i], &bits, sizeof(bits));
        }
    } else {
        uint64_t i = 0;
#ifdef __F16C__
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(half + i))));
#endif
        for (; i < count; i++)
            to[i] = half_to_float(half[i]);
    }
}

static int finite_all(const void *from, uint32_t dtype, uint64_t count)
{
    uint32_t bad = 0;
    if (dtype == PKV_F32) {
        const uint32_t *bits = from;
        for (uint64_t i = 0; i < count; i++)
            bad |= (bits[i] & 0x7f800000u) == 0x7f800000u;
    } else {
        const uint16_t *bits = from;
        uint16_t mask = dtype == PKV_F16 ? 0x7c00u : 0x7f80u, any = 0;
        for (uint64_t i = 0; i < count; i++)
            any = (uint16_t)(any | ((bits[i] & mask) == mask));
        bad = any;
    }
    return !bad;
}

/* Sixteen lanes, then a fixed tree: the one order of sums that every table uses. */
static float reduce(const float *lanes)
{
    float eight[8], four[4];
    for (int i = 0; i < 8; i++)
        eight[i] = lanes[i] + lanes[i + 8];
    for (int i = 0; i < 4; i++)
        four[i] = eight[i] + eight[i + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* reduce() of sixteen sums at once, one in each lane. */
static inline void tree(lanes16 *sum, float *ret)
{
#pragma GCC unroll 8
    for (int l = 0; l < 8; l++)
        sum[l] += sum[l + 8];
#pragma GCC unroll 4
    for (int l = 0; l < 4; l++)
        sum[l] += sum[l + 4];
    *(lanes16 *)(void *)ret = (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

static float dot(const float *a, const float *b, uint32_t count)
{
    union {
        lanes16 v;
        float f[GPU_LANES];
    } sum = {{0}};
    for (uint32_t i = 0; i < count; i += GPU_LANES)
        sum.v += *(const lanes16 *)(const void *)(a + i) * *(const lanes16 *)(const void *)(b + i);
    return reduce(sum.f);
}

static void products(const float *weight, uint32_t rows, uint32_t dim, const float *x, float *to)
{
    for (uint32_t r = 0; r < rows; r++, weight += dim) {
        lanes16 sum[GPU_LANES]; /* lane l of every vector's sum, added as reduce() does */
#pragma GCC unroll 16
        for (int l = 0; l < GPU_LANES; l++)
            sum[l] = (lanes16){0};
        for (uint32_t d = 0; d < dim; d += GPU_LANES) {
#pragma GCC unroll 16
            for (int l = 0; l < GPU_LANES; l++)
                sum[l] += weight[d + l] * *(const lanes16 *)(const void *)(x + (uint64_t)(d + l) * GPU_COLUMNS);
        }
        tree(sum, to + (uint64_t)r * GPU_COLUMNS);
    }
}

/* ---- exponentials ---- */

static void silu(float *values, uint32_t count)
{
    for (uint32_t i = 0; i < count; i += GPU_LANES) {
        lanes16 *at = (lanes16 *)(void *)(values + i), v = *at;
        ints16 below = v < 0;
        lanes16 x = PICK16(below, v, -v), low = (lanes16){0} - 87.0f;
        ints16 tiny = x < low;
        x = PICK16(tiny, low, x); /* from here on exp_negative() in every lane */
        lanes16 n = x * 1.44269504f;
        ints16 whole = __builtin_convertvector(n - 0.5f, ints16);
        lanes16 w = __builtin_convertvector(whole, lanes16);
        lanes16 r = (x - w * 0.693359375f) - w * -2.12194440e-4f;
        lanes16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = (p * r) * r + r + 1.0f;
        lanes16 e = p * (lanes16)((whole + 127) << 23);
        e = PICK16(tiny, (lanes16){0}, e); /* or a huge x would bring it back */
        *at = PICK16(below, v * e, v) / (1.0f + e);
    }
}

/* e^x for x <= 0: 2^n times a polynomial (Cephes), absolute error below 2e-7. */
static float exp_negative(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float n = x * 1.44269504f;
    int32_t whole = (int32_t)(n - 0.5f); /* nearest, as n <= 0 */
    float r = (x - (float)whole * 0.693359375f) - (float)whole * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    int32_t bits = (whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof(power));
    return p * power;
}

/* ---- attention ---- */

/* Scores of 16 rows at once from keys [head_dim][64]: lane l of every row's sum is one accumulator, added as reduce() does. */
static inline void scores_of_rows(const float *q, const float *keys, uint32_t head_dim, float *ret)
{
    lanes16 sum[GPU_LANES];
#pragma GCC unroll 16
    for (int l = 0; l < GPU_LANES; l++)
        sum[l] = (lanes16){0};
    for (uint32_t d = 0; d < head_dim; d += GPU_LANES) {
#pragma GCC unroll 16
        for (int l = 0; l < GPU_LANES; l++)
            sum[l] += q[d + l] * *(const lanes16 *)(const void *)(keys + (uint64_t)(d + l) * GPU_ATTEND_STEP);
    }
    tree(sum, ret);
}

/* out[32] = out * keep + sum over rows of weight x value, rows in order. */
static inline void add_values(const float *values, uint32_t stride, const float *weights, uint32_t count, float keep,
                              float *out)
{
    lanes16 a = *(const lanes16 *)(const void *)out * keep, b = *(const lanes16 *)(const void *)(out + 16) * keep;
    for (uint32_t r = 0; r < count; r++) {
        const float *v = values + (uint64_t)r * stride;
        a += weights[r] * *(const lanes16 *)(const void *)v;
        b += weights[r] * *(const lanes16 *)(const void *)(v + 16);
    }
    *(lanes16 *)(void *)out = a;
    *(lanes16 *)(void *)(out + 16) = b;
}

/* Scores become weights relative to the new maximum; the state's sum follows. Returns what the old output keeps. `scores` has
 * room for GPU_ATTEND_STEP: the last lanes are filled up, so that sums have one order. */
static float weigh(struct gpu_softmax *s, float *scores, uint32_t count)
{
    uint32_t whole = PKV_ALIGN_UP(count, GPU_LANES);
    float lanes[GPU_LANES], max = s->max;
    for (uint32_t r = count; r < whole; r++)
        scores[r] = -INFINITY;
    memcpy(lanes, scores, sizeof(lanes));
    for (uint32_t r = GPU_LANES; r < whole; r += GPU_LANES)
        for (uint32_t l = 0; l < GPU_LANES; l++)
            lanes[l] = scores[r + l] > lanes[l] ? scores[r + l] : lanes[l];
    for (uint32_t l = 0; l < GPU_LANES; l++)
        max = lanes[l] > max ? lanes[l] : max;
    float keep = s->sum > 0 ? exp_negative(s->max - max) : 0.0f;
    for (uint32_t r = 0; r < whole; r++)
        scores[r] = exp_negative(scores[r] - max);
    for (uint32_t r = count; r < whole; r++)
        scores[r] = 0;
    memcpy(lanes, scores, sizeof(lanes));
    for (uint32_t r = GPU_LANES; r < whole; r += GPU_LANES)
        for (uint32_t l = 0; l < GPU_LANES; l++)
            lanes[l] += scores[r + l];
    s->sum = s->sum * keep + reduce(lanes);
    s->max = max;
    return keep;
}

/* Few query heads: one row after the other. Many: keys are turned once, so that rows are lanes. The sums are the same. */
static void step(const struct gpu_step *a)
{
    float keys[GPU_ATTEND_STEP * PKV_HEAD_DIM_MAX], values[GPU_ATTEND_STEP * PKV_HEAD_DIM_MAX], row[PKV_HEAD_DIM_MAX];
    float scores[GPU_ATTEND_STEP];
    uint32_t bytes = a->head_dim * pkv_dtype_bytes(a->dtype), heads = a->queries * a->group;
    bool turned = heads > 8;
    for (uint32_t r = 0; r < a->count; r++) {
        float *key = turned ? row : keys + (uint64_t)r * a->head_dim;
        to_float(a->rows[r], a->dtype, key, a->head_dim);
        for (uint32_t d = 0; turned && d < a->head_dim; d++)
            keys[(uint64_t)d * GPU_ATTEND_STEP + r] = row[d];
        to_float((const char *)a->rows[r] + bytes, a->dtype, values + (uint64_t)r * a->head_dim, a->head_dim);
    }
    for (uint32_t h = 0; h < heads; h++) {
        const float *q = a->q + (uint64_t)h * a->head_dim;
        struct gpu_softmax *s = &a->states[h];
        uint32_t count = a->visible[h / a->group];
        for (uint32_t r = 0; turned && r < count; r += GPU_LANES)
            scores_of_rows(q, keys + r, a->head_dim, scores + r);
        for (uint32_t r = 0; !turned && r < count; r++)
            scores[r] = dot(q, keys + (uint64_t)r * a->head_dim, a->head_dim);
        if (!count)
            continue;
        float keep = weigh(s, scores, count);
        for (uint32_t d = 0; d < a->head_dim; d += 32)
            add_values(values + d, a->head_dim, scores, count, keep, s->out + d);
    }
}

/* ---- scan ---- */

#ifndef GPU_SCAN_WORDS
/* Sums of the weights of all 256 values of each byte of a signature. */
static void fill_tables(const struct gpu_scan *a)
{
    uint32_t bytes = a->words * 4;
    for (uint32_t h = 0; h < a->group; h++) {
        for (uint32_t b = 0; b < bytes; b++) {
            const int8_t *w = a->weights + (uint64_t)h * bytes * 8 + b * 8;
            int16_t *table = a->tables + ((uint64_t)h * bytes + b) * 256;
            table[0] = 0;
            for (uint32_t v = 1; v < 256; v++)
                table[v] = (int16_t)(table[v & (v - 1)] + w[__builtin_ctz(v)]);
        }
    }
}

static int32_t look_up(const int16_t *tables, const uint32_t *words, uint32_t count)
{
    int32_t sum = 0;
    for (uint32_t w = 0; w < count; w++, tables += 4 * 256) {
        uint32_t bits = words[w * 4];
        sum += tables[bits & 255] + tables[256 + (bits >> 8 & 255)] + tables[512 + (bits >> 16 & 255)] +
               tables[768 + (bits >> 24)];
    }
    return sum;
}

static uint16_t code_of(const struct gpu_scan *a, const uint32_t *words)
{
    uint64_t stride = (uint64_t)a->words * 4 * 256;
    if (a->rule == PKV_RULE_SOFTMAX) {
        float sum = 0;
        for (uint32_t h = 0; h < a->group; h++)
            sum += gpu_exp2(fmaf((float)look_up(a->tables + h * stride, words, a->words), a->scales[h], a->biases[h]));
        return gpu_code_softmax(sum);
    }
    int32_t total = 0, best = INT32_MIN;
    for (uint32_t h = 0; h < a->group; h++) {
        int32_t s = look_up(a->tables + h * stride, words, a->words);
        total += s;
        best = s > best ? s : best;
    }
    return gpu_code_integer(a->rule == PKV_RULE_SUM ? total : best, a->low, a->shift);
}

static void scan_bytes(const struct gpu_scan *a)
{
    fill_tables(a);
    for (uint32_t t = a->first; t < a->last; t++) {
        uint32_t in = t % PKV_BLOCK_TOKENS;
        const uint32_t *words = a->signatures[t / PKV_BLOCK_TOKENS] + (in / 4) * 4 * a->words + in % 4;
        uint16_t code = code_of(a, words);
        a->codes[t] = code;
        a->histogram[code]++;
    }
}
#endif

static int32_t score(const uint32_t *words, uint32_t count, const int8_t *weights)
{
    int32_t sum = 0;
    for (uint32_t w = 0; w < count; w++, weights += 32)
        for (uint32_t b = 0; b < 32; b++)
            sum += (int32_t)(words[w * 4] >> b & 1) * weights[b];
    return sum;
}

static uint32_t pick(const uint16_t *codes, uint32_t first, uint32_t last, uint32_t threshold, uint32_t ties, uint32_t *ret)
{
    uint32_t n = 0;
    for (uint32_t t = first; t < last;) {
        uint32_t end = PKV_MIN(t + 64, last);
        if (end - t == 64) { /* most stretches hold nothing: one maximum says so */
            uint16_t most = 0;
            for (uint32_t i = 0; i < 64; i++)
                most = codes[t + i] > most ? codes[t + i] : most;
            if (most < threshold) {
                t = end;
                continue;
            }
        }
        for (; t < end; t++) {
            bool tie = codes[t] == threshold;
            if (codes[t] < threshold || (tie && !ties))
                continue;
            ties -= tie;
            ret[n++] = t;
        }
    }
    return n;
}

const struct gpu_kernels GPU_KERNELS = {
    .name = GPU_KERNELS_NAME,
#ifdef GPU_SCAN_WORDS
    .scan = scan_words,
#else
    .scan = scan_bytes,
#endif
    .step = step,
    .to_float = to_float,
    .finite = finite_all,
    .dot = dot,
    .products = products,
    .silu = silu,
    .rotate = rotate,
    .positive = positive,
    .score = score,
    .pick = pick,
};
