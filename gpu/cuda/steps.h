/* Launchers of what a batch's step does before and behind its layers (gpu/batch.h). */
#ifndef GPU_CUDA_STEPS_H
#define GPU_CUDA_STEPS_H

#include "gpu/batch.h"
#include "gpu/cuda/cuda.h"

PKV_EXTERN_C_BEGIN

struct cuda_step {
    struct cuda_seq *seqs;            /* [layers][count], the pointers set */
    const uint64_t *tokens;           /* [count], in pinned memory: the kernel reads it there */
    const struct gpu_batch_ref *refs; /* [changed], likewise */
    uint32_t layers, count, changed, reserved;
};

struct cuda_end {
    uint32_t *bad, *ret_bad; /* on the device; in pinned memory */
    uint64_t *epoch;         /* in registered memory */
};

int cuda_steps_preload(void);
/* Entries first, then lengths: whoever waits for this kernel has both. */
int cuda_step_launch(const struct cuda_step *s, cuda_stream stream);
int cuda_end_launch(const struct cuda_end *e, cuda_stream stream);

PKV_EXTERN_C_END

#endif
