/* Copies: one low-priority stream a direction, and a ring of events behind each.
 *
 * A call: neighbours merged -> copies on the stream, batch by batch -> an event, whose number is the ticket. Events end in
 * order, so one that has ended answers for all before it. Failures: the ring is full of calls that are under way: RING_FULL,
 * nothing was started; a copy is refused: those of the call that were started are waited for, so that the caller may reuse its
 * memory; the device is lost: every call says so. */
#include "gpu/cuda/driver.h"

#include <time.h>

#define TICKET_BITS 56
#define UNDO_NS     10000000000ull

int cuda_lanes_open(struct cuda_device *d)
{
    const struct cuda_driver *cu = d->cu;
    int least = 0, greatest = 0, r = cuda_device_enter(d);
    if (r)
        return r;
    r = cuda_device_error(d, cu->cuCtxGetStreamPriorityRange(&least, &greatest));
    for (uint32_t i = 0; i < GPU_DIRECTIONS; i++) {
        struct cuda_lane *l = &d->lanes[i];
        pthread_mutex_init(&l->lock, NULL);
        r = r ? r : cuda_device_error(d, cu->cuStreamCreateWithPriority(&l->stream, CU_STREAM_NON_BLOCKING, least));
        for (uint32_t e = 0; e < GPU_TICKETS && !r; e++)
            r = cuda_device_error(d, cu->cuEventCreate(&l->events[e], CU_EVENT_DISABLE_TIMING));
    }
    cuda_device_leave(d);
    return r;
}

void cuda_lanes_close(struct cuda_device *d)
{
    int r = cuda_device_enter(d);
    for (uint32_t i = 0; i < GPU_DIRECTIONS && !r; i++) {
        struct cuda_lane *l = &d->lanes[i];
        for (uint32_t e = 0; e < GPU_TICKETS; e++)
            if (l->events[e])
                d->cu->cuEventDestroy(l->events[e]);
        if (l->stream)
            d->cu->cuStreamDestroy(l->stream);
        pthread_mutex_destroy(&l->lock);
    }
    if (!r)
        cuda_device_leave(d);
}

/* 1: all up to number `n` are done. Under the lane's lock, in the context. */
static int passed(struct cuda_device *d, struct cuda_lane *l, uint64_t n)
{
    if (n <= l->finished)
        return 1;
    CUresult c = d->cu->cuEventQuery(l->events[n % GPU_TICKETS]);
    if (c == CUDA_ERROR_NOT_READY)
        return 0;
    int r = cuda_device_error(d, c);
    if (r)
        return r;
    l->finished = n;
    return 1;
}

/* Room for one more event. */
static int reserve(struct cuda_device *d, struct cuda_lane *l)
{
    if (l->issued - l->finished < GPU_TICKETS)
        return 0;
    int r = passed(d, l, l->issued - GPU_TICKETS + 1);
    return r < 0 ? r : r ? 0 : -PKV_ERR_RING_FULL;
}

static int record(struct cuda_device *d, struct cuda_lane *l)
{
    int r = cuda_device_error(d, d->cu->cuEventRecord(l->events[(l->issued + 1) % GPU_TICKETS], l->stream));
    l->issued += !r;
    return r;
}

static CUresult start(const struct cuda_driver *cu, enum gpu_direction direction, const struct gpu_copy *c, CUstream stream)
{
    switch (direction) {
    case GPU_TO_HOST:
        return cu->cuMemcpyDtoHAsync((void *)(uintptr_t)c->to, c->from, c->bytes, stream);
    case GPU_TO_DEVICE:
        return cu->cuMemcpyHtoDAsync(c->to, (const void *)(uintptr_t)c->from, c->bytes, stream);
    default:
        return cu->cuMemcpyDtoDAsync(c->to, c->from, c->bytes, stream);
    }
}

/* What one call of the driver takes. Copies alone leave gaps of 2.5 us between them: 256 KiB each come to 37 GB/s, in a batch
 * to 53 of 55 (docs/performance.md). */
#define BATCH 64u
struct batch {
    uint32_t count;
    CUdeviceptr to[BATCH], from[BATCH];
    size_t bytes[BATCH];
};

/* The next copies from *at on; those that go on where the one before ends become one. */
static void gather(const struct gpu_copy *copies, uint32_t count, uint32_t *at, struct batch *b)
{
    b->count = 0;
    for (; *at < count; (*at)++) {
        const struct gpu_copy *c = &copies[*at];
        uint32_t last = b->count - 1;
        if (b->count && c->to == b->to[last] + b->bytes[last] && c->from == b->from[last] + b->bytes[last]) {
            b->bytes[last] += c->bytes;
            continue;
        }
        if (b->count == BATCH)
            return;
        b->to[b->count] = c->to, b->from[b->count] = c->from, b->bytes[b->count++] = c->bytes;
    }
}

/* False where the driver has no batches or takes none of this memory: singly, then. */
static bool start_batch(const struct cuda_driver *cu, struct batch *b, CUstream stream)
{
    CUmemcpyAttributes how = {.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM};
    size_t first = 0;
    return b->count > 1 && cu->cuMemcpyBatchAsync &&
           cu->cuMemcpyBatchAsync(b->to, b->from, b->bytes, b->count, &how, &first, 1, stream) == CUDA_SUCCESS;
}

static int start_all(struct cuda_device *d, enum gpu_direction direction, struct batch *b, CUstream stream)
{
    int r = 0;
    if (start_batch(d->cu, b, stream))
        return 0;
    for (uint32_t i = 0; i < b->count && !r; i++) {
        struct gpu_copy c = {.to = b->to[i], .from = b->from[i], .bytes = b->bytes[i]};
        r = cuda_device_error(d, start(d->cu, direction, &c, stream));
    }
    return r;
}

static void undo(struct cuda_device *d, struct cuda_lane *l)
{
    if (record(d, l))
        return;
    for (uint64_t waited = 0; waited < UNDO_NS && !passed(d, l, l->issued); waited += 100000)
        nanosleep(&(struct timespec){0, 100000}, NULL);
}

static uint64_t ticket_of(enum gpu_direction direction, const struct cuda_lane *l)
{
    return (uint64_t)direction << TICKET_BITS | l->issued;
}

int cuda_copy(struct gpu_device *base, enum gpu_direction direction, const struct gpu_copy *copies, uint32_t count,
              uint64_t *ret_ticket)
{
    struct cuda_device *d = cuda_device_of(base);
    struct cuda_lane *l = &d->lanes[direction];
    int r = cuda_device_enter(d);
    if (r)
        return r;
    pthread_mutex_lock(&l->lock);
    r = reserve(d, l);
    uint32_t at = 0;
    while (!r && at < count) {
        struct batch b;
        gather(copies, count, &at, &b);
        r = start_all(d, direction, &b, l->stream);
        if (r && r != -PKV_ERR_GPU_LOST)
            undo(d, l);
    }
    r = r ? r : record(d, l);
    if (!r)
        *ret_ticket = ticket_of(direction, l);
    pthread_mutex_unlock(&l->lock);
    cuda_device_leave(d);
    return r;
}

int cuda_zero(struct gpu_device *base, uint64_t address, uint64_t bytes, uint64_t *ret_ticket)
{
    struct cuda_device *d = cuda_device_of(base);
    struct cuda_lane *l = &d->lanes[GPU_ON_DEVICE];
    int r = cuda_device_enter(d);
    if (r)
        return r;
    pthread_mutex_lock(&l->lock);
    r = reserve(d, l);
    r = r ? r : cuda_device_error(d, d->cu->cuMemsetD8Async(address, 0, bytes, l->stream));
    r = r ? r : record(d, l);
    if (!r)
        *ret_ticket = ticket_of(GPU_ON_DEVICE, l);
    pthread_mutex_unlock(&l->lock);
    cuda_device_leave(d);
    return r;
}

int cuda_poll(struct gpu_device *base, uint64_t ticket)
{
    struct cuda_device *d = cuda_device_of(base);
    uint64_t direction = ticket >> TICKET_BITS, n = ticket & ((1ull << TICKET_BITS) - 1);
    if (direction >= GPU_DIRECTIONS || !n)
        return -PKV_ERR_INVALID;
    struct cuda_lane *l = &d->lanes[direction];
    int r = cuda_device_enter(d);
    if (r)
        return r;
    pthread_mutex_lock(&l->lock);
    r = n > l->issued ? -PKV_ERR_INVALID : passed(d, l, n);
    pthread_mutex_unlock(&l->lock);
    cuda_device_leave(d);
    return r;
}
