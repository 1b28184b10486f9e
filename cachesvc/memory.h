/* The memory of pool and arena: chunks that workers map by descriptor. Owner: the loop's thread; other threads read and write
 * what a place that they were given points to. */
#ifndef CACHESVC_MEMORY_H
#define CACHESVC_MEMORY_H

#include "cachesvc/devices.h"
#include "cachesvc/pins.h"
#include "gpu/gpu.h"
#include "offload/offload.h"

struct memory {
    struct offload_chunk *chunks[PKV_TIERS]; /* [POOL] NULL where the pool lies on devices */
    struct gpu_chunk *pool;                  /* on devices: chunk c on device c % devices->count */
    const struct devices *devices;
    uint64_t *bases[PKV_TIERS]; /* [PKV_CHUNKS_MAX] as kernels address them, for gpu_space */
    uint32_t count[PKV_TIERS];
    uint64_t chunk_bytes;
    uint32_t populate; /* threads; 0: memory comes when it is touched */
    struct pins pins;  /* of the arena, on devices */
};

struct memory_options {
    uint64_t chunk_bytes, pool_bytes, arena_bytes;
    uint32_t populate;
    const struct devices *devices; /* they outlive the memory */
};

/* -errno after saying why; nothing is left behind. */
int memory_create(struct memory *memory, const struct memory_options *options);
void memory_destroy(struct memory *memory);
/* Fresh memory for a chunk that another tenant takes. 0; -ENOMEM: on the host the old memory is kept, zeroed; on a device the
 * chunk is gone and the daemon must end, for a worker of the former tenant may still hold what could be had. */
int memory_reset(struct memory *memory, uint32_t tier, uint32_t chunk);
/* What a worker maps; stays the memory's. */
int memory_fd(const struct memory *memory, uint32_t tier, uint32_t chunk);
/* "thp": the least kind of pages that a tier got; "gpu". */
const char *memory_pages(const struct memory *memory, uint32_t tier);

static inline struct gpu_space memory_space(const struct memory *m)
{
    return (struct gpu_space){{NULL, m->bases[PKV_TIER_POOL], m->bases[PKV_TIER_ARENA]}};
}

static inline uint64_t memory_address(const struct memory *m, uint64_t place, uint64_t bytes)
{
    return pkv_place_address(m->bases[pkv_place_tier(place)][pkv_place_chunk(place)], place, bytes);
}

/* The device that a place lies on; NULL: CPU memory. */
static inline struct gpu_device *memory_device(const struct memory *m, uint64_t place)
{
    return m->pool && pkv_place_tier(place) == PKV_TIER_POOL ? m->devices->device[pkv_place_chunk(place) % m->devices->count]
                                                             : NULL;
}

#endif
