/* Signatures into codes on the tensor cores, and counts of codes.
 *
 * A weight is 3a - 4b - 60c + 80d with digits of 0 to 4: every integer from -130 to 206 is. A digit is four bit planes,
 * of which as many are set as it says; mma m16n8k128 counts the bits that a signature has in common with one, and a
 * chain of such products, or a fragment that holds a short signature twice, adds the four up. Tokens are rows (a lane's
 * 16-byte load holds one word of four tokens: the layout of geom.h is the fragment), columns are four q heads x two
 * digits, so two chains of a set of four heads hold all sums of digits for sixteen tokens.
 *
 * A sum is at most 1024 and lies in a register of its own: read as a half-precision number it is sum x 2^-24, exactly.
 * So the registers of a chain are A of a second product, m16n8k16 in half precision, whose rows are even digits of
 * eight tokens and odd digits of the same, whose k is head and which eight of the tokens, and whose B puts each of
 * these to its own column: the first chain counts once and the second -20 times. What is left is 3 x even - 4 x odd:
 * two fused multiply-adds with the head's scale, and its bias. Codes are the sum of 2^score over heads: a quad of lanes
 * adds them up.
 */
#ifndef GPU_CUDA_CODE_CUH
#define GPU_CUDA_CODE_CUH

#include "gpu/cuda/device.cuh"

#define CODE_LEAST __uint_as_float((GPU_CODE_BASE + 1u) << 18)
#define CODE_MOST  __uint_as_float((GPU_CODE_BASE + GPU_CODE_SOFTMAX_MAX + 0u) << 18)
#define UNIT_INV   0x1p24f /* scores come times its inverse */

/* D = popc(A and B), A 16 tokens x 128 bits, B 128 bits x 8 columns. */
static __device__ __forceinline__ void common_bits(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, const int (&c)[4])
{
    asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5},{%6},{%7,%8,%9,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

static __device__ __forceinline__ uint4 load_once(const uint4 *p)
{
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

/* d += A B: the sums of a chain, 16 tokens x 8 columns, as half-precision numbers. */
static __device__ __forceinline__ void weigh_sums(float (&d)[4], const int (&sums)[4], const uint32_t (&b)[2])
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(sums[0]), "r"(sums[1]), "r"(sums[2]), "r"(sums[3]), "r"(b[0]), "r"(b[1]));
}

/* ---- weights into digits ---- */

#define DIGITS    4u
#define DIGIT_MAX 4u
/* Of a head and word; bit i of number digit x 4 + e: the digit of weight i is above e. */
#define DIGIT_PLANES (DIGITS * DIGIT_MAX)

/* value = 3 x *even - 4 x *odd, both 0 to 4; whether there are such. */
static __device__ __forceinline__ bool pair_of(int value, uint32_t *even, uint32_t *odd)
{
    int x = 3 * value & 3, y = (3 * x - value) / 4; /* 3 x 3 is 1, modulo 4 */
    bool other = x == 0 && y < 0;                   /* 3 x 4 - 4 x 3 is nothing */
    *even = other ? 4 : x, *odd = other ? y + 3 : y;
    return *odd <= DIGIT_MAX;
}

/* A warp turns 32 weights of a head, a lane each, into to [DIGIT_PLANES]. */
static __device__ __forceinline__ void digits_write(int weight, uint32_t lane, uint32_t *to)
{
    uint32_t digit[DIGITS] = {0, 0, 0, 0}, own = 0;
#pragma unroll
    for (int i = -1; i <= 1; i++) {
        int high = (weight + 128) / 20 - 6 + i;
        uint32_t d[DIGITS];
        bool low = pair_of(weight - 20 * high, d, d + 1);
        if (pair_of(-high, d + 2, d + 3) && low)
#pragma unroll
            for (uint32_t j = 0; j < DIGITS; j++)
                digit[j] = d[j];
    }
#pragma unroll
    for (uint32_t j = 0; j < DIGIT_PLANES; j++) {
        uint32_t plane = __ballot_sync(ALL_LANES, digit[j / DIGIT_MAX] > j % DIGIT_MAX);
        own = lane == j ? plane : own;
    }
    if (lane < DIGIT_PLANES)
        to[lane] = own;
}

/* All warps turn the bit planes [heads][8][words] of the weights into digits [heads][words][DIGIT_PLANES]; `stride`: from one
 * plane to the next. */
static __device__ __forceinline__ void digits_take(const uint32_t *planes, uint32_t stride, uint32_t heads, uint32_t words,
                                                   uint32_t (*digits)[DIGIT_PLANES])
{
    uint32_t lane = threadIdx.x % WARP;
    for (uint32_t i = threadIdx.x / WARP; i < heads * words; i += blockDim.x / WARP) {
        const uint32_t *from = planes + (uint64_t)(i / words) * 8 * stride + i % words;
        uint32_t weight = 0;
#pragma unroll
        for (uint32_t p = 0; p < 8; p++)
            weight |= (from[p * stride] >> lane & 1) << p;
        digits_write((int8_t)weight, lane, digits[i]);
    }
}

/* ---- signatures into codes ---- */

/* STEPS: products in a chain: 2 for signatures of up to 64 bits, which a fragment holds twice, 4 up to 128, 8 beyond. */
static __device__ __forceinline__ uint32_t fragment_word(uint32_t steps, uint32_t words, uint32_t k, uint32_t lane)
{
    return min(steps == 2 ? lane % 2 : k * 4 + lane % 4, words - 1); /* where there is none, its planes are zero */
}

/* This lane's part of all B. Column of the first product: lane / 4 = 2 x head + parity. */
template <uint32_t SETS, uint32_t STEPS> struct planes {
    uint32_t b[SETS][2][STEPS];
    uint32_t places[2][2];                   /* B of the second product */
    float even[SETS], odd[SETS], bias[SETS]; /* of head lane % 4: scale x 3, scale x -4 */
};

/* The set's scales and biases, and digits [heads][words][DIGIT_PLANES] of the group. */
template <uint32_t SETS, uint32_t STEPS>
static __device__ __forceinline__ void planes_take(struct planes<SETS, STEPS> &p, const uint32_t (*digits)[DIGIT_PLANES],
                                                   const float *scales, const float *biases, uint32_t group, uint32_t words,
                                                   uint32_t lane)
{
    uint32_t column = lane / 4, k = lane % 4;
#pragma unroll
    for (uint32_t set = 0; set < SETS; set++) {
        uint32_t h = set * 4 + column / 2, own = set * 4 + k;
#pragma unroll
        for (uint32_t m = 0; m < 2; m++)
#pragma unroll
            for (uint32_t j = 0; j < STEPS; j++) {
                uint32_t word = STEPS == 2 ? k % 2 : k + j / 4 * 4, above = STEPS == 2 ? 2 * j + k / 2 : j % 4;
                bool there = h < group && word < words;
                p.b[set][m][j] = there ? digits[h * words + word][(2 * m + column % 2) * DIGIT_MAX + above] : 0;
            }
        float scale = own < group ? scales[own] * UNIT_INV : 0.0f;
        p.even[set] = 3 * scale, p.odd[set] = -4 * scale;
        p.bias[set] = own < group ? biases[own] : NOTHING;
    }
    for (uint32_t m = 0; m < 2; m++)
        for (uint32_t half = 0; half < 2; half++)
            p.places[m][half] = column == 2 * k + half ? (m ? 0xcd00u : 0x3c00u) : 0; /* -20 and 1 */
}

/* Scores of one head (set x 4 + lane % 4), scaled and biased, for four tokens. */
template <uint32_t SETS, uint32_t STEPS, uint32_t K>
static __device__ __forceinline__ void score(const uint4 (&s)[K], const struct planes<SETS, STEPS> &p, uint32_t set,
                                             float (&v)[4])
{
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float d[4] = {0, 0, 0, 0};
#pragma unroll
        for (uint32_t m = 0; m < 2; m++) {
            int sums[4] = {0, 0, 0, 0};
#pragma unroll
            for (uint32_t j = 0; j < STEPS; j++) {
                const uint4 &x = s[j / 4];
                common_bits(sums, half ? x.z : x.x, half ? x.w : x.y, p.b[set][m][j], sums);
            }
            weigh_sums(d, sums, p.places[m]);
        }
#pragma unroll
        for (uint32_t r = 0; r < 2; r++)
            v[2 * half + r] = fmaf(d[r], p.even[set], fmaf(d[2 + r], p.odd[set], p.bias[set]));
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

template <uint32_t SETS, uint32_t STEPS, uint32_t K>
static __device__ __forceinline__ uint32_t code_of(const uint4 (&s)[K], const struct planes<SETS, STEPS> &p, uint32_t lane)
{
    float total[4];
#pragma unroll
    for (uint32_t set = 0; set < SETS; set++) {
        float v[4];
        score<SETS, STEPS, K>(s, p, set, v);
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            float power = exp2_fast(v[j]);
            total[j] = set ? total[j] + power : power;
        }
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
