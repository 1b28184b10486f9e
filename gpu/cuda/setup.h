/* What is set up once, before any launch: device copies of a scheme, the work area. Private to gpu. */
#ifndef GPU_CUDA_SETUP_H
#define GPU_CUDA_SETUP_H

#include "gpu/cuda/cuda.h"
#include "gpu/scheme.h"

PKV_EXTERN_C_BEGIN

/* Thread blocks of a call on the current device: parts, splits, team. Geometry, policy, queries and tokens_max are set. */
int cuda_grid(struct cuda_attend *a);

/* Sets of a row cache of at most `bytes` (entries and rows) for each of `caches` pairs of sequence and kv head; 0: none. */
uint32_t cuda_cache_sets(const struct pkv_geom *geom, uint64_t caches, uint64_t bytes);

/* Bytes of the work area of a call, and its pointers into `base` (aligned to 256). Zero the area before its first use by a
 * call of this shape (geometry, policy, queries, tokens_max, grid). */
uint64_t cuda_work_bytes(const struct cuda_attend *a);
void cuda_work_bind(struct cuda_attend *a, void *base);

/* A scheme's arrays in device memory; *ret_memory is the one allocation, for cuda_scheme_free. A scheme that changed
 * (gpu_scheme_observe, gpu_scheme_state_import) is uploaded again. */
int cuda_scheme_upload(const struct gpu_scheme *scheme, struct cuda_scheme *ret, void **ret_memory);
/* What the scheme is in a layer, for cuda_scheme.kind: a `code` that was not calibrated there serves as `sign`. */
uint32_t cuda_scheme_kind(const struct gpu_scheme *scheme, uint32_t layer);
void cuda_scheme_free(void *memory);

PKV_EXTERN_C_END

#endif
