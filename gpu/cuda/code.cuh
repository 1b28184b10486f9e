/* Signatures into codes on the 1-bit tensor cores, and counts of codes.
 *
 * mma m16n8k256 counts the bits that a signature has in common with a bit plane. Signatures of up to 128 bits fill a fragment
 * twice, of up to 64 bits four times; each copy has a plane of its own, so a product gives a digit of 0 to 2 or 0 to 4 instead
 * of one bit. Weights are numbers of six digits to base 3 or four to base 5 then, else of eight bits; what the digits count for
 * makes all of -128..127 (the last ones are negative). Tokens are rows (a lane's 16-byte load holds one word of four tokens:
 * the layout of geom.h is the fragment), columns are four q heads x two digits, so a set of four heads takes half as many
 * products as digits for sixteen tokens, and every lane has the score of one head for two of them.
 *
 * A sum is at most 256: read as the bits of a float it is a denormal, sum x 2^-149, and one chain of fused multiply-adds turns
 * the digits' sums into the exact integer score without a conversion. Codes are the sum of 2^score over heads: a quad of lanes
 * adds them up.
 */
#ifndef GPU_CUDA_CODE_CUH
#define GPU_CUDA_CODE_CUH

#include "gpu/cuda/device.cuh"

#define CODE_LEAST __uint_as_float((GPU_CODE_BASE + 1u) << 18)
#define CODE_MOST  __uint_as_float((GPU_CODE_BASE + GPU_CODE_SOFTMAX_MAX + 0u) << 18)
#define UNIT_INV   0x1p49f /* score() returns integers times its inverse */

/* D = popc(A and B), A 16 tokens x 128 bits, B 128 bits x 8 columns. */
static __device__ __forceinline__ void common_bits(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, const int (&c)[4])
{
    asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5},{%6},{%7,%8,%9,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

/* The same of a whole fragment, 256 bits. */
static __device__ __forceinline__ void common_wide(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(0));
}

/* ---- weights into digits ---- */

/* COPIES of a signature in a fragment: a digit is at most that. */
static __device__ __forceinline__ uint32_t copies_of(uint32_t words)
{
    return words <= 2 ? 4 : words <= 4 ? 2 : 1;
}
#define DIGITS(copies) ((copies) == 4 ? 4u : (copies) == 2 ? 6u : 8u)
#define DIGIT_PLANES   16u /* of a head and word at most: bit i of one of digit d, copy e: that digit of weight i is above e */

/* Planes of ENTRIES (a multiple of 32) heads x words. The lanes of a warp want those of eight digits' parities and heads and of
 * words at once: they lie in different banks. */
template <uint32_t ENTRIES> struct digit_planes {
    static constexpr uint32_t PARITY = ENTRIES + 16, PAIR = 2 * PARITY + 1;
    uint32_t at[DIGIT_PLANES / 2 * PAIR];
    static __device__ __forceinline__ constexpr uint32_t place(uint32_t digit, uint32_t copy, uint32_t copies)
    {
        return (digit / 2 * copies + copy) * PAIR + digit % 2 * PARITY;
    }
};

/* What digit i counts for. */
template <uint32_t COPIES> static __device__ __forceinline__ constexpr float digit_value(uint32_t i)
{
    constexpr float base5[8] = {1, 5, 50, -75}, base3[8] = {1, 3, 9, 27, 81, -243}, base2[8] = {1, 2, 4, 8, 16, 32, 64, -128};
    return COPIES == 4 ? base5[i] : COPIES == 2 ? base3[i] : base2[i];
}

template <uint32_t COPIES> static __device__ __forceinline__ void digits_of(int weight, uint32_t (&digit)[DIGITS(COPIES)])
{
    if constexpr (COPIES == 4) { /* 25 k + rest; k of -6..5 is 2 x the third less 3 x the fourth */
        int k = (weight + 150) / 25 - 6, rest = weight - 25 * k, fourth = k & 1;
        fourth += k + 3 * fourth < 0 ? 2 : 0;
        digit[0] = rest % 5, digit[1] = rest / 5, digit[2] = (k + 3 * fourth) / 2, digit[3] = fourth;
    } else {
        constexpr uint32_t LAST = DIGITS(COPIES) - 1;
        digit[LAST] = weight < 0;
        uint32_t rest = (uint32_t)(weight - (int)digit_value<COPIES>(LAST) * (weight < 0));
#pragma unroll
        for (uint32_t i = 0; i < LAST; i++)
            digit[i] = rest % (COPIES + 1), rest /= COPIES + 1;
    }
}

template <uint32_t COPIES, uint32_t ENTRIES>
static __device__ __forceinline__ void digits_put(int weight, uint32_t lane, struct digit_planes<ENTRIES> &to, uint32_t entry)
{
    constexpr uint32_t PLANES = DIGITS(COPIES) * COPIES;
    uint32_t digit[DIGITS(COPIES)], own = 0;
    digits_of<COPIES>(weight, digit);
#pragma unroll
    for (uint32_t j = 0; j < PLANES; j++) {
        uint32_t plane = __ballot_sync(ALL_LANES, digit[j / COPIES] > j % COPIES);
        own = lane == j ? plane : own;
    }
    if (lane < PLANES)
        to.at[to.place(lane / COPIES, lane % COPIES, COPIES) + entry] = own;
}

/* A warp turns 32 weights of a head, a lane each, into their planes. words: of a signature; entry: head x words + word. */
template <uint32_t ENTRIES>
static __device__ __forceinline__ void digits_write(int weight, uint32_t lane, uint32_t words, struct digit_planes<ENTRIES> &to,
                                                    uint32_t entry)
{
    if (words <= 2)
        digits_put<4>(weight, lane, to, entry);
    else if (words <= 4)
        digits_put<2>(weight, lane, to, entry);
    else
        digits_put<1>(weight, lane, to, entry);
}

/* ---- signatures into codes ---- */

/* Sixteen tokens x 256 bits, this lane's part of A: of words lane % 4 and so on four tokens, two rows of each of two fragments.
 */
struct fragments {
    uint32_t a[2][4];
};

/* This lane's part of all B; column: lane / 4 = 2 x head + parity of the digit. */
template <uint32_t SETS, uint32_t COPIES> struct planes {
    uint32_t b[SETS][DIGITS(COPIES) / 2][2];
    float scale[SETS], bias[SETS]; /* of head lane % 4; scale: of what score() returns */
};

/* The group's digits. Words that signatures do not have and heads beyond the group are zero. */
template <uint32_t SETS, uint32_t COPIES, uint32_t ENTRIES>
static __device__ __forceinline__ void planes_digits(struct planes<SETS, COPIES> &p, const struct digit_planes<ENTRIES> &digits,
                                                     uint32_t group, uint32_t words, uint32_t lane)
{
    uint32_t column = lane / 4, k = lane % 4;
#pragma unroll
    for (uint32_t set = 0; set < SETS; set++) {
        uint32_t h = set * 4 + column / 2;
#pragma unroll
        for (uint32_t m = 0; m < DIGITS(COPIES) / 2; m++)
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                uint32_t word = COPIES == 4 ? k % 2 : COPIES == 2 ? k : half * 4 + k;
                uint32_t copy = COPIES == 4 ? half * 2 + k / 2 : COPIES == 2 ? half : 0;
                bool there = h < group && word < words;
                p.b[set][m][half] = there ? digits.at[digits.place(2 * m + column % 2, copy, COPIES) + h * words + word] : 0;
            }
    }
}

/* The set's scales and biases. */
template <uint32_t SETS, uint32_t COPIES>
static __device__ __forceinline__ void planes_biases(struct planes<SETS, COPIES> &p, const float *scales, const float *biases,
                                                     uint32_t group, uint32_t lane)
{
#pragma unroll
    for (uint32_t set = 0; set < SETS; set++) {
        uint32_t own = set * 4 + lane % 4;
        p.scale[set] = own < group ? scales[own] * UNIT_INV : 0.0f;
        p.bias[set] = own < group ? biases[own] : NOTHING;
    }
}

/* Scores of one head (set x 4 + lane % 4) for four tokens, exact integers as floats times 2^-49. */
template <uint32_t SETS, uint32_t COPIES>
static __device__ __forceinline__ void score(const struct fragments &s, const struct planes<SETS, COPIES> &p, uint32_t set,
                                             float (&v)[4])
{
    constexpr uint32_t PAIRS = DIGITS(COPIES) / 2;
    const float one = 0x1p100f; /* a sum is sum x 2^-149 */
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        int d[PAIRS][4];
#pragma unroll
        for (uint32_t m = 0; m < PAIRS; m++)
            common_wide(d[m], s.a[half], p.b[set][m]);
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
            float t = 0;
#pragma unroll
            for (uint32_t m = 0; m < PAIRS; m++)
#pragma unroll
                for (uint32_t odd = 0; odd < 2; odd++) {
                    float x = __int_as_float(d[m][2 * r + odd]), value = digit_value<COPIES>(2 * m + odd) * one;
                    t = m + odd ? fmaf(x, value, t) : x * value;
                }
            v[2 * half + r] = t;
        }
    }
}

/* Rows g and g + 8 of A [16 x 4] are a quad's values x and y: the sums over the quad. The product drops mantissa bits beyond
 * the tenth, a twentieth of a code's step. */
static __device__ __forceinline__ float2 quad_sums(float x, float y)
{
    float d[4];
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%7,%7,%7,%7};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(__float_as_uint(x)), "r"(__float_as_uint(y)), "r"(__float_as_uint(1.0f)), "f"(0.0f));
    return make_float2(d[0], d[2]);
}

/* Four values of tokens 4g..4g+3, a head per lane of a quad: the quad's sum for token lane % 4. */
static __device__ __forceinline__ float quad_sum(const float (&v)[4], uint32_t lane)
{
    float2 low = quad_sums(v[0], v[1]), high = quad_sums(v[2], v[3]);
    return lane & 2 ? (lane & 1 ? high.y : high.x) : lane & 1 ? low.y : low.x;
}

/* Scores of all heads for 32 tokens, this lane's as score() leaves them. */
template <uint32_t SETS> struct scores {
    float of[SETS][4];
};

template <uint32_t SETS, uint32_t COPIES>
static __device__ __forceinline__ struct scores<SETS> scores_of(const struct fragments &s,
                                                                const struct planes<SETS, COPIES> &p) {
    struct scores<SETS> v;
#pragma unroll
    for (uint32_t set = 0; set < SETS; set++)
        score(s, p, set, v.of[set]);
    return v;
}

/* Of token lane of 32. */
template <uint32_t SETS, uint32_t COPIES>
static __device__ __forceinline__ uint32_t code_of(const struct scores<SETS> &v, const struct planes<SETS, COPIES> &p,
                                                   uint32_t lane)
{
    float total[4];
#pragma unroll
    for (uint32_t set = 0; set < SETS; set++)
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            float power = exp2_fast(fmaf(v.of[set][j], p.scale[set], p.bias[set]));
            total[j] = set ? total[j] + power : power;
        }
    /* Clamped as floats, where the code is 1 and the largest: one shift and one addition remain. */
    float sum = fminf(fmaxf(quad_sum(total, lane), CODE_LEAST), CODE_MOST);
    return (__float_as_uint(sum) >> 18) - GPU_CODE_BASE;
}

/* Suffix sums of counts [2048]: how many tokens have at least this code. 512 threads, four codes each; warp_sums [16]: scratch.
 */
static __device__ __forceinline__ uint4 suffix_sums(const uint32_t *counts, uint32_t *warp_sums)
{
    uint32_t t = threadIdx.x, lane = t % WARP, warp = t / WARP;
    uint4 c = ((const uint4 *)counts)[t];
    c.z += c.w, c.y += c.z, c.x += c.y;
    uint32_t sum = c.x;
#pragma unroll
    for (uint32_t s = 1; s < WARP; s *= 2) {
        uint32_t other = __shfl_down_sync(ALL_LANES, sum, s);
        sum += lane + s < WARP ? other : 0;
    }
    if (lane == 0)
        warp_sums[warp] = sum;
    __syncthreads();
    uint32_t above = sum - c.x + __reduce_add_sync(ALL_LANES, lane > warp && lane < 512 / WARP ? warp_sums[lane] : 0);
    c.x += above, c.y += above, c.z += above, c.w += above;
    return c;
}

/* To global memory: fine [2049], coarse [64] (every 32nd). */
static __device__ __forceinline__ void write_counts(const uint4 &sums, uint32_t *to)
{
    uint32_t t = threadIdx.x;
    ((uint4 *)to)[t] = sums;
    if (t % 8 == 0)
        to[CUDA_COARSE + t / 8] = sums.x;
    if (t == 0)
        to[2048] = 0;
}

#endif
