/* A team's biases: what puts a head's estimates beside its exact scores of sinks and recent tokens (the ends). Each block
 * scores some, a warp sixteen rows at a time; every block adds up all shares, in the same order, and makes the estimates for
 * itself. (If every block scores all ends, nobody waits for words, but 64 KiB a block take longer than the words.) */
#ifndef GPU_CUDA_TEAM_BIAS_CUH
#define GPU_CUDA_TEAM_BIAS_CUH

#include "gpu/cuda/team_scan.cuh"

#if __CUDA_ARCH__ >= 900

/* The ends, numbered; of those from fitted_from on the bias is the mean of exact score less estimate. */
struct ends {
    uint32_t first, last, count, fitted_from; /* first, last: as in the span */
};

static __device__ __forceinline__ struct ends ends_of(const struct span &span)
{
    uint32_t recent = span.visible - span.last;
    return {span.first, span.last, span.first + recent, recent ? span.first : 0};
}

/* Those that a block attends: [begin, begin + count). */
struct own_ends {
    uint32_t begin, count;
};

static __device__ __forceinline__ struct own_ends own_ends(const struct team &t, const struct ends &e)
{
    uint32_t each = (e.count + t.size - 1) >> t.shift, begin = min(t.part * each, e.count);
    return {begin, min(each, e.count - begin)};
}

static __device__ __forceinline__ uint32_t end_token(const struct ends &e, uint32_t i)
{
    return i < e.first ? i : e.last + (i - e.first);
}

/* ---- exact scores ---- */

/* A lane's part of the keys of sixteen rows: of rows lane / 4 and + 8 every fourth piece of sixteen bytes. It is a fragment of
 * A whose dimensions are in another order, and so are the queries' (ends_score). */
template <uint32_t DIM> struct end_keys {
    uint4 low[DIM / 32], high[DIM / 32];
};

static __device__ __forceinline__ uint64_t end_row(const struct team_call &call, const struct team &t, const struct ends &e,
                                                   uint32_t i, bool cached)
{
    uint32_t token = end_token(e, i);
    return rows_at(call, t, t.blocks[token / PKV_BLOCK_TOKENS].rows, cached) +
           token % PKV_BLOCK_TOKENS * (call.rows_head / PKV_BLOCK_TOKENS);
}

template <typename T, uint32_t DIM>
static __device__ __forceinline__ void end_keys_load(uint64_t low, uint64_t high, uint32_t lane, struct end_keys<DIM> &k)
{
    low = (low & ~(FAR | FETCHED)) + lane % 4 * 16, high = (high & ~(FAR | FETCHED)) + lane % 4 * 16;
#pragma unroll
    for (uint32_t j = 0; j < DIM / 32; j++)
        k.low[j] = load_row_piece(low + j * 64), k.high[j] = load_row_piece(high + j * 64);
}

/* d: scores of rows lane / 4 and + 8 for columns 2 (lane % 4) and + 1, unscaled. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void ends_score(const struct end_keys<DIM> &k, uint32_t queries, uint32_t lane, float (&d)[4])
{
    float odd[4] = {0, 0, 0, 0};
    d[0] = d[1] = d[2] = d[3] = 0;
#pragma unroll
    for (uint32_t j = 0; j < DIM / 32; j++) {
        uint4 q = load_shared_piece(queries + lane / 4 * tile_shape<T, DIM>::QUERY + j * 64 + lane % 4 * 16);
        const uint32_t even_a[4] = {k.low[j].x, k.high[j].x, k.low[j].y, k.high[j].y};
        const uint32_t odd_a[4] = {k.low[j].z, k.high[j].z, k.low[j].w, k.high[j].w};
        multiply<T>(d, even_a, q.x, q.y);
        multiply<T>(odd, odd_a, q.z, q.w);
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; i++)
        d[i] += odd[i];
}

/* Sixteen rows' scores join a warp's shares of columns 2 (lane % 4) and + 1. */
static __device__ __forceinline__ void shares_join(const float (&d)[4], float scale, const struct ends &e, uint32_t first,
                                                   uint32_t lane, struct team_shared::share (&mine)[2])
{
#pragma unroll
    for (uint32_t c = 0; c < 2; c++) {
        float most = NOTHING, sum = 0, shift = 0;
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
            uint32_t row = first + lane / 4 + 8 * r;
            float score = d[c + 2 * r] * scale;
            most = row < e.count ? fmaxf(most, score) : most;
            shift += row < e.count && row >= e.fitted_from ? score : 0.0f;
        }
#pragma unroll
        for (uint32_t s = 4; s < WARP; s *= 2)
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
        most = fmaxf(most, mine[c].max);
#pragma unroll
        for (uint32_t r = 0; r < 2; r++)
            sum += first + lane / 4 + 8 * r < e.count ? exp2_fast(d[c + 2 * r] * scale - most) : 0.0f;
#pragma unroll
        for (uint32_t s = 4; s < WARP; s *= 2) {
            sum += __shfl_xor_sync(ALL_LANES, sum, s);
            shift += __shfl_xor_sync(ALL_LANES, shift, s);
        }
        mine[c].sum = mine[c].sum * exp2_fast(mine[c].max - most) + sum;
        mine[c].max = most, mine[c].shift += shift;
    }
}

/* Tiles of sixteen ends: tile i is of block i % size, of its warp number FIRST_SCORER + i / size, which goes on with every
 * (SCORERS x size)-th. */
#define SCORERS      4u
#define FIRST_SCORER 4u
static __device__ __forceinline__ uint32_t own_tile(const struct team &t)
{
    uint32_t scorer = t.warp - FIRST_SCORER;
    return scorer < SCORERS ? t.part + (scorer << t.shift) : ALL_LANES / TILE_ROWS;
}

static __device__ __forceinline__ uint64_t end_row_near(const struct team_call &call, const struct team &t,
                                                        const struct team_shared *m, const struct ends &e, uint32_t i)
{
    i = min(i, e.count - 1);
    return i < FIRST_ENDS ? m->end_rows[i] : end_row(call, t, e, i, false);
}

template <typename T, uint32_t DIM>
static __device__ __forceinline__ void ends_begin(const struct team_call &call, const struct team &t,
                                                  const struct team_shared *m, const struct ends &e, uint32_t first,
                                                  struct end_keys<DIM> &k)
{
    if (first < e.count)
        end_keys_load<T, DIM>(end_row_near(call, t, m, e, first + t.lane / 4),
                              end_row_near(call, t, m, e, first + t.lane / 4 + 8), t.lane, k);
}

/* The first tile's keys are on their way. Lane 2 (lane % 4) and the next have heads: their words go out. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void ends_share(const struct team_call &call, const struct team &t,
                                                  const struct team_shared *m, const struct ends &e, struct end_keys<DIM> &k)
{
    struct team_shared::share mine[2] = {{NOTHING, 0, 0}, {NOTHING, 0, 0}};
    uint32_t first = own_tile(t) * TILE_ROWS;
    struct word *words = bias_words(t) + own_tile(t) * HEADS;
    if (first >= e.count)
        return;
#pragma unroll 1
    while (first < e.count) {
        float d[4];
        ends_score<T, DIM>(k, (uint32_t)__cvta_generic_to_shared(m->queries), t.lane, d);
        shares_join(d, call.a.policy.scale * LOG2E, e, first, t.lane, mine);
        first += SCORERS * TILE_ROWS << t.shift;
        ends_begin<T, DIM>(call, t, m, e, first, k);
    }
#pragma unroll
    for (uint32_t c = 0; c < 2; c++)
        if (t.lane < 4 && t.lane * 2 + c < t.group)
            put_word(t, words + t.lane * 2 + c, __float_as_uint(mine[c].max), __float_as_uint(mine[c].sum),
                     __float_as_uint(mine[c].shift));
}

/* ---- their rows ---- */

/* Those that the block attends come into a tile of their own while it waits for the biases, two rows a warp, unless one lies in
 * the CPU's memory. Returns how many they are. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ uint32_t ends_fetch(const struct team_call &call, const struct team &t,
                                                      const struct team_shared *m, const struct ends &e)
{
    constexpr uint32_t PIECES = tile_shape<T, DIM>::ROW / 16, FETCHERS = TILE_ROWS / 2;
    struct own_ends own = own_ends(t, e);
    uint64_t row = call.at.ends && t.lane < own.count ? m->end_rows[own.begin + t.lane] : 0;
    if (!call.at.ends || __any_sync(ALL_LANES, row & FAR))
        return 0;
    if (t.warp < WARPS - FETCHERS)
        return own.count;
#pragma unroll
    for (uint32_t i = 0; i < TILE_ROWS * PIECES / FETCHERS / WARP; i++) {
        uint32_t piece = i * WARP + t.lane, r = (t.warp - (WARPS - FETCHERS)) * 2 + piece / PIECES;
        uint64_t from = __shfl_sync(ALL_LANES, row, r) + piece % PIECES * 16;
        uint32_t to =
            (uint32_t)__cvta_generic_to_shared(m) + call.at.ends + r * tile_shape<T, DIM>::PITCH + piece % PIECES * 16;
        if (r < own.count)
            asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
        else /* what is not there must be a number */
            asm volatile("st.shared.v4.u32 [%0],{%1,%1,%1,%1};" ::"r"(to), "r"(0) : "memory");
    }
    return own.count;
}

/* ---- estimates ---- */

/* Of fitted tokens four at a time, aligned: one word of their signatures is sixteen bytes. */
struct fitted {
    uint32_t begin, end, first, count; /* tokens; of fours */
};

static __device__ __forceinline__ struct fitted fitted_of(const struct ends &e)
{
    uint32_t begin = end_token(e, e.fitted_from), end = begin + e.count - e.fitted_from;
    return {begin, end, begin / 4, end > begin ? (end - 1) / 4 - begin / 4 + 1 : 0};
}

/* A word of four tokens; block: address of their block's signatures. */
static __device__ __forceinline__ uint4 fitted_load(const struct fitted &f, uint32_t i, uint64_t block, uint32_t words,
                                                    uint32_t word)
{
    return i < f.count ? *(const uint4 *)(block + ((f.first + i) % 16 * words + word) * 16) : make_uint4(0, 0, 0, 0);
}

static __device__ __noinline__ uint4 fitted_far(const struct team_call &call, const struct team t, const struct fitted f,
                                                uint32_t i, uint32_t word)
{
    uint64_t block = i < f.count ? signatures_of(call, t, t.blocks[(f.first + i) / 16].signatures) : 0;
    return fitted_load(f, i, block, call.words, word);
}

/* Tokens that are not fitted count for nothing. */
static __device__ __forceinline__ void fitted_only(const struct fitted &f, uint32_t i, uint4 &v)
{
    uint32_t token = (f.first + i) * 4;
    v.x = token >= f.begin ? v.x : 0, v.y = token + 1 >= f.begin && token + 1 < f.end ? v.y : 0;
    v.z = token + 2 >= f.begin && token + 2 < f.end ? v.z : 0, v.w = token + 3 < f.end ? v.w : 0;
    v.x = token < f.end ? v.x : 0, v.w = token + 3 >= f.begin ? v.w : 0;
}

/* A warp has a word of a head's weights: digits for the scan, and the sum of the weights of all bits that fitted tokens have
 * there. Of a fragment's rows each holds four tokens' words, of B's columns each a bit plane. The first word's tokens are on
 * their way. */
template <uint32_t SETS, uint32_t COPIES>
static __device__ __forceinline__ void words_take(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                  const struct weigh_shared<HEADS> *w, const struct fitted &f,
                                                  const uint4 (&ahead)[2])
{
#pragma unroll 1
    for (uint32_t task = t.warp; task < SETS * 4 * call.words; task += WARPS) {
        uint32_t h = task % (SETS * 4), word = task / (SETS * 4);
        if (h >= t.group)
            continue;
        int weight = w->weights[h][word * WARP + t.lane], sum = 0;
        uint32_t own = word_planes(weight, t.lane);
        digits_put<COPIES>(weight, t.lane, m->digits, h * call.words + word);
#pragma unroll 1
        for (uint32_t i = t.lane; i < PKV_ALIGN_UP(f.count, WARP); i += WARP) {
            bool first = task == t.warp && i < 2 * WARP;
            uint4 v = first ? i < WARP ? ahead[0] : ahead[1] : fitted_far(call, t, f, i, word);
            int d[4] = {0, 0, 0, 0};
            fitted_only(f, i, v);
            common_bits(d, v.x, v.y, own, d);
            common_bits(d, v.z, v.w, own, d);
            int even = d[0] + d[2], odd = d[1] + d[3], shift = t.lane % 4 * 2;
            sum += (even << shift) + (shift == 6 ? -(odd << 7) : odd << (shift + 1));
        }
        sum = __reduce_add_sync(ALL_LANES, sum);
        if (t.lane == 0)
            m->estimates[h][word] = sum;
        if (!t.plain && w->write)
            word_keep(call, t, h, word, weight, own);
    }
}

/* ---- all shares into biases; one warp calls it ---- */

/* A lane's first two shares, as they are when it looks for the first time: before the warp needs them. */
template <uint32_t SETS> struct shares_seen {
    struct word of[SETS][2];
};

/* Head set x 4 + lane % 4: shares of tiles i and i + 8 of this lane that there are. */
static __device__ __forceinline__ uint32_t shares_left(const struct team &t, const struct ends &e, uint32_t set, uint32_t i)
{
    uint32_t shares = min((e.count + TILE_ROWS - 1) / TILE_ROWS, SCORERS << t.shift);
    return i < shares && set * 4 + t.lane % 4 < t.group ? (shares - i + 7) / 8 : 0;
}
static __device__ __forceinline__ const struct word *shares_at(const struct team &t, uint32_t set, uint32_t i)
{
    return bias_words(t) + i * HEADS + set * 4 + t.lane % 4;
}

template <uint32_t SETS>
static __device__ __forceinline__ void shares_look(const struct team &t, const struct ends &e, struct shares_seen<SETS> &seen)
{
#pragma unroll
    for (uint32_t set = 0; set < SETS; set++)
        look_at_words<2>(t, shares_at(t, set, t.lane / 4), 8 * HEADS, shares_left(t, e, set, t.lane / 4), seen.of[set]);
}

template <uint32_t SETS>
static __device__ __forceinline__ void biases_join(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                   const struct weigh_shared<HEADS> *w, const struct ends &e,
                                                   struct shares_seen<SETS> &seen)
{
#pragma unroll
    for (uint32_t set = 0; set < SETS; set++) {
        uint32_t h = set * 4 + t.lane % 4;
        struct team_shared::share r = {NOTHING, 0, 0};
#pragma unroll 1
        for (uint32_t i = t.lane / 4; (i - t.lane / 4) * TILE_ROWS < e.count && i < SCORERS << t.shift; i += 16) {
            uint32_t left = shares_left(t, e, set, i);
            struct word(&x)[2] = seen.of[set];
            if (i >= 16)
                look_at_words<2>(t, shares_at(t, set, i), 8 * HEADS, left, x);
            take_words<2>(t, shares_at(t, set, i), 8 * HEADS, left, x);
#pragma unroll
            for (uint32_t j = 0; j < 2; j++)
                if (j < left) {
                    float most = fmaxf(r.max, __uint_as_float(x[j].x));
                    r.sum =
                        r.sum * exp2_fast(r.max - most) + __uint_as_float(x[j].y) * exp2_fast(__uint_as_float(x[j].x) - most);
                    r.max = most, r.shift += __uint_as_float(x[j].z);
                }
        }
        float most = r.max;
#pragma unroll
        for (uint32_t s = 4; s < WARP; s *= 2) {
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
            r.shift += __shfl_xor_sync(ALL_LANES, r.shift, s);
        }
        r.sum *= exp2_fast(r.max - most);
#pragma unroll
        for (uint32_t s = 4; s < WARP; s *= 2)
            r.sum += __shfl_xor_sync(ALL_LANES, r.sum, s);
        if (t.lane >= 4 || h >= t.group)
            continue;
        int estimate = 0;
        for (uint32_t i = 0; i < call.words; i++)
            estimate += m->estimates[h][i];
        float scale = w->scale[h], fitted = (float)(e.count - e.fitted_from);
        float bias = __fdividef(r.shift - (float)estimate * scale, fitted) - (most + __log2f(r.sum));
        bias = isfinite(bias) ? bias : 0.0f; /* there are no ends, or numbers that are none */
        m->bias[h] = bias, m->scale[h] = scale;
        if (t.part == 0)
            call.a.work.biases[t.q_head + h] = bias;
        if (!t.plain && w->write)
            call.a.work.scales[t.q_head + h] = scale;
    }
}

#endif /* architecture */

#endif
