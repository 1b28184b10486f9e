/* The host kernels. Compiled once per instruction set with GPU_KERNELS naming the table; see kernel.h for why the bits
 * agree. */
#include "gpu/code.h"
#include "gpu/kernel.h"

#include <stdlib.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

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

static float dot_float(const float *a, const float *b, uint32_t count)
{
    float lanes[GPU_LANES] = {0};
    for (uint32_t i = 0; i < count; i += GPU_LANES)
        for (uint32_t l = 0; l < GPU_LANES; l++)
            lanes[l] += a[i + l] * b[i + l];
    return reduce(lanes);
}

static float dot(const float *a, const void *b, uint32_t dtype, uint32_t count)
{
    float row[PKV_HEAD_DIM_MAX];
    to_float(b, dtype, row, count);
    return dot_float(a, row, count);
}

/* ---- attention ---- */

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

static void step_head(const struct gpu_step *a, const float *keys, const float *values, uint32_t head)
{
    struct gpu_softmax *s = &a->states[head];
    const float *q = a->q + (uint64_t)head * a->head_dim;
    float weights[GPU_ATTEND_STEP], max = s->max;
    for (uint32_t r = 0; r < a->count; r++) {
        weights[r] = dot_float(q, keys + (uint64_t)r * a->head_dim, a->head_dim);
        max = weights[r] > max ? weights[r] : max;
    }
    float keep = s->sum > 0 ? exp_negative(s->max - max) : 0.0f, sum = 0;
    for (uint32_t r = 0; r < a->count; r++) {
        weights[r] = exp_negative(weights[r] - max);
        sum += weights[r];
    }
    float out[PKV_HEAD_DIM_MAX];
    for (uint32_t d = 0; d < a->head_dim; d++)
        out[d] = s->out[d] * keep;
    for (uint32_t r = 0; r < a->count; r++) {
        const float *v = values + (uint64_t)r * a->head_dim;
        float w = weights[r];
        for (uint32_t d = 0; d < a->head_dim; d++)
            out[d] += w * v[d];
    }
    memcpy(s->out, out, a->head_dim * sizeof(float));
    s->sum = s->sum * keep + sum;
    s->max = max;
}

static void step(const struct gpu_step *a)
{
    float keys[GPU_ATTEND_STEP * PKV_HEAD_DIM_MAX], values[GPU_ATTEND_STEP * PKV_HEAD_DIM_MAX];
    uint32_t bytes = a->head_dim * pkv_dtype_bytes(a->dtype);
    for (uint32_t r = 0; r < a->count; r++) {
        to_float(a->rows[r], a->dtype, keys + (uint64_t)r * a->head_dim, a->head_dim);
        to_float((const char *)a->rows[r] + bytes, a->dtype, values + (uint64_t)r * a->head_dim, a->head_dim);
    }
    for (uint32_t head = 0; head < a->group; head++)
        step_head(a, keys, values, head);
}

/* ---- scan ---- */

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

static int32_t score(const int16_t *tables, const uint32_t *words, uint32_t count)
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
            sum += gpu_exp2(fmaf((float)score(a->tables + h * stride, words, a->words), a->scales[h], a->biases[h]));
        return gpu_code_softmax(sum);
    }
    int32_t total = 0, best = INT32_MIN;
    for (uint32_t h = 0; h < a->group; h++) {
        int32_t s = score(a->tables + h * stride, words, a->words);
        total += s;
        best = s > best ? s : best;
    }
    return gpu_code_integer(a->rule == PKV_RULE_SUM ? total : best, a->low, a->shift);
}

static void scan(const struct gpu_scan *a)
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

const struct gpu_kernels GPU_KERNELS = {
    .name = GPU_KERNELS_NAME,
    .scan = scan,
    .step = step,
    .to_float = to_float,
    .finite = finite_all,
    .dot = dot,
};
