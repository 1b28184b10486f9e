/* Connection: socket, hello, the mappings that every worker has; and messages on the socket later on. */
#include "client/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define HELLO_FDS 4
enum { FD_REGION, FD_EVENT, FD_CONTROL, FD_TABLES };

static _Thread_local char connect_error[256] = "no error";

const char *pkv_version(void)
{
    return PKV_VERSION;
}

const char *pkv_error(const struct pkv *kv)
{
    return kv ? kv->error : connect_error;
}

int kv_done(struct pkv *kv, int r)
{
    if (!r)
        return 0;
    snprintf(kv->error, sizeof(kv->error), "%s", pkv_err_text((uint32_t)-r));
    return pkv_err_status((uint32_t)-r);
}

int daemon_check(struct pkv *kv)
{
    struct pollfd p[] = {{.fd = kv->socket, .events = POLLIN}, {.fd = kv->process, .events = POLLIN}};
    if (kv->control && pkv_load64(&kv->control->lost))
        return -PKV_ERR_GPU_LOST;
    /* Between calls the daemon sends nothing: whatever can be read is its end. The process tells sooner than the socket, which
     * an io_uring keeps open for a while. */
    if (!kv->gone && poll(p, 2, 0) > 0)
        kv->gone = true;
    return kv->gone ? -PKV_ERR_DAEMON_GONE : 0;
}

/* ---- messages ---- */

static int send_message(int socket, const void *message, size_t bytes, int fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec io = {(void *)(uintptr_t)message, bytes};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1};
    if (fd >= 0) {
        m.msg_control = control.bytes, m.msg_controllen = sizeof(control.bytes);
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    }
    return sendmsg(socket, &m, MSG_NOSIGNAL) == (ssize_t)bytes ? 0 : -PKV_ERR_DAEMON_GONE;
}

/* A reply and the descriptors beside it, at most HELLO_FDS; those that do not come are -1. */
static int receive_reply(int socket, struct pkv_reply *ret, int fds[HELLO_FDS])
{
    union {
        char bytes[CMSG_SPACE(HELLO_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec io = {ret, sizeof(*ret)};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    for (int i = 0; i < HELLO_FDS; i++)
        fds[i] = -1;
    ssize_t n;
    do
        n = recvmsg(socket, &m, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n != (ssize_t)sizeof(*ret))
        return n < 0 && errno == EAGAIN ? -PKV_ERR_TIMEOUT : -PKV_ERR_DAEMON_GONE;
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
        memcpy(fds, CMSG_DATA(c), PKV_MIN(c->cmsg_len - CMSG_LEN(0), HELLO_FDS * sizeof(int)));
    return 0;
}

static void close_all(int fds[HELLO_FDS])
{
    for (int i = 0; i < HELLO_FDS; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

int socket_call(struct pkv *kv, const void *request, size_t bytes, int fd, struct pkv_reply *ret, int *ret_fd)
{
    int fds[HELLO_FDS], r = daemon_check(kv);
    if (!r)
        r = send_message(kv->socket, request, bytes, fd);
    if (!r)
        r = receive_reply(kv->socket, ret, fds);
    if (r) {
        kv->gone = true; /* after a late reply no other could be told apart */
        return r == -PKV_ERR_DAEMON_GONE ? daemon_check(kv) : r;
    }
    if (ret->err == PKV_ERR_OK && ret_fd) {
        *ret_fd = fds[0];
        fds[0] = -1;
    }
    close_all(fds);
    if (ret->err != PKV_ERR_OK)
        return ret->err < PKV_ERR_COUNT ? -(int)ret->err : -PKV_ERR_INVALID;
    return ret_fd && *ret_fd < 0 ? -PKV_ERR_INVALID : 0;
}

/* ---- connecting ---- */

static int address_of(const char *path, struct sockaddr_un *ret)
{
    const char *run = getenv("XDG_RUNTIME_DIR");
    path = path ? path : getenv("PIVOTKV_SOCKET");
    int n;
    if (path && path[0])
        n = snprintf(ret->sun_path, sizeof(ret->sun_path), "%s", path);
    else if (run && run[0])
        n = snprintf(ret->sun_path, sizeof(ret->sun_path), "%s/pivotkv/socket", run);
    else
        n = snprintf(ret->sun_path, sizeof(ret->sun_path), "/tmp/pivotkv-%u/socket", (unsigned)geteuid());
    ret->sun_family = AF_UNIX;
    return n < (int)sizeof(ret->sun_path) ? 0 : -PKV_ERR_SOCKET_PATH;
}

static int dial(const char *path, uint32_t timeout_ms, int *ret, int *ret_process)
{
    struct sockaddr_un address;
    struct stat s;
    int r = address_of(path, &address);
    if (r)
        return r;
    if (stat(address.sun_path, &s) == 0 && s.st_uid != geteuid())
        return -PKV_ERR_SOCKET_OWNER;
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -PKV_ERR_SYSTEM;
    struct timeval bound = {timeout_ms / 1000, (timeout_ms % 1000) * 1000};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &bound, sizeof(bound));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &bound, sizeof(bound));
    struct ucred peer = {0};
    socklen_t size = sizeof(peer);
    if (connect(fd, (const struct sockaddr *)&address, sizeof(address)))
        r = errno == EACCES || errno == EPERM ? -PKV_ERR_SOCKET_OWNER : errno == EAGAIN ? -PKV_ERR_TIMEOUT : -PKV_ERR_REFUSED;
    else if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) || peer.uid != geteuid())
        r = -PKV_ERR_SOCKET_OWNER;
    if (r) {
        close(fd);
        return r;
    }
    *ret = fd, *ret_process = (int)syscall(SYS_pidfd_open, peer.pid, 0); /* -1 in another PID namespace: the socket will do */
    return 0;
}

static bool name_copy(char to[PKV_NAME_BYTES], const char *from)
{
    size_t n = from ? strlen(from) : 0;
    if (n >= PKV_NAME_BYTES)
        return false;
    if (n)
        memcpy(to, from, n);
    return true;
}

static void *map_fd(int fd, uint64_t bytes, int protection)
{
    struct stat s;
    int seals = fcntl(fd, F_GET_SEALS);
    /* A memfd that may still shrink could take the memory away under a reader. */
    if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &s) || (uint64_t)s.st_size < bytes)
        return NULL;
    void *base = mmap(NULL, bytes, protection, MAP_SHARED | MAP_NORESERVE, fd, 0);
    return base == MAP_FAILED ? NULL : base;
}

static int map_welcome(struct pkv *kv, const struct pkv_reply *reply, int fds[HELLO_FDS])
{
    if (reply->bytes < sizeof(struct pkv_region))
        return -PKV_ERR_INVALID;
    kv->region_bytes = reply->bytes;
    kv->region = map_fd(fds[FD_REGION], kv->region_bytes, PROT_READ | PROT_WRITE);
    kv->control = map_fd(fds[FD_CONTROL], sizeof(struct pkv_control), PROT_READ);
    kv->tables = map_fd(fds[FD_TABLES], PKV_TABLE_BYTES, PROT_READ);
    if (!kv->region || !kv->control || !kv->tables)
        return -PKV_ERR_NO_MEMORY;
    if (kv->region->magic != PKV_MAGIC || !pkv_check_range(kv->region->data_off, kv->region->data_bytes, kv->region_bytes))
        return -PKV_ERR_INVALID;
    kv->data = (char *)kv->region + kv->region->data_off;
    kv->data_bytes = kv->region->data_bytes;
    kv->event = fds[FD_EVENT];
    fds[FD_EVENT] = -1;
    return kv->event >= 0 ? 0 : -PKV_ERR_INVALID;
}

static int say_hello(struct pkv *kv, const struct pkv_options *o)
{
    struct pkv_hello hello = {.magic = PKV_MAGIC,
                              .message = PKV_MSG_HELLO,
                              .version_major = PKV_VERSION_MAJOR,
                              .version_minor = PKV_VERSION_MINOR,
                              .data_bytes = o->data_bytes ? o->data_bytes : 64ull << 20};
    if (!name_copy(hello.tenant, o->tenant) || !name_copy(hello.label, o->label ? o->label : program_invocation_short_name))
        return -PKV_ERR_INVALID;
    struct pkv_reply reply;
    int fds[HELLO_FDS], r = backend_offer(kv, o, &hello);
    if (!r)
        r = send_message(kv->socket, &hello, sizeof(hello), -1);
    if (!r)
        r = receive_reply(kv->socket, &reply, fds);
    if (r)
        return r;
    enum pkv_err e = pkv_check_welcome(&reply, hello.required);
    r = e == PKV_ERR_OK ? map_welcome(kv, &reply, fds) : -(int)e;
    kv->worker = reply.id;
    close_all(fds);
    return r ? r : backend_settle(kv, o, &reply);
}

static int make_tables(struct pkv *kv)
{
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++)
        kv->readable[tier] = calloc(PKV_CHUNKS_MAX, sizeof(uint64_t));
    kv->writable = calloc(PKV_CHUNKS_MAX, sizeof(uint64_t));
    if (!kv->readable[PKV_TIER_POOL] || !kv->readable[PKV_TIER_ARENA] || !kv->writable)
        return -PKV_ERR_NO_MEMORY;
    return 0;
}

int pkv_connect(const char *path, const struct pkv_options *options, struct pkv **ret)
{
    struct pkv_options o = {.size = sizeof(o)};
    if (options && options->size == sizeof(o))
        o = *options;
    struct pkv *kv = calloc(1, sizeof(*kv));
    int r = kv ? 0 : -PKV_ERR_NO_MEMORY;
    if (!r && ((options && options->size != sizeof(o)) || o.flags & ~PKV_CONNECT_SERVED))
        r = -PKV_ERR_INVALID;
    if (kv) {
        snprintf(kv->error, sizeof(kv->error), "%s", pkv_err_text(PKV_ERR_OK));
        kv->socket = kv->process = kv->event = -1;
        kv->served = o.flags & PKV_CONNECT_SERVED;
        kv->timeout_ms = o.timeout_ms ? o.timeout_ms : 10000;
        kv->spin_us = o.spin_us ? o.spin_us : 50;
    }
    r = r ? r : make_tables(kv);
    r = r ? r : dial(path, kv->timeout_ms, &kv->socket, &kv->process);
    r = r ? r : say_hello(kv, &o);
    if (!r) {
        *ret = kv;
        return 0;
    }
    pkv_close(kv);
    snprintf(connect_error, sizeof(connect_error), "%s", pkv_err_text((uint32_t)-r));
    return pkv_err_status((uint32_t)-r);
}

void pkv_close(struct pkv *kv)
{
    if (!kv)
        return;
    batch_close_all(kv);
    while (kv->models) {
        struct pkv_model *m = kv->models;
        while (m->seqs)
            seq_forget(m->seqs);
        kv->models = m->next;
        model_states_close(m);
        free(m);
    }
    /* Goodbye says that nothing is mapped any more, so that comes first. */
    region_unmap_all(kv);
    if (kv->tables)
        munmap((void *)(uintptr_t)kv->tables, PKV_TABLE_BYTES);
    if (kv->control)
        munmap((void *)(uintptr_t)kv->control, sizeof(struct pkv_control));
    if (kv->region) {
        munmap(kv->region, kv->region_bytes);
        struct pkv_bye bye = {.magic = PKV_MAGIC, .message = PKV_MSG_BYE};
        (void)send_message(kv->socket, &bye, sizeof(bye), -1); /* a daemon that is gone does not mind */
    }
    if (kv->socket >= 0)
        close(kv->socket);
    if (kv->process >= 0)
        close(kv->process);
    if (kv->event >= 0)
        close(kv->event);
    backend_close(kv);
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++)
        free(kv->readable[tier]);
    free(kv->writable);
    free(kv->refs);
    audit_close(&kv->audit);
    free(kv);
}
