/* The daemon's loop.
 *
 * A turn: take what the sockets say -> take submissions, a bounded number per worker -> take what movers finished -> carry out
 * what the core decided -> publish the epoch and see which readers have passed it -> sleep if there was nothing.
 * Before it sleeps the loop raises `waiting` in every region, fences, and looks once more; a worker that pushes after that
 * sees the flag and writes its eventfd. */
#include "cachesvc/daemon.h"

#include "cachesvc/audit.h"
#include "cachesvc/copies.h"
#include "cachesvc/served.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <unistd.h>

#define HELLO_NS      5000000000ull /* a connection says hello within this */
#define IDLE_NS       1000000000ull /* the longest sleep */
#define LOSS_SLEEP_NS 10000000ull   /* the longest one before the end */
#define READERS_NS    200000ull     /* the sleep while an operation waits for readers to pass an epoch */

/* ---- what the core decided ---- */

static struct worker *worker_find(struct daemon *d, uint32_t id)
{
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++)
        if (d->workers[i] && d->workers[i]->state == WORKER_JOINED && d->workers[i]->id == id)
            return d->workers[i];
    return NULL;
}

void daemon_act(struct daemon *d)
{
    struct core_action a;
    uint64_t now = 0;
    while (core_next_action(d->core, &a)) {
        if (a.kind == CORE_COPY || a.kind == CORE_CHECK) {
            now = now ? now : daemon_now_ns();
            copies_act(d, &a, now);
        } else if (a.kind == CORE_CHUNK_RESET) {
            if (memory_reset(&d->memory, a.tier, a.chunk))
                loss_report(d, "no memory for a chunk that changes its tenant: somebody still holds the old one");
        } else {
            struct worker *w = worker_find(d, a.worker);
            if (w)
                worker_complete(w, a.tag, a.err, a.value0, a.value1);
        }
    }
    copies_flush(d);
}

/* ---- epochs ---- */

static uint64_t readers_epoch(struct daemon *d, uint64_t epoch)
{
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++) {
        const struct worker *w = d->workers[i];
        if (w && w->served)
            epoch = PKV_MIN(epoch, w->served->epoch);
        uint64_t oldest = w && w->state == WORKER_JOINED ? pkv_epoch_oldest(w->region) : PKV_EPOCH_IDLE;
        epoch = PKV_MIN(epoch, oldest);
    }
    return epoch;
}

static void epochs_turn(struct daemon *d)
{
    uint64_t epoch = core_epoch(d->core);
    if (epoch != d->epoch_published) {
        pkv_store64(&d->control->epoch, epoch);
        d->epoch_published = epoch;
    }
    pkv_fence(); /* pairs with pkv_epoch_enter */
    core_quiesce(d->core, daemon_now_ns(), readers_epoch(d, epoch));
    daemon_act(d);
}

/* ---- turns ---- */

static void accept_all(struct daemon *d)
{
    for (int n = 0; n < 16; n++) {
        int pid = 0, fd = listen_accept(&d->listener, &pid);
        if (fd == -EPERM)
            continue;
        if (fd < 0)
            return;
        int r = worker_accept(d, fd, pid);
        if (r) {
            log_warn("no room for the connection of pid %d: %s", pid, strerror(-r));
            close(fd);
        }
    }
}

static void on_token(struct daemon *d, uint64_t token)
{
    uint64_t ignored;
    struct signalfd_siginfo signal;
    switch (token) {
    case TOKEN_LISTEN:
        accept_all(d);
        return;
    case TOKEN_COPIES:
    case TOKEN_SERVED: /* the queues are looked at in every turn */
        if (read(token == TOKEN_COPIES ? d->copies_event : d->served_event, &ignored, sizeof(ignored)) < 0)
            return;
        return;
    case TOKEN_SIGNAL:
        if (read(d->signals, &signal, sizeof(signal)) == (ssize_t)sizeof(signal))
            d->stop = true;
        return;
    case TOKEN_ADMIN:
        admin_answer(d);
        return;
    default:
        for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++) {
            struct worker *w = d->workers[i];
            if (!w || w->state == WORKER_LEFT || token - w->token >= 3)
                continue;
            worker_ready(w, (uint32_t)(token - w->token));
            return;
        }
    }
}

static bool look(struct daemon *d)
{
    bool work = mover_has_done(&d->copies) || mover_has_done(&d->served);
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX && !work; i++)
        work = d->workers[i] && worker_has_work(d->workers[i]);
    return work;
}

static bool turn(struct daemon *d)
{
    bool work = false;
    d->counters.loop_turns++;
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++) {
        struct worker *w = d->workers[i];
        if (!w || w->state != WORKER_JOINED)
            continue;
        if (w->backlog_count)
            worker_flush(w);
        work |= worker_drain(w);
        if (w->doomed)
            worker_leave(w, true, "it does not reap its completions");
    }
    work |= mover_reap(&d->copies);
    work |= mover_reap(&d->served);
    daemon_act(d);
    epochs_turn(d);
    return work;
}

static void flags(struct daemon *d, uint32_t waiting)
{
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++)
        if (d->workers[i] && d->workers[i]->state == WORKER_JOINED)
            pkv_store32(&d->workers[i]->region->sq_tail.waiting, waiting);
    pkv_fence();
}

static uint64_t sleep_bound(struct daemon *d, uint64_t now)
{
    uint64_t bound = loss_happened(&d->loss) ? LOSS_SLEEP_NS : IDLE_NS, deadline = core_deadline(d->core);
    if (deadline != UINT64_MAX)
        bound = PKV_MIN(PKV_MIN(bound, READERS_NS), deadline > now ? deadline - now : 0);
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++)
        if (d->workers[i] && d->workers[i]->backlog_count)
            bound = PKV_MIN(bound, 1000000u); /* nothing tells when a worker reaps */
    return bound;
}

static void drop_silent(struct daemon *d, uint64_t now)
{
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++)
        if (d->workers[i] && d->workers[i]->state == WORKER_NEW && now - d->workers[i]->accepted_ns > HELLO_NS)
            worker_leave(d->workers[i], false, "no hello");
}

/* Waits for descriptors, or only looks; carries out what they say. */
static int descriptors(struct daemon *d, uint64_t timeout_ns)
{
    uint64_t tokens[64];
    int n = d->io->wait(d->loop, timeout_ns, tokens, 64);
    for (int i = 0; i < n; i++)
        on_token(d, tokens[i]);
    if (n < 0)
        log_error("waiting for descriptors failed: %s", strerror(-n));
    return n;
}

int daemon_run(struct daemon *d)
{
    uint64_t busy = daemon_now_ns(), looked = busy;
    int n = 0;
    while (!d->stop && n >= 0) {
        uint64_t now = daemon_now_ns();
        if (loss_turn(d, now))
            return -ENOTRECOVERABLE;
        audit_turn(d, now);
        scrub_turn(d, now);
        if (turn(d))
            busy = now;
        /* While movers compute, spinning would take their processor; they wake the loop. */
        if (now - busy < d->config.spin_us * 1000 && !d->serving) {
            /* Descriptors cost a system call: while spinning they are looked at now and then. */
            if (now - looked > 20000) {
                n = descriptors(d, 0);
                looked = now;
            }
            continue;
        }
        flags(d, 1);
        uint64_t bound = look(d) ? 0 : sleep_bound(d, now);
        n = descriptors(d, bound);
        flags(d, 0);
        looked = daemon_now_ns();
        if (n > 0)
            busy = looked;
        drop_silent(d, looked);
    }
    return n < 0 ? n : 0;
}
