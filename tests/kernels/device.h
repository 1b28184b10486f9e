/* A world on the device: what check_cuda and bench_cuda set up alike. */
#ifndef TESTS_KERNELS_DEVICE_H
#define TESTS_KERNELS_DEVICE_H

#include "gpu/cuda/setup.h"
#include "tests/kernels/world.h"

#include <cuda_runtime_api.h>

#define CUDA(call)                                                                            \
    do {                                                                                      \
        cudaError_t error_ = (call);                                                          \
        if (error_ != cudaSuccess) {                                                          \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)

static inline void *device_take(uint64_t bytes)
{
    void *p;
    CUDA(cudaMalloc(&p, PKV_MAX(bytes, 256u)));
    return p;
}

static inline void *device_copy(const void *from, uint64_t bytes)
{
    void *p = device_take(bytes);
    CUDA(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice));
    return p;
}

static inline void *host_copy(const void *from, uint64_t bytes)
{
    void *p = take(bytes);
    CUDA(cudaMemcpy(p, from, bytes, cudaMemcpyDeviceToHost));
    return p;
}

static inline uint32_t device_processors(void)
{
    int device, count;
    CUDA(cudaGetDevice(&device));
    CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return (uint32_t)count;
}

/* 77: the test runner's word for skipped. */
static inline void device_or_skip(void)
{
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || !count) {
        printf("no CUDA device: nothing was checked\n");
        exit(77);
    }
}

#endif
