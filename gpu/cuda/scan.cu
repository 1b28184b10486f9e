/* Scan: a code for each token of a list, and how many tokens of each part have at least each code. */
#include "gpu/cuda/stage.cuh"

#define THREADS (SCAN_WARPS * WARP)

struct scan_shared {
    uint32_t counts[2048 + 8];
    uint32_t warp_sums[SCAN_WARPS];
    struct digit_planes<PKV_GROUP_MAX * PKV_SIG_WORDS_MAX> digits;
};

/* Bit planes [8][words] of the group's heads into digits, 32 weights a warp at a time. */
static __device__ __forceinline__ void digits_take(const uint32_t *planes, uint32_t group, uint32_t words,
                                                   struct scan_shared *m)
{
    uint32_t lane = threadIdx.x % WARP;
    for (uint32_t i = threadIdx.x / WARP; i < group * words; i += SCAN_WARPS) {
        uint32_t weight = 0;
#pragma unroll
        for (uint32_t p = 0; p < 8; p++)
            weight |= (planes[(i / words * 8 + p) * words + i % words] >> lane & 1) << p;
        digits_write((int8_t)weight, lane, words, m->digits, i);
    }
}

template <uint32_t COPIES>
static __device__ __forceinline__ struct fragments fragments_of(const uint4 (&x)[COPIES == 1 ? 2 : 1])
{
    const uint4 &low = x[0], &high = x[COPIES == 1 ? 1 : 0];
    return {{{low.x, low.y, high.x, high.y}, {low.z, low.w, high.z, high.w}}};
}

template <uint32_t SETS, uint32_t COPIES>
__global__ void __launch_bounds__(THREADS, SETS == 1 && COPIES != 1 ? 2 : 1)
    scan_kernel(const __grid_constant__ struct cuda_attend a)
{
    __shared__ __align__(16) struct scan_shared m;
    const struct pkv_geom &g = a.geom;
    uint32_t list = blockIdx.x / a.parts, part = blockIdx.x % a.parts, query = list / g.kv_heads, head = list % g.kv_heads;
    uint32_t lane = threadIdx.x % WARP, words = pkv_geom_words(&g), group = pkv_geom_group(&g);
    for (uint32_t i = threadIdx.x; i < 2048 + 8; i += THREADS)
        m.counts[i] = 0;
    struct span span = span_of(a, query);
    if (span.dense) {
        wait_for_former(); /* a grid that ends early would let later ones pass the former */
        return;
    }
    /* Contiguous blocks for a part, so that ties go to the lower index by a prefix over parts; warps take them in turn. */
    struct stream s = stream_open(span, part, a.parts, words, 0, 0);
    auto addresses = [&](uint32_t i) { return signatures_at(a, s, query, head, i); };
    s.now = addresses(0), s.next = addresses(WARP);
    uint64_t policy = policy_once();
    auto load = [&](uint64_t from) { return pieces_once<COPIES, false>(from, words, lane, policy); };
    auto first = load(__shfl_sync(ALL_LANES, s.now, 0));
    wait_for_former();
    uint64_t q_head = (uint64_t)query * g.q_heads + head * group;
    digits_take(a.work.planes + q_head * 8 * words, group, words, &m);
    __syncthreads();
    struct planes<SETS, COPIES> p;
    planes_digits(p, m.digits, group, words, lane);
    planes_biases(p, a.work.scales + q_head, a.work.biases + q_head, group, lane);
    uint16_t *codes = a.work.codes + list * codes_stride(a) + (uint64_t)s.begin * PKV_BLOCK_TOKENS;
    scan_direct<COPIES, false>(s, span, first, codes, m.counts, 0, addresses, load,
                               [&](const struct pieces<COPIES, false>(&x)[1], uint32_t(&got)[2]) {
#pragma unroll
                                   for (uint32_t h = 0; h < 2; h++)
                                       got[h] = code_of(scores_of(fragments_of<COPIES>(x[0].of[h]), p), p, lane);
                               });
    __syncthreads();
    write_counts(suffix_sums(m.counts, m.warp_sums), a.work.counts + ((uint64_t)list * a.parts + part) * CUDA_COUNTS);
}

template <uint32_t SETS> static void (*kernel_of_bits(uint32_t bits))(const struct cuda_attend)
{
    return bits <= 64 ? scan_kernel<SETS, 4> : bits <= 128 ? scan_kernel<SETS, 2> : scan_kernel<SETS, 1>;
}

static void (*kernel_of(uint32_t sets, uint32_t bits))(const struct cuda_attend)
{
    return sets == 1 ? kernel_of_bits<1>(bits) : sets == 2 ? kernel_of_bits<2>(bits) : kernel_of_bits<4>(bits);
}

extern "C" int cuda_scan_preload(void)
{
    cudaFuncAttributes f;
    for (uint32_t sets = 1; sets <= 4; sets *= 2)
        for (uint32_t bits = 64; bits <= 256; bits *= 2)
            if (cudaFuncGetAttributes(&f, kernel_of(sets, bits)) != cudaSuccess)
                return -(int)PKV_ERR_UNSUPPORTED;
    return 0;
}

extern "C" int cuda_scan_launch(const struct cuda_attend *a, void *stream)
{
    if (a->policy.rule != PKV_RULE_SOFTMAX)
        return cuda_integer_launch(a, stream);
    return launch(kernel_of(cuda_head_chunks(&a->geom), a->geom.sig_bits), dim3(a->queries * a->geom.kv_heads * a->parts),
                  THREADS, 0, *a, stream);
}
