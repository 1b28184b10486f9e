/* What the kernels share. */
#ifndef GPU_CUDA_DEVICE_CUH
#define GPU_CUDA_DEVICE_CUH

#include "gpu/code.h"
#include "gpu/cuda/launch.h"
#include "proto/err.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define WARP      32u
#define ALL_LANES 0xffffffffu
#define LOG2E     1.44269504f
#define NOTHING   (-1e30f) /* below every score; keeps differences finite */

/* A launch starts while the former one ends: everything that the former wrote is there from here on. What a call is given
 * (queries, lengths, tables, rows, signatures) was there before its first kernel passed this line, and that kernel lets the
 * next one start only then; so the call's other kernels may read those, and only those, before it. */
static __device__ __forceinline__ void wait_for_former(void)
{
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <typename K, typename A>
static int launch(K kernel, dim3 grid, unsigned threads, size_t shared, const A &args, void *stream, bool early = true,
                  bool together = false)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};
    uint32_t count = 0;
    if (early) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (together) {
        attributes[count].id = cudaLaunchAttributeCooperative;
        attributes[count++].val.cooperative = 1;
    }
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
    config.stream = (cudaStream_t)stream, config.attrs = attributes, config.numAttrs = count;
    cudaError_t e = cudaLaunchKernelEx(&config, kernel, args);
    if (e == cudaSuccess)
        return 0;
    (void)cudaGetLastError(); /* a sticky error shows again at the next call; others must not */
    return e == cudaErrorInvalidValue || e == cudaErrorInvalidConfiguration ? -(int)PKV_ERR_SHAPE : -(int)PKV_ERR_SYSTEM;
}

static __device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float to_float(float x)
{
    return x;
}
static __device__ __forceinline__ float to_float(__half x)
{
    return __half2float(x);
}
static __device__ __forceinline__ float to_float(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}

static __device__ __forceinline__ char *place_address(const uint64_t *const *base, uint64_t place, uint64_t slot_bytes)
{
    return (char *)pkv_place_address(base[pkv_place_tier(place)][pkv_place_chunk(place)], place, slot_bytes);
}

static __device__ __forceinline__ const char *row_address(const struct cuda_attend &a, const struct pkv_block_ref *blocks,
                                                          uint32_t head, uint32_t token)
{
    return place_address(a.base, blocks[token / PKV_BLOCK_TOKENS].rows, pkv_geom_block_bytes(&a.geom)) +
           pkv_geom_row_offset(&a.geom, head, token % PKV_BLOCK_TOKENS);
}

/* The tokens of a query that are neither sinks nor recent. */
struct span {
    uint32_t visible, first, last;
    bool dense; /* attended whole: short, or nothing to select */
};

static __device__ __forceinline__ struct span span_in(const struct cuda_attend &a, uint64_t tokens, uint32_t back)
{
    struct span s;
    s.visible = tokens > back ? (uint32_t)(tokens - back) : 0u;
    s.visible = s.visible < a.tokens_max ? s.visible : a.tokens_max;
    s.first = s.visible < a.policy.sinks ? s.visible : a.policy.sinks;
    s.last = s.visible - min(a.policy.recent, s.visible - s.first);
    s.dense = s.visible < a.policy.dense_below || s.last - s.first <= a.policy.k;
    return s;
}

static __device__ __forceinline__ struct span span_of(const struct cuda_attend &a, uint32_t query)
{
    struct cuda_query where = a.query[query];
    return span_in(a, a.seqs[where.seq].tokens, where.back);
}

/* Blocks [begin, end) of the candidates that a part scans and picks from: contiguous, in the order of the parts. */
static __device__ __forceinline__ void part_of(const struct span &span, uint32_t part, uint32_t parts, uint32_t *begin,
                                               uint32_t *end)
{
    uint32_t all = pkv_tokens_blocks(span.last);
    uint32_t per = parts & (parts - 1) ? PKV_DIV_UP(all, parts) : (all + parts - 1) >> (31 - __clz(parts));
    *begin = min(part * per, all), *end = min(*begin + per, all);
}

static __device__ __forceinline__ uint64_t codes_stride(const struct cuda_attend &a)
{
    return PKV_ALIGN_UP((uint64_t)a.tokens_max, PKV_BLOCK_TOKENS);
}

static __device__ __forceinline__ const struct pkv_block_ref *blocks_of(const struct cuda_attend &a, uint32_t query)
{
    return a.seqs[a.query[query].seq].blocks;
}

#endif
