/* A team's biases: what puts each head's estimates beside its exact scores of sinks and recent tokens. */
#ifndef GPU_CUDA_TEAM_BIAS_CUH
#define GPU_CUDA_TEAM_BIAS_CUH

#include "gpu/cuda/team_scan.cuh"

#if __CUDA_ARCH__ >= 900

static __device__ __forceinline__ void share_join(struct team_shared::share &r, float max, float sum, float shift)
{
    float most = fmaxf(r.max, max);
    r.sum = r.sum * exp2_fast(r.max - most) + sum * exp2_fast(max - most);
    r.max = most, r.shift += shift;
}

/* Sixteen lanes' shares into one. */
static __device__ __forceinline__ struct team_shared::share share_merge(struct team_shared::share r)
{
    float most = r.max;
#pragma unroll
    for (uint32_t s = 8; s; s /= 2)
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
    r.sum *= exp2_fast(r.max - most), r.max = most;
#pragma unroll
    for (uint32_t s = 8; s; s /= 2) {
        r.sum += __shfl_xor_sync(ALL_LANES, r.sum, s);
        r.shift += __shfl_xor_sync(ALL_LANES, r.shift, s);
    }
    return r;
}

/* Sum of the weights of a signature's set bits; words that it has not are zero. */
static __device__ __forceinline__ int estimate(const struct weigh_shared<HEADS> *w, const uint4 &bits, uint32_t h)
{
    int sum = 0;
#pragma unroll
    for (uint32_t p = 0; p < 8; p++) {
        uint4 plane = *(const uint4 *)w->planes[h][p];
        int n = __popc(bits.x & plane.x) + __popc(bits.y & plane.y) + __popc(bits.z & plane.z) + __popc(bits.w & plane.w);
        sum += p == 7 ? -(n << p) : n << p;
    }
    return sum;
}

/* Keys of sixteen sinks or recent tokens, scored for all heads, and their signatures. A warp calls it. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void ends_tile(const struct cuda_attend &a, const struct team &t, struct team_shared *m,
                                                 const struct span &span, uint32_t first, uint32_t rows, uint32_t slot,
                                                 unsigned char *scratch)
{
    const struct pkv_geom &g = a.geom;
    const struct pkv_block_ref *blocks = blocks_of(a, t.query);
    uint32_t n = first + min(t.lane % TILE_ROWS, rows - 1), token = n < span.first ? n : span.last + (n - span.first);
    struct pkv_block_ref ref = blocks[token / PKV_BLOCK_TOKENS];
    if (t.lane < TILE_ROWS)
        m->ends[slot][t.lane] = (uint64_t)place_address(a.base, ref.rows, pkv_geom_block_bytes(&g)) +
                                pkv_geom_row_offset(&g, t.head, token % PKV_BLOCK_TOKENS);
    const uint32_t *signature = (const uint32_t *)place_address(a.base, ref.signatures, pkv_geom_sig_block_bytes(&g));
    __syncwarp();
    uint32_t word[2];
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t w = t.lane / TILE_ROWS + 2 * i;
        word[i] = w < pkv_geom_words(&g) ? signature[pkv_geom_sig_index(&g, t.head, token % PKV_BLOCK_TOKENS, w)] : 0;
    }
    load_tile<tile_shape<T, DIM>::HALF, tile_shape<T, DIM>::KEYS>(scratch, m->ends[slot], NULL, 0, TILE_ROWS, t.lane);
    for (uint32_t i = 0; i < DIM * sizeof(T) / 128; i++) /* their values are wanted later */
        if (t.lane < TILE_ROWS)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(m->ends[slot][t.lane] + DIM * sizeof(T) + i * 128));
    for (uint32_t i = 0; i < 2; i++)
        m->signature[slot][t.lane % TILE_ROWS][t.lane / TILE_ROWS + 2 * i] = word[i];
    float d[4];
    tile_scores<T, DIM, tile_shape<T, DIM>::KEYS>((uint32_t)__cvta_generic_to_shared(scratch),
                                                  (uint32_t)__cvta_generic_to_shared(m->queries), t.lane, d);
#pragma unroll
    for (uint32_t i = 0; i < 4; i++)
        m->exact[slot][t.lane / 4 + i / 2 * 8][t.lane % 4 * 2 + i % 2] = d[i] * (a.policy.scale * LOG2E);
    __syncwarp();
}

/* The shares of all blocks into biases. */
static __device__ __forceinline__ void biases_join(const struct cuda_attend &a, const struct team &t, struct team_shared *m,
                                                   struct stream &stream, uint32_t fitted)
{
    uint32_t kind = t.lane / HEADS, head = t.lane % HEADS; /* a warp has a block's words */
    if (t.warp < t.size && kind < 3 && head < t.group)
        ((float *)&m->gathered[t.warp][head])[kind] = __uint_as_float(take_word(t, bias_words(t) + t.warp * WARP + t.lane));
    __syncwarp();
    if (!stream_long(stream))
        stream_fill(a, t, stream, 0), stream_fill(a, t, stream, 1);
    __syncthreads();
    if (t.warp < t.group) {
        const struct team_shared::share none = {NOTHING, 0, 0};
        struct team_shared::share r = share_merge(t.lane < t.size ? m->gathered[t.lane][t.warp] : none);
        float bias = fitted ? r.shift / (float)fitted - (r.max + log2f(r.sum)) : 0.0f;
        bias = isfinite(bias) ? bias : 0.0f;
        if (t.lane == 0) {
            m->bias[t.warp] = bias;
            if (t.part == 0)
                a.work.biases[t.q_head + t.warp] = bias;
        }
    }
    __syncthreads();
}

/* Tiles of sinks and recent tokens are dealt out to the blocks; in a block the upper warps take them while the lower ones
 * weigh, then each tile is estimated by two warps: a lane has a row and, of each four heads, one. The stream of signatures
 * begins when all that this waits for has been read. */
template <typename T, uint32_t DIM, uint32_t SETS>
static __device__ __forceinline__ void biases_share(const struct cuda_attend &a, const struct team &t, struct team_shared *m,
                                                    struct weigh_shared<HEADS> *w, const struct span &span,
                                                    struct stream &stream, unsigned char *scratch)
{
    uint32_t recent = span.visible - span.last, total = span.first + recent, tiles = PKV_DIV_UP(total, TILE_ROWS);
    uint32_t own = t.part < tiles ? (tiles - t.part + t.size - 1) / t.size : 0, row = t.lane % TILE_ROWS;
    uint32_t slot = t.warp % END_TILES, h0 = t.warp / END_TILES * 2 + t.lane / TILE_ROWS;
    struct team_shared::share mine[SETS];
#pragma unroll
    for (uint32_t i = 0; i < SETS; i++)
        mine[i] = {NOTHING, 0, 0};
#pragma unroll 1
    for (uint32_t begin = 0; begin == 0 || begin < own; begin += END_TILES) {
        uint32_t first = (t.part + (begin + slot) * t.size) * TILE_ROWS;
        bool there = begin + slot < own;
        if (begin == 0 && t.warp < t.group)
            weigh_head<DIM / WARP>(a, w, t.head, t.q_head, t.warp, t.lane);
        else if (t.warp >= END_TILES && there)
            ends_tile<T, DIM>(a, t, m, span, first, min(TILE_ROWS, total - first), slot,
                              scratch + slot * TILE_ROWS * tile_shape<T, DIM>::KEYS);
        __syncthreads();
        if (begin == 0 && stream_long(stream))
            stream_fill(a, t, stream, 0), stream_fill(a, t, stream, 1);
#pragma unroll
        for (uint32_t i = 0; i < SETS; i++) {
            uint32_t h = h0 + 4 * i, n = first + row;
            bool valid = there && n < total && h < t.group;
            struct team_shared::share x = {NOTHING, 0, 0};
            if (valid)
                x = {m->exact[slot][row][h], 1.0f, 0};
            if (valid && (n >= span.first || !recent))
                x.shift = x.max - (float)estimate(w, *(const uint4 *)m->signature[slot][row], h) * w->scale[h];
            x = share_merge(x);
            share_join(mine[i], x.max, x.sum, x.shift);
        }
        if (begin + END_TILES < own)
            __syncthreads();
    }
#pragma unroll
    for (uint32_t i = 0; i < SETS; i++)
        if (row == 0)
            m->shares[t.warp][t.lane / TILE_ROWS][i] = mine[i];
    __syncthreads();
    if (threadIdx.x < t.group) {
        uint32_t h = threadIdx.x;
        struct team_shared::share r = {NOTHING, 0, 0};
        for (uint32_t s = 0; s < min(own, END_TILES); s++) {
            struct team_shared::share x = m->shares[h % 4 / 2 * END_TILES + s][h % 2][h / 4];
            share_join(r, x.max, x.sum, x.shift);
        }
        uint64_t *to = bias_words(t) + t.part * WARP + h;
        put_word(t, to, __float_as_uint(r.max));
        put_word(t, to + HEADS, __float_as_uint(r.sum));
        put_word(t, to + 2 * HEADS, __float_as_uint(r.shift));
    }
}

#endif /* architecture */

#endif
