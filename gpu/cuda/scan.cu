/* Scan: a code for each token of a list, and how many tokens of each part have at least each code. */
#include "gpu/cuda/code.cuh"

#define THREADS 512u
#define WARPS   (THREADS / WARP)

struct scan_shared {
    uint32_t counts[2048 + 8];
    uint32_t warp_sums[WARPS];
    uint32_t digits[PKV_GROUP_MAX * PKV_SIG_WORDS_MAX][DIGIT_PLANES];
};

/* One block of 64 tokens is two halves of 32: a lane's loads. */
template <uint32_t K> struct tile {
    uint4 half[2][K];
};

template <uint32_t K>
static __device__ __forceinline__ void load_tile(uint64_t block, const uint32_t (&at)[2][K], struct tile<K> &t)
{
#pragma unroll
    for (uint32_t half = 0; half < 2; half++)
#pragma unroll
        for (uint32_t k = 0; k < K; k++)
            t.half[half][k] = block ? load_once((const uint4 *)(block + at[half][k])) : make_uint4(0, 0, 0, 0);
}

/* Codes of a block's tokens, and their counts. Inside of the span every token is a candidate. */
template <uint32_t SETS, uint32_t STEPS, uint32_t K>
static __device__ __forceinline__ void score_tile(const struct tile<K> &t, const struct planes<SETS, STEPS> &p,
                                                  struct scan_shared *m, uint16_t *codes, uint32_t block,
                                                  const struct span &span, uint32_t lane)
{
    uint32_t first = block * PKV_BLOCK_TOKENS + lane;
    bool inside = block * PKV_BLOCK_TOKENS >= span.first && (block + 1) * PKV_BLOCK_TOKENS <= span.last;
    uint32_t code[2] = {code_of(t.half[0], p, lane), code_of(t.half[1], p, lane)};
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

template <uint32_t SETS, uint32_t STEPS>
__global__ void __launch_bounds__(THREADS, SETS == 1 && STEPS <= 4 ? 2 : 1)
    scan_kernel(const __grid_constant__ struct cuda_attend a)
{
    constexpr uint32_t K = STEPS == 8 ? 2 : 1;
    __shared__ __align__(16) struct scan_shared m;
    const struct pkv_geom &g = a.geom;
    uint32_t list = blockIdx.x / a.parts, part = blockIdx.x % a.parts, query = list / g.kv_heads, head = list % g.kv_heads;
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, words = pkv_geom_words(&g), group = pkv_geom_group(&g);
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
    part_of(span, part, a.parts, &begin, &end);
    /* Addresses of this warp's next 32 blocks, one a lane: the table is read ahead of the signatures. */
    auto address = [&](uint32_t i) -> uint64_t {
        uint32_t b = begin + warp + (i + lane) * WARPS;
        return b < end ? (uint64_t)place_address(a.base, blocks[b].signatures, slot) + offset : 0;
    };
    uint32_t mine = begin + warp < end ? (end - begin - warp + WARPS - 1) / WARPS : 0;
    uint64_t now = address(0), next = address(WARP), q_head = (uint64_t)query * g.q_heads + head * group;
    uint32_t at[2][K];
#pragma unroll
    for (uint32_t k = 0; k < K; k++)
        for (uint32_t half = 0; half < 2; half++)
            at[half][k] = ((lane / 4 + 8 * half) * words + fragment_word(STEPS, words, k, lane)) * 16;
    struct tile<K> even, odd;
    load_tile<K>(__shfl_sync(ALL_LANES, now, 0), at, even);
    wait_for_former();
    digits_take(a.work.planes + q_head * 8 * words, words, group, words, m.digits);
    __syncthreads();
    struct planes<SETS, STEPS> p;
    planes_take(p, m.digits, a.work.scales + q_head, a.work.biases + q_head, group, words, lane);
    /* Registers hold one tile ahead. Two tiles a turn, so that none is moved; 32 is even, so addresses change at even turns. */
    for (uint32_t i = 0; i < mine; i += 2) {
        uint32_t b = begin + warp + i * WARPS;
        load_tile<K>(__shfl_sync(ALL_LANES, now, (i + 1) % WARP), at, odd);
        score_tile(even, p, &m, codes, b, span, lane);
        if ((i + 2) % WARP == 0)
            now = next, next = address(i + 2 + WARP);
        load_tile<K>(__shfl_sync(ALL_LANES, now, (i + 2) % WARP), at, even);
        if (i + 1 < mine)
            score_tile(odd, p, &m, codes, b + WARPS, span, lane);
    }
    __syncthreads();
    write_counts(suffix_sums(m.counts, m.warp_sums), a.work.counts + ((uint64_t)list * a.parts + part) * CUDA_COUNTS);
}

template <uint32_t SETS> static void (*kernel_of_bits(uint32_t bits))(const struct cuda_attend)
{
    return bits <= 64 ? scan_kernel<SETS, 2> : bits <= 128 ? scan_kernel<SETS, 4> : scan_kernel<SETS, 8>;
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
    return launch(kernel_of(cuda_head_chunks(&a->geom), a->geom.sig_bits),
                  dim3(a->queries * a->geom.kv_heads * a->parts), THREADS, 0, *a, stream);
}
