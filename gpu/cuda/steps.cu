/* Before a step's layers: lengths and table entries, read from pinned memory. Behind them: its bad word, then its epoch's end.
 */
#include "gpu/cuda/device.cuh"
#include "gpu/cuda/steps.h"
#include "proto/region.h"

#define THREADS 256u

__global__ void __launch_bounds__(THREADS) step_kernel(const __grid_constant__ struct cuda_step s)
{
    uint32_t first = blockIdx.x * THREADS + threadIdx.x, stride = gridDim.x * THREADS;
    for (uint32_t i = first; i < s.changed; i += stride) {
        struct gpu_batch_ref r = s.refs[i];
        struct pkv_block_ref *to = (struct pkv_block_ref *)s.seqs[(uint64_t)r.layer * s.count + r.seq].blocks + r.block;
        to->rows = r.ref.rows, to->signatures = r.ref.signatures;
    }
    for (uint32_t i = first; i < s.layers * s.count; i += stride)
        s.seqs[i].tokens = s.tokens[i % s.count];
}

__global__ void end_kernel(const __grid_constant__ struct cuda_end e)
{
    *(volatile uint32_t *)e.ret_bad = *e.bad;
    __threadfence_system();
    *(volatile uint64_t *)e.epoch = PKV_EPOCH_IDLE;
}

extern "C" int cuda_steps_preload(void)
{
    cudaFuncAttributes f;
    return cudaFuncGetAttributes(&f, step_kernel) == cudaSuccess && cudaFuncGetAttributes(&f, end_kernel) == cudaSuccess
               ? 0
               : -(int)PKV_ERR_UNSUPPORTED;
}

extern "C" int cuda_step_launch(const struct cuda_step *s, void *stream)
{
    uint32_t most = PKV_MAX(s->changed, s->layers * s->count);
    return launch(step_kernel, dim3(PKV_MIN(PKV_DIV_UP(most, THREADS), 256u)), THREADS, 0, *s, stream, false);
}

extern "C" int cuda_end_launch(const struct cuda_end *e, void *stream)
{
    return launch(end_kernel, dim3(1), 1, 0, *e, stream, false);
}
