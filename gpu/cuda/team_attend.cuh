/* A team's last half: each block attends its rows, and all merge their results. */
#ifndef GPU_CUDA_TEAM_ATTEND_CUH
#define GPU_CUDA_TEAM_ATTEND_CUH

#include "gpu/cuda/team_choose.cuh"

#if __CUDA_ARCH__ >= 900

/* ---- attend ---- */

/* Ways for the rows that the block will fetch. All finds of the team come before its claims. */
static __device__ __noinline__ void rows_claim(const struct cuda_attend &a, struct team t, const struct list_of l,
                                               struct team_rows *r, uint32_t count, const uint32_t *outcomes)
{
    if (threadIdx.x < CUDA_COUNTERS && outcomes[threadIdx.x] && a.cache.counters)
        atomicAdd((unsigned long long *)a.cache.counters + threadIdx.x, (unsigned long long)outcomes[threadIdx.x]);
    team_gate(t);
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        uint64_t address = r->address[i];
        r->keep[i] = address & FETCHED ? cache_claim(a, l, r->token[i]) : 0, r->address[i] = address & ~FETCHED;
    }
}

/* Addresses of a part of all rows. */
static __device__ __forceinline__ void dense_rows(const struct cuda_attend &a, const struct team &t, struct team_rows *r,
                                                  uint32_t at, uint32_t rows)
{
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < rows; i += THREADS) {
        uint64_t place = t.blocks[(at + i) / PKV_BLOCK_TOKENS].rows;
        r->address[i] = (uint64_t)place_address(a.base, place, pkv_geom_block_bytes(&a.geom)) +
                        pkv_geom_row_offset(&a.geom, t.head, (at + i) % PKV_BLOCK_TOKENS);
    }
}

/* Rows of r, or all tokens from `begin` on; the first warp begins with the ends that are in their tile. Returns how many warps
 * have a result. */
template <typename T, uint32_t DIM, uint32_t SETS>
static __device__ __forceinline__ uint32_t rows_attend(const struct cuda_attend &a, const struct team &t, struct team_shared *m,
                                                       struct team_rows *r, unsigned char *tiles, unsigned char *ends,
                                                       const struct own_rows &own, uint32_t begin, bool dense, bool cached)
{
    uint32_t there = own.there, count = own.count;
    constexpr uint32_t USED = DIM > 128 ? WARPS / 2 : WARPS, BYTES = tile_shape<T, DIM>::BYTES, ROW = tile_shape<T, DIM>::ROW;
    unsigned char *tile = tiles + t.warp * BYTES;
    uint32_t busy = there ? 1 : 0, turn = t.warp >= busy ? t.warp - busy : USED - 1;
    struct tile_state<DIM> s;
    tile_reset(s);
#pragma unroll 1
    for (uint32_t at = 0; at < count || there; at += ROWS) {
        uint32_t rows = at < count ? min(ROWS, count - at) : 0;
        if (dense) {
            dense_rows(a, t, r, begin + at, rows);
            __syncthreads();
        }
#pragma unroll 1
        for (uint32_t first = turn * TILE_ROWS; t.warp < USED; first += USED * TILE_ROWS) {
            bool ready = there && !t.warp;
            if (!ready) {
                if (first >= rows)
                    break;
                load_tile<ROW, tile_shape<T, DIM>::PITCH>(tile, r->address, cached ? r->keep : NULL, first, rows, t.lane);
            }
            tile_attend<T, DIM, (SETS > 1)>((uint32_t)__cvta_generic_to_shared(ready ? ends : tile),
                                            (uint32_t)__cvta_generic_to_shared(m->queries),
                                            ready ? there : min(TILE_ROWS, rows - first), a.policy.scale * LOG2E, t.lane, s);
            if (ready)
                first -= USED * TILE_ROWS, there = 0;
        }
        there = 0;
        if (at + ROWS < count)
            __syncthreads(); /* the addresses are written again */
    }
    uint32_t used = min(PKV_DIV_UP(count, TILE_ROWS) + busy, USED);
    if (t.warp < used)
        tile_result<DIM, (SETS > 1)>(s, (float *)tile, &m->ends[0][0][t.warp], &m->ends[1][0][t.warp], WARPS, t.lane);
    __syncthreads();
    return used;
}

/* ---- merge ---- */

/* Warps into the block's result, as words [group][DIM]: output, maximum, sum. A warp takes 32 outputs of a head, a lane first
 * the weight of another warp's result. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void merge_warps(const struct team &t, const struct team_shared *m,
                                                   const unsigned char *tiles, uint32_t used, struct word *words)
{
    constexpr uint32_t STRIDE = tile_shape<T, DIM>::BYTES / 4;
    const float *results = (const float *)tiles;
    words += t.part * t.group * DIM;
#pragma unroll 1
    for (uint32_t i = t.warp * WARP; i < t.group * DIM; i += THREADS) {
        uint32_t h = i / DIM, at = h * RESULT_PITCH(DIM) + i % DIM + t.lane;
        bool there = t.lane < used;
        float max = there ? m->ends[0][h][t.lane % WARPS] : NOTHING, sum = there ? m->ends[1][h][t.lane % WARPS] : 0.0f;
        float most = max, out = 0;
#pragma unroll
        for (uint32_t s = 8; s; s /= 2)
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
        float keep = exp2_fast(max - most);
        sum *= keep;
#pragma unroll
        for (uint32_t s = 8; s; s /= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, s);
#pragma unroll 4
        for (uint32_t w = 0; w < used; w++)
            out = fmaf(results[w * STRIDE + at], __shfl_sync(ALL_LANES, keep, w), out);
        most = __shfl_sync(ALL_LANES, most, 0), sum = __shfl_sync(ALL_LANES, sum, 0);
        put_word(t, words + i + t.lane, __float_as_uint(out), __float_as_uint(most), __float_as_uint(sum));
    }
}

/* A block adds up its share of the outputs: up to four lanes have one output, each of up to four blocks. */
#define MERGE_LANES 4u
template <uint32_t DIM>
static __device__ __forceinline__ void merge_blocks(const struct cuda_attend &a, const struct team &t, const struct word *words)
{
    constexpr uint32_t EACH = TEAM_MAX / MERGE_LANES;
    uint32_t share = t.group * DIM >> t.shift, lanes = min(t.size, MERGE_LANES), shift = min(t.shift, 2u),
             from = t.lane % lanes;
#pragma unroll 1
    for (uint32_t x = threadIdx.x; x - t.lane < share << shift; x += THREADS) {
        bool there = x >> shift < share;
        uint32_t i = t.part * share + (there ? x >> shift : 0), blocks = t.size / lanes;
        struct word w[EACH];
        look_at_words<EACH>(t, words + from * t.group * DIM + i, lanes * t.group * DIM, blocks, w);
        take_words<EACH>(t, words + from * t.group * DIM + i, lanes * t.group * DIM, blocks, w);
        float most = NOTHING, out = 0, sum = 0;
#pragma unroll
        for (uint32_t j = 0; j < EACH; j++)
            most = j < blocks ? fmaxf(most, __uint_as_float(w[j].y)) : most;
        for (uint32_t s = 1; s < lanes; s *= 2)
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
#pragma unroll
        for (uint32_t j = 0; j < EACH; j++) {
            float keep = j < blocks ? exp2_fast(__uint_as_float(w[j].y) - most) : 0.0f;
            out = fmaf(__uint_as_float(w[j].x), keep, out), sum = fmaf(__uint_as_float(w[j].z), keep, sum);
        }
        for (uint32_t s = 1; s < lanes; s *= 2) {
            out += __shfl_xor_sync(ALL_LANES, out, s);
            sum += __shfl_xor_sync(ALL_LANES, sum, s);
        }
        if (there && from == 0) {
            a.out[t.q_head * DIM + i] = __fdividef(out, sum);
            if (i % DIM == 0 && a.lse)
                a.lse[t.q_head + i / DIM] = (most + __log2f(sum)) * 0.69314718f;
        }
    }
}

#endif /* architecture */

#endif
