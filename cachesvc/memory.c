/* Chunks of both tiers. On the host backend the pool is CPU memory too: a memfd that its workers may map writable, for they
 * write the blocks that they were granted. Nobody but the daemon maps the arena writable. The pool's pages are touched at the
 * start; the arena's are reserved, and zeroed when a copy reaches them: touching them takes five times as long. */
#include "cachesvc/memory.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int chunk_create(const struct memory *m, uint32_t tier, struct offload_chunk *ret)
{
    bool pool = tier == PKV_TIER_POOL;
    struct offload_chunk_options options = {.bytes = m->chunk_bytes,
                                            .best = OFFLOAD_HUGETLB,
                                            .readers_only = !pool,
                                            .reserve = !pool && m->populate,
                                            .populate = pool ? m->populate : 0};
    return offload_chunk_create(&options, ret);
}

int memory_create(struct memory *m, uint64_t chunk_bytes, uint64_t pool_bytes, uint64_t arena_bytes, uint32_t populate)
{
    *m = (struct memory){.chunk_bytes = chunk_bytes, .populate = populate};
    uint32_t want[PKV_TIERS] = {0, (uint32_t)(pool_bytes / chunk_bytes), (uint32_t)(arena_bytes / chunk_bytes)};
    /* All or nothing: taking what there is before failing would push others out. */
    int r = populate && pool_bytes + arena_bytes > offload_available() ? -ENOMEM : 0;
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS && !r; tier++) {
        m->chunks[tier] = calloc(want[tier], sizeof(struct offload_chunk));
        m->bases[tier] = calloc(PKV_CHUNKS_MAX, sizeof(uint64_t));
        r = m->chunks[tier] && m->bases[tier] ? 0 : -ENOMEM;
        while (!r && m->count[tier] < want[tier]) {
            struct offload_chunk *c = &m->chunks[tier][m->count[tier]];
            r = chunk_create(m, tier, c);
            if (!r)
                m->bases[tier][m->count[tier]++] = (uint64_t)(uintptr_t)c->base;
        }
    }
    if (r)
        memory_destroy(m);
    return r;
}

void memory_destroy(struct memory *m)
{
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++) {
        for (uint32_t c = 0; c < m->count[tier]; c++)
            offload_chunk_destroy(&m->chunks[tier][c]);
        free(m->chunks[tier]);
        free(m->bases[tier]);
    }
    *m = (struct memory){0};
}

int memory_reset(struct memory *m, uint32_t tier, uint32_t chunk)
{
    struct offload_chunk *c = &m->chunks[tier][chunk], fresh;
    int r = chunk_create(m, tier, &fresh);
    if (r) {
        memset(c->base, 0, c->bytes);
        return r;
    }
    offload_chunk_destroy(c);
    *c = fresh;
    m->bases[tier][chunk] = (uint64_t)(uintptr_t)c->base;
    return 0;
}

const char *memory_pages(const struct memory *m, uint32_t tier)
{
    enum offload_pages worst = OFFLOAD_HUGETLB;
    for (uint32_t c = 0; c < m->count[tier]; c++)
        worst = PKV_MAX(worst, m->chunks[tier][c].pages);
    return offload_pages_name(worst);
}
