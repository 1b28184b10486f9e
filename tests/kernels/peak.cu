/* The ceilings that bench_cuda measures in its own run: a plain read, and a gather of rows at listed addresses. */
#include "tests/kernels/peak.h"

#include <cuda_runtime.h>

static __global__ void __launch_bounds__(512) read_kernel(const uint4 *from, uint64_t count, uint32_t *to)
{
    uint64_t step = (uint64_t)gridDim.x * blockDim.x, i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x;
    uint32_t sum = 0;
    for (; i + 7 * step < count; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = __ldcs(from + i + j * step);
#pragma unroll
        for (int j = 0; j < 8; j++)
            sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < count; i += step)
        sum ^= __ldcs(from + i).x;
    if (sum == 0x12345u)
        *to = sum;
}

extern "C" int peak_read(const void *from, uint64_t bytes, void *to, void *stream)
{
    read_kernel<<<528, 512, 0, (cudaStream_t)stream>>>((const uint4 *)from, bytes / 16, (uint32_t *)to);
    return cudaGetLastError() == cudaSuccess ? 0 : -1;
}

/* A warp takes sixteen rows of 512 bytes at a time, all on their way at once. */
static __global__ void __launch_bounds__(512) gather_kernel(const uint64_t *address, uint32_t rows, uint4 *to)
{
    uint32_t first = (blockIdx.x * 16 + threadIdx.x / 32) * 16, lane = threadIdx.x % 32;
    uint4 v[16];
#pragma unroll
    for (uint32_t r = 0; r < 16; r++)
        v[r] = first + r < rows ? __ldg((const uint4 *)(address[first + r] & ~1ull) + lane) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (uint32_t r = 0; r < 16; r++)
        if (first + r < rows)
            to[(uint64_t)(first + r) * 32 + lane] = v[r];
}

extern "C" int peak_gather(const uint64_t *address, uint32_t rows, void *to, void *stream)
{
    gather_kernel<<<(rows + 255) / 256, 512, 0, (cudaStream_t)stream>>>(address, rows, (uint4 *)to);
    return cudaGetLastError() == cudaSuccess ? 0 : -1;
}
