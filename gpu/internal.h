/* What the files of gpu share: the opened backend, its threads, its workspace. Owner: the thread that calls gpu_*. */
#ifndef GPU_INTERNAL_H
#define GPU_INTERNAL_H

#include "gpu/kernel.h"

#include <math.h>
#include <pthread.h>

#define GPU_THREADS_MAX 64u

/* One task of a parallel loop: item `i`, on thread `thread` (0 is the caller). */
typedef void gpu_task(void *context, uint64_t i, uint32_t thread);

struct gpu_team {
    pthread_mutex_t lock;
    pthread_cond_t go, done;
    pthread_t threads[GPU_THREADS_MAX];
    uint32_t size; /* threads besides the caller */
    uint32_t busy;
    uint64_t round;
    int stop;
    gpu_task *task;
    void *context;
    uint64_t items, next;
};

int gpu_team_start(struct gpu_team *team, uint32_t threads);
void gpu_team_stop(struct gpu_team *team);
/* Runs task(context, i, thread) for all i < items; returns when all are done. Which thread takes which item varies, so
 * a task writes only what belongs to its item. */
void gpu_team_run(struct gpu_team *team, gpu_task *task, void *context, uint64_t items);

/* A buffer that grows and is kept, one per thread and purpose. */
struct gpu_buffer {
    void *data;
    uint64_t bytes;
};
enum gpu_purpose { GPU_BUF_CODES, GPU_BUF_HISTOGRAM, GPU_BUF_TABLES, GPU_BUF_POINTERS, GPU_BUF_PURPOSES };

/* What outlives one task of a call. */
enum gpu_shared { GPU_SHARED_WEIGHTS, GPU_SHARED_SCALES, GPU_SHARED_ROWS, GPU_SHARED_STATE, GPU_SHARED_COUNT };

struct gpu {
    const struct gpu_kernels *kernels; /* of the CPU, whatever the backend: it looks at queries and weighs them */
    const struct gpu_backend *backend; /* NULL: host */
    void *device;                      /* the backend's */
    struct gpu_team team;
    struct gpu_buffer buffers[GPU_THREADS_MAX][GPU_BUF_PURPOSES];
    struct gpu_buffer shared[GPU_SHARED_COUNT];
    char description[128];
};

/* At least `bytes`, contents undefined; NULL without memory. */
void *gpu_buffer_get(struct gpu_buffer *buffer, uint64_t bytes);
uint64_t gpu_now_ns(void);

/* Address of a block's rows or signatures; the door has checked that its chunk is mapped. */
static inline const char *gpu_place(const struct gpu_space *space, uint64_t place, uint64_t slot_bytes)
{
    uint64_t base = space->base[pkv_place_tier(place)][pkv_place_chunk(place)];
    return (const char *)(uintptr_t)pkv_place_address(base, place, slot_bytes);
}

/* select.c, attend.c: on the CPU, over memory that it can read. Arguments have been checked. */
int host_select(struct gpu *gpu, const struct gpu_select_args *args, const struct gpu_rows *ret_rows);
int host_attend_rows(struct gpu *gpu, const struct gpu_select_args *args, const struct gpu_rows *rows, const void *gathered,
                     float *ret_out, float *ret_lse);

int gpu_check_policy(const struct pkv_geom *geom, const struct gpu_policy *policy, uint32_t seqs, const struct gpu_view *views);

/* staged.c: the same on a device's memory, by bringing what they read to the CPU. For what the device's kernels lack; slow. */
int staged_select(struct gpu *gpu, const struct gpu_select_args *args, const struct gpu_rows *ret_rows);
int staged_attend_rows(struct gpu *gpu, const struct gpu_select_args *args, const struct gpu_rows *rows, float *ret_out,
                       float *ret_lse);

/* Every place of the first `blocks` entries lies in a mapped chunk. */
bool gpu_places_mapped(const struct gpu_space *space, const struct pkv_block_ref *refs, uint32_t first, uint32_t blocks,
                       bool signatures);

static inline float gpu_scale(float scale, const struct pkv_geom *g)
{
    return scale > 0 ? scale : 1.0f / sqrtf((float)g->head_dim);
}

/* Sequence and position of a query token of a batch. */
struct gpu_query {
    const struct gpu_view *view;
    uint32_t visible; /* tokens that it sees */
};
struct gpu_query gpu_query_find(const struct gpu_view *views, uint32_t seqs, uint32_t query);
uint32_t gpu_queries(const struct gpu_view *views, uint32_t seqs);

/* Geometry, views and the queries' numbers; shared by select and dense. */
int gpu_check_views(struct gpu *gpu, const struct pkv_geom *geom, const struct gpu_space *space, uint32_t seqs,
                    const struct gpu_view *views, const void *q, bool signatures);

#endif
