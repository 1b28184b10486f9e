/* Before a step's layers: lengths and table entries, read from pinned memory. Behind them: its bad word, then its epoch's end.
 * Around a call that keeps: when it began; how long it took, and what the audit wants of it.
 *
 * All are launched early. What a step brings is read while the former step ends; nothing is written before it has. The kernel
 * behind a step's begins when that has ended: it may read lengths and tables before it waits. */
#include "gpu/cuda/device.cuh"
#include "gpu/cuda/steps.h"
#include "proto/region.h"

#define THREADS 256u

/* What the former kernel, and all before it, wrote is there. The next one starts when this one has ended, or has let it. */
static __device__ __forceinline__ void former_done(void)
{
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

static __device__ __forceinline__ void next_may_start(void)
{
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/* Pinned memory is written again by the host, step for step: not out of this processor's cache. */
static __device__ __forceinline__ struct gpu_batch_ref ref_load(const struct gpu_batch_ref *from)
{
    static_assert(sizeof(*from) == 2 * sizeof(uint4), "two loads");
    union {
        uint4 half[2];
        struct gpu_batch_ref ref;
    } u = {{__ldcv((const uint4 *)from), __ldcv((const uint4 *)from + 1)}};
    return u.ref;
}

__global__ void __launch_bounds__(THREADS) step_kernel(const __grid_constant__ struct cuda_step s)
{
    uint32_t first = blockIdx.x * THREADS + threadIdx.x, stride = gridDim.x * THREADS, lengths = s.layers * s.count;
    struct gpu_batch_ref r = {};
    unsigned long long tokens = 0;
    if (first < s.changed)
        r = ref_load(s.refs + first);
    if (first < lengths)
        tokens = __ldcv((const unsigned long long *)s.tokens + first % s.count);
    former_done();
    for (uint32_t i = first; i < s.changed; i += stride) {
        if (i != first)
            r = ref_load(s.refs + i);
        struct pkv_block_ref *to = (struct pkv_block_ref *)s.seqs[(uint64_t)r.layer * s.count + r.seq].blocks + r.block;
        to->rows = r.ref.rows, to->signatures = r.ref.signatures;
    }
    for (uint32_t i = first; i < lengths; i += stride)
        s.seqs[i].tokens = i == first ? tokens : __ldcv((const unsigned long long *)s.tokens + i % s.count);
    if (first == 0 && s.keeper)
        s.keeper->wanted = s.wanted, s.keeper->head = s.head;
}

static __device__ __forceinline__ uint64_t now_ns(void)
{
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

__global__ void mark_kernel(struct cuda_keeper *keeper)
{
    wait_for_former();
    keeper->begin_ns = now_ns();
}

__global__ void __launch_bounds__(THREADS) keep_kernel(const __grid_constant__ struct cuda_keep k)
{
    wait_for_former();
    uint32_t wanted = k.keeper->wanted, group = pkv_geom_group(&k.geom),
             words = pkv_dtype_bytes(k.geom.dtype) * k.geom.head_dim / 4;
    if (threadIdx.x == 0)
        *(volatile uint64_t *)&k.kept->ns = now_ns() - k.keeper->begin_ns;
    if (!wanted)
        return;
    uint64_t first = (uint64_t)(wanted - 1) * k.geom.q_heads + k.keeper->head * group;
    uint32_t numbers = group * k.geom.head_dim;
    volatile uint32_t *q = (uint32_t *)(k.kept + 1);
    volatile float *out = (float *)(k.kept + 1) + numbers, *lse = out + numbers;
    for (uint32_t i = threadIdx.x; i < group * words; i += THREADS)
        q[i] = ((const uint32_t *)k.q)[first * words + i];
    for (uint32_t i = threadIdx.x; i < numbers; i += THREADS)
        out[i] = k.out[first * k.geom.head_dim + i];
    for (uint32_t i = threadIdx.x; i < group; i += THREADS)
        lse[i] = k.lse[first + i];
    __syncthreads();
    if (threadIdx.x)
        return;
    *(volatile uint32_t *)&k.kept->layer = k.layer, *(volatile uint32_t *)&k.kept->found = 1; /* read once the step has ended */
    k.keeper->wanted = 0;
}

__global__ void end_kernel(const __grid_constant__ struct cuda_end e)
{
    next_may_start(); /* a step's, which waits for this one before it writes */
    former_done();
    *(volatile uint32_t *)e.ret_bad = *e.bad;
    __threadfence_system();
    *(volatile uint64_t *)e.epoch = PKV_EPOCH_IDLE;
}

extern "C" int cuda_steps_preload(void)
{
    cudaFuncAttributes f;
    bool all = cudaFuncGetAttributes(&f, step_kernel) == cudaSuccess && cudaFuncGetAttributes(&f, end_kernel) == cudaSuccess &&
               cudaFuncGetAttributes(&f, mark_kernel) == cudaSuccess && cudaFuncGetAttributes(&f, keep_kernel) == cudaSuccess;
    return all ? 0 : -(int)PKV_ERR_UNSUPPORTED;
}

extern "C" int cuda_step_launch(const struct cuda_step *s, void *stream)
{
    uint32_t most = PKV_MAX(s->changed, s->layers * s->count);
    return launch(step_kernel, dim3(PKV_MIN(PKV_DIV_UP(most, THREADS), 256u)), THREADS, 0, *s, stream);
}

extern "C" int cuda_mark_launch(struct cuda_keeper *keeper, void *stream)
{
    return launch(mark_kernel, dim3(1), 1, 0, keeper, stream);
}

extern "C" int cuda_keep_launch(const struct cuda_keep *k, void *stream)
{
    return launch(keep_kernel, dim3(1), THREADS, 0, *k, stream);
}

extern "C" int cuda_end_launch(const struct cuda_end *e, void *stream)
{
    return launch(end_kernel, dim3(1), 1, 0, *e, stream);
}
