/* Signatures into their blocks, rows out of them: copies that follow the block tables. Bound by the link, not by these kernels.
 */
#include "gpu/cuda/device.cuh"
#include "gpu/cuda/rows.h"

#define THREADS 256u
#define WARPS   (THREADS / WARP)

__global__ void __launch_bounds__(THREADS) signatures_kernel(const __grid_constant__ struct cuda_signatures s)
{
    const struct pkv_geom &g = s.geom;
    uint32_t words = pkv_geom_words(&g), each = g.kv_heads * words;
    uint64_t all = (uint64_t)s.tokens * each;
    for (uint64_t i = blockIdx.x * THREADS + threadIdx.x; i < all; i += (uint64_t)gridDim.x * THREADS) {
        uint64_t token = s.first_token + i / each;
        uint32_t head = (uint32_t)(i % each) / words, word = (uint32_t)(i % words);
        uint64_t place = s.blocks[token / PKV_BLOCK_TOKENS].signatures;
        uint32_t *to = (uint32_t *)place_address(s.base, place, pkv_geom_sig_block_bytes(&g));
        to[pkv_geom_sig_index(&g, head, token % PKV_BLOCK_TOKENS, word)] = s.from[i];
    }
}

__global__ void __launch_bounds__(THREADS) rows_kernel(const __grid_constant__ struct cuda_rows r)
{
    const struct pkv_geom &g = r.geom;
    uint32_t list = blockIdx.y, head = list % g.kv_heads, lane = threadIdx.x % WARP, count = min(r.count[list], r.rows_max);
    const struct pkv_block_ref *blocks = r.seqs[r.query[list / g.kv_heads].seq].blocks;
    uint64_t bytes = pkv_geom_row_bytes(&g), first = (uint64_t)list * r.rows_max;
    for (uint32_t i = blockIdx.x * WARPS + threadIdx.x / WARP; i < count; i += gridDim.x * WARPS) {
        uint32_t token = r.index[first + i];
        const uint4 *from =
            (const uint4 *)(place_address(r.base, blocks[token / PKV_BLOCK_TOKENS].rows, pkv_geom_block_bytes(&g)) +
                            pkv_geom_row_offset(&g, head, token % PKV_BLOCK_TOKENS));
        for (uint32_t p = lane; p < bytes / 16; p += WARP)
            ((uint4 *)(r.to + (first + i) * bytes))[p] = __ldg(from + p);
    }
}

__global__ void __launch_bounds__(THREADS) merge_kernel(const __grid_constant__ struct cuda_merge m)
{
    uint64_t head = blockIdx.x;
    float lse = m.lse[head], max = m.max[head], sum = m.sum[head];
    if (!(lse > NOTHING))
        return;
    float most = fmaxf(max, lse), keep = expf(max - most), add = expf(lse - most);
    for (uint32_t d = threadIdx.x; d < m.head_dim; d += THREADS) {
        uint64_t at = head * m.head_dim + d;
        m.state[at] = m.state[at] * keep + m.out[at] * add;
    }
    __syncthreads();
    if (threadIdx.x == 0)
        m.max[head] = most, m.sum[head] = sum * keep + add;
}

extern "C" int cuda_rows_preload(void)
{
    cudaFuncAttributes f;
    return cudaFuncGetAttributes(&f, signatures_kernel) == cudaSuccess &&
                   cudaFuncGetAttributes(&f, rows_kernel) == cudaSuccess &&
                   cudaFuncGetAttributes(&f, merge_kernel) == cudaSuccess
               ? 0
               : -(int)PKV_ERR_UNSUPPORTED;
}

extern "C" int cuda_merge_launch(const struct cuda_merge *m, void *stream)
{
    return launch(merge_kernel, dim3(m->heads), THREADS, 0, *m, stream, false);
}

extern "C" int cuda_signatures_launch(const struct cuda_signatures *s, void *stream)
{
    uint64_t words = (uint64_t)s->tokens * s->geom.kv_heads * pkv_geom_words(&s->geom);
    uint32_t blocks = (uint32_t)PKV_MIN(PKV_DIV_UP(words, (uint64_t)THREADS), 4096ull);
    return launch(signatures_kernel, dim3(blocks), THREADS, 0, *s, stream, false);
}

extern "C" int cuda_rows_launch(const struct cuda_rows *r, void *stream)
{
    dim3 grid(PKV_DIV_UP(r->rows_max, WARPS * 4), r->queries * r->geom.kv_heads);
    return launch(rows_kernel, grid, THREADS, 0, *r, stream, false);
}
