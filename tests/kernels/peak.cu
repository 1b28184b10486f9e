/* A ceiling that bench_cuda measures in its own run: a gather of rows at listed addresses. */
#include "tests/kernels/peak.h"

#include <cuda_runtime.h>

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
