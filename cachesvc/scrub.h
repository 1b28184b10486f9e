/* Checksums of what is at home in the arena, looked at again and again at a bounded rate. Owner: the loop's thread. */
#ifndef CACHESVC_SCRUB_H
#define CACHESVC_SCRUB_H

#include <stdint.h>

struct daemon;

struct scrub {
    uint64_t at_ns;
    double credit;                      /* bytes; below zero after a large block */
    uint32_t flying;                    /* looks under way */
    uint64_t failures, mended, damaged; /* that were told */
};

/* Once a turn. */
void scrub_turn(struct daemon *daemon, uint64_t now_ns);
/* A checksum has been answered to the core. */
void scrub_looked(struct daemon *daemon);
/* Says what the core has found since the last time. */
void scrub_tell(struct daemon *daemon);

#endif
