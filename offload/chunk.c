/* Chunks: memfds with the best pages that the machine gives.
 *
 * hugetlb needs pages set aside by the administrator, so it is tried by really reserving them. Transparent huge pages on shared
 * memory are advice (MADV_HUGEPAGE where shmem_enabled allows it, MADV_COLLAPSE otherwise, Linux 6.1); they want aligned
 * mappings. What remains are small pages. Populating comes before sealing and in parallel: the kernel zeroes 4 GiB a second and
 * thread. */
#include "offload/offload.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

#define HUGE_BYTES           (2ull << 20)
#define POPULATE_THREADS_MAX 16u

const char *offload_pages_name(enum offload_pages pages)
{
    static const char *const names[] = {"hugetlb", "thp", "4k"};
    return pages < OFFLOAD_PAGES ? names[pages] : "unknown";
}

/* The kernel's estimate of what can be taken without pushing others out, and what was set aside as hugetlb pages; UINT64_MAX
 * where it gives none. Filling shared memory beyond it ends processes at random, so it is asked before. */
uint64_t offload_available(void)
{
    char line[128];
    unsigned long long kib, pages = 0, size = 0;
    uint64_t bytes = UINT64_MAX;
    FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof(line), f)) {
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
            bytes = kib * 1024;
        else if (sscanf(line, "HugePages_Free: %llu", &pages) != 1)
            (void)sscanf(line, "Hugepagesize: %llu kB", &size);
    }
    if (f)
        fclose(f);
    return bytes == UINT64_MAX ? bytes : bytes + pages * size * 1024;
}

struct part {
    pthread_t thread;
    char *base;
    uint64_t bytes;
    bool collapse, collapsed;
    int error;
};

/* One touched page is enough for the kernel to make a huge one: faulting all small ones first takes ten times as long. What the
 * memory holds stays, whoever writes it meanwhile. */
static bool collapse(char *base, uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += HUGE_BYTES)
        __atomic_fetch_or(base + at, 0, __ATOMIC_RELAXED);
    return madvise(base, bytes, MADV_COLLAPSE) == 0;
}

static void *populate_part(void *arg)
{
    struct part *p = arg;
    p->collapsed = p->bytes && p->collapse ? collapse(p->base, p->bytes) : p->collapse;
    if (p->bytes && madvise(p->base, p->bytes, MADV_POPULATE_WRITE)) {
        p->error = errno;
        if (errno == EINVAL) { /* before Linux 5.14: touch */
            for (uint64_t at = 0; at < p->bytes; at += 4096)
                __atomic_fetch_or(p->base + at, 0, __ATOMIC_RELAXED); /* copies may have arrived there already */
            p->error = 0;
        }
    }
    return NULL;
}

/* `collapsed`: huge pages are wanted; false afterwards where not all became huge. May be NULL. */
static int populate(char *base, uint64_t bytes, uint32_t threads, bool *collapsed)
{
    struct part parts[POPULATE_THREADS_MAX];
    threads = PKV_MIN(threads, POPULATE_THREADS_MAX);
    uint64_t step = PKV_ALIGN_UP(PKV_DIV_UP(bytes, threads), HUGE_BYTES);
    uint32_t started = 0;
    int error = 0;
    for (uint32_t i = 0; i < threads; i++) {
        uint64_t at = PKV_MIN(i * step, bytes);
        parts[i] = (struct part){.base = base + at, .bytes = PKV_MIN(step, bytes - at), .collapse = collapsed && *collapsed};
        if (i + 1 < threads && pthread_create(&parts[i].thread, NULL, populate_part, &parts[i]) == 0)
            started |= 1u << i;
        else
            populate_part(&parts[i]);
    }
    for (uint32_t i = 0; i < threads; i++) {
        if (started >> i & 1)
            pthread_join(parts[i].thread, NULL);
        error = parts[i].error ? parts[i].error : error;
        if (collapsed)
            *collapsed = *collapsed && parts[i].collapsed;
    }
    return error == EFAULT ? -ENOMEM : -error;
}

/* Where huge pages can be mapped whole. */
static void *map_aligned(int fd, uint64_t bytes)
{
    char *room = mmap(NULL, bytes + HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return MAP_FAILED;
    char *at = (char *)PKV_ALIGN_UP((uintptr_t)room, HUGE_BYTES);
    if (at > room)
        munmap(room, (size_t)(at - room));
    munmap(at + bytes, (size_t)(room + HUGE_BYTES - at)); /* at least a page: `at` is within HUGE_BYTES of room */
    void *base = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (base == MAP_FAILED)
        munmap(at, bytes);
    return base;
}

static int map_new(const struct offload_chunk_options *o, bool hugetlb, struct offload_chunk *c)
{
    c->fd = memfd_create("pivotkv", MFD_CLOEXEC | MFD_ALLOW_SEALING | (hugetlb ? MFD_HUGETLB : 0));
    if (c->fd < 0)
        return -errno;
    int r = 0;
    if (ftruncate(c->fd, (off_t)o->bytes))
        r = -errno;
    if (!r) {
        c->base = map_aligned(c->fd, o->bytes);
        if (c->base != MAP_FAILED)
            return 0;
        r = -errno;
    }
    close(c->fd);
    return r == -ENOSPC ? -ENOMEM : r;
}

static int seal(int fd, bool readers_only)
{
    int seals = F_SEAL_SHRINK | F_SEAL_GROW | (readers_only ? F_SEAL_FUTURE_WRITE : 0) | F_SEAL_SEAL;
    return fcntl(fd, F_ADD_SEALS, seals) ? -errno : 0;
}

int offload_chunk_populate(struct offload_chunk *c, uint32_t threads)
{
    bool huge = c->pages == OFFLOAD_SMALL && c->bytes % HUGE_BYTES == 0;
    int r = populate(c->base, c->bytes, PKV_MAX(threads, 1u), &huge);
    if (!r && huge)
        __atomic_store_n(&c->pages, OFFLOAD_THP, __ATOMIC_RELAXED); /* others may look meanwhile */
    return r;
}

int offload_chunk_create(const struct offload_chunk_options *o, struct offload_chunk *ret)
{
    if (!o->bytes || o->bytes % 4096 || o->best >= OFFLOAD_PAGES)
        return -EINVAL;
    if ((o->populate || o->reserve) && o->bytes > offload_available())
        return -ENOMEM;
    struct offload_chunk c = {.fd = -1, .bytes = o->bytes, .pages = OFFLOAD_SMALL};
    int r = -ENOMEM;
    if (o->best == OFFLOAD_HUGETLB && o->bytes % HUGE_BYTES == 0) {
        r = map_new(o, true, &c);
        c.pages = OFFLOAD_HUGETLB;
    }
    if (r) {
        r = map_new(o, false, &c);
        c.pages = OFFLOAD_SMALL;
    }
    if (r)
        return r;
    bool huge = c.pages == OFFLOAD_SMALL && o->best <= OFFLOAD_THP && o->bytes >= HUGE_BYTES;
    if (huge)
        (void)madvise(c.base, c.bytes, MADV_HUGEPAGE); /* advice; the collapse below tells what came of it */
    /* Mapping them has reserved hugetlb pages, and to allocate them is to zero them on one thread. */
    if (o->reserve && c.pages != OFFLOAD_HUGETLB && fallocate(c.fd, 0, 0, (off_t)c.bytes))
        r = errno == ENOSPC ? -ENOMEM : -errno;
    if (!r && o->populate)
        r = huge ? offload_chunk_populate(&c, o->populate) : populate(c.base, c.bytes, o->populate, NULL);
    if (!r)
        r = seal(c.fd, o->readers_only);
    if (r) {
        offload_chunk_destroy(&c);
        return r;
    }
    *ret = c;
    return 0;
}

void offload_chunk_destroy(struct offload_chunk *c)
{
    if (c->fd < 0)
        return;
    munmap(c->base, c->bytes);
    close(c->fd);
    *c = (struct offload_chunk){.fd = -1};
}
