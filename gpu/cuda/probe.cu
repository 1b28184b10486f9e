/* For benchmarks: a plain gather. */
#include "gpu/cuda/device.cuh"
#include "gpu/cuda/probe.h"

#define THREADS 256u

static __device__ __forceinline__ uint32_t mixed(uint32_t x)
{
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

__global__ void __launch_bounds__(THREADS) probe_kernel(const __grid_constant__ struct cuda_probe p)
{
    uint32_t i = (blockIdx.x * THREADS + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (i >= p.rows)
        return;
    uint64_t part = p.span / PKV_DIV_UP(p.rows, p.run) / p.row_bytes * p.row_bytes, free = part / p.row_bytes - p.run;
    uint64_t first = (uint64_t)__umulhi(mixed(i / p.run + p.seed), (uint32_t)free);
    const char *row = (const char *)p.from + i / p.run * part + (first + i % p.run) * p.row_bytes;
    uint32_t sum = 0;
    for (uint32_t at = lane * 16; at < p.row_bytes; at += WARP * 16) {
        uint4 v = *(const uint4 *)(row + at);
        sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x12345u)
        *(uint32_t *)p.to = sum;
}

extern "C" int cuda_probe_launch(const struct cuda_probe *p, void *stream)
{
    if (!p->rows || !p->run || p->span / PKV_DIV_UP(p->rows, p->run) / p->row_bytes <= p->run)
        return -(int)PKV_ERR_SHAPE;
    return launch(probe_kernel, dim3(PKV_DIV_UP(p->rows, THREADS / WARP)), THREADS, 0, *p, stream, false);
}
