/* A stray write, and a kernel that is still at it when its process is killed. */
#include "tests/kernels/stray.h"

#include <cuda_runtime.h>

static __global__ void write_kernel(uint32_t *to, uint32_t word)
{
    *to = word;
}

static __global__ void busy_kernel(uint32_t *to, uint64_t words, uint64_t ns)
{
    uint64_t begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do {
        for (uint64_t i = threadIdx.x; i < words; i += blockDim.x)
            to[i]++;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - begin < ns);
}

extern "C" int stray_write(uint64_t to, uint32_t word)
{
    write_kernel<<<1, 1>>>((uint32_t *)to, word);
    cudaError_t e = cudaGetLastError();
    return (int)(e != cudaSuccess ? e : cudaDeviceSynchronize());
}

extern "C" int stray_busy(uint64_t to, uint64_t words, uint32_t seconds)
{
    busy_kernel<<<1, 256>>>((uint32_t *)to, words, seconds * 1000000000ull);
    return (int)cudaGetLastError();
}
