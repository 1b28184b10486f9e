/* Scan by the rules `sum` and `max`, and for codes that are not counted whole the counts of the low bits of those that share
 * the threshold's upper ones. */
#include "gpu/cuda/integer.cuh"
#include "gpu/cuda/stage.cuh"

#define THREADS (SCAN_WARPS * WARP)

struct integer_shared {
    uint32_t counts[2048 + 8];
    uint32_t warp_sums[SCAN_WARPS];
    struct integer_rows<PKV_GROUP_MAX, PKV_SIG_WORDS_MAX> rows;
};

template <uint32_t COPIES>
__global__ void __launch_bounds__(THREADS, COPIES == 1 ? 1 : 2) integer_kernel(const __grid_constant__ struct cuda_attend a)
{
    __shared__ __align__(16) struct integer_shared m;
    const struct pkv_geom &g = a.geom;
    uint32_t list = blockIdx.x / a.parts, part = blockIdx.x % a.parts, query = list / g.kv_heads, head = list % g.kv_heads;
    uint32_t words = pkv_geom_words(&g), group = pkv_geom_group(&g);
    bool sum = a.policy.rule == PKV_RULE_SUM;
    for (uint32_t i = threadIdx.x; i < 2048 + 8; i += THREADS)
        m.counts[i] = 0;
    struct span span = span_of(a, query);
    if (span.dense) {
        wait_for_former(); /* a grid that ends early would let later ones pass the former */
        return;
    }
    struct stream s = stream_open(span, part, a.parts, words, 0, 0);
    auto addresses = [&](uint32_t i) { return signatures_at(a, s, query, head, i); };
    s.now = addresses(0), s.next = addresses(WARP);
    uint64_t policy = policy_once();
    auto load = [&](uint64_t from) { return pieces_once<COPIES, true>(from, words, threadIdx.x % WARP, policy); };
    auto first = load(__shfl_sync(ALL_LANES, s.now, 0));
    wait_for_former();
    const int8_t *weights = a.work.weights + ((uint64_t)query * g.q_heads + head * group) * g.sig_bits;
    rows_make(&m.rows, sum, group, words, [&](uint32_t h, uint32_t i) { return (int)weights[h * g.sig_bits + i]; });
    __syncthreads();
    struct integer_rule rule = rule_of(&m.rows, sum, group, words);
    uint32_t *counts = a.work.counts + ((uint64_t)list * a.parts + part) * CUDA_COUNTS;
    uint16_t *codes = a.work.codes + list * codes_stride(a) + (uint64_t)s.begin * PKV_BLOCK_TOKENS;
    scan_integer<COPIES, 1>(&m.rows, rule, m.counts, [&](uint32_t *own, const auto &code) {
        scan_direct<COPIES, true>(s, span, first, codes, own, rule.low_bits, addresses, load, code);
    });
    write_counts(suffix_sums(m.counts, m.warp_sums), counts);
    if (threadIdx.x == 0)
        counts[CUDA_LOW_BITS] = rule.low_bits;
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
    if (!a.work.counts[(uint64_t)list * a.parts * CUDA_COUNTS + CUDA_LOW_BITS])
        return;
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

static void (*kernel_of(uint32_t bits))(const struct cuda_attend)
{
    return bits <= 64 ? integer_kernel<4> : bits <= 128 ? integer_kernel<2> : integer_kernel<1>;
}

extern "C" int cuda_integer_preload(void)
{
    cudaFuncAttributes f;
    for (uint32_t bits = 64; bits <= 256; bits *= 2)
        if (cudaFuncGetAttributes(&f, kernel_of(bits)) != cudaSuccess)
            return -(int)PKV_ERR_UNSUPPORTED;
    return cudaFuncGetAttributes(&f, refine_kernel) == cudaSuccess ? 0 : -(int)PKV_ERR_UNSUPPORTED;
}

/* Weights of +-1 of so few bits that all codes are counted whole: rule_of() finds the same. The heads' largest lies between
 * one head's least and another's largest score. */
static bool counted_whole(const struct cuda_attend *a)
{
    bool ones = !a->weighed && a->scheme.q_signs && (a->scheme.kind == PKV_SCHEME_HASH || a->scheme.kind == PKV_SCHEME_LINEAR);
    uint32_t heads = a->policy.rule == PKV_RULE_SUM ? pkv_geom_group(&a->geom) : 2;
    return ones && heads * a->geom.sig_bits < WHOLE;
}

extern "C" int cuda_integer_launch(const struct cuda_attend *a, void *stream)
{
    dim3 grid(a->queries * a->geom.kv_heads * a->parts);
    int r = launch(kernel_of(a->geom.sig_bits), grid, THREADS, 0, *a, stream);
    return r || counted_whole(a) ? r : launch(refine_kernel, grid, THREADS, 0, *a, stream);
}
