/* The arena's chunks registered with the devices, by a thread of its own: touching and pinning tens of GiB takes longer than a
 * daemon may take to start. Until a chunk's turn has come its copies go through the driver's staging memory, slower and as
 * right. */
#ifndef CACHESVC_PINS_H
#define CACHESVC_PINS_H

#include "gpu/device.h"
#include "offload/offload.h"

#include <pthread.h>

#define PINS_NONE UINT32_MAX

struct pins {
    pthread_mutex_t lock; /* of a chunk's memory, while it is pinned or replaced; a leaf */
    pthread_t thread;
    bool started, stop;
    struct gpu_device *device;
    struct offload_chunk *chunks;
    bool *pinned;
    uint32_t count, populate, done; /* done: atomic, chunks that are pinned */
    int refused;                    /* 0 or -enum pkv_err of the first that could not be; atomic */
};

/* The first chunk at once, so that a refusal shows at the start (-errno after saying why); then a thread does the others.
 * `populate` 0: none at all, since pinning would touch what the operator wants left alone. */
int pins_start(struct pins *pins, struct gpu_device *device, struct offload_chunk *chunks, uint32_t count, uint32_t populate);
void pins_stop(struct pins *pins);
/* Around the replacement of a chunk's memory; PINS_NONE and pins that never started are allowed. Waits for a chunk being
 * pinned. */
void pins_take(struct pins *pins, uint32_t chunk);
void pins_give(struct pins *pins, uint32_t chunk);

#endif
