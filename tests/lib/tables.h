/* Block tables for a core without a daemon: from the heap, each table's offset its address. */
#ifndef TESTS_LIB_TABLES_H
#define TESTS_LIB_TABLES_H

#include "proto/table.h"

#include <stdlib.h>

static inline struct pkv_table *test_table_alloc(void *context, uint32_t tenant, uint64_t bytes, uint64_t *ret_offset)
{
    (void)context, (void)tenant;
    struct pkv_table *t = calloc(1, bytes);
    *ret_offset = (uint64_t)(uintptr_t)t;
    return t;
}

static inline void test_table_free(void *context, uint32_t tenant, uint64_t offset, uint64_t bytes)
{
    (void)context, (void)tenant, (void)bytes;
    free((void *)(uintptr_t)offset);
}

#endif
