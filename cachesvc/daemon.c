/* The daemon's life and its loop.
 *
 * A turn: take what the sockets say -> take submissions, a bounded number per worker -> take what movers finished -> carry out
 * what the core decided -> publish the epoch and see which readers have passed it -> sleep if there was nothing.
 * Before it sleeps the loop raises `waiting` in every region, fences, and looks once more; a worker that pushes after that
 * sees the flag and writes its eventfd. */
#include "cachesvc/daemon.h"

#include "cachesvc/served.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

enum { TOKEN_LISTEN = 1, TOKEN_COPIES, TOKEN_SERVED, TOKEN_SIGNAL, TOKEN_ADMIN, TOKEN_WORKERS = 16 };

#define HELLO_NS       5000000000ull /* a connection says hello within this */
#define IDLE_NS        1000000000ull /* the longest sleep */
#define READERS_NS     200000ull     /* the sleep while a grant waits for readers to pass an epoch */
#define COPIES_THREADS 4u

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

uint64_t daemon_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* ---- what the core decided ---- */

struct copy_job {
    struct mover_job job;
    struct daemon *daemon;
    uint32_t copy;
    void *to;
    const void *from;
    uint64_t bytes, checksum, ns;
};

static void copy_run(struct mover_job *job)
{
    struct copy_job *c = PKV_CONTAINER_OF(job, struct copy_job, job);
    uint64_t begin = daemon_now_ns();
    c->checksum = offload_copy(c->to, c->from, c->bytes);
    c->ns = daemon_now_ns() - begin;
}

static void copy_done(struct mover_job *job)
{
    struct copy_job *c = PKV_CONTAINER_OF(job, struct copy_job, job);
    c->daemon->counters.copy_bytes += c->bytes;
    c->daemon->counters.copy_ns += c->ns;
    core_copied(c->daemon->core, c->copy, true, c->checksum);
    free(c);
}

static void *address(struct daemon *d, uint64_t place, uint64_t bytes)
{
    return (void *)(uintptr_t)pkv_place_address(d->memory.bases[pkv_place_tier(place)][pkv_place_chunk(place)], place, bytes);
}

static void act_copy(struct daemon *d, const struct core_action *a)
{
    struct copy_job *c = malloc(sizeof(*c));
    if (!c) {
        core_copied(d->core, a->copy, false, 0);
        return;
    }
    *c = (struct copy_job){.job = {.run = copy_run, .done = copy_done},
                           .daemon = d,
                           .copy = a->copy,
                           .to = address(d, a->to, a->bytes),
                           .from = address(d, a->from, a->bytes),
                           .bytes = a->bytes};
    mover_submit(&d->copies, &c->job);
}

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
    while (core_next_action(d->core, &a)) {
        if (a.kind == CORE_COPY) {
            act_copy(d, &a);
        } else if (a.kind == CORE_CHUNK_RESET) {
            if (memory_reset(&d->memory, a.tier, a.chunk))
                log_warn("no fresh memory for a chunk that changes its tenant: the old memory was zeroed");
        } else {
            struct worker *w = worker_find(d, a.worker);
            if (w)
                worker_complete(w, a.tag, a.err, a.value0, a.value1);
        }
    }
}

/* ---- epochs ---- */

static uint64_t readers_epoch(struct daemon *d, uint64_t epoch)
{
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++) {
        const struct worker *w = d->workers[i];
        if (w && w->served)
            epoch = PKV_MIN(epoch, w->served->epoch);
        if (w && w->state == WORKER_JOINED)
            epoch = PKV_MIN(epoch, pkv_load64(&w->region->epoch)); /* idle is the greatest number */
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
    uint64_t bound = IDLE_NS, deadline = core_deadline(d->core);
    if (deadline != UINT64_MAX)
        bound = PKV_MIN(READERS_NS, deadline > now ? deadline - now : 0);
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

/* ---- birth and death ---- */

static int control_make(struct daemon *d)
{
    d->control_fd = memfd_create("pivotkv-control", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (d->control_fd < 0 || ftruncate(d->control_fd, 4096))
        return -errno;
    void *base = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, d->control_fd, 0);
    if (base == MAP_FAILED)
        return -errno;
    d->control = base;
    if (fcntl(d->control_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL))
        return -errno;
    *d->control =
        (struct pkv_control){.magic = PKV_MAGIC, .version_major = PKV_VERSION_MAJOR, .version_minor = PKV_VERSION_MINOR};
    return getrandom(&d->control->instance, sizeof(d->control->instance), 0) < 0 ? -errno : 0;
}

static int loop_make(struct daemon *d)
{
    int r = -ENOSYS;
    if (d->config.io != CONFIG_IO_EPOLL) {
        d->io = &loop_uring;
        r = d->io->open(&d->loop);
        if (r)
            log_info("io_uring is not to be had (%s)%s", strerror(-r), d->config.io == CONFIG_IO_AUTO ? ": epoll" : "");
    }
    if (r && d->config.io != CONFIG_IO_URING) {
        d->io = &loop_epoll;
        r = d->io->open(&d->loop);
    }
    return r;
}

/* Before any thread is made: a thread that does not block them would end the process. */
static int signals_make(struct daemon *d)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_BLOCK, &set, NULL);
    d->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return d->signals < 0 ? -errno : 0;
}

static int watch_all(struct daemon *d)
{
    int r = d->io->watch(d->loop, d->listener.fd, TOKEN_LISTEN);
    r = r ? r : d->io->watch(d->loop, d->copies_event, TOKEN_COPIES);
    r = r ? r : d->io->watch(d->loop, d->served_event, TOKEN_SERVED);
    r = r ? r : d->io->watch(d->loop, d->signals, TOKEN_SIGNAL);
    return r ? r : d->io->watch(d->loop, d->admin.ready, TOKEN_ADMIN);
}

static uint32_t threads_of(const struct config *c)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    return c->threads ? (uint32_t)c->threads : cpus > 0 ? (uint32_t)PKV_MIN(cpus, 64) : 1;
}

static int memory_make(struct daemon *d)
{
    const struct config *c = &d->config;
    uint64_t chunk = config_chunk_bytes(c);
    int r = memory_create(&d->memory, chunk, c->pool_bytes, c->arena_bytes, c->populate ? threads_of(c) : 0);
    if (r)
        log_error("no memory for a pool of %llu MiB and an arena of %llu MiB: %s; make them smaller, or see pivotkv doctor",
                  (unsigned long long)c->pool_bytes >> 20, (unsigned long long)c->arena_bytes >> 20, strerror(-r));
    return r;
}

static int core_make(struct daemon *d)
{
    struct core_config config = {.pool_chunks = d->memory.count[PKV_TIER_POOL],
                                 .arena_chunks = d->memory.count[PKV_TIER_ARENA],
                                 .chunk_bytes = d->memory.chunk_bytes,
                                 .grant_timeout_ns = d->config.grant_timeout_ms * 1000000u};
    d->core = core_create(&config, &(struct core_hooks){tables_alloc, tables_free, &d->tables});
    return d->core ? 0 : -ENOMEM;
}

static int threads_make(struct daemon *d)
{
    uint32_t threads = threads_of(&d->config);
    const char *isa = strcmp(d->config.isa, "best") ? d->config.isa : NULL;
    struct gpu_options options = {.backend = d->config.backend, .isa = isa, .threads = threads};
    int r = gpu_open(&options, &d->gpu);
    if (r) {
        log_error("backend %s, isa %s: %s", d->config.backend, d->config.isa, pkv_err_text((uint32_t)-r));
        return pkv_err_status((uint32_t)-r);
    }
    d->copies_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), d->served_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (d->copies_event < 0 || d->served_event < 0)
        return -errno;
    r = mover_start(&d->copies, PKV_MIN(threads, COPIES_THREADS), d->copies_event);
    return r ? r : mover_start(&d->served, 1, d->served_event);
}

int daemon_create(const struct config *config, struct daemon **ret)
{
    struct daemon *d = calloc(1, sizeof(*d));
    if (!d)
        return -ENOMEM;
    d->config = *config;
    d->control_fd = d->copies_event = d->served_event = d->signals = d->listener.fd = d->admin.socket = -1;
    d->next_token = TOKEN_WORKERS, d->started_ns = daemon_now_ns();
    tables_init(&d->tables);
    for (uint32_t m = 0; m < PKV_MODELS_MAX; m++)
        d->states[m].fd = -1;
    /* The lock of the socket comes first: a second daemon must not take memory before it learns that it is the second. */
    int r = listen_open(config->socket, &d->listener);
    if (r)
        d->listener.fd = -1;
    r = r ? r : signals_make(d);
    r = r ? r : memory_make(d);
    r = r ? r : control_make(d);
    r = r ? r : core_make(d);
    r = r ? r : loop_make(d);
    r = r ? r : threads_make(d);
    if (!r && (r = admin_open(d->listener.folder, &d->admin)))
        d->admin.socket = -1;
    r = r ? r : watch_all(d);
    if (r) {
        log_error("pivotkvd cannot start: %s", strerror(-r));
        daemon_destroy(d);
        return r;
    }
    log_info("ready on %s: pool %llu MiB (%s), arena %llu MiB (%s), chunks of %llu MiB, %s, %s", d->listener.path,
             (unsigned long long)config->pool_bytes >> 20, memory_pages(&d->memory, PKV_TIER_POOL),
             (unsigned long long)config->arena_bytes >> 20, memory_pages(&d->memory, PKV_TIER_ARENA),
             (unsigned long long)d->memory.chunk_bytes >> 20, gpu_describe(d->gpu), d->io->name);
    *ret = d;
    return 0;
}

void daemon_destroy(struct daemon *d)
{
    if (d->admin.socket >= 0)
        admin_close(&d->admin);
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++)
        if (d->workers[i])
            worker_leave(d->workers[i], false, "the daemon ends");
    if (d->copies.event > 0)
        mover_stop(&d->copies);
    if (d->served.event > 0)
        mover_stop(&d->served);
    if (d->core) {
        mover_reap(&d->copies);
        mover_reap(&d->served);
        daemon_act(d);
    }
    core_destroy(d->core);
    gpu_close(d->gpu);
    if (d->loop)
        d->io->close(d->loop);
    tables_destroy(&d->tables);
    memory_destroy(&d->memory);
    if (d->control)
        munmap(d->control, 4096);
    for (uint32_t m = 0; m < PKV_MODELS_MAX; m++)
        if (d->states[m].fd >= 0)
            close(d->states[m].fd);
    int fds[] = {d->control_fd, d->copies_event, d->served_event, d->signals};
    for (size_t i = 0; i < PKV_ARRAY_LEN(fds); i++)
        if (fds[i] >= 0)
            close(fds[i]);
    if (d->listener.fd >= 0)
        listen_close(&d->listener);
    free(d);
}
