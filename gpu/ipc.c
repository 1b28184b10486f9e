/* cudaIpc: tokens, and who in this process uses which chunk. */
#include "gpu/ipc.h"

#include "gpu/module.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define ZERO_NS       10000000000ull
#define TOKEN_MAGIC   0x6370695f76746f70ull
#define TOKEN_VERSION 1u
#define TOKEN_SEALS   (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

struct gpu_ipc_token {
    uint64_t magic;
    uint32_t version, reserved;
    uint64_t bytes;
    uint8_t uuid[PKV_UUID_BYTES];
    uint8_t handle[GPU_IPC_HANDLE];
};
static_assert(sizeof(struct gpu_ipc_token) == 104, "the same in both processes");

/* A chunk in this process: made here, or opened here once. */
struct shared {
    struct gpu_ipc_token token;
    uint64_t at;
    uint32_t users;
    bool own;
    struct shared *next;
};

/* Also held while the driver opens and closes: nobody may open what is being closed. A leaf. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct shared *all;

static struct gpu_chunk chunk_of(struct shared *s, bool writable, int fd)
{
    return (struct gpu_chunk){.bytes = s->token.bytes,
                              .readable = s->at,
                              .writable = writable ? s->at : 0,
                              .handle = (uint64_t)(uintptr_t)s,
                              .fd = fd,
                              .share = GPU_SHARE_IPC};
}

static void enlist(struct shared *s)
{
    s->users = 1;
    s->next = all;
    all = s;
}

/* ---- tokens ---- */

static int token_fd(struct gpu_ipc_token t) /* by value: some compilers see but a member of it otherwise */
{
    int fd = memfd_create("pivotkv-ipc", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -PKV_ERR_SYSTEM;
    if (pwrite(fd, &t, sizeof(t), 0) == (ssize_t)sizeof(t) && !fcntl(fd, F_ADD_SEALS, TOKEN_SEALS))
        return fd;
    close(fd);
    return -PKV_ERR_SYSTEM;
}

/* Its copy; what the file says later does not count. */
static bool token_read(int fd, struct gpu_ipc_token *ret)
{
    struct stat s;
    return !fstat(fd, &s) && S_ISREG(s.st_mode) && s.st_size == (off_t)sizeof(*ret) &&
           pread(fd, ret, sizeof(*ret), 0) == (ssize_t)sizeof(*ret) && ret->magic == TOKEN_MAGIC;
}

bool gpu_ipc_is_token(int fd)
{
    struct gpu_ipc_token t;
    return token_read(fd, &t);
}

/* ---- chunks ---- */

int gpu_ipc_create(struct gpu_device *d, uint64_t bytes, struct gpu_chunk *ret)
{
    struct shared *s = calloc(1, sizeof(*s));
    uint64_t ticket;
    int fd = -1, r = s ? d->verbs->ipc_take(d, bytes, &s->at, s->token.handle) : -PKV_ERR_NO_MEMORY;
    if (r)
        goto nothing;
    s->own = true;
    s->token.magic = TOKEN_MAGIC, s->token.version = TOKEN_VERSION, s->token.bytes = bytes;
    memcpy(s->token.uuid, d->info.uuid, PKV_UUID_BYTES);
    r = d->verbs->zero(d, s->at, bytes, &ticket); /* the driver does not clear what this process has had before */
    r = r ? r : gpu_device_wait(d, ticket, ZERO_NS);
    fd = r ? r : token_fd(s->token);
    if (fd < 0) {
        r = fd;
        goto taken;
    }
    pthread_mutex_lock(&lock);
    enlist(s);
    pthread_mutex_unlock(&lock);
    *ret = chunk_of(s, true, fd);
    return 0;
taken:
    d->verbs->ipc_give(d, s->at, true);
nothing:
    free(s);
    return r;
}

static struct shared *find(const struct gpu_ipc_token *t)
{
    for (struct shared *s = all; s; s = s->next)
        if (!memcmp(&s->token, t, sizeof(*t)))
            return s;
    return NULL;
}

static int open_here(struct gpu_device *d, const struct gpu_ipc_token *t, struct shared **ret)
{
    struct shared *s = calloc(1, sizeof(*s));
    int r = s ? d->verbs->ipc_open(d, t->handle, t->bytes, &s->at) : -PKV_ERR_NO_MEMORY;
    if (r) {
        free(s);
        return r;
    }
    s->token = *t;
    enlist(s);
    *ret = s;
    return 0;
}

int gpu_ipc_import(struct gpu_device *d, int fd, uint64_t bytes, bool writable, struct gpu_chunk *ret)
{
    struct gpu_ipc_token t;
    if (!token_read(fd, &t) || t.version != TOKEN_VERSION || t.reserved || t.bytes != bytes ||
        (fcntl(fd, F_GET_SEALS) & TOKEN_SEALS) != TOKEN_SEALS)
        return -PKV_ERR_INVALID;
    if (memcmp(t.uuid, d->info.uuid, PKV_UUID_BYTES))
        return -PKV_ERR_GPU_DEVICE;
    if (gpu_device_lost(d))
        return -PKV_ERR_GPU_LOST;
    pthread_mutex_lock(&lock);
    struct shared *s = find(&t);
    int r = 0;
    if (s)
        s->users++;
    else
        r = open_here(d, &t, &s);
    if (!r)
        *ret = chunk_of(s, writable, -1);
    pthread_mutex_unlock(&lock);
    return r;
}

void gpu_ipc_release(struct gpu_device *d, struct gpu_chunk *chunk)
{
    struct shared *s = (struct shared *)(uintptr_t)chunk->handle, **at = &all;
    if (chunk->fd >= 0)
        close(chunk->fd);
    pthread_mutex_lock(&lock);
    bool last = --s->users == 0;
    while (last && *at != s)
        at = &(*at)->next;
    if (last) {
        *at = s->next;
        d->verbs->ipc_give(d, s->at, s->own);
    }
    pthread_mutex_unlock(&lock);
    if (last)
        free(s);
}
