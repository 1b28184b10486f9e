/* The rules `sum` and `max`: a token's score is an integer, the heads' sum or their largest, and its code has sixteen bits.
 * Counts are of the upper eleven; where eleven bits are enough for all codes (weights of +-1: plain Hamming distances) they are
 * counted whole. Codes equal the host's bit for bit. In a team's kernel and as a stage. For 512 threads.
 *
 * What scores is a row of weights: for `sum` the heads' weights added up, for `max` each head's. Bit planes of their two's
 * complement meet the signatures on the 1-bit tensor cores, two planes at a time: fragments of sixteen tokens (code.cuh; of up
 * to 64 bits, two signatures a line of it) take turns at the columns of one sum, so that afterwards each lane has both planes'
 * counts for two neighbouring tokens of a block. Weights of +-1, added up where heads have bits of their own, are two planes:
 * four or two products for 64 tokens, and no lane needs another. */
#ifndef GPU_CUDA_INTEGER_CUH
#define GPU_CUDA_INTEGER_CUH

#include "gpu/cuda/choose.cuh"
#include "gpu/cuda/scan.cuh"

#define SUM_PLANES 12u   /* of the sum of a group's weights */
#define MAX_PLANES 8u    /* of a weight */
#define WHOLE      2047u /* codes of a smaller range are counted whole */
#define APART      256u  /* codes of fewer values are counted eight times, each with a gap of one against bank conflicts */

/* In shared memory; written by rows_make, read after a barrier. */
template <uint32_t GROUP, uint32_t WORDS> struct integer_rows {
    uint32_t planes[GROUP * MAX_PLANES][WORDS]; /* of a row those from row x stride on */
    int low[GROUP], high[GROUP];                /* what the heads can reach */
    uint32_t width[GROUP * WORDS];              /* bits of the largest weight, of a row and word */
};

/* What all threads know of the rows. */
struct integer_rule {
    uint32_t rows, stride, pairs, words;
    int low;           /* the least score: of each head where they are summed up, so none may reach it */
    uint32_t shift;    /* code = 1 + (score - low >> shift) */
    uint32_t low_bits; /* of codes, that are not counted */
    bool apart;        /* few codes: every eighth lane counts for itself, since many tokens have the same */
};

/* weight(h, i): of bit i. A warp takes a word of a row, or what a head can reach. */
template <uint32_t GROUP, uint32_t WORDS, typename W>
static __device__ __forceinline__ void rows_make(struct integer_rows<GROUP, WORDS> *m, bool sum, uint32_t group, uint32_t words,
                                                 const W &weight)
{
    uint32_t lane = threadIdx.x % WARP, rows = sum ? 1 : group, stride = sum ? SUM_PLANES : MAX_PLANES;
#pragma unroll 1
    for (uint32_t i = threadIdx.x / WARP; i < rows * words + group; i += SCAN_WARPS) {
        uint32_t row = i / words, word = i % words, own = 0;
        if (i >= rows * words) {
            uint32_t h = i - rows * words;
            int low = 0, high = 0;
#pragma unroll
            for (uint32_t w = 0; w < WORDS; w++) {
                int x = w < words ? weight(h, w * WARP + lane) : 0;
                low += min(x, 0), high += max(x, 0);
            }
            m->low[h] = __reduce_add_sync(ALL_LANES, low), m->high[h] = __reduce_add_sync(ALL_LANES, high);
            continue;
        }
        int x = 0;
#pragma unroll
        for (uint32_t h = 0; h < GROUP; h++) /* all on their way together */
            x += h < (sum ? group : 1) ? weight(row + h, word * WARP + lane) : 0;
#pragma unroll
        for (uint32_t p = 0; p < SUM_PLANES; p++) {
            uint32_t plane = __ballot_sync(ALL_LANES, x >> p & 1);
            own = lane == p ? plane : own;
        }
        if (lane < stride)
            m->planes[row * stride + lane][word] = own;
        m->width[i] = __reduce_max_sync(ALL_LANES, 33u - (uint32_t)__clz(x ^ x >> 31));
    }
}

template <uint32_t GROUP, uint32_t WORDS>
static __device__ __forceinline__ struct integer_rule rule_of(const struct integer_rows<GROUP, WORDS> *m, bool sum,
                                                              uint32_t group, uint32_t words)
{
    uint32_t lane = threadIdx.x % WARP, h = min(lane, group - 1), width = 0;
    int low = m->low[h], high = m->high[h];
    struct integer_rule r = {.rows = sum ? 1 : group, .stride = sum ? SUM_PLANES : MAX_PLANES, .words = words};
    for (uint32_t i = lane; i < r.rows * words; i += WARP)
        width = max(width, m->width[i]);
    r.low = sum ? __reduce_add_sync(ALL_LANES, lane < group ? low : 0) : __reduce_min_sync(ALL_LANES, low);
    high = sum ? __reduce_add_sync(ALL_LANES, lane < group ? high : 0) : __reduce_max_sync(ALL_LANES, high);
    uint32_t range = (uint32_t)(high - r.low);
    r.pairs = (__reduce_max_sync(ALL_LANES, width) + 1) / 2;
    r.shift = gpu_code_shift(r.low, high), r.low_bits = range >= WHOLE ? CODE_LOW_BITS : 0;
    r.apart = range < APART - 1;
    return r;
}

/* ---- signatures into scores ---- */

/* This lane's part of B for each fragment: a pair of planes in the columns that are the fragment's. */
template <uint32_t COPIES> struct pair_planes {
    static constexpr uint32_t FRAGMENTS = pieces<COPIES, true>::HALVES * 2, PARTS = pieces<COPIES, true>::PARTS;
    uint32_t b[FRAGMENTS][PARTS];
};

template <uint32_t COPIES, uint32_t WORDS>
static __device__ __forceinline__ struct pair_planes<COPIES> pair_take(const uint32_t (*planes)[WORDS], uint32_t words,
                                                                       uint32_t lane) {
    struct pair_planes<COPIES> p;
    uint32_t column = lane / 4, word = COPIES == 4 ? lane % 2 : lane % 4;
    bool mine = COPIES != 4 || column / 2 % 2 == lane % 4 / 2; /* a line's second signature has columns of its own */
#pragma unroll
    for (uint32_t part = 0; part < p.PARTS; part++) {
        uint32_t own = mine && part * 4 + word < words ? planes[column % 2][part * 4 + word] : 0;
#pragma unroll
        for (uint32_t f = 0; f < p.FRAGMENTS; f++)
            p.b[f][part] = column * p.FRAGMENTS / 8 == f ? own : 0;
    }
    return p;
}

/* d: of this lane's first token the bits in common with the even and the odd plane, then of its second token. */
template <uint32_t COPIES>
static __device__ __forceinline__ void pair_count(const struct pieces<COPIES, true> &x, const struct pair_planes<COPIES> &p,
                                                  int (&d)[4])
{
#pragma unroll
    for (uint32_t h = 0; h < x.HALVES; h++)
#pragma unroll
        for (uint32_t part = 0; part < p.PARTS; part++) {
            common_bits(d, x.of[h][part].x, x.of[h][part].y, p.b[2 * h][part], d);
            common_bits(d, x.of[h][part].z, x.of[h][part].w, p.b[2 * h + 1][part], d);
        }
}

/* Codes of a turn's tokens, this lane's two of each block. */
template <uint32_t COPIES, uint32_t BLOCKS, uint32_t GROUP, uint32_t WORDS>
static __device__ __forceinline__ void codes_of(const struct pieces<COPIES, true> (&x)[BLOCKS],
                                                const struct integer_rows<GROUP, WORDS> *m, const struct integer_rule &rule,
                                                uint32_t lane, uint32_t (&got)[2 * BLOCKS])
{
    int best[2 * BLOCKS];
#pragma unroll 1
    for (uint32_t row = 0; row < rule.rows; row++) {
        int score[2 * BLOCKS] = {};
#pragma unroll 1
        for (uint32_t i = 0; i < rule.pairs; i++) {
            struct pair_planes<COPIES> p = pair_take<COPIES>(m->planes + row * rule.stride + 2 * i, rule.words, lane);
            int odd = i + 1 == rule.pairs ? -2 : 2; /* the last plane is of the signs */
#pragma unroll
            for (uint32_t n = 0; n < BLOCKS; n++) {
                int d[4] = {0, 0, 0, 0};
                pair_count<COPIES>(x[n], p, d);
                score[2 * n] += (d[0] + odd * d[1]) << 2 * i, score[2 * n + 1] += (d[2] + odd * d[3]) << 2 * i;
            }
        }
#pragma unroll
        for (uint32_t n = 0; n < 2 * BLOCKS; n++)
            best[n] = row ? max(best[n], score[n]) : score[n];
    }
#pragma unroll
    for (uint32_t n = 0; n < 2 * BLOCKS; n++)
        got[n] = 1 + ((uint32_t)(best[n] - rule.low) >> rule.shift);
}

/* ---- the scan ---- */

/* Eight lanes' counts of few codes into one. Between barriers. */
static __device__ void counts_join(uint32_t *counts)
{
    uint32_t sum = 0;
    for (uint32_t i = 0; i < 8 && threadIdx.x < APART; i++)
        sum += counts[i * (APART + 1) + threadIdx.x];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < 2048 + 8; i += SCAN_WARPS * WARP)
        counts[i] = i < APART ? sum : 0;
    __syncthreads();
}

/* Codes of the part's tokens, and in counts [2048 + 8] how many have each, by all but the low bits. scan(counts, code) goes
 * through the part, BLOCKS blocks at a time. Ends with a barrier. */
template <uint32_t COPIES, uint32_t BLOCKS, uint32_t GROUP, uint32_t WORDS, typename S>
static __device__ __forceinline__ void scan_integer(const struct integer_rows<GROUP, WORDS> *m, const struct integer_rule &rule,
                                                    uint32_t *counts, const S &scan)
{
    uint32_t lane = threadIdx.x % WARP, *own = counts + (rule.apart ? threadIdx.x % 8 * (APART + 1) : 0);
    if (rule.rows == 1 && rule.pairs == 1 && !rule.shift) {
        struct pair_planes<COPIES> p = pair_take<COPIES>(m->planes, rule.words, lane);
        int least = 1 - rule.low;
        scan(own, [&](const struct pieces<COPIES, true>(&x)[BLOCKS], uint32_t(&got)[2 * BLOCKS]) {
#pragma unroll
            for (uint32_t n = 0; n < BLOCKS; n++) {
                int d[4] = {least, 0, least, 0};
                pair_count<COPIES>(x[n], p, d);
                got[2 * n] = d[0] - 2 * d[1], got[2 * n + 1] = d[2] - 2 * d[3];
            }
        });
    } else {
        scan(own, [&](const struct pieces<COPIES, true>(&x)[BLOCKS], uint32_t(&got)[2 * BLOCKS]) {
            codes_of<COPIES>(x, m, rule, lane, got);
        });
    }
    __syncthreads();
    if (rule.apart)
        counts_join(counts);
}

#endif
