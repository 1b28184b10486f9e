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
    uint32_t layers, count, changed;
    uint32_t wanted, head;      /* the wish's query token + 1; 0: none */
    struct cuda_keeper *keeper; /* NULL: it never keeps */
};

/* What a call that keeps is to keep, in device memory: the step says so, in the stream. */
struct cuda_keeper {
    uint32_t wanted, head;
    uint64_t begin_ns;
};

/* What it has kept, in pinned memory; behind it q, out, lse of the group's heads. */
struct cuda_kept {
    uint64_t ns;
    uint32_t found, layer;
};

struct cuda_keep {
    struct pkv_geom geom;
    struct cuda_keeper *keeper;
    struct cuda_kept *kept;
    const void *q; /* arrays of all the call's query tokens */
    const float *out, *lse;
    uint32_t layer, reserved;
};

struct cuda_end {
    uint32_t *bad, *ret_bad; /* on the device; in pinned memory */
    uint64_t *epoch;         /* in registered memory */
};

int cuda_steps_preload(void);
/* Entries first, then lengths: whoever waits for this kernel has both. */
int cuda_step_launch(const struct cuda_step *s, cuda_stream stream);
/* Before and behind a call that keeps. */
int cuda_mark_launch(struct cuda_keeper *keeper, cuda_stream stream);
int cuda_keep_launch(const struct cuda_keep *k, cuda_stream stream);
int cuda_end_launch(const struct cuda_end *e, cuda_stream stream);

PKV_EXTERN_C_END

#endif
