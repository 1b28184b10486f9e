/* Launcher for benchmarks: the plainest gather of rows, as a ceiling for those that do something with them. */
#ifndef GPU_CUDA_PROBE_H
#define GPU_CUDA_PROBE_H

#include "gpu/cuda/cuda.h"

PKV_EXTERN_C_BEGIN

/* Reads `rows` rows of `row_bytes` (a multiple of 16) that lie in [from, from + span), in ascending order: runs of
 * `run` neighbours, each run somewhere in its own equal part of the span. A warp a row. */
struct cuda_probe {
    const void *from;
    uint64_t span;
    uint32_t rows, row_bytes, run, seed;
    void *to; /* four bytes that keep the reads alive */
};
int cuda_probe_launch(const struct cuda_probe *p, cuda_stream stream);

PKV_EXTERN_C_END

#endif
