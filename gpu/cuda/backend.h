/* What the files of the CUDA backend share. Owner: the thread that calls (as of struct gpu).
 *
 * A call: `in` is filled in pinned memory and goes to the device as one copy, kernels run on the backend's stream, results
 * come back through `out`, the call waits with a bound. Failures: no memory for a buffer: the call fails, the backend stays; a
 * fault of the device, or none of its answers within WAIT_NS: the device is lost to this process, every later call says so. */
#ifndef GPU_CUDA_BACKEND_H
#define GPU_CUDA_BACKEND_H

#include "gpu/cuda/driver.h"
#include "gpu/cuda/setup.h"
#include "gpu/module.h"

#include <cuda_runtime_api.h>

/* A buffer that grows and is kept: pinned, on the device, or the one mirrored by the other. */
struct area {
    char *host, *device;
    uint64_t host_bytes, device_bytes, used;
};

struct scheme_copy {
    uint64_t version; /* of the scheme that it is a copy of; 0: none */
    uint64_t used;    /* when, in calls */
    struct cuda_scheme scheme;
    void *memory;
};
#define SCHEME_COPIES 4u

/* Chunks behind the ones that places can name: where dense streams blocks through. */
#define STAGE_CHUNKS 2u
#define BASES        (PKV_CHUNKS_MAX + STAGE_CHUNKS)

/* A space's addresses: what is read and what is written alternate. */
struct base_copy {
    uint64_t used;
    uint64_t *host, *device; /* [2][BASES] */
};
#define BASE_COPIES 3u

struct backend {
    struct cuda_device *device;
    uint32_t processors;
    cudaStream_t stream, copies;
    cudaEvent_t done, filled[STAGE_CHUNKS], drained[STAGE_CHUNKS];
    cudaEvent_t marks[5]; /* around the stages of an attend */
    struct area in, out, rows, work, stage;
    struct base_copy bases[BASE_COPIES];
    struct cuda_attend bound; /* the shape that `work` is laid out for */
    struct scheme_copy schemes[SCHEME_COPIES];
    uint64_t calls;
    uint32_t *bad;
    void *page; /* of CPU memory, registered for all batches */
    uint64_t page_address;
    uint32_t page_users;
};

/* ---- backend.c ---- */

/* Makes the device's context current; every door function is between these two. leave returns r. */
int backend_enter(struct backend *b);
int backend_leave(struct backend *b, int r);
/* 0 or -enum pkv_err. */
int backend_error(struct backend *b, cudaError_t e);
uint64_t backend_now_ns(void);
/* Until the stream is done. */
int backend_wait(struct backend *b);

/* Room for `bytes`, pinned and on the device as wanted; what was in it is gone. */
int area_room(struct backend *b, struct area *a, uint64_t bytes, bool host, bool device);
/* The next piece of an area, aligned to 256. */
static inline uint64_t area_take(struct area *a, uint64_t bytes)
{
    uint64_t at = a->used;
    a->used += PKV_ALIGN_UP(bytes, 256ull);
    return at;
}
int area_send(struct backend *b, struct area *a); /* `used` bytes to the device, on the stream */

/* The space's addresses on the device, and where they lie. */
int backend_bases(struct backend *b, const struct gpu_space *space, const uint64_t *ret_base[PKV_TIERS]);
/* The device's copy of a scheme, as it is now, for a layer. */
int backend_scheme(struct backend *b, const struct gpu_scheme *scheme, uint32_t layer, struct cuda_scheme *ret);
/* Lays out `work` for the call, parts and splits included. */
int backend_work(struct backend *b, struct cuda_attend *a);

/* ---- the door functions ---- */

int backend_append(void *backend, const struct gpu_append_args *args);
int backend_sign(void *backend, const struct gpu_sign_args *args);
int backend_put_signatures(void *backend, const struct gpu_signatures_args *args);
int backend_read(void *backend, const struct gpu_read_args *args);
int backend_select(void *backend, const struct gpu_select_args *args, const struct gpu_rows *ret_rows);
int backend_gather(void *backend, const struct gpu_select_args *args, const struct gpu_rows *rows, void *ret);
int backend_attend(void *backend, const struct gpu_attend_args *args);
int backend_dense(void *backend, const struct gpu_dense_args *args);

int backend_batch_open(void *backend, const struct gpu_batch_options *options, void **ret);
void backend_batch_close(void *batch);
int backend_batch_spaces(void *batch, const struct gpu_space *readable, const struct gpu_space *writable);
int backend_batch_forget(void *batch, uint32_t seq, void *stream);
int backend_batch_step(void *batch, const struct gpu_batch_step *step, void *stream);
int backend_batch_append(void *batch, uint32_t layer, const void *k, const void *v, void *stream);
int backend_batch_attend(void *batch, uint32_t layer, const void *q, float *out, float *lse, bool keeps, void *stream);
struct gpu_batch_kept backend_batch_kept(const void *batch);
int backend_batch_end(void *batch, uint32_t slot, uint64_t epoch, void *stream);
bool backend_batch_bad(void *batch, uint32_t slot);
int backend_batch_reset(void *batch);
int backend_batch_page(void *batch, void *base, uint64_t *ret_address);
bool backend_batch_captures(void *batch, void *stream);
int backend_batch_check(void *batch);
int backend_batch_counters(void *batch, uint64_t *ret_hits, uint64_t *ret_misses);

extern const struct gpu_backend gpu_cuda_backend;
extern const struct gpu_lab_verbs gpu_cuda_lab;

#endif
