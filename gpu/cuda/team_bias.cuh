/* A team's biases: what puts a head's estimates beside its exact scores of sinks and recent tokens (the ends). Every block
 * scores all of them, in the same order, so that no block waits for another: a warp sixteen rows at a time. */
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

/* Table entries of those rows. */
struct end_entries {
    uint64_t low, high;
};

static __device__ __forceinline__ struct end_entries end_entries_load(const struct team &t, const struct ends &e,
                                                                      uint32_t first)
{
    if (first >= e.count)
        return {0, 0};
    uint32_t low = end_token(e, min(first + t.lane / 4, e.count - 1)),
             high = end_token(e, min(first + t.lane / 4 + 8, e.count - 1));
    return {t.blocks[low / PKV_BLOCK_TOKENS].rows, t.blocks[high / PKV_BLOCK_TOKENS].rows};
}

template <typename T, uint32_t DIM>
static __device__ __forceinline__ void end_keys_load(const struct team_call &call, const struct team &t, const struct ends &e,
                                                     uint32_t first, const struct end_entries &entries, struct end_keys<DIM> &k)
{
    if (first >= e.count)
        return;
    uint64_t at[2] = {address_of(call.a, entries.low, call.rows_slot), address_of(call.a, entries.high, call.rows_slot)};
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t token = end_token(e, min(first + t.lane / 4 + 8 * i, e.count - 1));
        at[i] += (t.head * PKV_BLOCK_TOKENS + token % PKV_BLOCK_TOKENS) * tile_shape<T, DIM>::ROW;
    }
#pragma unroll
    for (uint32_t j = 0; j < DIM / 32; j++) {
        k.low[j] = load_row_piece(at[0] + j * 64 + t.lane % 4 * 16);
        k.high[j] = load_row_piece(at[1] + j * 64 + t.lane % 4 * 16);
    }
    /* The values are wanted later: one block has them brought to L2. */
    if (first / TILE_ROWS % t.size == t.part)
        for (uint32_t i = t.lane % 4; i < DIM / 64; i += 4)
            asm volatile("prefetch.global.L2 [%0];\n\tprefetch.global.L2 [%1];" ::"l"(at[0] + DIM * 2 + i * 128),
                         "l"(at[1] + DIM * 2 + i * 128));
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

template <typename T, uint32_t DIM>
static __device__ __forceinline__ void ends_share(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                  const struct ends &e, struct end_keys<DIM> &k)
{
    struct team_shared::share mine[2] = {{NOTHING, 0, 0}, {NOTHING, 0, 0}};
#pragma unroll 1
    for (uint32_t first = t.warp * TILE_ROWS; first < e.count;) {
        float d[4];
        ends_score<T, DIM>(k, (uint32_t)__cvta_generic_to_shared(m->queries), t.lane, d);
        shares_join(d, call.a.policy.scale * LOG2E, e, first, t.lane, mine);
        first += WARPS * TILE_ROWS;
        end_keys_load<T, DIM>(call, t, e, first, end_entries_load(t, e, first), k);
    }
    if (t.lane < 4)
        m->shares[t.warp][t.lane * 2] = mine[0], m->shares[t.warp][t.lane * 2 + 1] = mine[1];
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

static __device__ __forceinline__ uint64_t fitted_entry(const struct team &t, const struct fitted &f, uint32_t i)
{
    return i < f.count ? t.blocks[(f.first + i) / 16].signatures : 0;
}

static __device__ __forceinline__ uint4 fitted_load(const struct team_call &call, const struct team &t, const struct fitted &f,
                                                    uint32_t i, uint64_t entry, uint32_t word)
{
    if (!entry)
        return make_uint4(0, 0, 0, 0);
    uint32_t at = ((t.head * 16 + (f.first + i) % 16) * call.words + word) * 16;
    return *(const uint4 *)(address_of(call.a, entry, call.signatures_slot) + at);
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
template <uint32_t SETS>
static __device__ __forceinline__ void words_take(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                  const struct weigh_shared<HEADS> *w, const struct fitted &f,
                                                  const uint4 (&ahead)[2])
{
#pragma unroll 1
    for (uint32_t task = t.warp; task < SETS * 4 * call.words; task += WARPS) {
        uint32_t h = task % (SETS * 4), word = task / (SETS * 4), own = 0;
        if (h >= t.group)
            continue;
        int weight = w->weights[h][word * WARP + t.lane], sum = 0;
#pragma unroll
        for (uint32_t p = 0; p < 8; p++) {
            uint32_t plane = __ballot_sync(ALL_LANES, weight >> p & 1);
            own = t.lane / 4 == p ? plane : own;
        }
        digits_write(weight, t.lane, call.words, m->digits[h * call.words + word]);
#pragma unroll 1
        for (uint32_t i = t.lane; i < PKV_ALIGN_UP(f.count, WARP); i += WARP) {
            bool first = task == t.warp && i < 2 * WARP;
            uint4 v = first ? i < WARP ? ahead[0] : ahead[1] : fitted_load(call, t, f, i, fitted_entry(t, f, i), word);
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
        if (!w->write)
            continue;
        call.a.work.weights[(t.q_head + h) * call.a.geom.sig_bits + word * WARP + t.lane] = (int8_t)weight;
        if (t.lane % 4 == 0)
            call.a.work.planes[((t.q_head + h) * 8 + t.lane / 4) * call.words + word] = own;
    }
}

/* ---- all warps' shares into biases; one warp calls it ---- */

template <uint32_t SETS>
static __device__ __forceinline__ void biases_join(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                   const struct weigh_shared<HEADS> *w, const struct ends &e)
{
#pragma unroll
    for (uint32_t set = 0; set < SETS; set++) {
        uint32_t h = set * 4 + t.lane % 4;
        const struct team_shared::share x = m->shares[t.lane / 4][h], y = m->shares[t.lane / 4 + 8][h];
        float most = fmaxf(x.max, y.max), shift = x.shift + y.shift;
#pragma unroll
        for (uint32_t s = 4; s < WARP; s *= 2) {
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
            shift += __shfl_xor_sync(ALL_LANES, shift, s);
        }
        float sum = x.sum * exp2_fast(x.max - most) + y.sum * exp2_fast(y.max - most);
#pragma unroll
        for (uint32_t s = 4; s < WARP; s *= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, s);
        if (t.lane >= 4 || h >= t.group)
            continue;
        int estimate = 0;
        for (uint32_t i = 0; i < call.words; i++)
            estimate += m->estimates[h][i];
        float scale = w->scale[h], fitted = (float)(e.count - e.fitted_from);
        float bias = __fdividef(shift - (float)estimate * scale, fitted) - (most + __log2f(sum));
        bias = isfinite(bias) ? bias : 0.0f; /* there are no ends, or numbers that are none */
        m->bias[h] = bias, m->scale[h] = scale;
        if (t.part == 0)
            call.a.work.biases[t.q_head + h] = bias;
        if (w->write)
            call.a.work.scales[t.q_head + h] = scale;
    }
}

#endif /* architecture */

#endif
