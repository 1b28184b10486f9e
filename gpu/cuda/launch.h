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
int cuda_team_preload(void);
int cuda_integer_preload(void);

int cuda_query_launch(const struct cuda_attend *a, cuda_stream stream);
int cuda_scan_launch(const struct cuda_attend *a, cuda_stream stream);
int cuda_pick_launch(const struct cuda_attend *a, cuda_stream stream);
int cuda_attend_launch(const struct cuda_attend *a, cuda_stream stream);
int cuda_integer_launch(const struct cuda_attend *a, cuda_stream stream); /* scan by the rules `sum` and `max` */
int cuda_team_launch(const struct cuda_attend *a, cuda_stream stream);    /* the whole call; a->team is not 0 */
int cuda_gather_launch(const struct cuda_gather *g, cuda_stream stream);
int cuda_append_launch(const struct cuda_append *a, cuda_stream stream);

/* Thread blocks of a team, for a device with so many multiprocessors and so much shared memory a block; 0: it does not fit. */
uint32_t cuda_team_size(const struct cuda_attend *a, uint32_t processors, uint32_t shared);

PKV_EXTERN_C_END

#endif
