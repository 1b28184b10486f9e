/* The fake device: chunks are memfds, addresses are pointers, copies run on a thread. */
#include "tests/fake/fake.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define GRAIN (64u << 10)

struct task {
    enum { TASK_COPY, TASK_ZERO } kind;
    uint64_t to, from, bytes;
    uint64_t ticket; /* done with this task; 0: further tasks of the call follow */
    struct task *next;
};

struct fake {
    struct gpu_device base;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct task *first, *last;
    uint64_t issued, finished; /* tickets */
    bool stop;
};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct fake_faults none, *faults = &none;

static void map_faults(void)
{
    const char *path = getenv("PIVOTKV_FAKE_FAULTS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *p = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof(*faults), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    faults = p == MAP_FAILED ? &none : p;
    if (fd >= 0)
        close(fd);
}

struct fake_faults *fake_faults(void)
{
    pthread_once(&once, map_faults);
    return faults;
}

/* True when the countdown reached zero in this call (`last`), or had not yet (otherwise). */
static bool count_down(uint32_t *word, bool last)
{
    uint32_t n = fake_get(word);
    while (n && !__atomic_compare_exchange_n(word, &n, n - 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        ;
    return last ? n == 1 : n > 0;
}

static struct fake *fake_of(const struct gpu_device *d)
{
    return (struct fake *)(uintptr_t)d;
}

/* ---- devices ---- */

static int count(uint32_t *ret)
{
    const char *n = getenv("PIVOTKV_FAKE_DEVICES");
    *ret = n ? (uint32_t)atoi(n) : 1;
    return *ret ? 0 : -PKV_ERR_GPU_NONE;
}

static int probe(uint32_t ordinal, struct gpu_device_info *ret)
{
    uint32_t n = 0;
    if (count(&n) || ordinal >= n)
        return -PKV_ERR_GPU_DEVICE;
    *ret = (struct gpu_device_info){.uuid = {0xfa, 0xce, (uint8_t)ordinal},
                                    .ordinal = ordinal,
                                    .driver = 13000,
                                    .major = 9,
                                    .processors = 1,
                                    .bytes = 1ull << 40,
                                    .grain = GRAIN,
                                    .exports = !fake_get(&fake_faults()->no_export),
                                    .exports_ipc = !fake_get(&fake_faults()->no_ipc),
                                    .registers = true,
                                    .registers_read_only = true};
    snprintf(ret->name, sizeof(ret->name), "Fake %u", ordinal);
    return 0;
}

static bool lost(const struct gpu_device *d)
{
    (void)d;
    return fake_get(&fake_faults()->lost);
}

static void nap(uint32_t us)
{
    nanosleep(&(struct timespec){us / 1000000, (long)(us % 1000000) * 1000}, NULL);
}

/* What a copy engine does no thread does: pages of the arena may be touched (offload/chunk.c) while copies go there. */
__attribute__((no_sanitize("thread"))) static void carry(volatile char *to, const volatile char *from, uint64_t bytes)
{
    uint64_t at = 0;
    for (; at + 8 <= bytes; at += 8)
        *(volatile uint64_t *)(to + at) = *(const volatile uint64_t *)(from + at);
    for (; at < bytes; at++)
        to[at] = from[at];
}

static void carry_out(struct fake *d, const struct task *t)
{
    if (fake_get(&fake_faults()->copy_delay_us))
        nap(fake_get(&fake_faults()->copy_delay_us));
    while (fake_get(&fake_faults()->copies_hang) && !__atomic_load_n(&d->stop, __ATOMIC_ACQUIRE))
        nap(1000);
    if (lost(&d->base))
        return;
    char *to = (char *)(uintptr_t)t->to;
    if (t->kind == TASK_ZERO) {
        memset(to, 0, t->bytes);
        fake_add(&fake_faults()->zeroed, 1);
        return;
    }
    bool half = count_down(&fake_faults()->lost_in_copies, true);
    carry(to, (const char *)(uintptr_t)t->from, half ? t->bytes / 2 : t->bytes);
    fake_add(&fake_faults()->copies, 1);
    if (half)
        __atomic_store_n(&fake_faults()->lost, 1, __ATOMIC_RELEASE);
}

static void *thread_main(void *arg)
{
    struct fake *d = arg;
    pthread_mutex_lock(&d->lock);
    while (!d->stop || d->first) {
        struct task *t = d->first;
        if (!t) {
            pthread_cond_wait(&d->more, &d->lock);
            continue;
        }
        d->first = t->next;
        pthread_mutex_unlock(&d->lock);
        carry_out(d, t);
        pthread_mutex_lock(&d->lock);
        d->finished = t->ticket ? t->ticket : d->finished;
        free(t);
    }
    pthread_mutex_unlock(&d->lock);
    return NULL;
}

static int device_open(uint32_t ordinal, struct gpu_device **ret);

static void device_close(struct gpu_device *base)
{
    struct fake *d = fake_of(base);
    pthread_mutex_lock(&d->lock);
    __atomic_store_n(&d->stop, true, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&d->more);
    pthread_mutex_unlock(&d->lock);
    pthread_join(d->thread, NULL);
    free(d);
}

/* ---- chunks ---- */

static int map(int fd, uint64_t bytes, int protection, uint64_t *ret)
{
    void *p = mmap(NULL, bytes, protection, MAP_SHARED, fd, 0);
    *ret = p == MAP_FAILED ? 0 : (uint64_t)(uintptr_t)p;
    return *ret ? 0 : -PKV_ERR_GPU_MEMORY;
}

static int chunk_create(struct gpu_device *d, uint64_t bytes, struct gpu_chunk *ret)
{
    struct gpu_chunk c = {.bytes = bytes, .fd = -1};
    if (lost(d))
        return -PKV_ERR_GPU_LOST;
    if (fake_get(&fake_faults()->refuse_export))
        return -PKV_ERR_GPU_EXPORT;
    if (fake_get(&fake_faults()->refuse_create) || bytes > FAKE_CHUNK_MAX)
        return -PKV_ERR_GPU_MEMORY;
    c.fd = memfd_create("fake", MFD_CLOEXEC);
    int r =
        c.fd < 0 || ftruncate(c.fd, (off_t)bytes) ? -PKV_ERR_GPU_MEMORY : map(c.fd, bytes, PROT_READ | PROT_WRITE, &c.writable);
    if (r && c.fd >= 0)
        close(c.fd);
    if (r)
        return r;
    c.readable = c.writable;
    fake_add(&fake_faults()->chunks, 1);
    *ret = c;
    return 0;
}

static void chunk_release(struct gpu_device *d, struct gpu_chunk *c)
{
    (void)d;
    if (c->writable && c->writable != c->readable)
        munmap((void *)(uintptr_t)c->writable, c->bytes);
    munmap((void *)(uintptr_t)c->readable, c->bytes);
    if (c->fd >= 0)
        close(c->fd);
    fake_add(&fake_faults()->chunks, UINT32_MAX);
}

static int chunk_import(struct gpu_device *d, int fd, uint64_t bytes, bool writable, struct gpu_chunk *ret)
{
    struct gpu_chunk c = {.bytes = bytes, .fd = -1};
    if (lost(d))
        return -PKV_ERR_GPU_LOST;
    if (fake_get(&fake_faults()->refuse_import))
        return -PKV_ERR_UNSUPPORTED;
    int r = map(fd, bytes, PROT_READ, &c.readable);
    if (!r && writable && (r = map(fd, bytes, PROT_READ | PROT_WRITE, &c.writable)))
        munmap((void *)(uintptr_t)c.readable, bytes);
    if (r)
        return r;
    fake_add(&fake_faults()->chunks, 1);
    *ret = c;
    return 0;
}

/* ---- CPU memory ---- */

static int pin(struct gpu_device *d, const void *base, uint64_t bytes, bool read_only, uint64_t *ret)
{
    (void)bytes;
    if (lost(d))
        return -PKV_ERR_GPU_LOST;
    if (fake_get(&fake_faults()->refuse_register) || (read_only && fake_get(&fake_faults()->refuse_read_only)))
        return -PKV_ERR_GPU_REGISTER;
    fake_add(&fake_faults()->pins, 1);
    *ret = (uint64_t)(uintptr_t)base;
    return 0;
}

static void unpin(struct gpu_device *d, const void *base)
{
    (void)d, (void)base;
    fake_add(&fake_faults()->pins, UINT32_MAX);
}

/* ---- copies ---- */

static void push(struct fake *d, const struct task *t)
{
    struct task *mine = malloc(sizeof(*mine));
    if (!mine)
        abort();
    *mine = *t;
    mine->next = NULL;
    if (d->first)
        d->last->next = mine;
    else
        d->first = mine;
    d->last = mine;
    pthread_cond_signal(&d->more);
}

static int copy(struct gpu_device *base, enum gpu_direction direction, const struct gpu_copy *copies, uint32_t n,
                uint64_t *ret_ticket)
{
    struct fake *d = fake_of(base);
    (void)direction;
    if (lost(base))
        return -PKV_ERR_GPU_LOST;
    if (count_down(&fake_faults()->copies_fail, false))
        return -PKV_ERR_SYSTEM;
    pthread_mutex_lock(&d->lock);
    bool room = d->issued - d->finished < GPU_TICKETS;
    for (uint32_t i = 0; i < n && room; i++) {
        d->issued += i + 1 == n;
        push(d, &(struct task){TASK_COPY, copies[i].to, copies[i].from, copies[i].bytes, i + 1 == n ? d->issued : 0, NULL});
        fake_add(&fake_faults()->bytes_copied, (uint32_t)copies[i].bytes);
    }
    *ret_ticket = d->issued;
    pthread_mutex_unlock(&d->lock);
    return room ? 0 : -PKV_ERR_RING_FULL;
}

static int zero(struct gpu_device *base, uint64_t address, uint64_t bytes, uint64_t *ret_ticket)
{
    struct fake *d = fake_of(base);
    if (lost(base))
        return -PKV_ERR_GPU_LOST;
    pthread_mutex_lock(&d->lock);
    push(d, &(struct task){TASK_ZERO, address, 0, bytes, ++d->issued, NULL});
    *ret_ticket = d->issued;
    pthread_mutex_unlock(&d->lock);
    return 0;
}

static int poll(struct gpu_device *base, uint64_t ticket)
{
    struct fake *d = fake_of(base);
    pthread_mutex_lock(&d->lock);
    int r = ticket > d->issued || !ticket ? -PKV_ERR_INVALID : ticket <= d->finished;
    pthread_mutex_unlock(&d->lock);
    return lost(base) ? -PKV_ERR_GPU_LOST : r; /* looked at behind the ticket: a copy that fails is finished, too */
}

const struct gpu_device_verbs fake_device_verbs = {
    .count = count,
    .probe = probe,
    .open = device_open,
    .close = device_close,
    .lost = lost,
    .chunk_create = chunk_create,
    .chunk_import = chunk_import,
    .chunk_release = chunk_release,
    .ipc_take = fake_ipc_take,
    .ipc_open = fake_ipc_open,
    .ipc_give = fake_ipc_give,
    .pin = pin,
    .unpin = unpin,
    .copy = copy,
    .zero = zero,
    .poll = poll,
};

static int device_open(uint32_t ordinal, struct gpu_device **ret)
{
    struct fake *d = calloc(1, sizeof(*d));
    int r = d ? probe(ordinal, &d->base.info) : -PKV_ERR_NO_MEMORY;
    if (!r && lost(&d->base))
        r = -PKV_ERR_GPU_LOST;
    if (!r) {
        d->base.verbs = &fake_device_verbs;
        pthread_mutex_init(&d->lock, NULL);
        pthread_cond_init(&d->more, NULL);
        r = pthread_create(&d->thread, NULL, thread_main, d) ? -PKV_ERR_NO_MEMORY : 0;
    }
    if (r)
        free(d);
    else
        *ret = &d->base;
    return r;
}
