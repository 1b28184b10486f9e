/* The daemon's birth and death; what it does in between is in turn.c. */
#include "cachesvc/daemon.h"

#include "cachesvc/copies.h"
#include "cachesvc/worker.h"

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

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

uint64_t daemon_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

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
    *d->control = (struct pkv_control){.magic = PKV_MAGIC,
                                       .version_major = PKV_VERSION_MAJOR,
                                       .version_minor = PKV_VERSION_MINOR,
                                       .pool_bytes = d->config.pool_bytes,
                                       .arena_bytes = d->config.arena_bytes,
                                       .audit_ppm = (uint32_t)d->config.audit_ppm};
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

/* The grain of a device's memory is a limit below; the operator's own choice is not changed. */
static int chunk_choose(struct daemon *d, uint64_t *ret)
{
    const struct config *c = &d->config;
    uint64_t chunk = config_chunk_bytes(c), least = PKV_CHUNK_BYTES_MIN;
    for (uint32_t i = 0; i < d->devices.count; i++)
        least = PKV_MAX(least, gpu_device_about(d->devices.device[i])->grain);
    chunk = c->chunk_bytes ? chunk : PKV_MAX(chunk, least);
    if (chunk % least || c->pool_bytes / chunk < PKV_MAX(d->devices.count, 1u) || c->arena_bytes < chunk) {
        log_error("chunks of %llu KiB do not do: a GPU's are multiples of %llu KiB, and each GPU needs one in pool-bytes",
                  (unsigned long long)chunk >> 10, (unsigned long long)least >> 10);
        return -EINVAL;
    }
    *ret = chunk;
    return 0;
}

static int memory_make(struct daemon *d)
{
    const struct config *c = &d->config;
    int r = devices_open(&d->devices, c->backend, c->device, (enum devices_share)c->share);
    struct memory_options options = {.pool_bytes = c->pool_bytes,
                                     .arena_bytes = c->arena_bytes,
                                     .populate = c->populate ? threads_of(c) : 0,
                                     .devices = &d->devices};
    r = r ? r : chunk_choose(d, &options.chunk_bytes);
    return r ? r : memory_create(&d->memory, &options);
}

static int core_make(struct daemon *d)
{
    struct core_config config = {.pool_chunks = d->memory.count[PKV_TIER_POOL],
                                 .arena_chunks = d->memory.count[PKV_TIER_ARENA],
                                 .pool_devices = d->devices.count,
                                 .chunk_bytes = d->memory.chunk_bytes,
                                 .grant_timeout_ns = d->config.grant_timeout_ms * 1000000u,
                                 .hold_ns = d->devices.count ? d->config.home_hold_ms * 1000000u : 0, /* else no link */
                                 .hold_rate = d->config.home_hold_rate};
    d->core = core_create(&config, &(struct core_hooks){tables_alloc, tables_free, &d->tables});
    return d->core ? 0 : -ENOMEM;
}

/* What served selects run on: a device each, or the CPU. */
static int gpus_make(struct daemon *d)
{
    const char *isa = strcmp(d->config.isa, "best") ? d->config.isa : NULL;
    struct gpu_options options = {.backend = d->devices.count ? "cuda" : "host", .isa = isa, .threads = threads_of(&d->config)};
    for (uint32_t i = 0; i < PKV_MAX(d->devices.count, 1u); i++) {
        options.device = d->devices.device[i];
        int r = gpu_open(&options, &d->gpus[i]);
        if (r) {
            log_error("backend %s, isa %s: %s", options.backend, d->config.isa, pkv_err_text((uint32_t)-r));
            return pkv_err_status((uint32_t)-r);
        }
    }
    return 0;
}

static int threads_make(struct daemon *d)
{
    int r = gpus_make(d);
    if (r)
        return r;
    d->copies_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), d->served_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (d->copies_event < 0 || d->served_event < 0)
        return -errno;
    r = copies_start(d, threads_of(&d->config));
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
    states_init(d->states);
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
             (unsigned long long)d->memory.chunk_bytes >> 20, gpu_describe(d->gpus[0]), d->io->name);
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
    copies_stop(d);
    if (d->served.event > 0)
        mover_stop(&d->served);
    if (d->core) {
        mover_reap(&d->copies);
        mover_reap(&d->served);
        daemon_act(d);
    }
    core_destroy(d->core);
    for (uint32_t i = 0; i < DEVICES_MAX; i++)
        gpu_close(d->gpus[i]);
    if (d->loop)
        d->io->close(d->loop);
    tables_destroy(&d->tables);
    memory_destroy(&d->memory);
    devices_close(&d->devices);
    if (d->control)
        munmap(d->control, 4096);
    states_close(d->states);
    int fds[] = {d->control_fd, d->copies_event, d->served_event, d->signals};
    for (size_t i = 0; i < PKV_ARRAY_LEN(fds); i++)
        if (fds[i] >= 0)
            close(fds[i]);
    if (d->listener.fd >= 0)
        listen_close(&d->listener);
    free(d);
}
