/* A CUDA module without CUDA, for tests on a CPU: chunks are memfds, addresses are pointers, copies run on a thread of the
 * device, the backend is the host's. Every fault of a device can be made to happen (faults.h). */
#include "tests/fake/fake.h"

#include <stdlib.h>
#include <string.h>

/* ---- the backend: the host's, over pointers ---- */

static int backend_open(struct gpu_device *device, void **ret)
{
    struct gpu_options host = {.backend = "host", .threads = 1};
    return gpu_device_lost(device) ? -PKV_ERR_GPU_LOST : gpu_open(&host, (struct gpu **)ret);
}

static void backend_close(void *b)
{
    gpu_close(b);
}

static int append(void *b, const struct gpu_append_args *a)
{
    return gpu_append(b, a);
}

static int sign(void *b, const struct gpu_sign_args *a)
{
    return gpu_sign(b, a);
}

static int put_signatures(void *b, const struct gpu_signatures_args *a)
{
    return gpu_put_signatures(b, a);
}

static int read_blocks(void *b, const struct gpu_read_args *a)
{
    return gpu_read(b, a);
}

static int select_rows(void *b, const struct gpu_select_args *a, const struct gpu_rows *rows)
{
    return gpu_select(b, a, rows);
}

static int gather(void *b, const struct gpu_select_args *a, const struct gpu_rows *rows, void *ret)
{
    return gpu_gather(b, a, rows, ret);
}

static int dense(void *b, const struct gpu_dense_args *a)
{
    return gpu_dense(b, a);
}

static int attend(void *b, const struct gpu_attend_args *a)
{
    return gpu_attend(b, a);
}

/* Batches: the host's, over the same pointers; but as on a device NaN is found late, and a step ends when its stream does. */
struct fake_batch {
    struct gpu_batch *host;
    uint64_t epoch[PKV_EPOCH_SLOTS]; /* words of steps whose end hangs; 0: none */
    bool bad, bad_at[PKV_EPOCH_SLOTS];
};

static int batch_open(void *b, const struct gpu_batch_options *o, void **ret)
{
    struct fake_batch *f_ = calloc(1, sizeof(*f_));
    int r = f_ ? gpu_batch_open(b, o, &f_->host) : -PKV_ERR_NO_MEMORY;
    if (r)
        free(f_);
    else
        *ret = f_;
    return r;
}

static void batch_close(void *b)
{
    gpu_batch_close(((struct fake_batch *)b)->host);
    free(b);
}

static int batch_spaces(void *b, const struct gpu_space *readable, const struct gpu_space *writable)
{
    return gpu_batch_spaces(((struct fake_batch *)b)->host, readable, writable);
}

static int batch_forget(void *b, uint32_t seq, void *stream)
{
    return gpu_batch_forget(((struct fake_batch *)b)->host, seq, stream);
}

static int batch_step(void *b, const struct gpu_batch_step *step, void *stream)
{
    return gpu_batch_step(((struct fake_batch *)b)->host, step, stream);
}

static int batch_append(void *b, uint32_t layer, const void *k, const void *v, void *stream)
{
    struct fake_batch *batch = b;
    int r = gpu_batch_append(batch->host, layer, k, v, stream);
    batch->bad |= r == -PKV_ERR_NOT_FINITE;
    return r == -PKV_ERR_NOT_FINITE ? 0 : r;
}

static int batch_attend(void *b, uint32_t layer, const void *q, float *out, float *lse, bool keeps, void *stream)
{
    return gpu_batch_attend(((struct fake_batch *)b)->host, layer, q, out, lse, keeps, stream);
}

static struct gpu_batch_kept batch_kept(const void *b)
{
    return gpu_batch_kept(((const struct fake_batch *)b)->host);
}

static void streams_go_on(struct fake_batch *b)
{
    for (uint32_t i = 0; i < PKV_EPOCH_SLOTS && !fake_get(&fake_faults()->steps_hang); i++) {
        if (b->epoch[i])
            (void)gpu_batch_end(b->host, i, b->epoch[i], NULL);
        b->epoch[i] = 0;
    }
}

static int batch_check(void *b)
{
    streams_go_on(b);
    return fake_get(&fake_faults()->lost) ? -PKV_ERR_GPU_LOST : 0;
}

static int batch_end(void *b, uint32_t slot, uint64_t epoch, void *stream)
{
    struct fake_batch *batch = b;
    (void)stream;
    batch->bad_at[slot] = batch->bad;
    batch->epoch[slot] = epoch;
    return batch_check(batch);
}

static bool batch_bad(void *b, uint32_t slot)
{
    return ((struct fake_batch *)b)->bad_at[slot];
}

static int batch_reset(void *b)
{
    struct fake_batch *batch = b;
    batch->bad = false;
    memset(batch->bad_at, 0, sizeof(batch->bad_at));
    return 0;
}

static int batch_page(void *b, void *base, uint64_t *ret)
{
    return gpu_batch_page(((struct fake_batch *)b)->host, base, ret);
}

static bool batch_captures(void *b, void *stream)
{
    return gpu_batch_captures(((struct fake_batch *)b)->host, stream);
}

static int batch_counters(void *b, uint64_t *hits, uint64_t *misses)
{
    return gpu_batch_counters(((struct fake_batch *)b)->host, hits, misses);
}

static const struct gpu_backend backend = {
    .open = backend_open,
    .close = backend_close,
    .append = append,
    .sign = sign,
    .put_signatures = put_signatures,
    .read = read_blocks,
    .select = select_rows,
    .gather = gather,
    .dense = dense,
    .attend = attend,
    .batch_open = batch_open,
    .batch_close = batch_close,
    .batch_spaces = batch_spaces,
    .batch_forget = batch_forget,
    .batch_step = batch_step,
    .batch_append = batch_append,
    .batch_attend = batch_attend,
    .batch_kept = batch_kept,
    .batch_end = batch_end,
    .batch_bad = batch_bad,
    .batch_reset = batch_reset,
    .batch_page = batch_page,
    .batch_captures = batch_captures,
    .batch_check = batch_check,
    .batch_counters = batch_counters,
};

__attribute__((visibility("default"))) gpu_module_entry pivotkv_cuda_module;

const struct gpu_module *pivotkv_cuda_module(void)
{
    static const struct gpu_module module = {
        .version = FAKE_VERSION,
        .bytes = sizeof(struct gpu_module),
        .release = PKV_VERSION,
        .device = &fake_device_verbs,
        .backend = &backend,
    };
    return &module;
}
