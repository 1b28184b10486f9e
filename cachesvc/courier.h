/* Copies on a device's copy engines: one thread per device gathers what waits into batches and keeps a few of them under way.
 * Owner of everything but the queue: the courier's thread. */
#ifndef CACHESVC_COURIER_H
#define CACHESVC_COURIER_H

#include "gpu/device.h"

#include <pthread.h>

/* Embedded in the caller's struct; the caller owns it again when the courier hands it back. */
struct courier_job {
    enum gpu_direction direction;
    struct gpu_copy copy;
    int err; /* 0 or -enum pkv_err, once it is handed back */
    struct courier_job *next;
};
/* Jobs that have been carried, or have failed, together; on the courier's thread. */
typedef void courier_carried(void *context, struct courier_job *const *jobs, uint32_t count);

#define COURIER_BATCH 64u /* jobs of one call */
#define COURIER_DEPTH 4u  /* calls under way */

struct courier_batch {
    struct courier_job *jobs[COURIER_BATCH];
    uint32_t count;
    uint64_t ticket;
};

struct courier {
    struct gpu_device *device;
    courier_carried *carried;
    void *context;
    pthread_t thread;
    pthread_mutex_t lock; /* of the queue; a leaf */
    pthread_cond_t more;
    struct courier_job *first, *last;
    struct courier_job *staged_first, *staged_last; /* of the thread that submits */
    bool started, stop;
    struct courier_batch batches[COURIER_DEPTH]; /* a ring */
    uint32_t oldest, under_way;
    int broken; /* GPU_LOST once: every later job fails with it */
    uint64_t hang_ns;
};

/* `hang_ns`: a batch that takes longer means that the device is lost. -errno. */
int courier_start(struct courier *courier, struct gpu_device *device, uint64_t hang_ns, courier_carried *carried,
                  void *context);
/* Carries, or fails, what was submitted; then ends the thread. Of a courier that never started: nothing. */
void courier_stop(struct courier *courier);
void courier_submit(struct courier *courier, struct courier_job *job);
/* The same in two steps, for many: one lock and one wake-up for all. */
void courier_stage(struct courier *courier, struct courier_job *job);
void courier_flush(struct courier *courier);

#endif
