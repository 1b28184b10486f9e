/* The daemon's settings: one table gives flag, key of the configuration file, default, check and help. Read once at the start.
 */
#ifndef CACHESVC_CONFIG_H
#define CACHESVC_CONFIG_H

#include "cachesvc/log.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum config_io { CONFIG_IO_AUTO, CONFIG_IO_URING, CONFIG_IO_EPOLL };

struct config {
    char socket[256]; /* empty: the user's default */
    char backend[16], isa[16];
    char device[256];                              /* which GPUs; empty: the first that can be used */
    uint64_t share;                                /* enum devices_share */
    uint64_t pool_bytes, arena_bytes, chunk_bytes; /* chunk_bytes 0: chosen from the others */
    uint64_t threads, spin_us, grant_timeout_ms;
    uint64_t home_hold_ms, home_hold_rate; /* bytes a second */
    uint64_t scrub_bytes_s;
    uint64_t audit_ppm, audit_alarm_ppm, recalibrate_s;
    uint64_t populate; /* 1: take all memory at the start */
    uint64_t io;       /* enum config_io */
    uint64_t log_level;
};

enum config_outcome { CONFIG_RUN, CONFIG_DONE, CONFIG_WRONG };
/* Defaults, then --config FILE, then flags. DONE: --help or --version was answered. WRONG: the cause is on stderr. */
enum config_outcome config_read(int argc, char **argv, struct config *ret);
void config_help(FILE *to);
/* Bytes of a chunk of pool and arena: chunk_bytes, or what suits both. */
uint64_t config_chunk_bytes(const struct config *config);

#endif
