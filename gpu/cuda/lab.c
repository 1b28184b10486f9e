/* The lab (gpu/lab.h) on a device. */
#include "gpu/cuda/backend.h"
#include "gpu/cuda/fill.h"
#include "gpu/cuda/probe.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define TAKEN_MAX  64u
#define PEAK_BYTES (4ull << 30)
#define COPY_BYTES (512ull << 20)
#define HUGE_BYTES (2ull << 20)
#define ROUNDS     9

struct gpu_lab {
    struct backend *backend; /* its stream, its errors, its waits */
    void *taken[TAKEN_MAX];
    uint32_t count;
};

static int lab_close_part(struct gpu_lab *l)
{
    int r = backend_enter(l->backend);
    for (uint32_t i = 0; i < l->count && !r; i++)
        cudaFree(l->taken[i]);
    return r ? r : backend_leave(l->backend, 0);
}

static void lab_close(struct gpu_lab *l)
{
    (void)lab_close_part(l);
    gpu_cuda_backend.close(l->backend);
    free(l);
}

static int lab_open(struct gpu_device *device, struct gpu_lab **ret)
{
    struct gpu_lab *l = calloc(1, sizeof(*l));
    int r = l ? gpu_cuda_backend.open(device, (void **)&l->backend) : -PKV_ERR_NO_MEMORY;
    if (r) {
        free(l);
        return r;
    }
    *ret = l;
    return 0;
}

static void *lab_stream(struct gpu_lab *l)
{
    return l->backend->stream;
}

static int lab_take(struct gpu_lab *l, uint64_t bytes, void **ret)
{
    int r = l->count == TAKEN_MAX ? -PKV_ERR_NO_MEMORY : backend_enter(l->backend);
    if (r)
        return r;
    r = backend_error(l->backend, cudaMalloc(ret, bytes));
    if (!r)
        l->taken[l->count++] = *ret;
    return backend_leave(l->backend, r);
}

static int lab_fill(struct gpu_lab *l, void *to, uint64_t count, uint32_t seed, uint32_t noise_seed, float noise)
{
    struct cuda_fill f = {to, count, seed, noise_seed, noise};
    int r = backend_enter(l->backend);
    return r ? r : backend_leave(l->backend, cuda_fill_launch(&f, l->backend->stream));
}

static int lab_wait(struct gpu_lab *l)
{
    int r = backend_enter(l->backend);
    return r ? r : backend_leave(l->backend, backend_wait(l->backend));
}

static int lab_capture(struct gpu_lab *l)
{
    int r = backend_enter(l->backend);
    if (r)
        return r;
    r = backend_error(l->backend, cudaStreamBeginCapture(l->backend->stream, cudaStreamCaptureModeThreadLocal));
    return backend_leave(l->backend, r);
}

static int lab_captured(struct gpu_lab *l, void **ret_graph)
{
    cudaGraph_t graph;
    cudaGraphExec_t run;
    int r = backend_enter(l->backend);
    if (r)
        return r;
    r = backend_error(l->backend, cudaStreamEndCapture(l->backend->stream, &graph));
    if (!r) {
        r = backend_error(l->backend, cudaGraphInstantiate(&run, graph, 0));
        cudaGraphDestroy(graph);
    }
    if (!r)
        *ret_graph = run;
    return backend_leave(l->backend, r);
}

/* Around what was launched since mark 0. */
static int timed(struct backend *b, double *ret_us)
{
    float ms = 0;
    int r = backend_error(b, cudaEventRecord(b->marks[1], b->stream));
    r = r ? r : backend_wait(b);
    r = r ? r : backend_error(b, cudaEventElapsedTime(&ms, b->marks[0], b->marks[1]));
    *ret_us = ms * 1e3;
    return r;
}

static int lab_replay(struct gpu_lab *l, void *graph, double *ret_us)
{
    struct backend *b = l->backend;
    int r = backend_enter(b);
    if (r)
        return r;
    r = backend_error(b, cudaEventRecord(b->marks[0], b->stream));
    r = r ? r : backend_error(b, cudaGraphLaunch((cudaGraphExec_t)graph, b->stream));
    return backend_leave(b, r ? r : timed(b, ret_us));
}

static void lab_graph_free(struct gpu_lab *l, void *graph)
{
    if (backend_enter(l->backend))
        return;
    cudaGraphExecDestroy((cudaGraphExec_t)graph);
    (void)backend_leave(l->backend, 0);
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median of the rounds, as bytes a second. */
static double rate(double *us, uint64_t bytes)
{
    qsort(us, ROUNDS, sizeof(*us), by_size);
    return (double)bytes / us[ROUNDS / 2] * 1e6;
}

static int lab_read_peak(struct gpu_lab *l, double *ret)
{
    struct backend *b = l->backend;
    char *memory = NULL;
    double us[ROUNDS] = {0};
    int r = backend_enter(b);
    if (r)
        return r;
    r = backend_error(b, cudaMalloc((void **)&memory, PEAK_BYTES + 256));
    for (int i = -1; i < ROUNDS && !r; i++) {
        r = backend_error(b, cudaEventRecord(b->marks[0], b->stream));
        r = r ? r : cuda_read_launch(memory, PEAK_BYTES, memory + PEAK_BYTES, b->stream);
        r = r ? r : timed(b, &us[i < 0 ? 0 : i]);
    }
    cudaFree(memory);
    *ret = rate(us, PEAK_BYTES);
    return backend_leave(b, r);
}

static cudaError_t copy(char *device, char *host, bool to_device, cudaStream_t stream)
{
    return cudaMemcpyAsync(to_device ? device : host, to_device ? host : device, COPY_BYTES, cudaMemcpyDefault, stream);
}

/* `beside`: while others go the other way, which begin earlier and end later. */
static int lab_copy_peak(struct gpu_lab *l, bool to_device, bool beside, double *ret)
{
    struct backend *b = l->backend;
    char *device = NULL, *host = NULL;
    double us[ROUNDS] = {0};
    int r = backend_enter(b);
    if (r)
        return r;
    r = backend_error(b, cudaMalloc((void **)&device, 2 * COPY_BYTES));
    r = r ? r : backend_error(b, cudaHostAlloc((void **)&host, 2 * COPY_BYTES, cudaHostAllocDefault));
    for (int i = 0; i < ROUNDS + 3 && !r && beside; i++)
        r = backend_error(b, copy(device + COPY_BYTES, host + COPY_BYTES, !to_device, b->copies));
    for (int i = -1; i < ROUNDS && !r; i++) {
        r = backend_error(b, cudaEventRecord(b->marks[0], b->stream));
        r = r ? r : backend_error(b, copy(device, host, to_device, b->stream));
        r = r ? r : timed(b, &us[i < 0 ? 0 : i]);
    }
    r = r ? r : backend_error(b, cudaStreamSynchronize(b->copies));
    cudaFree(device), cudaFreeHost(host);
    *ret = rate(us, COPY_BYTES);
    return backend_leave(b, r);
}

/* As the arena's pages are: what the device's own page tables cost is part of the rate. */
static void *huge_memory(uint64_t bytes)
{
    void *memory = aligned_alloc(HUGE_BYTES, PKV_ALIGN_UP(bytes, HUGE_BYTES));
    if (memory)
        (void)madvise(memory, bytes, MADV_HUGEPAGE);
    if (memory)
        memset(memory, 1, bytes);
    return memory;
}

static int lab_gather(struct gpu_lab *l, uint64_t span, uint32_t rows, uint32_t row_bytes, uint32_t run, double *ret)
{
    struct backend *b = l->backend;
    char *device = NULL;
    double us[ROUNDS] = {0};
    uint64_t address = 0;
    void *host = huge_memory(span);
    int r = host ? backend_enter(b) : -PKV_ERR_NO_MEMORY;
    if (r)
        return r;
    r = backend_error(b, cudaMalloc((void **)&device, 256));
    r = r ? r : b->device->base.verbs->pin(&b->device->base, host, span, false, &address);
    for (int i = -1; i < ROUNDS && !r; i++) {
        struct cuda_probe p = {(const void *)(uintptr_t)address, span, rows, row_bytes, run, (uint32_t)(i + 2) * 7919u, device};
        r = backend_error(b, cudaEventRecord(b->marks[0], b->stream));
        r = r ? r : cuda_probe_launch(&p, b->stream);
        r = r ? r : timed(b, &us[i < 0 ? 0 : i]);
    }
    cudaFree(device);
    if (address)
        b->device->base.verbs->unpin(&b->device->base, host);
    free(host);
    *ret = rate(us, (uint64_t)rows * row_bytes);
    return backend_leave(b, r);
}

const struct gpu_lab_verbs gpu_cuda_lab = {
    .open = lab_open,
    .close = lab_close,
    .stream = lab_stream,
    .take = lab_take,
    .fill = lab_fill,
    .wait = lab_wait,
    .capture = lab_capture,
    .captured = lab_captured,
    .replay = lab_replay,
    .graph_free = lab_graph_free,
    .read_peak = lab_read_peak,
    .copy_peak = lab_copy_peak,
    .gather = lab_gather,
};
