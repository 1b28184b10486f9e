/* The memory of pool and arena: chunks (offload/offload.h) that workers map by descriptor. Owner: the loop's thread; other
 * threads read what a place that they were given points to. */
#ifndef CACHESVC_MEMORY_H
#define CACHESVC_MEMORY_H

#include "gpu/gpu.h"
#include "offload/offload.h"

struct memory {
    struct offload_chunk *chunks[PKV_TIERS];
    uint64_t *bases[PKV_TIERS]; /* [PKV_CHUNKS_MAX], for gpu_space */
    uint32_t count[PKV_TIERS];
    uint64_t chunk_bytes;
    uint32_t populate; /* threads; 0: memory comes when it is touched */
};

/* -errno; nothing is left behind. */
int memory_create(struct memory *memory, uint64_t chunk_bytes, uint64_t pool_bytes, uint64_t arena_bytes, uint32_t populate);
void memory_destroy(struct memory *memory);
/* Fresh memory for a chunk that another tenant takes. -errno: the old memory is kept, zeroed. */
int memory_reset(struct memory *memory, uint32_t tier, uint32_t chunk);
/* The least kind of pages that a tier got. */
const char *memory_pages(const struct memory *memory, uint32_t tier);

static inline struct gpu_space memory_space(const struct memory *m)
{
    return (struct gpu_space){{NULL, m->bases[PKV_TIER_POOL], m->bases[PKV_TIER_ARENA]}};
}

#endif
