/* Life and rings of a worker. What can go wrong, and what becomes of it: the process dies at any point: its socket ends (the
 * kernel closes it after the memory is gone) or its pidfd reports, what it had submitted is done and all it held is freed; it
 * stops reaping: its completions wait in a backlog, beyond WORKER_BACKLOG_MAX it is dropped; it never says hello: dropped after
 * HELLO_NS by the loop; it writes nonsense into its region: each submission is copied once and the copy checked. */
#include "cachesvc/worker.h"

#include "cachesvc/audit.h"
#include "cachesvc/optable.h"
#include "cachesvc/served.h"
#include "proto/check.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

int worker_accept(struct daemon *d, int socket, int pid)
{
    uint32_t slot = 0;
    while (slot < DAEMON_CONNECTIONS_MAX && d->workers[slot])
        slot++;
    struct worker *w = slot < DAEMON_CONNECTIONS_MAX ? calloc(1, sizeof(*w)) : NULL;
    if (!w)
        return -EUSERS;
    *w = (struct worker){.daemon = d,
                         .slot = slot,
                         .socket = socket,
                         .process = (int)syscall(SYS_pidfd_open, pid, 0),
                         .event = -1,
                         .region_fd = -1,
                         .pid = pid,
                         .device = DEVICES_MAX,
                         .token = d->next_token,
                         .accepted_ns = daemon_now_ns()};
    d->next_token += 4;
    int r = d->io->watch(d->loop, socket, w->token);
    if (!r && w->process >= 0)
        r = d->io->watch(d->loop, w->process, w->token + 1);
    if (r) {
        d->io->unwatch(d->loop, socket, w->token);
        if (w->process >= 0)
            close(w->process);
        free(w);
        return r;
    }
    d->workers[slot] = w;
    return 0;
}

void worker_free(struct worker *w)
{
    w->daemon->workers[w->slot] = NULL;
    if (w->pinned)
        gpu_device_unregister(w->daemon->devices.device[0], w->region);
    if (w->region)
        munmap(w->region, w->region_bytes);
    free(w->backlog);
    free(w);
}

static void keep_counters(struct daemon *d, const struct pkv_worker_counters *c)
{
    uint64_t *to = (uint64_t *)&d->departed;
    const uint64_t *from = (const uint64_t *)c;
    for (size_t i = 0; i < sizeof(*c) / sizeof(*to); i++)
        to[i] += pkv_load64(&from[i]);
}

static void close_watched(struct worker *w, int *fd, uint32_t which)
{
    if (*fd < 0)
        return;
    w->daemon->io->unwatch(w->daemon->loop, *fd, w->token + which);
    close(*fd);
    *fd = -1;
}

void worker_leave(struct worker *w, bool died, const char *why)
{
    struct daemon *d = w->daemon;
    if (w->state == WORKER_LEFT)
        return;
    if (w->state == WORKER_JOINED) {
        /* What it had submitted counts: its goodbye, or its end, may overtake the last seals. At most a ring of them. */
        for (uint32_t i = 0; i < PKV_RING_ENTRIES / WORKER_TURN + 1 && worker_drain(w); i++)
            ;
        log_write(died ? LOG_WARN : LOG_INFO, "worker %u (%s, pid %d) left: %s", w->id, w->label, w->pid, why);
        d->counters.workers_died += died;
        keep_counters(d, &w->region->counters);
        audit_worker(w);
        w->state = WORKER_LEFT;
        core_worker_leave(d->core, w->id);
        daemon_act(d); /* answers to this worker, before its number is another's */
    }
    close_watched(w, &w->socket, 0);
    close_watched(w, &w->process, 1);
    close_watched(w, &w->event, 2);
    if (w->region_fd >= 0)
        close(w->region_fd);
    w->state = WORKER_LEFT;
    if (!w->served)
        worker_free(w);
}

void worker_ready(struct worker *w, uint32_t which)
{
    uint64_t ignored;
    if (which == 2) {
        if (read(w->event, &ignored, sizeof(ignored)) < 0)
            return; /* another turn took it */
    } else if (which == 1) {
        worker_leave(w, w->state == WORKER_JOINED, "its process ended");
    } else if (!message_receive(w)) {
        worker_leave(w, true, "its socket ended");
    }
}

static void futex_wake(uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

void worker_wake(struct worker *w)
{
    if (w->state == WORKER_JOINED)
        futex_wake(&w->region->cq_tail.value);
}

static bool push(struct worker *w, const struct pkv_completion *c)
{
    if (!pkv_cq_push(w->region, &w->cq_tail, c))
        return false;
    if (pkv_load32(&w->region->cq_tail.waiting))
        futex_wake(&w->region->cq_tail.value);
    return true;
}

void worker_complete(struct worker *w, uint32_t tag, enum pkv_err err, uint64_t value0, uint64_t value1)
{
    if (w->state != WORKER_JOINED)
        return;
    struct pkv_completion c = {.tag = tag, .err = err, .value0 = value0, .value1 = value1};
    w->daemon->counters.ops++;
    if (!w->backlog_count && push(w, &c))
        return;
    if (!w->backlog)
        w->backlog = malloc(WORKER_BACKLOG_MAX * sizeof(*w->backlog));
    if (!w->backlog || w->backlog_count == WORKER_BACKLOG_MAX) {
        w->doomed = true; /* whoever called may still use it: the loop drops it */
        return;
    }
    w->backlog[w->backlog_count++] = c;
}

void worker_flush(struct worker *w)
{
    uint32_t n = 0;
    while (n < w->backlog_count && push(w, &w->backlog[n]))
        n++;
    w->backlog_count -= n;
    if (n)
        memmove(w->backlog, w->backlog + n, w->backlog_count * sizeof(*w->backlog));
}

bool worker_has_work(const struct worker *w)
{
    if (w->state != WORKER_JOINED || w->served)
        return false;
    if (w->backlog_count) /* room to push them is the work */
        return w->cq_tail - pkv_load32(&w->region->cq_head.value) < PKV_RING_ENTRIES;
    return pkv_load32(&w->region->sq_tail.value) != w->sq_head;
}

bool worker_drain(struct worker *w)
{
    uint32_t n = 0;
    struct pkv_submission s;
    while (n < WORKER_TURN && w->state == WORKER_JOINED && !w->served && !w->backlog_count &&
           pkv_sq_pop(w->region, &w->sq_head, &s)) {
        n++;
        enum pkv_err e = loss_happened(&w->daemon->loss) ? PKV_ERR_GPU_LOST : pkv_check_submission(&s, w->data_bytes);
        if (e == PKV_ERR_OK) {
            optable[s.op].run(w, &s);
        } else {
            w->daemon->counters.ops_refused++;
            worker_complete(w, s.tag, e, 0, 0);
        }
    }
    return n > 0;
}
