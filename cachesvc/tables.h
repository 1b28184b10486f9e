/* Block tables: one sparse memfd per tenant, which its workers map read-only. Owner: the loop's thread. */
#ifndef CACHESVC_TABLES_H
#define CACHESVC_TABLES_H

#include "proto/table.h"

#include <stdbool.h>

struct tables_hole {
    uint64_t at, bytes;
};

struct tables_tenant {
    int fd; /* -1: not made yet */
    char *base;
    struct tables_hole *holes; /* free ranges, ascending, never adjacent */
    uint32_t count, room;
};

struct tables {
    struct tables_tenant tenants[PKV_TENANTS_MAX];
};

void tables_init(struct tables *tables);
void tables_destroy(struct tables *tables);
/* The tenant's memfd, made at first use; -errno. */
int tables_fd(struct tables *tables, uint32_t tenant);

/* Hooks of the core; `context` is the struct tables. */
struct pkv_table *tables_alloc(void *context, uint32_t tenant, uint64_t bytes, uint64_t *ret_offset);
void tables_free(void *context, uint32_t tenant, uint64_t offset, uint64_t bytes);

#endif
