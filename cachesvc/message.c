/* Messages on a worker's socket. Each is copied out of the kernel into one struct, checked, and answered by one reply. */
#include "cachesvc/worker.h"

#include "proto/check.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define FDS_MAX 4

union message {
    struct pkv_hello hello;
    struct pkv_model_request model;
    struct pkv_map_request map;
    struct pkv_state_request state;
    struct pkv_bye bye;
};

/* A peer that is gone, or that does not read, sent no bad message: its socket ends, and the next turn sees it. */
static void reply(struct worker *w, uint16_t message, struct pkv_reply *r, const int *fds, uint16_t count)
{
    r->magic = PKV_MAGIC, r->message = message, r->fds = count;
    r->version_major = PKV_VERSION_MAJOR, r->version_minor = PKV_VERSION_MINOR;
    union {
        char bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec io = {r, sizeof(*r)};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1};
    if (count) {
        m.msg_control = control.bytes, m.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(c), fds, count * sizeof(int));
    }
    if (sendmsg(w->socket, &m, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)sizeof(*r))
        shutdown(w->socket, SHUT_RDWR);
}

static enum pkv_err region_make(struct worker *w, uint64_t data_bytes)
{
    w->region_bytes = pkv_region_bytes(data_bytes), w->data_bytes = data_bytes, w->data_off = pkv_region_data_off();
    w->region_fd = memfd_create("pivotkv-region", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    w->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (w->region_fd < 0 || w->event < 0 || ftruncate(w->region_fd, (off_t)w->region_bytes) ||
        fcntl(w->region_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        return PKV_ERR_SYSTEM;
    void *base = mmap(NULL, w->region_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, w->region_fd, 0);
    if (base == MAP_FAILED)
        return PKV_ERR_NO_MEMORY;
    w->region = base;
    if (w->daemon->io->watch(w->daemon->loop, w->event, w->token + 2))
        return PKV_ERR_SYSTEM;
    w->region->magic = PKV_MAGIC, w->region->worker = w->id, w->region->bytes = w->region_bytes;
    w->region->data_off = w->data_off, w->region->data_bytes = data_bytes;
    for (uint32_t i = 0; i < PKV_EPOCH_SLOTS; i++)
        w->region->epoch[i] = PKV_EPOCH_IDLE;
    return PKV_ERR_OK;
}

/* `from` is terminated: its NUL was checked. */
static void copy_name(char to[PKV_NAME_BYTES], const char *from)
{
    size_t n = strnlen(from, PKV_NAME_BYTES - 1);
    memcpy(to, from, n);
    to[n] = 0;
    for (char *c = to; *c; c++)
        if (*c < ' ' || *c > '~')
            *c = '?'; /* names go to logs and terminals */
}

/* The one with the fewest workers. */
static uint32_t device_for_worker(const struct daemon *d)
{
    uint32_t load[DEVICES_MAX + 1] = {0}, best = 0;
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++)
        load[d->workers[i] && d->workers[i]->state == WORKER_JOINED ? d->workers[i]->device : DEVICES_MAX]++;
    for (uint32_t i = 1; i < d->devices.count; i++)
        best = load[i] < load[best] ? i : best;
    return best;
}

/* Where only one tenant may map the pool: the one whose worker does so first, as long as the daemon lives. */
static bool may_map(const struct worker *w, const char *tenant)
{
    const struct daemon *d = w->daemon;
    return !d->devices.one_tenant || !d->mapper[0] || !strcmp(d->mapper, tenant);
}

/* What both sides can do, and on which device. A worker that knows nothing of devices cannot map a pool that lies on one. */
static enum pkv_err settle(struct worker *w, const struct pkv_hello *h, struct pkv_reply *r)
{
    static const uint8_t any[PKV_UUID_BYTES];
    const struct devices *devices = &w->daemon->devices;
    bool cuda = devices->count && h->features & PKV_FEATURE_CUDA, direct = may_map(w, w->tenant);
    r->features = h->features & (cuda ? PKV_FEATURES : devices->count ? PKV_FEATURE_SERVED : PKV_FEATURES & ~PKV_FEATURE_CUDA);
    if (h->required & ~r->features)
        return PKV_ERR_BACKEND;
    if (!cuda)
        return PKV_ERR_OK;
    if (!direct && h->required & PKV_FEATURE_CUDA)
        return PKV_ERR_GPU_TENANT;
    uint32_t device = memcmp(h->device, any, sizeof(any)) ? devices_find(devices, h->device) : device_for_worker(w->daemon);
    if (device == DEVICES_MAX)
        return PKV_ERR_GPU_DEVICE;
    memcpy(r->device, gpu_device_about(devices->device[device])->uuid, sizeof(r->device));
    if (direct)
        w->device = device;
    else
        r->features &= ~PKV_FEATURE_DIRECT;
    return PKV_ERR_OK;
}

static bool on_hello(struct worker *w, const struct pkv_hello *h)
{
    struct daemon *d = w->daemon;
    struct pkv_reply r = {.err = PKV_ERR_OK};
    int tables = -1;
    r.err = w->state == WORKER_NEW ? pkv_check_hello(h) : PKV_ERR_INVALID;
    if (r.err == PKV_ERR_OK) {
        copy_name(w->tenant, h->tenant[0] ? h->tenant : "default");
        copy_name(w->label, h->label);
        r.err = loss_happened(&d->loss) ? PKV_ERR_GPU_LOST : settle(w, h, &r);
    }
    if (r.err == PKV_ERR_OK)
        r.err = core_worker_join(d->core, w->tenant, &w->id);
    if (r.err == PKV_ERR_OK) {
        r.err = region_make(w, h->data_bytes);
        tables = tables_fd(&d->tables, core_worker_tenant(d->core, w->id));
        r.err = r.err == PKV_ERR_OK && tables < 0 ? PKV_ERR_NO_MEMORY : r.err;
        if (r.err != PKV_ERR_OK)
            core_worker_leave(d->core, w->id);
    }
    if (r.err != PKV_ERR_OK) {
        d->counters.workers_refused++;
        log_warn("refused pid %d: %s", w->pid, pkv_err_text(r.err));
        reply(w, PKV_MSG_HELLO, &r, NULL, 0);
        return false;
    }
    if (w->device != DEVICES_MAX)
        core_worker_device(d->core, w->id, w->device);
    w->state = WORKER_JOINED;
    d->counters.workers_joined++;
    log_info("worker %u (%s, pid %d) joined tenant %s", w->id, w->label, w->pid, w->tenant);
    r.id = w->id, r.bytes = w->region_bytes;
    int fds[FDS_MAX] = {w->region_fd, w->event, d->control_fd, tables};
    reply(w, PKV_MSG_HELLO, &r, fds, FDS_MAX);
    return true;
}

static void on_model(struct worker *w, struct pkv_model_request *m)
{
    struct pkv_reply r = {.err = pkv_check_model(m)};
    if (r.err == PKV_ERR_OK)
        r.err = core_model_add(w->daemon->core, m, &r.id);
    if (r.err == PKV_ERR_OK)
        w->models |= 1ull << r.id;
    reply(w, PKV_MSG_MODEL, &r, NULL, 0);
}

static void on_map(struct worker *w, const struct pkv_map_request *m)
{
    struct pkv_reply r = {.err = m->reserved ? PKV_ERR_RESERVED : may_map(w, w->tenant) ? PKV_ERR_OK : PKV_ERR_GPU_TENANT};
    if (r.err == PKV_ERR_OK)
        r.err = loss_happened(&w->daemon->loss) ? PKV_ERR_GPU_LOST : core_chunk_map(w->daemon->core, w->id, m->tier, m->chunk);
    if (r.err != PKV_ERR_OK) {
        reply(w, PKV_MSG_MAP, &r, NULL, 0);
        return;
    }
    w->direct = true;
    if (w->daemon->devices.one_tenant)
        memcpy(w->daemon->mapper, w->tenant, sizeof(w->tenant));
    int fd = memory_fd(&w->daemon->memory, m->tier, m->chunk);
    r.bytes = w->daemon->memory.chunk_bytes;
    reply(w, PKV_MSG_MAP, &r, &fd, 1);
}

static void on_state(struct worker *w, const struct pkv_state_request *s, int *fd)
{
    struct pkv_reply r = {.err = s->reserved0 ? PKV_ERR_RESERVED : PKV_ERR_OK};
    const struct state *state = NULL;
    if (r.err == PKV_ERR_OK && !core_model(w->daemon->core, s->model))
        r.err = PKV_ERR_NO_MODEL;
    if (r.err == PKV_ERR_OK && s->message == PKV_MSG_STATE_PUT)
        r.err = states_put(w->daemon, s->model, s->state, fd);
    if (r.err == PKV_ERR_OK) {
        state = states_find(w->daemon, s->model, s->state);
        r.err = state ? PKV_ERR_OK : PKV_ERR_NO_STATE;
    }
    if (state)
        r.id = state->number, r.bytes = state->bytes;
    reply(w, s->message, &r, state ? &state->fd : NULL, state && s->message == PKV_MSG_STATE_GET);
}

static bool dispatch(struct worker *w, union message *m, size_t bytes, int *fd)
{
    uint16_t kind = m->bye.message;
    if (m->bye.magic != PKV_MAGIC || (w->state == WORKER_NEW) != (kind == PKV_MSG_HELLO))
        return false;
    switch (kind) {
    case PKV_MSG_HELLO:
        /* Another version's hello may have another size: it is to be told so. One of ours with a wrong size is refused. */
        m->hello.reserved |= bytes != sizeof(m->hello);
        return on_hello(w, &m->hello);
    case PKV_MSG_MODEL:
        if (bytes != sizeof(m->model))
            return false;
        on_model(w, &m->model);
        return true;
    case PKV_MSG_MAP:
        if (bytes != sizeof(m->map))
            return false;
        on_map(w, &m->map);
        return true;
    case PKV_MSG_STATE_PUT:
    case PKV_MSG_STATE_GET:
        if (bytes != sizeof(m->state))
            return false;
        on_state(w, &m->state, fd);
        return true;
    default:
        return false;
    }
}

/* The descriptor beside a message; further ones are closed. */
static int take_fd(struct msghdr *m)
{
    int kept = -1;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
            if (kept < 0)
                kept = fd;
            else
                close(fd);
        }
    }
    return kept;
}

bool message_receive(struct worker *w)
{
    union message message;
    memset(&message, 0, sizeof(message));
    union {
        char bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec io = {&message, sizeof(message)};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    ssize_t n = recvmsg(w->socket, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    int fd = take_fd(&m);
    bool good = n >= (ssize_t)sizeof(message.bye) && !(m.msg_flags & MSG_CTRUNC) &&
                (!(m.msg_flags & MSG_TRUNC) || message.bye.message == PKV_MSG_HELLO);
    bool bye = good && message.bye.magic == PKV_MAGIC && message.bye.message == PKV_MSG_BYE && w->state == WORKER_JOINED;
    if (good && !bye)
        good = dispatch(w, &message, (size_t)n, &fd);
    if (fd >= 0)
        close(fd);
    if (bye)
        worker_leave(w, false, "goodbye");
    else if (!good)
        worker_leave(w, w->state == WORKER_JOINED, n ? "it sent what is no message" : "its socket ended");
    return true;
}
