/* Launchers for benchmarks: random numbers, a plain read. */
#ifndef GPU_CUDA_FILL_H
#define GPU_CUDA_FILL_H

#include "gpu/cuda/cuda.h"

PKV_EXTERN_C_BEGIN

/* Gaussian bf16 numbers (the sum of twelve uniform ones): of `seed`, plus `noise` times those of `noise_seed`. */
struct cuda_fill {
    void *to;
    uint64_t count;
    uint32_t seed, noise_seed;
    float noise;
};
int cuda_fill_launch(const struct cuda_fill *f, cuda_stream stream);
/* Reads `bytes` once; `to`: four bytes that keep the reads alive. */
int cuda_read_launch(const void *from, uint64_t bytes, void *to, cuda_stream stream);

PKV_EXTERN_C_END

#endif
