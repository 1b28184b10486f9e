/* The launchers of the .cu files, one row each; the table in table.c. */
#ifndef GPU_CUDA_LAUNCH_H
#define GPU_CUDA_LAUNCH_H

#include "gpu/cuda/cuda.h"

PKV_EXTERN_C_BEGIN

int cuda_query_preload(void);
int cuda_scan_preload(void);
int cuda_pick_preload(void);
int cuda_attend_preload(void);
int cuda_append_preload(void);

int cuda_query_launch(const struct cuda_attend *a, cuda_stream stream);
int cuda_scan_launch(const struct cuda_attend *a, cuda_stream stream);
int cuda_pick_launch(const struct cuda_attend *a, cuda_stream stream);
int cuda_attend_launch(const struct cuda_attend *a, cuda_stream stream);
int cuda_gather_launch(const struct cuda_gather *g, cuda_stream stream);
int cuda_append_launch(const struct cuda_append *a, cuda_stream stream);

PKV_EXTERN_C_END

#endif
