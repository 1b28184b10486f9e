/* The rules `sum` and `max`: a token's score is an integer, the heads' sum or their largest, and its code has sixteen bits.
 * Counts are of the upper eleven, and refine counts the lower five of those that share the threshold's; where eleven bits are
 * enough for all codes (weights of +-1: plain Hamming distances) they are counted whole. Codes equal the host's bit for bit.
 *
 * By popcounts: a sum of weights over a signature's bits, less the least that there can be, is the sum of the weights'
 * magnitudes over the bits that differ from the weights' signs (a negative weight counts where its bit is not set). So a word
 * and a bit of the magnitudes cost one popc((word ^ signs) & magnitudes); weights of +-1 have one such bit. `sum` adds the
 * heads' weights up first. A lane has a word of four tokens, and four lanes their sums. */
#include "gpu/cuda/choose.cuh"
#include "gpu/cuda/scan.cuh"

#define THREADS   (SCAN_WARPS * WARP)
#define MAGNITUDE 12u   /* bits, of a sum of weights of a whole group */
#define WHOLE     2047u /* codes of a smaller range are counted whole */
#define APART     256u  /* codes of fewer values are counted eight times, each with a gap of one against bank conflicts */

struct integer_shared {
    uint32_t counts[2048 + 8];
    uint32_t warp_sums[SCAN_WARPS];
    struct row { /* what scores: a head, or all together */
        uint32_t signs[PKV_SIG_WORDS_MAX], magnitudes[MAGNITUDE][PKV_SIG_WORDS_MAX];
        int low; /* its least score */
    } rows[PKV_GROUP_MAX];
    int low[PKV_GROUP_MAX], high[PKV_GROUP_MAX]; /* what the heads can reach */
    uint32_t bits;                               /* of the largest magnitude */
    __align__(16) unsigned char rings[SCAN_WARPS][RING];
};

/* What all threads know of the rows. */
struct integer_rule {
    uint32_t rows, bits, words;
    int low;                    /* the least score: of each head where they are summed up, so none may reach it */
    uint32_t shift;             /* code = 1 + (score - low >> shift) */
    uint32_t low_bits;          /* of codes, that are not counted */
    bool apart;                 /* few codes: every eighth lane counts for itself, since many tokens have the same */
    bool wide, plain;           /* score - low needs more than sixteen bits; one row of weights of +-1, up to 128 bits */
    uint32_t signs, magnitudes; /* of this lane's word, if plain */
    uint32_t offset;            /* of the first row's least score from the least of all */
};

/* 32 weights of a row, a lane each. */
static __device__ void row_write(struct integer_shared *m, struct integer_shared::row *r, int weight, uint32_t word)
{
    uint32_t lane = threadIdx.x % WARP, magnitude = (uint32_t)abs(weight), own = 0;
    for (uint32_t j = 0; j < MAGNITUDE; j++) {
        uint32_t plane = __ballot_sync(ALL_LANES, magnitude >> j & 1);
        own = lane == j ? plane : own;
    }
    uint32_t signs = __ballot_sync(ALL_LANES, weight < 0), most = __reduce_max_sync(ALL_LANES, magnitude);
    int low = __reduce_add_sync(ALL_LANES, min(weight, 0));
    if (lane < MAGNITUDE)
        r->magnitudes[lane][word] = own;
    if (lane == 0) {
        r->signs[word] = signs;
        atomicAdd(&r->low, low);
        atomicMax(&m->bits, 32u - (uint32_t)__clz((int)most));
    }
}

/* 32 weights of a head: what they can reach. */
static __device__ void reach_add(struct integer_shared *m, uint32_t head, int weight)
{
    int low = __reduce_add_sync(ALL_LANES, min(weight, 0)), high = __reduce_add_sync(ALL_LANES, max(weight, 0));
    if (threadIdx.x % WARP == 0)
        atomicAdd(&m->low[head], low), atomicAdd(&m->high[head], high);
}

static __device__ struct integer_rule rule_take(const struct cuda_attend &a, struct integer_shared *m, uint64_t q_head)
{
    bool sum = a.policy.rule == PKV_RULE_SUM;
    uint32_t group = pkv_geom_group(&a.geom), words = pkv_geom_words(&a.geom), lane = threadIdx.x % WARP;
    struct integer_rule rule = {.rows = sum ? 1 : group, .words = words};
    for (uint32_t i = threadIdx.x / WARP; i < rule.rows * words; i += SCAN_WARPS) {
        uint32_t row = i / words, word = i % words;
        uint32_t end = sum ? group : row + 1;
        int weight = 0, own[PKV_GROUP_MAX]; /* all on their way together */
#pragma unroll
        for (uint32_t h = 0; h < PKV_GROUP_MAX; h++)
            own[h] = row + h < end ? a.work.weights[(q_head + row + h) * a.geom.sig_bits + word * WARP + lane] : 0;
#pragma unroll
        for (uint32_t h = 0; h < PKV_GROUP_MAX; h++)
            if (row + h < end)
                reach_add(m, row + h, own[h]), weight += own[h];
        row_write(m, m->rows + row, weight, word);
    }
    __syncthreads();
    int high = m->high[0];
    rule.low = m->low[0], rule.bits = m->bits;
    for (uint32_t h = 1; h < group; h++) {
        rule.low = sum ? rule.low + m->low[h] : min(rule.low, m->low[h]);
        high = sum ? high + m->high[h] : max(high, m->high[h]);
    }
    uint32_t range = (uint32_t)(high - rule.low);
    rule.shift = gpu_code_shift(rule.low, high), rule.wide = range > 0xffff;
    rule.low_bits = range >= WHOLE ? CODE_LOW_BITS : 0;
    rule.apart = range < APART - 1;
    rule.offset = (uint32_t)(m->rows[0].low - rule.low);
    rule.plain = rule.rows == 1 && rule.bits == 1 && words <= 4;
    rule.signs = lane % 4 < words ? m->rows[0].signs[lane % 4] : 0;
    rule.magnitudes = lane % 4 < words ? m->rows[0].magnitudes[0][lane % 4] : 0;
    return rule;
}

/* Four tokens' words of this lane: one, or two where signatures have more than four. */
template <uint32_t COPIES> struct token_words {
    uint4 word[COPIES == 1 ? 2 : 1];
};

template <uint32_t COPIES> static __device__ __forceinline__ struct token_words<COPIES> words_load(uint32_t at) {
    struct token_words<COPIES> x;
#pragma unroll
    for (uint32_t k = 0; k < (COPIES == 1 ? 2 : 1); k++)
        x.word[k] = load_shared(at + k * 64);
    return x;
}

static __device__ __forceinline__ uint4
differing(const uint4 &x, uint32_t signs, uint32_t magnitudes)
{
    return make_uint4(__popc((x.x ^ signs) & magnitudes), __popc((x.y ^ signs) & magnitudes),
                      __popc((x.z ^ signs) & magnitudes), __popc((x.w ^ signs) & magnitudes));
}

/* Four tokens' scores of a row by this lane's words, less the row's least score. */
template <uint32_t COPIES>
static __device__ __forceinline__ uint4 row_scores(const struct token_words<COPIES> &x, const struct integer_shared::row &r,
                                                   const struct integer_rule &rule, uint32_t lane)
{
    uint4 all = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (uint32_t k = 0; k < (COPIES == 1 ? 2 : 1); k++) {
        uint32_t word = k * 4 + lane % 4;
        if (word >= rule.words)
            continue;
        for (uint32_t j = 0; j < rule.bits; j++) {
            uint4 n = differing(x.word[k], r.signs[word], r.magnitudes[j][word]);
            all.x += n.x << j, all.y += n.y << j, all.z += n.z << j, all.w += n.w << j;
        }
    }
    return all;
}

static __device__ __forceinline__ uint32_t quad_add(uint32_t x)
{
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

/* The score of token lane of 32, less the least score. */
template <uint32_t COPIES>
static __device__ __forceinline__ uint32_t score_of(const struct token_words<COPIES> &x, const struct integer_shared *m,
                                                    const struct integer_rule &rule, uint32_t lane)
{
    if (rule.wide) { /* one row: the heads' largest needs no more than sixteen */
        uint4 v = row_scores(x, m->rows[0], rule, lane);
        v = make_uint4(quad_add(v.x), quad_add(v.y), quad_add(v.z), quad_add(v.w));
        return (lane & 2 ? (lane & 1 ? v.w : v.z) : lane & 1 ? v.y : v.x) + rule.offset;
    }
    uint32_t low = 0, high = 0; /* two tokens each */
    for (uint32_t r = 0; r < rule.rows; r++) {
        uint4 v = row_scores(x, m->rows[r], rule, lane);
        uint32_t least = (uint32_t)(m->rows[r].low - rule.low) * 0x10001u;
        low = __vmaxu2(low, quad_add(v.x + (v.y << 16)) + least);
        high = __vmaxu2(high, quad_add(v.z + (v.w << 16)) + least);
    }
    return (lane & 2 ? high : low) >> (lane & 1) * 16 & 0xffff;
}

/* The same for `plain`: four tokens' counts of up to 128 in four bytes. */
static __device__ __forceinline__ uint32_t plain_score_of(const struct token_words<2> &x, const struct integer_rule &rule,
                                                          uint32_t lane)
{
    uint4 n = differing(x.word[0], rule.signs, rule.magnitudes);
    return __byte_perm(quad_add(n.x + (n.y << 8) + (n.z << 16) + (n.w << 24)), 0, 0x4440 + lane % 4) + rule.offset;
}

/* Eight lanes' counts of few codes into one. */
static __device__ void counts_join(uint32_t *counts)
{
    uint32_t sum = 0;
    for (uint32_t i = 0; i < 8 && threadIdx.x < APART; i++)
        sum += counts[i * (APART + 1) + threadIdx.x];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < 2048 + 8; i += THREADS)
        counts[i] = i < APART ? sum : 0;
    __syncthreads();
}

template <uint32_t COPIES>
__global__ void __launch_bounds__(THREADS, 2) integer_kernel(const __grid_constant__ struct cuda_attend a)
{
    extern __shared__ __align__(16) unsigned char shared[];
    struct integer_shared *m = (struct integer_shared *)shared;
    const struct pkv_geom &g = a.geom;
    uint32_t list = blockIdx.x / a.parts, part = blockIdx.x % a.parts, query = list / g.kv_heads, head = list % g.kv_heads;
    uint32_t words = pkv_geom_words(&g);
    for (uint32_t i = threadIdx.x; i < 2048 + 8; i += THREADS)
        m->counts[i] = 0;
    if (threadIdx.x < PKV_GROUP_MAX)
        m->rows[threadIdx.x].low = m->low[threadIdx.x] = m->high[threadIdx.x] = 0, m->bits = 0;
    struct span span = span_of(a, query);
    if (span.dense) {
        wait_for_former(); /* a grid that ends early would let later ones pass the former */
        return;
    }
    struct stream s = stream_open(span, part, a.parts, words, shared_address(m->rings[threadIdx.x / WARP]), RING);
    auto addresses = [&](uint32_t i) { return signatures_at(a, s, query, head, i); };
    s.now = addresses(0), s.next = addresses(WARP);
    stream_begin<COPIES>(s, addresses);
    wait_for_former();
    __syncthreads();
    struct integer_rule rule = rule_take(a, m, (uint64_t)query * g.q_heads + head * pkv_geom_group(&g));
    uint32_t *counts = a.work.counts + ((uint64_t)list * a.parts + part) * CUDA_COUNTS;
    uint16_t *codes = a.work.codes + list * codes_stride(a) + (uint64_t)s.begin * PKV_BLOCK_TOKENS;
    uint32_t *own = m->counts + (rule.apart ? threadIdx.x % 8 * (APART + 1) : 0);
    if (COPIES != 1 && rule.plain)
        scan_blocks<COPIES>(
            s, span, words, codes, own, rule.low_bits, addresses, [&](uint32_t at) { return words_load<2>(at); },
            [&](const struct token_words<2> &x, uint32_t lane) { return 1 + (plain_score_of(x, rule, lane) >> rule.shift); });
    else
        scan_blocks<COPIES>(
            s, span, words, codes, own, rule.low_bits, addresses, [&](uint32_t at) { return words_load<COPIES>(at); },
            [&](const struct token_words<COPIES> &x, uint32_t lane) { return 1 + (score_of(x, m, rule, lane) >> rule.shift); });
    __syncthreads();
    if (rule.apart)
        counts_join(m->counts);
    write_counts(suffix_sums(m->counts, m->warp_sums), counts);
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
        if (cudaFuncSetAttribute(kernel_of(bits), cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(struct integer_shared)) !=
            cudaSuccess)
            return -(int)PKV_ERR_UNSUPPORTED;
    return cudaFuncGetAttributes(&f, refine_kernel) == cudaSuccess ? 0 : -(int)PKV_ERR_UNSUPPORTED;
}

/* Weights of +-1 of so few bits that all codes are counted whole: rule_take() finds the same. The heads' largest lies between
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
    int r = launch(kernel_of(a->geom.sig_bits), grid, THREADS, sizeof(struct integer_shared), *a, stream);
    return r || counted_whole(a) ? r : launch(refine_kernel, grid, THREADS, 0, *a, stream);
}
