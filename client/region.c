/* Chunks of pool and arena in this process. A chunk is mapped when a place in it is met for the first time, and stays mapped:
 * the daemon gives it to another tenant only after this worker is gone. */
#include "client/internal.h"

#include <sys/mman.h>
#include <unistd.h>

static int map_chunk(struct pkv *kv, uint32_t tier, uint32_t chunk)
{
    struct pkv_map_request request = {.magic = PKV_MAGIC, .message = PKV_MSG_MAP, .tier = (uint16_t)tier, .chunk = chunk};
    struct pkv_reply reply;
    int fd = -1, r = socket_call(kv, &request, sizeof(request), -1, &reply, &fd);
    if (r)
        return r;
    /* The pool's pages have been touched: a page table entry each now is cheaper than a fault each later. */
    int flags = MAP_SHARED | (tier == PKV_TIER_POOL ? MAP_POPULATE : 0);
    void *readable = mmap(NULL, reply.bytes, PROT_READ, flags, fd, 0), *writable = NULL;
    if (tier == PKV_TIER_POOL)
        writable = mmap(NULL, reply.bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    close(fd);
    if (readable == MAP_FAILED || writable == MAP_FAILED) {
        if (readable != MAP_FAILED)
            munmap(readable, reply.bytes);
        return -PKV_ERR_NO_MEMORY;
    }
    kv->chunk_bytes = reply.bytes;
    kv->readable[tier][chunk] = (uint64_t)(uintptr_t)readable;
    if (writable)
        kv->writable[chunk] = (uint64_t)(uintptr_t)writable;
    return 0;
}

int region_map(struct pkv *kv, uint64_t place)
{
    uint32_t tier = pkv_place_tier(place), chunk = pkv_place_chunk(place);
    if (tier == PKV_TIER_NONE || tier >= PKV_TIERS || chunk >= PKV_CHUNKS_MAX)
        return -PKV_ERR_STALE;
    return kv->readable[tier][chunk] ? 0 : map_chunk(kv, tier, chunk);
}

static void unmap(uint64_t base, uint64_t bytes)
{
    if (base)
        munmap((void *)(uintptr_t)base, bytes);
}

void region_unmap_all(struct pkv *kv)
{
    for (uint32_t c = 0; c < PKV_CHUNKS_MAX && kv->writable; c++) {
        for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++)
            unmap(kv->readable[tier][c], kv->chunk_bytes);
        unmap(kv->writable[c], kv->chunk_bytes);
    }
}

struct gpu_space region_readable(const struct pkv *kv)
{
    return (struct gpu_space){{NULL, kv->readable[PKV_TIER_POOL], kv->readable[PKV_TIER_ARENA]}};
}

struct gpu_space region_writable(const struct pkv *kv)
{
    return (struct gpu_space){{NULL, kv->writable, kv->readable[PKV_TIER_ARENA]}};
}

struct pkv_block_ref *region_refs(struct pkv *kv, uint64_t count)
{
    if (count > kv->refs_room) {
        free(kv->refs);
        kv->refs_room = count + count / 2;
        kv->refs = malloc(kv->refs_room * sizeof(*kv->refs));
        kv->refs_room = kv->refs ? kv->refs_room : 0;
    }
    return kv->refs;
}
