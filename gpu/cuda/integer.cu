/* The rules `sum` and `max`: a token's score is an integer, the heads' sum or their largest, and its code has sixteen bits.
 * Counts are of the upper eleven; refine counts the lower five of those that share the threshold's. Plain popcounts: these
 * rules are the cheaper ones to define, not to run. Codes equal the host's bit for bit. */
#include "gpu/cuda/choose.cuh"
#include "gpu/cuda/code.cuh"

#define THREADS 512u

struct integer_shared {
    uint32_t counts[2048 + 8];
    uint32_t warp_sums[THREADS / WARP];
    uint32_t planes[PKV_GROUP_MAX][8][PKV_SIG_WORDS_MAX];
    int negative[PKV_GROUP_MAX], positive[PKV_GROUP_MAX]; /* the least and the largest score of a head */
};

static __device__ void load_weights(const struct cuda_attend &a, struct integer_shared *m, uint64_t q_head)
{
    uint32_t group = pkv_geom_group(&a.geom), words = pkv_geom_words(&a.geom), bits = a.geom.sig_bits;
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (uint32_t i = threadIdx.x; i < group * 8 * words; i += THREADS)
        m->planes[i / (8 * words)][i / words % 8][i % words] = a.work.planes[q_head * 8 * words + i];
    if (warp >= group)
        return;
    int negative = 0, positive = 0;
    for (uint32_t b = lane; b < bits; b += WARP) {
        int w = a.work.weights[(q_head + warp) * bits + b];
        negative += min(w, 0), positive += max(w, 0);
    }
    negative = __reduce_add_sync(ALL_LANES, negative), positive = __reduce_add_sync(ALL_LANES, positive);
    if (lane == 0)
        m->negative[warp] = negative, m->positive[warp] = positive;
}

static __device__ __forceinline__ int score_of(const struct cuda_attend &a, const struct integer_shared *m,
                                               const uint32_t *signature, uint32_t group, uint32_t words)
{
    int all = a.policy.rule == PKV_RULE_SUM ? 0 : INT32_MIN;
    for (uint32_t h = 0; h < group; h++) {
        int sum = 0;
        for (uint32_t w = 0; w < words; w++)
#pragma unroll
            for (uint32_t p = 0; p < 8; p++) {
                int n = __popc(signature[w * 4] & m->planes[h][p][w]) << p;
                sum += p == 7 ? -n : n;
            }
        all = a.policy.rule == PKV_RULE_SUM ? all + sum : max(all, sum);
    }
    return all;
}

__global__ void __launch_bounds__(THREADS) integer_kernel(const __grid_constant__ struct cuda_attend a)
{
    __shared__ __align__(16) struct integer_shared m;
    const struct pkv_geom &g = a.geom;
    uint32_t list = blockIdx.x / a.parts, part = blockIdx.x % a.parts, query = list / g.kv_heads, head = list % g.kv_heads;
    uint32_t group = pkv_geom_group(&g), words = pkv_geom_words(&g), begin, end;
    for (uint32_t i = threadIdx.x; i < 2048 + 8; i += THREADS)
        m.counts[i] = 0;
    wait_for_former();
    struct span span = span_of(a, query);
    if (span.dense)
        return;
    load_weights(a, &m, (uint64_t)query * g.q_heads + head * group);
    __syncthreads();
    bool sum = a.policy.rule == PKV_RULE_SUM;
    int low = m.negative[0], high = m.positive[0];
    for (uint32_t h = 1; h < group; h++) {
        low = sum ? low + m.negative[h] : min(low, m.negative[h]);
        high = sum ? high + m.positive[h] : max(high, m.positive[h]);
    }
    uint32_t shift = gpu_code_shift(low, high);
    const struct pkv_block_ref *blocks = blocks_of(a, query);
    uint16_t *codes = a.work.codes + list * codes_stride(a);
    part_of(span, part, a.parts, &begin, &end);
    for (uint32_t t = begin * PKV_BLOCK_TOKENS + threadIdx.x; t < end * PKV_BLOCK_TOKENS; t += THREADS) {
        const uint32_t *s =
            (const uint32_t *)place_address(a.base, blocks[t / PKV_BLOCK_TOKENS].signatures, pkv_geom_sig_block_bytes(&g)) +
            pkv_geom_sig_index(&g, head, t % PKV_BLOCK_TOKENS, 0);
        bool candidate = t >= span.first && t < span.last;
        uint32_t code = candidate ? gpu_code_integer(score_of(a, &m, s, group, words), low, shift) : 0;
        codes[t] = (uint16_t)code;
        if (candidate)
            atomicAdd(&m.counts[code >> CODE_LOW_BITS], 1u);
    }
    __syncthreads();
    write_counts(suffix_sums(m.counts, m.warp_sums), a.work.counts + ((uint64_t)list * a.parts + part) * CUDA_COUNTS);
}

/* How many tokens of the part have at least each of the 32 codes that share the threshold's upper bits. */
__global__ void __launch_bounds__(THREADS) refine_kernel(const __grid_constant__ struct cuda_attend a)
{
    __shared__ struct choose_shared m;
    __shared__ uint32_t counts[WARP];
    uint32_t list = blockIdx.x / a.parts, part = blockIdx.x % a.parts, lane = threadIdx.x, begin, end;
    wait_for_former();
    struct span span = span_of(a, list / a.geom.kv_heads);
    if (span.dense)
        return;
    if (lane < WARP)
        counts[lane] = 0;
    struct threshold t =
        find(&m, a.work.counts + (uint64_t)list * a.parts * CUDA_COUNTS, a.parts, part, a.policy.k); /* synchronises */
    part_of(span, part, a.parts, &begin, &end);
    const uint16_t *codes = a.work.codes + list * codes_stride(a);
    for (uint32_t i = begin * PKV_BLOCK_TOKENS + threadIdx.x; i < end * PKV_BLOCK_TOKENS; i += THREADS)
        if (codes[i] && codes[i] >> CODE_LOW_BITS == t.code)
            atomicAdd(&counts[codes[i] % WARP], 1u);
    __syncthreads();
    if (lane >= WARP)
        return;
    uint32_t sum = counts[lane];
    for (uint32_t s = 1; s < WARP; s *= 2) {
        uint32_t other = __shfl_down_sync(ALL_LANES, sum, s);
        sum += lane + s < WARP ? other : 0;
    }
    uint32_t *to = a.work.fine + ((uint64_t)list * a.parts + part) * CUDA_FINE;
    to[lane] = sum;
    if (lane == 0)
        to[WARP] = 0;
}

extern "C" int cuda_integer_preload(void)
{
    cudaFuncAttributes f;
    return cudaFuncGetAttributes(&f, integer_kernel) == cudaSuccess && cudaFuncGetAttributes(&f, refine_kernel) == cudaSuccess
               ? 0
               : -(int)PKV_ERR_UNSUPPORTED;
}

extern "C" int cuda_integer_launch(const struct cuda_attend *a, void *stream)
{
    dim3 grid(a->queries * a->geom.kv_heads * a->parts);
    int r = launch(integer_kernel, grid, THREADS, 0, *a, stream);
    return r ? r : launch(refine_kernel, grid, THREADS, 0, *a, stream);
}
