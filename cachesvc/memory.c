/* Chunks of both tiers. On the host backend the pool is CPU memory too: a memfd that its workers may map writable, for they
 * write the blocks that they were granted. Nobody but the daemon maps the arena writable. The pool's pages are touched at the
 * start; the arena's are reserved, and zeroed when a copy reaches them: touching them takes five times as long.
 *
 * On devices the pool's chunks are allocations there, and the arena's are pinned behind the daemon's back (pins.c). */
#include "cachesvc/memory.h"

#include "cachesvc/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RELEASE_TRIES 50 /* of 20 ms: a process that ended gives its memory back a little later */

static int host_create(const struct memory *m, uint32_t tier, struct offload_chunk *ret)
{
    bool pool = tier == PKV_TIER_POOL;
    struct offload_chunk_options options = {.bytes = m->chunk_bytes,
                                            .best = OFFLOAD_HUGETLB,
                                            .readers_only = !pool,
                                            .reserve = !pool && m->populate && !m->devices->count,
                                            .populate = pool ? m->populate : 0};
    return offload_chunk_create(&options, ret);
}

static int device_create(const struct memory *m, uint32_t chunk, struct gpu_chunk *ret)
{
    return gpu_device_chunk_create(m->devices->device[chunk % m->devices->count], m->chunk_bytes, m->devices->share, ret);
}

static int pool_on_devices(struct memory *m, uint32_t want)
{
    int r = 0;
    m->pool = calloc(want, sizeof(*m->pool));
    for (uint32_t *c = &m->count[PKV_TIER_POOL]; m->pool && !r && *c < want; *c += !r)
        if (!(r = device_create(m, *c, &m->pool[*c])))
            m->bases[PKV_TIER_POOL][*c] = m->pool[*c].writable;
    if (r)
        log_error("chunk %u of %u of the pool: %s", m->count[PKV_TIER_POOL], want, pkv_err_text((uint32_t)-r));
    return !m->pool ? -ENOMEM : r ? pkv_err_status((uint32_t)-r) : 0;
}

static int chunks_on_host(struct memory *m, uint32_t tier, uint32_t want)
{
    int r = 0;
    m->chunks[tier] = calloc(want, sizeof(struct offload_chunk));
    for (uint32_t *c = &m->count[tier]; m->chunks[tier] && !r && *c < want; *c += !r)
        if (!(r = host_create(m, tier, &m->chunks[tier][*c])))
            m->bases[tier][*c] = (uint64_t)(uintptr_t)m->chunks[tier][*c].base;
    return m->chunks[tier] ? r : -ENOMEM;
}

int memory_create(struct memory *m, const struct memory_options *o)
{
    *m = (struct memory){.chunk_bytes = o->chunk_bytes, .populate = o->populate, .devices = o->devices};
    uint32_t want[PKV_TIERS] = {0, (uint32_t)(o->pool_bytes / o->chunk_bytes), (uint32_t)(o->arena_bytes / o->chunk_bytes)};
    /* All or nothing: taking what there is before failing would push others out. */
    uint64_t host_bytes = o->arena_bytes + (o->devices->count ? 0 : o->pool_bytes);
    int r = o->populate && host_bytes > offload_available() ? -ENOMEM : 0;
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS && !r; tier++) {
        m->bases[tier] = calloc(PKV_CHUNKS_MAX, sizeof(uint64_t));
        bool device = tier == PKV_TIER_POOL && o->devices->count;
        r = !m->bases[tier] ? -ENOMEM : device ? pool_on_devices(m, want[tier]) : chunks_on_host(m, tier, want[tier]);
    }
    if (!r && o->devices->count)
        r = pins_start(&m->pins, o->devices->device[0], m->chunks[PKV_TIER_ARENA], m->count[PKV_TIER_ARENA], o->populate);
    if (r) {
        log_error("no memory for a pool of %llu MiB and an arena of %llu MiB: %s; make them smaller, or see pivotkv doctor",
                  (unsigned long long)o->pool_bytes >> 20, (unsigned long long)o->arena_bytes >> 20, strerror(-r));
        memory_destroy(m);
    }
    return r;
}

void memory_destroy(struct memory *m)
{
    pins_stop(&m->pins);
    for (uint32_t c = 0; m->pool && c < m->count[PKV_TIER_POOL]; c++)
        gpu_device_chunk_release(m->devices->device[c % m->devices->count], &m->pool[c]);
    free(m->pool);
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++) {
        for (uint32_t c = 0; m->chunks[tier] && c < m->count[tier]; c++)
            offload_chunk_destroy(&m->chunks[tier][c]);
        free(m->chunks[tier]);
        free(m->bases[tier]);
    }
    *m = (struct memory){0};
}

/* A full device has room for the new chunk only once the old one is gone, and that is gone only if nobody holds it any more. */
static int device_reset(struct memory *m, uint32_t chunk)
{
    struct gpu_chunk fresh = {.fd = -1};
    int r = device_create(m, chunk, &fresh);
    if (!r || r == -PKV_ERR_GPU_MEMORY)
        gpu_device_chunk_release(m->devices->device[chunk % m->devices->count], &m->pool[chunk]);
    for (int i = 0; i < RELEASE_TRIES && r == -PKV_ERR_GPU_MEMORY; i++) {
        if (i)
            nanosleep(&(struct timespec){0, 20000000}, NULL);
        r = device_create(m, chunk, &fresh);
    }
    if (r)
        return -ENOMEM;
    m->pool[chunk] = fresh;
    m->bases[PKV_TIER_POOL][chunk] = fresh.writable;
    return 0;
}

static int host_reset(struct memory *m, uint32_t tier, uint32_t chunk)
{
    struct offload_chunk *c = &m->chunks[tier][chunk], fresh;
    int r = host_create(m, tier, &fresh);
    if (r) {
        log_warn("no fresh memory for a chunk that changes its tenant: the old memory was zeroed");
        memset(c->base, 0, c->bytes);
        return 0;
    }
    offload_chunk_destroy(c);
    *c = fresh;
    m->bases[tier][chunk] = (uint64_t)(uintptr_t)c->base;
    return 0;
}

int memory_reset(struct memory *m, uint32_t tier, uint32_t chunk)
{
    if (m->pool && tier == PKV_TIER_POOL)
        return device_reset(m, chunk);
    pins_take(&m->pins, tier == PKV_TIER_ARENA ? chunk : PINS_NONE);
    int r = host_reset(m, tier, chunk);
    pins_give(&m->pins, tier == PKV_TIER_ARENA ? chunk : PINS_NONE);
    return r;
}

int memory_fd(const struct memory *m, uint32_t tier, uint32_t chunk)
{
    return m->pool && tier == PKV_TIER_POOL ? m->pool[chunk].fd : m->chunks[tier][chunk].fd;
}

const char *memory_pages(const struct memory *m, uint32_t tier)
{
    enum offload_pages worst = OFFLOAD_HUGETLB;
    if (m->pool && tier == PKV_TIER_POOL)
        return "gpu";
    for (uint32_t c = 0; c < m->count[tier]; c++)
        worst = PKV_MAX(worst, __atomic_load_n(&m->chunks[tier][c].pages, __ATOMIC_RELAXED));
    return offload_pages_name(worst);
}
