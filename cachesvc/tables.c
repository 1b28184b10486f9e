/* First fit over a list of holes. A freed table first loses the handle in its header and then its entries: a reader that
 * copies entries and finds the same handle before and after has copied that sequence's entries (client/seq.c). */
#include "cachesvc/tables.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#define GRAIN 4096ull

void tables_init(struct tables *t)
{
    for (uint32_t i = 0; i < PKV_TENANTS_MAX; i++)
        t->tenants[i] = (struct tables_tenant){.fd = -1};
}

void tables_destroy(struct tables *t)
{
    for (uint32_t i = 0; i < PKV_TENANTS_MAX; i++) {
        struct tables_tenant *n = &t->tenants[i];
        if (n->fd < 0)
            continue;
        munmap(n->base, PKV_TABLE_BYTES);
        close(n->fd);
        free(n->holes);
        n->fd = -1;
    }
}

static int tenant_make(struct tables_tenant *n)
{
    int r;
    struct tables_hole *holes = malloc(16 * sizeof(*holes));
    int fd = memfd_create("pivotkv-tables", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || !holes || ftruncate(fd, (off_t)PKV_TABLE_BYTES))
        goto failed;
    char *base = mmap(NULL, PKV_TABLE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (base == MAP_FAILED)
        goto failed;
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)) {
        munmap(base, PKV_TABLE_BYTES);
        goto failed;
    }
    *n = (struct tables_tenant){.fd = fd, .base = base, .holes = holes, .count = 1, .room = 16};
    n->holes[0] = (struct tables_hole){0, PKV_TABLE_BYTES};
    return fd;
failed:
    r = fd < 0 || !holes ? -ENOMEM : -errno;
    free(holes);
    if (fd >= 0)
        close(fd);
    return r;
}

int tables_fd(struct tables *t, uint32_t tenant)
{
    assert(tenant < PKV_TENANTS_MAX);
    return t->tenants[tenant].fd >= 0 ? t->tenants[tenant].fd : tenant_make(&t->tenants[tenant]);
}

struct pkv_table *tables_alloc(void *context, uint32_t tenant, uint64_t bytes, uint64_t *ret_offset)
{
    struct tables *t = context;
    if (tables_fd(t, tenant) < 0)
        return NULL;
    struct tables_tenant *n = &t->tenants[tenant];
    bytes = PKV_ALIGN_UP(bytes, GRAIN);
    for (uint32_t i = 0; i < n->count; i++) {
        struct tables_hole *h = &n->holes[i];
        if (h->bytes < bytes)
            continue;
        *ret_offset = h->at;
        h->at += bytes, h->bytes -= bytes;
        if (!h->bytes)
            memmove(h, h + 1, (--n->count - i) * sizeof(*h));
        return (struct pkv_table *)(void *)(n->base + *ret_offset);
    }
    return NULL;
}

static bool holes_grow(struct tables_tenant *n)
{
    struct tables_hole *more = n->count < n->room ? n->holes : realloc(n->holes, 2ull * n->room * sizeof(*more));
    if (!more)
        return false;
    n->room = n->count < n->room ? n->room : 2 * n->room;
    n->holes = more;
    return true;
}

void tables_free(void *context, uint32_t tenant, uint64_t offset, uint64_t bytes)
{
    struct tables_tenant *n = &((struct tables *)context)->tenants[tenant];
    struct pkv_table *table = (struct pkv_table *)(void *)(n->base + offset);
    __atomic_store_n(&table->seq, 0, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    memset(table + 1, 0, bytes - sizeof(*table));
    bytes = PKV_ALIGN_UP(bytes, GRAIN);
    uint32_t i = 0;
    while (i < n->count && n->holes[i].at < offset)
        i++;
    bool before = i > 0 && n->holes[i - 1].at + n->holes[i - 1].bytes == offset;
    bool after = i < n->count && offset + bytes == n->holes[i].at;
    if (before && after) {
        n->holes[i - 1].bytes += bytes + n->holes[i].bytes;
        memmove(&n->holes[i], &n->holes[i + 1], (--n->count - i) * sizeof(*n->holes));
    } else if (before) {
        n->holes[i - 1].bytes += bytes;
    } else if (after) {
        n->holes[i].at -= bytes, n->holes[i].bytes += bytes;
    } else if (holes_grow(n)) { /* without memory for the list the range stays unused */
        memmove(&n->holes[i + 1], &n->holes[i], (n->count++ - i) * sizeof(*n->holes));
        n->holes[i] = (struct tables_hole){offset, bytes};
    }
}
