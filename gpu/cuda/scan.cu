/* Scan: a code for each token of a list, and how many tokens of each part have at least each code.
 *
 * 1-bit tensor cores: mma m16n8k128 counts the bits that a signature has in common with a bit plane of the weights. Tokens are
 * rows (a lane's 16-byte load holds one word of four tokens: the layout of geom.h is the fragment), columns are four q heads x
 * two planes, so four products of a set of four heads give every lane the score of one head for four tokens. A count is at most
 * 256: read as the bits of a float it is a denormal, count x 2^-149, and one chain of fused multiply-adds turns the planes'
 * counts into the exact integer score without a conversion. Rows of the code are the sum of 2^score over heads: a quad of lanes
 * adds them up. */
#include "gpu/cuda/device.cuh"

#define THREADS    512u
#define WARPS      (THREADS / WARP)
#define CODE_LEAST __uint_as_float((GPU_CODE_BASE + 1u) << 18)
#define CODE_MOST  __uint_as_float((GPU_CODE_BASE + GPU_CODE_SOFTMAX_MAX + 0u) << 18)
#define UNIT_INV   0x1p49f /* score() returns integers times its inverse */

struct scan_shared {
    uint32_t counts[2048 + 8];
    uint32_t warp_sums[WARPS];
};

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

/* Four values of tokens 4g..4g+3, a head per lane of a quad: the quad's sum for token lane % 4. */
static __device__ __forceinline__ float quad_sum(const float (&v)[4], uint32_t lane)
{
    bool high = lane & 2, odd = lane & 1;
    float keep0 = high ? v[2] : v[0], keep1 = high ? v[3] : v[1], give0 = high ? v[0] : v[2], give1 = high ? v[1] : v[3];
    keep0 += __shfl_xor_sync(ALL_LANES, give0, 2);
    keep1 += __shfl_xor_sync(ALL_LANES, give1, 2);
    float keep = odd ? keep1 : keep0, give = odd ? keep0 : keep1;
    return keep + __shfl_xor_sync(ALL_LANES, give, 1);
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

/* One block of 64 tokens is two halves of 32: a lane's loads, all steps. */
template <uint32_t K> struct tile {
    uint4 half[2][K];
};

/* Where this lane reads in a block, and whether at all: lanes beyond the signature's words hold zeros. */
template <uint32_t K> struct lane_offsets {
    uint32_t at[2][K];
    bool there[K];
};

template <uint32_t K>
static __device__ __forceinline__ void load_tile(uint64_t block, const struct lane_offsets<K> &o, struct tile<K> &t)
{
#pragma unroll
    for (uint32_t half = 0; half < 2; half++)
#pragma unroll
        for (uint32_t k = 0; k < K; k++)
            t.half[half][k] = o.there[k] && block ? load_once((const uint4 *)(block + o.at[half][k])) : make_uint4(0, 0, 0, 0);
}

/* Codes of a block's tokens, and their counts. Inside of the span every token is a candidate. */
template <uint32_t SETS, uint32_t K>
static __device__ __forceinline__ void score_tile(const struct tile<K> &t, const struct planes<SETS, K> &p,
                                                  struct scan_shared *m, uint16_t *codes, uint32_t block,
                                                  const struct span &span, uint32_t lane)
{
    uint32_t first = block * PKV_BLOCK_TOKENS + lane;
    bool inside = block * PKV_BLOCK_TOKENS >= span.first && (block + 1) * PKV_BLOCK_TOKENS <= span.last;
    uint32_t code[2] = {code_of<SETS, K>(t.half[0], p, lane), code_of<SETS, K>(t.half[1], p, lane)};
    if (!inside) {
        code[0] = first >= span.first && first < span.last ? code[0] : 0;
        code[1] = first + 32 >= span.first && first + 32 < span.last ? code[1] : 0;
    }
    codes[first] = (uint16_t)code[0], codes[first + 32] = (uint16_t)code[1];
    if (inside || code[0])
        atomicAdd(&m->counts[code[0]], 1u);
    if (inside || code[1])
        atomicAdd(&m->counts[code[1]], 1u);
}

/* The counts become suffix sums, in place and in global memory: fine [2049], coarse [64] (every 32nd). */
static __device__ void write_counts(struct scan_shared *m, uint32_t *to)
{
    uint32_t t = threadIdx.x, lane = t % WARP, warp = t / WARP;
    uint4 c = ((const uint4 *)m->counts)[t];
    c.z += c.w, c.y += c.z, c.x += c.y;
    uint32_t sum = c.x;
#pragma unroll
    for (uint32_t s = 1; s < WARP; s *= 2) {
        uint32_t other = __shfl_down_sync(ALL_LANES, sum, s);
        sum += lane + s < WARP ? other : 0;
    }
    if (lane == 0)
        m->warp_sums[warp] = sum;
    __syncthreads();
    uint32_t above = sum - c.x;
    for (uint32_t w = warp + 1; w < WARPS; w++)
        above += m->warp_sums[w];
    c.x += above, c.y += above, c.z += above, c.w += above;
    ((uint4 *)to)[t] = c;
    if (t % 8 == 0)
        to[CUDA_COARSE + t / 8] = c.x;
    if (t == 0)
        to[2048] = 0;
}

template <uint32_t SETS, uint32_t K>
__global__ void __launch_bounds__(THREADS, SETS == 1 && K == 1 ? 2 : 1)
    scan_kernel(const __grid_constant__ struct cuda_attend a)
{
    __shared__ __align__(16) struct scan_shared m;
    const struct pkv_geom &g = a.geom;
    uint32_t list = blockIdx.x / a.parts, part = blockIdx.x % a.parts, query = list / g.kv_heads, head = list % g.kv_heads;
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, words = pkv_geom_words(&g);
    for (uint32_t i = threadIdx.x; i < 2048 + 8; i += THREADS)
        m.counts[i] = 0;
    struct span span = span_of(a, query);
    if (span.dense) {
        wait_for_former(); /* a grid that ends early would let later ones pass the former */
        return;
    }
    const struct pkv_block_ref *blocks = blocks_of(a, query);
    uint16_t *codes = a.work.codes + list * codes_stride(a);
    uint64_t slot = pkv_geom_sig_block_bytes(&g), offset = (uint64_t)pkv_geom_sig_index(&g, head, 0, 0) * 4;
    /* Contiguous blocks for a part, so that ties go to the lower index by a prefix over parts; warps take them in turn. */
    uint32_t begin, end;
    part_of(a, span, part, &begin, &end);
    /* Addresses of this warp's next 32 blocks, one a lane: the table is read ahead of the signatures. */
    auto address = [&](uint32_t i) -> uint64_t {
        uint32_t b = begin + warp + (i + lane) * WARPS;
        return b < end ? (uint64_t)place_address(a.base, blocks[b].signatures, slot) + offset : 0;
    };
    uint32_t mine = begin + warp < end ? (end - begin - warp + WARPS - 1) / WARPS : 0;
    uint64_t now = address(0), next = address(WARP);
    struct lane_offsets<K> offsets;
#pragma unroll
    for (uint32_t k = 0; k < K; k++) {
        offsets.there[k] = k * 4 + lane % 4 < words;
        for (uint32_t half = 0; half < 2; half++)
            offsets.at[half][k] = ((lane / 4 + 8 * half) * words + k * 4 + lane % 4) * 16;
    }
    struct tile<K> even, odd;
    load_tile<K>(__shfl_sync(ALL_LANES, now, 0), offsets, even);
    wait_for_former();
    __syncthreads();
    struct planes<SETS, K> p;
    load_planes<SETS, K>(a, (uint64_t)query * g.q_heads + head * pkv_geom_group(&g), lane, p);
    /* Registers hold one tile ahead. Two tiles a turn, so that none is moved; 32 is even, so addresses change at even turns. */
    for (uint32_t i = 0; i < mine; i += 2) {
        uint32_t b = begin + warp + i * WARPS;
        load_tile<K>(__shfl_sync(ALL_LANES, now, (i + 1) % WARP), offsets, odd);
        score_tile<SETS, K>(even, p, &m, codes, b, span, lane);
        if ((i + 2) % WARP == 0)
            now = next, next = address(i + 2 + WARP);
        load_tile<K>(__shfl_sync(ALL_LANES, now, (i + 2) % WARP), offsets, even);
        if (i + 1 < mine)
            score_tile<SETS, K>(odd, p, &m, codes, b + WARPS, span, lane);
    }
    __syncthreads();
    write_counts(&m, a.work.counts + ((uint64_t)list * a.parts + part) * CUDA_COUNTS);
}

template <uint32_t SETS, uint32_t K> static int start(const struct cuda_attend *a, void *stream)
{
    return launch(scan_kernel<SETS, K>, dim3(a->queries * a->geom.kv_heads * a->parts), THREADS, 0, *a, stream);
}

template <uint32_t SETS, uint32_t K> static int preload(void)
{
    cudaFuncAttributes f;
    return cudaFuncGetAttributes(&f, scan_kernel<SETS, K>) == cudaSuccess ? 0 : -(int)PKV_ERR_UNSUPPORTED;
}

extern "C" int cuda_scan_preload(void)
{
    int r = preload<1, 1>();
    r = r ? r : preload<2, 1>();
    r = r ? r : preload<4, 1>();
    r = r ? r : preload<1, 2>();
    r = r ? r : preload<2, 2>();
    return r ? r : preload<4, 2>();
}

extern "C" int cuda_scan_launch(const struct cuda_attend *a, void *stream)
{
    uint32_t sets = cuda_head_chunks(&a->geom);
    if (a->policy.rule != PKV_RULE_SOFTMAX)
        return -(int)PKV_ERR_UNSUPPORTED;
    if (a->geom.sig_bits <= 128)
        return sets == 1 ? start<1, 1>(a, stream) : sets == 2 ? start<2, 1>(a, stream) : start<4, 1>(a, stream);
    return sets == 1 ? start<1, 2>(a, stream) : sets == 2 ? start<2, 2>(a, stream) : start<4, 2>(a, stream);
}
