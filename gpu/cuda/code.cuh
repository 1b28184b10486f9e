/* Signatures into codes on the 1-bit tensor cores, and counts of codes.
 *
 * mma m16n8k128 counts the bits that a signature has in common with a bit plane of the weights. Tokens are rows (a lane's
 * 16-byte load holds one word of four tokens: the layout of geom.h is the fragment), columns are four q heads x two planes, so
 * four products of a set of four heads give every lane the score of one head for four tokens. A count is at most 256: read as
 * the bits of a float it is a denormal, count x 2^-149, and one chain of fused multiply-adds turns the planes' counts into the
 * exact integer score without a conversion. Rows of the code are the sum of 2^score over heads: a quad of lanes adds them up.
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

static __device__ __forceinline__ uint4 load_once(const uint4 *p)
{
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

/* Planes of the four heads of a set, as this lane's part of B: column = lane / 4 = 2 x head + parity, product m has planes 2m
 * and 2m + 1, words lane % 4 of each step. Heads beyond the group are zero. */
template <uint32_t SETS, uint32_t K> struct planes {
    uint32_t b[SETS][4][K];
    float scale[SETS], bias[SETS]; /* scale: of what score() returns */
};

template <uint32_t SETS, uint32_t K>
static __device__ __forceinline__ void load_planes(const struct cuda_attend &a, uint64_t q_head, uint32_t lane,
                                                   struct planes<SETS, K> &p)
{
    uint32_t group = pkv_geom_group(&a.geom), words = pkv_geom_words(&a.geom);
#pragma unroll
    for (uint32_t set = 0; set < SETS; set++) {
        uint32_t h = set * 4 + lane / 8, mine = set * 4 + lane % 4;
#pragma unroll
        for (uint32_t m = 0; m < 4; m++)
#pragma unroll
            for (uint32_t k = 0; k < K; k++) {
                uint32_t w = k * 4 + lane % 4, plane = 2 * m + lane / 4 % 2;
                p.b[set][m][k] = h < group && w < words ? a.work.planes[((q_head + h) * 8 + plane) * words + w] : 0;
            }
        bool there = mine < group;
        p.scale[set] = there ? a.work.scales[q_head + mine] * UNIT_INV : 0.0f;
        p.bias[set] = there ? a.work.biases[q_head + mine] : NOTHING;
    }
}

/* Scores of one head (set x 4 + lane % 4) for four tokens, exact integers as floats times 2^-49. */
template <uint32_t K>
static __device__ __forceinline__ void score(const uint4 (&s)[K], const uint32_t (&b)[4][K], float (&v)[4])
{
    const float one = 0x1p100f; /* a count is count x 2^-149 */
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        int d[4][4];
#pragma unroll
        for (uint32_t m = 0; m < 4; m++) {
            const int zero[4] = {0, 0, 0, 0};
            common_bits(d[m], half ? s[0].z : s[0].x, half ? s[0].w : s[0].y, b[m][0], zero);
            if (K == 2)
                common_bits(d[m], half ? s[K - 1].z : s[K - 1].x, half ? s[K - 1].w : s[K - 1].y, b[m][K - 1], d[m]);
        }
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
            float t = __int_as_float(d[0][2 * r]) * one;
            t = fmaf(__int_as_float(d[0][2 * r + 1]), 2 * one, t);
#pragma unroll
            for (uint32_t m = 1; m < 4; m++) {
                t = fmaf(__int_as_float(d[m][2 * r]), (float)(1 << 2 * m) * one, t);
                t = fmaf(__int_as_float(d[m][2 * r + 1]), (m == 3 ? -1.0f : 1.0f) * (float)(2 << 2 * m) * one, t);
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

template <uint32_t SETS, uint32_t K>
static __device__ __forceinline__ uint32_t code_of(const uint4 (&s)[K], const struct planes<SETS, K> &p, uint32_t lane)
{
    float total[4];
#pragma unroll
    for (uint32_t set = 0; set < SETS; set++) {
        float v[4];
        score<K>(s, p.b[set], v);
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            float power = exp2_fast(fmaf(v[j], p.scale[set], p.bias[set]));
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
