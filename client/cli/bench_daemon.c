/* Private daemons of benchmarks, each in a folder of its own. */
#include "client/cli/bench.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

void bench_daemon_stop(struct bench_daemon *d)
{
    static const char *const names[] = {"socket", "socket.lock", "admin"};
    if (d->pid > 0) {
        kill(d->pid, SIGTERM);
        waitpid(d->pid, NULL, 0);
    }
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        char path[160];
        snprintf(path, sizeof(path), "%s/%s", d->folder, names[i]);
        unlink(path);
    }
    rmdir(d->folder);
}

struct pkv *bench_daemon_start(const struct bench *b, struct bench_daemon *d, const char *pool, const char *arena, bool spin,
                               double *ret_seconds)
{
    char threads[16];
    struct pkv *kv = NULL;
    struct pkv_options o = {.size = sizeof(o), .threads = b->threads, .label = "bench", .spin_us = spin ? 1000000 : 0};
    snprintf(d->folder, sizeof(d->folder), "/tmp/pivotkv-bench-XXXXXX");
    if (!mkdtemp(d->folder))
        return NULL;
    snprintf(d->socket, sizeof(d->socket), "%s/socket", d->folder);
    snprintf(threads, sizeof(threads), "%u", b->threads);
    double begin = bench_now();
    d->pid = fork();
    if (d->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execl(b->daemon, b->daemon, "--socket", d->socket, "--pool-bytes", pool, "--arena-bytes", arena, "--threads", threads,
              "--spin-us", spin ? "200000" : "50", "--log-level", "warn", "--backend", b->cuda ? "cuda" : "host",
              b->audit ? "--audit-ppm" : NULL, b->audit, (char *)NULL);
        fprintf(stderr, "pivotkv: cannot run %s: %s; name it with --daemon\n", b->daemon, strerror(errno));
        _exit(127);
    }
    while (d->pid > 0 && pkv_connect(d->socket, &o, &kv) && bench_now() - begin < 60) {
        if (waitpid(d->pid, NULL, WNOHANG) == d->pid) {
            d->pid = 0;
            break;
        }
        usleep(1000);
    }
    *ret_seconds = bench_now() - begin;
    if (!kv)
        bench_daemon_stop(d);
    return kv;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(double *values, uint32_t count)
{
    qsort(values, count, sizeof(*values), by_size);
    return values[count / 2];
}

uint64_t bench_total(const char *socket, const char *group, const char *name)
{
    struct cli cli = {.socket = socket, .timeout_ms = 5000};
    int ignored;
    json_t *stat = admin_request(&cli, json_pack("{s:s}", "verb", "stat"), &ignored);
    uint64_t value = format_number(group ? json_object_get(stat, group) : stat, name);
    json_decref(stat);
    return value;
}
