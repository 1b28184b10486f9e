/* What is set up once, before any launch: device copies of a scheme, the work area. Private to gpu. */
#ifndef GPU_CUDA_SETUP_H
#define GPU_CUDA_SETUP_H

#include "gpu/cuda/cuda.h"
#include "gpu/scheme.h"

PKV_EXTERN_C_BEGIN

/* Grids for a call of `lists` lists (queries x kv heads) on a device of `processors` multiprocessors. */
uint32_t cuda_parts(uint32_t lists, uint32_t tokens_max, uint32_t processors);
uint32_t cuda_splits(uint32_t items, uint32_t processors); /* items: lists x cuda_head_chunks */

/* Bytes of the work area of a call, and its pointers into `base` (aligned to 256). Zero the area once before its first use. */
uint64_t cuda_work_bytes(const struct cuda_attend *a);
void cuda_work_bind(struct cuda_attend *a, void *base);

/* A scheme's arrays in device memory; *ret_memory is the one allocation, for cuda_scheme_free. The scheme must be settled.
 * -PKV_ERR_UNSUPPORTED: `hash`. */
int cuda_scheme_upload(const struct gpu_scheme *scheme, struct cuda_scheme *ret, void **ret_memory);
void cuda_scheme_free(void *memory);

PKV_EXTERN_C_END

#endif
