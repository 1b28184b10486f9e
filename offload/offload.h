/* The door of offload: chunks of CPU memory that other processes can map, and copies that checksum what they move. Functions
 * return 0 or -errno. Nothing here prints; nothing here knows of sequences. */
#ifndef OFFLOAD_OFFLOAD_H
#define OFFLOAD_OFFLOAD_H

#include "proto/limits.h"

#include <stdbool.h>

/* What a chunk's memory is made of, best first. */
enum offload_pages { OFFLOAD_HUGETLB, OFFLOAD_THP, OFFLOAD_SMALL, OFFLOAD_PAGES };
const char *offload_pages_name(enum offload_pages pages); /* "hugetlb", "thp", "4k" */

/* A memfd, mapped writable in this process and sealed against changes of its size. Owned by whoever created it, on one
 * thread. */
struct offload_chunk {
    int fd;
    void *base;
    uint64_t bytes;
    enum offload_pages pages;
};

struct offload_chunk_options {
    uint64_t bytes;          /* a multiple of 4096 */
    enum offload_pages best; /* try this kind first, then the lesser ones */
    bool readers_only;       /* nobody but this process may map it writable (arena); false: writers may (pool) */
    /* Take the memory now, so that no later write fails for want of it: `reserve` without touching it (the kernel zeroes a page
     * at its first use), `populate` by that many threads that touch every page; 0: none. */
    bool reserve;
    uint32_t populate;
};

/* Bytes that can be taken without pushing others out; UINT64_MAX where the kernel does not say. */
uint64_t offload_available(void);

/* -EINVAL bad size, -ENOMEM not enough memory, -EMFILE too many descriptors. Nothing is left behind on failure. */
int offload_chunk_create(const struct offload_chunk_options *options, struct offload_chunk *ret);
void offload_chunk_destroy(struct offload_chunk *chunk);
/* Touches every page by that many threads, and makes huge ones of them where the kernel can; what the chunk holds stays, and
 * others may read and write it meanwhile. -ENOMEM. */
int offload_chunk_populate(struct offload_chunk *chunk, uint32_t threads);

/* Copies and returns the checksum of what was copied (see copy.c). */
uint64_t offload_copy(void *to, const void *from, uint64_t bytes);
uint64_t offload_checksum(const void *data, uint64_t bytes); /* the same, without the copy */
/* 0, or -EBADMSG where the bytes do not have that checksum. */
int offload_verify(const void *data, uint64_t bytes, uint64_t checksum);

#endif
