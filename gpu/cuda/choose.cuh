/* The k best of a list by their codes, ascending, ties to the lower index, from the suffix sums that its parts left: each part
 * finds the threshold for itself (coarse, then fine: two small rounds) and knows from the parts before it how many tokens
 * above and at the threshold come first. For 512 threads. */
#ifndef GPU_CUDA_CHOOSE_CUH
#define GPU_CUDA_CHOOSE_CUH

#include "gpu/cuda/device.cuh"

struct choose_shared {
    uint32_t coarse[64];
    uint32_t fine[CUDA_PARTS_MAX][33]; /* suffix counts of the threshold's 32 codes and the next one */
    uint32_t greater[16], equal[16];
    double mass[16];
    uint32_t k;
};

/* Codes of integer rules have sixteen bits: counts are of those above the low ones. */
#define CODE_LOW_BITS 5u

/* Where the k best end: codes above `code` are all taken, of those that have it the first `ties`. before_*: in earlier parts.
 */
struct threshold {
    uint32_t code, ties, before_greater, before_equal;
};

/* Top-p: the smallest k whose estimated mass, with one per q head for sinks and recent, reaches p; at most k. */
static __device__ __noinline__ void budget(const struct cuda_attend &a, struct choose_shared *m, const uint32_t *counts,
                                           uint32_t parts, uint32_t k)
{
    uint32_t t = threadIdx.x, lane = t % WARP, warp = t / WARP, suffix[5];
    double group = pkv_geom_group(&a.geom), own[4], sum = 0;
    for (uint32_t j = 0; j < 5; j++) {
        suffix[j] = 0;
        for (uint32_t r = 0; r < parts; r++)
            suffix[j] += __ldcg(counts + r * CUDA_COUNTS + t * 4 + j);
    }
    for (uint32_t j = 4; j-- > 0;)
        sum += own[j] = (t * 4 + j ? (suffix[j] - suffix[j + 1]) * gpu_code_mass(t * 4 + j) : 0.0);
    double scan = sum;
    for (uint32_t s = 1; s < WARP; s *= 2) {
        double other = __shfl_down_sync(ALL_LANES, scan, s);
        scan += lane + s < WARP ? other : 0;
    }
    if (lane == 0)
        m->mass[warp] = scan;
    if (t == 0)
        m->k = k;
    __syncthreads();
    double above = scan - sum, total = group;
    for (uint32_t w = 0; w < (512 / WARP); w++) {
        above += w > warp ? m->mass[w] : 0;
        total += m->mass[w];
    }
    double missing = a.policy.top_p * total - group;
    for (uint32_t j = 4; j-- > 0; above += own[j])
        if (above < missing && above + own[j] >= missing)
            atomicMin(&m->k, suffix[j + 1] + (uint32_t)ceil((missing - above) / gpu_code_mass(t * 4 + j)));
    if (t == 0 && missing <= 0)
        atomicMin(&m->k, 0u);
    __syncthreads();
}

/* The coarse sums of all parts are in m->coarse: the last of 64 buckets that k tokens reach. */
static __device__ __forceinline__ uint32_t bucket_of(const struct choose_shared *m, uint32_t k)
{
    uint32_t lane = threadIdx.x % WARP;
    uint32_t low = __ballot_sync(ALL_LANES, m->coarse[lane] >= k), high = __ballot_sync(ALL_LANES, m->coarse[32 + lane] >= k);
    return high ? 63 - __clz(high) : low ? 31 - __clz(low) : 0;
}

/* The bucket's fine sums of all parts are in m->fine. */
static __device__ __forceinline__ struct threshold threshold_of(const struct choose_shared *m, uint32_t parts, uint32_t part,
                                                                uint32_t k, uint32_t bucket)
{
    uint32_t lane = threadIdx.x % WARP, merged = 0;
#pragma unroll 8
    for (uint32_t r = 0; r < parts; r++)
        merged += m->fine[r][lane];
    uint32_t reached = __ballot_sync(ALL_LANES, merged >= k), at = reached ? 31 - __clz(reached) : 0;
    struct threshold t = {bucket * 32 + at, k, 0, 0};
    uint32_t above = 0;
    for (uint32_t r = lane; r < parts; r += WARP) {
        uint32_t greater = m->fine[r][at + 1], equal = m->fine[r][at] - greater;
        above += greater;
        t.before_greater += r < part ? greater : 0;
        t.before_equal += r < part ? equal : 0;
    }
    t.ties -= __reduce_add_sync(ALL_LANES, above);
    t.before_greater = __reduce_add_sync(ALL_LANES, t.before_greater);
    t.before_equal = __reduce_add_sync(ALL_LANES, t.before_equal);
    return t;
}

/* Both, from sums that lie in memory: counts [parts][CUDA_COUNTS]. */
static __device__ struct threshold find(struct choose_shared *m, const uint32_t *counts, uint32_t parts, uint32_t part,
                                        uint32_t k)
{
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    /* Eight threads add up one coarse sum. */
    uint32_t sum = 0;
    for (uint32_t r = threadIdx.x % 8; r < parts; r += 8)
        sum += __ldcg(counts + r * CUDA_COUNTS + CUDA_COARSE + threadIdx.x / 8);
    for (uint32_t s = 4; s; s /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, s);
    if (threadIdx.x % 8 == 0)
        m->coarse[threadIdx.x / 8] = sum;
    __syncthreads();
    uint32_t bucket = bucket_of(m, k);
    for (uint32_t r = warp; r < parts; r += 512 / WARP) {
        const uint32_t *from = counts + r * CUDA_COUNTS + bucket * 32;
        m->fine[r][lane] = __ldcg(from + lane);
        if (lane == 0)
            m->fine[r][32] = __ldcg(from + 32);
    }
    __syncthreads();
    return threshold_of(m, parts, part, k, bucket);
}

/* Codes of eight tokens: how many are above the threshold (low half) and at it (high half). */
static __device__ __forceinline__ uint32_t tally(const uint4 &v, uint32_t code)
{
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    uint32_t n = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t a = w[i] & 0xffffu, b = w[i] >> 16;
        n += a > code ? 1u : a == code ? 65536u : 0u;
        n += b > code ? 1u : b == code ? 65536u : 0u;
    }
    return n;
}

/* Which of the eight are at the threshold or above it. */
static __device__ __forceinline__ uint32_t reaching(const uint4 &v, uint32_t code)
{
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    uint32_t mask = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++)
        mask |= ((w[i] & 0xffffu) >= code ? 1u << 2 * i : 0u) | (w[i] >> 16 >= code ? 2u << 2 * i : 0u);
    return mask;
}

static __device__ __forceinline__ uint32_t most_of(const uint4 &v)
{
    uint32_t z = __vmaxu2(__vmaxu2(v.x, v.y), __vmaxu2(v.z, v.w));
    return max(z >> 16, z & 0xffffu);
}

/* The chosen of 256 tokens, eight a lane, go to their places: write(place, which of the lane's eight, code). */
template <typename W>
static __device__ __forceinline__ void place(const struct threshold &t, const uint4 &v, uint32_t lane, uint32_t *greater,
                                             uint32_t *equal, W write)
{
    uint32_t own = tally(v, t.code), sum = own;
#pragma unroll
    for (uint32_t s = 1; s < WARP; s *= 2) {
        uint32_t other = __shfl_up_sync(ALL_LANES, sum, s);
        sum += lane >= s ? other : 0;
    }
    uint32_t g = *greater + ((sum - own) & 0xffffu), e = *equal + ((sum - own) >> 16);
    uint64_t low = (uint64_t)v.y << 32 | v.x, high = (uint64_t)v.w << 32 | v.z;
    uint32_t mask = reaching(v, t.code);
    while (mask) {
        uint32_t j = __ffs(mask) - 1, code = (uint32_t)((j < 4 ? low : high) >> j % 4 * 16) & 0xffffu;
        bool above = code > t.code;
        mask &= mask - 1;
        if (above || e < t.ties)
            write(g + min(e, t.ties), j, code);
        g += above, e += !above;
    }
    uint32_t total = __shfl_sync(ALL_LANES, sum, WARP - 1);
    *greater += total & 0xffffu, *equal += total >> 16;
}

#endif
