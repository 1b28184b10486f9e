/* What the parts of `pivotkv bench` share. */
#ifndef CLIENT_CLI_BENCH_H
#define CLIENT_CLI_BENCH_H

#include "client/cli/cli.h"
#include "client/pivotkv.h"

#include <sys/types.h>
#include <time.h>

struct bench {
    uint32_t threads, scale; /* scale divides all lengths, for a quick look; figures count at 1 */
    const char *only;        /* comma-separated names, NULL: all */
    const char *daemon;      /* path of pivotkvd */
    const char *peer;        /* gpu: the comparator's script, NULL: none */
    bool cuda;               /* daemons with a pool on a GPU */
    const char *audit;       /* audit-ppm of daemons; NULL: the default */
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

/* bench_gpu.c: on a GPU, batches in replayed graphs. */
void bench_gpu(struct bench *bench);

/* bench_daemon.c */
struct bench_daemon {
    pid_t pid;
    char folder[64], socket[80];
};
/* Starts a daemon and connects; NULL after saying why. *ret_seconds: from exec to the accepted hello. */
struct pkv *bench_daemon_start(const struct bench *bench, struct bench_daemon *daemon, const char *pool, const char *arena,
                               bool spin, double *ret_seconds);
void bench_daemon_stop(struct bench_daemon *daemon);
/* A number of `pivotkv stat`: of its "totals" (of workers), or of another group; NULL: of none. */
uint64_t bench_total(const char *socket, const char *group, const char *name);
double bench_median(double *values, uint32_t count);

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
