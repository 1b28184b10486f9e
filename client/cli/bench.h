/* What the parts of `pivotkv bench` share. */
#ifndef CLIENT_CLI_BENCH_H
#define CLIENT_CLI_BENCH_H

#include "client/cli/cli.h"

#include <time.h>

struct bench {
    uint32_t threads, scale; /* scale divides all lengths, for a quick look; figures count at 1 */
    const char *only;        /* comma-separated names, NULL: all */
    const char *daemon;      /* path of pivotkvd */
    json_t *results;
};

/* One figure. `ratio` is what the goal speaks of; `least`: reached at or above the goal, else at or below. `peer` NULL: none.
 */
struct figure {
    const char *name, *unit, *peer;
    double value, peer_value, ratio, goal;
    bool least;
};
bool bench_wanted(const struct bench *bench, const char *name);
void bench_add(struct bench *bench, const struct figure *figure);
/* A figure that could not be taken: met is null, and why is said on stderr. */
void bench_skip(struct bench *bench, const char *name, const char *why);
uint64_t bench_available(void); /* bytes of memory */

/* bench_kernels.c: scan, attend_128k, attend_1m. bench_service.c: the others, with private daemons. */
void bench_kernels(struct bench *bench);
void bench_service(struct bench *bench);

/* bench_peer.c: what we compare with. Seconds of one run each, by `threads` threads. */
double peer_sum(const void *data, uint64_t bytes, uint32_t threads);
double peer_copy(void *to, const void *from, uint64_t bytes, uint32_t threads);
/* Dense attention of one query token by the library at hand, over float K and V; negative: none. */
double peer_dense(uint32_t tokens, uint32_t q_heads, uint32_t kv_heads, uint32_t head_dim, uint32_t threads);
const char *peer_dense_name(void);

static inline double bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

#endif
