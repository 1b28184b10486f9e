/* The CUDA backend: its memory, its stream, its waits. */
#include "gpu/cuda/backend.h"
#include "gpu/cuda/rows.h"
#include "gpu/cuda/steps.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define WAIT_NS  60000000000ull /* longer than any call: what takes more does not end */
#define SPIN_NS  200000ull
#define SLEEP_NS 20000

uint64_t backend_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

int backend_enter(struct backend *b)
{
    return cuda_device_enter(b->device);
}

int backend_leave(struct backend *b, int r)
{
    cuda_device_leave(b->device);
    return r;
}

/* The runtime's numbers are the driver's. */
int backend_error(struct backend *b, cudaError_t e)
{
    if (e != cudaSuccess)
        (void)cudaGetLastError();
    return cuda_device_error(b->device, (CUresult)e);
}

int backend_wait(struct backend *b)
{
    int r = backend_error(b, cudaEventRecord(b->done, b->stream));
    uint64_t begin = backend_now_ns();
    while (!r) {
        cudaError_t e = cudaEventQuery(b->done);
        uint64_t waited = backend_now_ns() - begin;
        if (e != cudaErrorNotReady)
            return backend_error(b, e);
        (void)cudaGetLastError();
        if (waited > WAIT_NS) { /* whatever it still does, it does in memory that we may not reuse */
            __atomic_store_n(&b->device->lost, 1, __ATOMIC_RELEASE);
            return -PKV_ERR_GPU_LOST;
        }
        if (waited > SPIN_NS)
            nanosleep(&(struct timespec){0, SLEEP_NS}, NULL);
    }
    return r;
}

/* ---- memory ---- */

static void area_free(struct area *a)
{
    if (a->host)
        cudaFreeHost(a->host);
    if (a->device)
        cudaFree(a->device);
    *a = (struct area){0};
}

int area_room(struct backend *b, struct area *a, uint64_t bytes, bool host, bool device)
{
    int r = 0;
    uint64_t room = PKV_ALIGN_UP(bytes + bytes / 4, 65536ull);
    a->used = 0;
    if (host && a->host_bytes < bytes) {
        cudaFreeHost(a->host);
        a->host = NULL, a->host_bytes = 0;
        r = backend_error(b, cudaHostAlloc((void **)&a->host, room, cudaHostAllocDefault));
        a->host_bytes = r ? 0 : room;
    }
    if (!r && device && a->device_bytes < bytes) {
        cudaFree(a->device);
        a->device = NULL, a->device_bytes = 0;
        r = backend_error(b, cudaMalloc((void **)&a->device, room));
        a->device_bytes = r ? 0 : room;
    }
    return r;
}

int area_send(struct backend *b, struct area *a)
{
    return backend_error(b, cudaMemcpyAsync(a->device, a->host, a->used, cudaMemcpyHostToDevice, b->stream));
}

/* ---- what stays on the device between calls ---- */

/* A plain copy from pageable memory returns before it has arrived, and our stream does not wait for it. */
static int arrived(struct backend *b, cudaError_t e)
{
    return backend_error(b, e != cudaSuccess ? e : cudaStreamSynchronize(cudaStreamLegacy));
}

static bool same_bases(const struct base_copy *c, const struct gpu_space *space)
{
    bool same = c->used;
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS && same; tier++)
        same = !space->base[tier] ||
               !memcmp(c->host + (tier - PKV_TIER_POOL) * BASES, space->base[tier], PKV_CHUNKS_MAX * sizeof(uint64_t));
    return same;
}

int backend_bases(struct backend *b, const struct gpu_space *space, const uint64_t *ret_base[PKV_TIERS])
{
    struct base_copy *c = &b->bases[0];
    bool same = false;
    for (uint32_t i = 0; i < BASE_COPIES && !same; i++) {
        same = same_bases(&b->bases[i], space);
        c = same || b->bases[i].used < c->used ? &b->bases[i] : c;
    }
    ret_base[PKV_TIER_NONE] = NULL;
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++) {
        uint64_t first = (tier - PKV_TIER_POOL) * BASES;
        ret_base[tier] = c->device + first;
        if (!same && space->base[tier])
            memcpy(c->host + first, space->base[tier], PKV_CHUNKS_MAX * sizeof(uint64_t));
    }
    c->used = ++b->calls;
    /* The stream is idle between calls: nothing reads what is replaced. */
    return same ? 0 : arrived(b, cudaMemcpy(c->device, c->host, 2 * BASES * sizeof(uint64_t), cudaMemcpyHostToDevice));
}

int backend_scheme(struct backend *b, const struct gpu_scheme *scheme, uint32_t layer, struct cuda_scheme *ret)
{
    struct scheme_copy *c = &b->schemes[0];
    for (uint32_t i = 0; i < SCHEME_COPIES && c->version != scheme->version; i++)
        c = b->schemes[i].version == scheme->version || b->schemes[i].used < c->used ? &b->schemes[i] : c;
    if (c->version != scheme->version) {
        cuda_scheme_free(c->memory);
        *c = (struct scheme_copy){0};
        int r = cuda_scheme_upload(scheme, &c->scheme, &c->memory);
        r = r ? r : arrived(b, cudaSuccess);
        if (r) {
            cuda_scheme_free(c->memory);
            *c = (struct scheme_copy){0};
            return r == -PKV_ERR_NO_MEMORY ? -PKV_ERR_GPU_MEMORY : r;
        }
        c->version = scheme->version;
    }
    c->used = ++b->calls;
    *ret = c->scheme;
    ret->kind = cuda_scheme_kind(scheme, layer);
    return 0;
}

/* A layout is one of all that cuda_work_bytes looks at. */
static bool same_layout(const struct cuda_attend *a, const struct cuda_attend *o)
{
    return !memcmp(&a->geom, &o->geom, sizeof(a->geom)) && cuda_rows_max(&a->policy) == cuda_rows_max(&o->policy) &&
           a->queries == o->queries && a->tokens_max == o->tokens_max && a->parts == o->parts && a->splits == o->splits;
}

int backend_work(struct backend *b, struct cuda_attend *a)
{
    int r = cuda_grid(a);
    a->team = 0; /* the stages apart: what they leave is looked at, and timed */
    if (r)
        return r;
    uint64_t bytes = cuda_work_bytes(a);
    char *before = b->work.device;
    r = area_room(b, &b->work, bytes, false, true);
    if (r)
        return r;
    if (b->work.device != before || !same_layout(a, &b->bound))
        r = backend_error(b, cudaMemsetAsync(b->work.device, 0, bytes, b->stream));
    cuda_work_bind(a, b->work.device);
    b->bound = *a;
    return r;
}

/* ---- life ---- */

static void backend_close(void *backend)
{
    struct backend *b = backend;
    if (backend_enter(b) == 0) {
        (void)backend_wait(b);
        for (uint32_t i = 0; i < SCHEME_COPIES; i++)
            cuda_scheme_free(b->schemes[i].memory);
        area_free(&b->in), area_free(&b->out), area_free(&b->rows), area_free(&b->work), area_free(&b->stage);
        for (uint32_t i = 0; i < BASE_COPIES; i++)
            cudaFree(b->bases[i].device);
        cudaFree(b->bad);
        for (uint32_t i = 0; i < PKV_ARRAY_LEN(b->marks); i++)
            cudaEventDestroy(b->marks[i]);
        for (uint32_t i = 0; i < STAGE_CHUNKS; i++)
            cudaEventDestroy(b->filled[i]), cudaEventDestroy(b->drained[i]);
        cudaEventDestroy(b->done);
        if (b->stream)
            cudaStreamDestroy(b->stream);
        if (b->copies)
            cudaStreamDestroy(b->copies);
        (void)cudaGetLastError();
        (void)backend_leave(b, 0);
    }
    for (uint32_t i = 0; i < BASE_COPIES; i++)
        free(b->bases[i].host);
    free(b);
}

static cudaError_t events(struct backend *b)
{
    cudaError_t e = cudaEventCreateWithFlags(&b->done, cudaEventDisableTiming);
    for (uint32_t i = 0; i < STAGE_CHUNKS && e == cudaSuccess; i++) {
        e = cudaEventCreateWithFlags(&b->filled[i], cudaEventDisableTiming);
        e = e == cudaSuccess ? cudaEventCreateWithFlags(&b->drained[i], cudaEventDisableTiming) : e;
    }
    for (uint32_t i = 0; i < PKV_ARRAY_LEN(b->marks) && e == cudaSuccess; i++)
        e = cudaEventCreate(&b->marks[i]);
    return e;
}

static int backend_fill(struct backend *b)
{
    cudaError_t e = cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking);
    e = e == cudaSuccess ? cudaStreamCreateWithFlags(&b->copies, cudaStreamNonBlocking) : e;
    e = e == cudaSuccess ? events(b) : e;
    for (uint32_t i = 0; i < BASE_COPIES; i++)
        e = e == cudaSuccess ? cudaMalloc((void **)&b->bases[i].device, 2 * BASES * sizeof(uint64_t)) : e;
    e = e == cudaSuccess ? cudaMalloc((void **)&b->bad, sizeof(*b->bad)) : e;
    int r = backend_error(b, e);
    r = r ? r : gpu_cuda_table()->preload();
    r = r ? r : cuda_rows_preload();
    return r ? r : cuda_steps_preload();
}

static int backend_open(struct gpu_device *device, void **ret)
{
    struct backend *b = calloc(1, sizeof(*b));
    if (!b)
        return -PKV_ERR_NO_MEMORY;
    b->device = cuda_device_of(device), b->processors = device->info.processors;
    int r = backend_enter(b);
    for (uint32_t i = 0; i < BASE_COPIES && !r; i++) {
        b->bases[i].host = calloc(2 * BASES, sizeof(uint64_t));
        r = b->bases[i].host ? 0 : -PKV_ERR_NO_MEMORY;
    }
    r = r ? r : backend_leave(b, backend_fill(b));
    if (r) {
        backend_close(b);
        return r;
    }
    *ret = b;
    return 0;
}

const struct gpu_backend gpu_cuda_backend = {
    .open = backend_open,
    .close = backend_close,
    .append = backend_append,
    .sign = backend_sign,
    .put_signatures = backend_put_signatures,
    .read = backend_read,
    .select = backend_select,
    .gather = backend_gather,
    .dense = backend_dense,
    .attend = backend_attend,
    .batch_open = backend_batch_open,
    .batch_close = backend_batch_close,
    .batch_spaces = backend_batch_spaces,
    .batch_forget = backend_batch_forget,
    .batch_step = backend_batch_step,
    .batch_append = backend_batch_append,
    .batch_attend = backend_batch_attend,
    .batch_kept = backend_batch_kept,
    .batch_end = backend_batch_end,
    .batch_bad = backend_batch_bad,
    .batch_reset = backend_batch_reset,
    .batch_page = backend_batch_page,
    .batch_captures = backend_batch_captures,
    .batch_check = backend_batch_check,
    .batch_counters = backend_batch_counters,
};
