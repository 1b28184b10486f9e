/* Chunks of pool and arena in this process. A chunk is mapped when a place in it is met for the first time, and stays mapped:
 * the daemon gives it to another tenant only after this worker is gone. On a device the pool's chunks are imported there, and
 * the arena's registered with it. */
#include "client/internal.h"

#include <sys/mman.h>
#include <unistd.h>

#define HUGE_BYTES (2ull << 20)

/* On the host both tiers are files in memory. The pool's pages have been touched: a page table entry each now is cheaper than a
 * fault each later. */
static int map_host(struct pkv *kv, uint32_t tier, uint32_t chunk, int fd)
{
    int flags = MAP_SHARED | (tier == PKV_TIER_POOL ? MAP_POPULATE : 0);
    void *readable = mmap(NULL, kv->chunk_bytes, PROT_READ, flags, fd, 0), *writable = NULL;
    if (tier == PKV_TIER_POOL)
        writable = mmap(NULL, kv->chunk_bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (readable == MAP_FAILED || writable == MAP_FAILED) {
        if (readable != MAP_FAILED)
            munmap(readable, kv->chunk_bytes);
        return -PKV_ERR_NO_MEMORY;
    }
    kv->readable[tier][chunk] = (uint64_t)(uintptr_t)readable;
    if (writable)
        kv->writable[chunk] = (uint64_t)(uintptr_t)writable;
    return 0;
}

static int import(struct pkv *kv, uint32_t chunk, int fd)
{
    int r = gpu_device_chunk_import(kv->device, fd, kv->chunk_bytes, true, &kv->imported[chunk]);
    if (r)
        return r;
    kv->readable[PKV_TIER_POOL][chunk] = kv->imported[chunk].readable;
    kv->writable[chunk] = kv->imported[chunk].writable;
    return 0;
}

/* Where huge pages can be mapped whole: registering walks the page table. */
static void *map_aligned(int fd, uint64_t bytes)
{
    char *room = mmap(NULL, bytes + HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return MAP_FAILED;
    char *at = (char *)PKV_ALIGN_UP((uintptr_t)room, HUGE_BYTES), *end = at + bytes;
    if (at > room)
        munmap(room, (size_t)(at - room));
    munmap(end, (size_t)(room + HUGE_BYTES - at));
    void *base = mmap(at, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0);
    if (base == MAP_FAILED)
        munmap(at, bytes);
    return base;
}

/* The arena stays where it is; the device reads it over the link. */
static int map_registered(struct pkv *kv, uint32_t chunk, int fd)
{
    void *base = map_aligned(fd, kv->chunk_bytes);
    if (base == MAP_FAILED)
        return -PKV_ERR_NO_MEMORY;
    int r = gpu_device_register(kv->device, base, kv->chunk_bytes, true, &kv->readable[PKV_TIER_ARENA][chunk]);
    if (r)
        munmap(base, kv->chunk_bytes);
    else
        kv->arena[chunk] = (uint64_t)(uintptr_t)base;
    return r;
}

static int map_chunk(struct pkv *kv, uint32_t tier, uint32_t chunk)
{
    struct pkv_map_request request = {.magic = PKV_MAGIC, .message = PKV_MSG_MAP, .tier = (uint16_t)tier, .chunk = chunk};
    struct pkv_reply reply;
    int fd = -1, r = socket_call(kv, &request, sizeof(request), -1, &reply, &fd);
    if (r)
        return r;
    kv->chunk_bytes = reply.bytes, kv->maps++;
    if (!kv->device)
        r = map_host(kv, tier, chunk, fd);
    else
        r = tier == PKV_TIER_POOL ? import(kv, chunk, fd) : map_registered(kv, chunk, fd);
    close(fd);
    return r;
}

int region_map(struct pkv *kv, uint64_t place)
{
    uint32_t tier = pkv_place_tier(place), chunk = pkv_place_chunk(place);
    if (tier == PKV_TIER_NONE || tier >= PKV_TIERS || chunk >= PKV_CHUNKS_MAX)
        return -PKV_ERR_STALE;
    return kv->readable[tier][chunk] ? 0 : map_chunk(kv, tier, chunk);
}

/* The daemon says which chunks are ours, and on our device, by refusing the others; and where a tier ends. */
int region_map_all(struct pkv *kv)
{
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++) {
        int r = 0;
        for (uint32_t c = 0; c < PKV_CHUNKS_MAX && r != -PKV_ERR_RANGE; c++) {
            r = kv->readable[tier][c] ? 0 : map_chunk(kv, tier, c);
            if (r && r != -PKV_ERR_TENANT && r != -PKV_ERR_GPU_DEVICE && r != -PKV_ERR_RANGE)
                return r;
        }
    }
    return 0;
}

static void unmap(uint64_t base, uint64_t bytes)
{
    if (base)
        munmap((void *)(uintptr_t)base, bytes);
}

static void unmap_device(struct pkv *kv, uint32_t chunk)
{
    gpu_device_chunk_release(kv->device, &kv->imported[chunk]);
    if (kv->arena[chunk])
        gpu_device_unregister(kv->device, (const void *)(uintptr_t)kv->arena[chunk]);
    unmap(kv->arena[chunk], kv->chunk_bytes);
}

void region_unmap_all(struct pkv *kv)
{
    for (uint32_t c = 0; c < PKV_CHUNKS_MAX && kv->writable; c++) {
        if (kv->device) {
            unmap_device(kv, c);
            continue;
        }
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
