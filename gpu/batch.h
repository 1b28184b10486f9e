/* Steps of decoding in a caller's stream: a door of gpu, beside gpu.h. What a batch needs is allocated when it is opened; a
 * step then costs one small launch before its layers and one behind them, and its layers' calls only launch: no wait, no
 * allocation, no decision that depends on lengths, so that they can be captured into a CUDA graph and replayed while sequences
 * grow.
 *
 * On the backend `cuda` k, v, q, out and lse are device addresses and `stream` is a CUstream; on `host` they are the CPU's, the
 * stream is ignored, and everything is done when a call returns. Places and lengths live in the batch: step sets them.
 * Owner: the thread that owns the struct gpu; one stream at a time. Functions return 0 or -enum pkv_err. */
#ifndef GPU_BATCH_H
#define GPU_BATCH_H

#include "gpu/gpu.h"

PKV_EXTERN_C_BEGIN

struct gpu_batch;

/* Neighbouring sequences whose signatures are made alike. */
struct gpu_batch_run {
    const struct gpu_scheme *scheme; /* a device works with a copy, as it is when the batch is opened */
    uint32_t seqs;
};

struct gpu_batch_options {
    const struct pkv_geom *geom;
    struct gpu_policy policy; /* sequences no longer than sinks + recent + k are attended densely, whatever dense_below */
    uint32_t seqs, runs;
    uint32_t queries;           /* new tokens, and query tokens, of each sequence in a step */
    const uint32_t *blocks_max; /* [seqs] */
    const struct gpu_batch_run *run;
    uint64_t cache_bytes; /* device memory for rows of the arena; 0: none */
    bool keeps;           /* attend may be asked to keep what it did */
};

int gpu_batch_open(struct gpu *gpu, const struct gpu_batch_options *options, struct gpu_batch **ret);
/* Nothing of it may be in flight. NULL is allowed. */
void gpu_batch_close(struct gpu_batch *batch);

/* Where chunks are; again after a chunk was mapped. Addresses that steps in flight use must stay as they were. */
int gpu_batch_spaces(struct gpu_batch *batch, const struct gpu_space *readable, const struct gpu_space *writable);
/* A sequence's tokens were cut or written anew: nothing that was kept of it holds. In the stream. */
int gpu_batch_forget(struct gpu_batch *batch, uint32_t seq, void *stream);

/* One entry of a sequence's table that is new or has changed. */
struct gpu_batch_ref {
    uint32_t seq, layer, block, reserved;
    struct pkv_block_ref ref;
};

/* One query token (of [seqs][queries]) and kv head, of which the step's first attend call that keeps is to keep what it did.
 * One wish at a time: the next one when the step of the former has ended. */
struct gpu_batch_wish {
    uint32_t query, head;
};

/* A step's lengths (its new tokens included), entries, and wish, in the stream. */
struct gpu_batch_step {
    uint32_t slot;          /* below PKV_EPOCH_SLOTS; the step's until its end has passed */
    uint32_t count;         /* of refs */
    const uint64_t *tokens; /* [seqs] */
    const struct gpu_batch_ref *refs;
    const struct gpu_batch_wish *wish; /* NULL: none */
};
int gpu_batch_step(struct gpu_batch *batch, const struct gpu_batch_step *step, void *stream);
/* k, v [seqs][queries][kv_heads][head_dim]. NaN or infinity: -PKV_ERR_NOT_FINITE on `host`, in the slot's bad word on `cuda`.
 */
int gpu_batch_append(struct gpu_batch *batch, uint32_t layer, const void *k, const void *v, void *stream);
/* q, out [seqs][queries][q_heads][head_dim], lse [seqs][queries][q_heads] or NULL. `keeps`: the call takes its own time, and
 * keeps what the step wishes, for two launches more; a graph that captured it goes on doing so. */
int gpu_batch_attend(struct gpu_batch *batch, uint32_t layer, const void *q, float *out, float *lse, bool keeps, void *stream);
/* Behind all that the step reads, the stream writes PKV_EPOCH_IDLE to `epoch` (an address as gpu_batch_word returns it), after
 * the slot's bad word. */
int gpu_batch_end(struct gpu_batch *batch, uint32_t slot, uint64_t epoch, void *stream);
/* Valid once the step has ended: whether a number of it or of an earlier step was NaN or infinite. */
bool gpu_batch_bad(struct gpu_batch *batch, uint32_t slot);
/* Forgets that, for all slots; nothing is in flight. */
int gpu_batch_reset(struct gpu_batch *batch);

/* What calls that keep have left. The arrays are of the wish: valid once its step has ended, until the next one. */
struct gpu_batch_kept {
    uint64_t ns; /* that such a call took lately; 0: there was none */
    bool found;  /* the wish, in `layer` */
    uint32_t layer;
    const void *q;          /* [group][head_dim] of the model's type */
    const float *out, *lse; /* [group][head_dim], [group] */
};
struct gpu_batch_kept gpu_batch_kept(const struct gpu_batch *batch);

/* The page of CPU memory [base, base + 4096) as the stream writes it. */
int gpu_batch_page(struct gpu_batch *batch, void *base, uint64_t *ret_address);
/* Whether the stream captures: then calls between steps are allowed, for nothing runs. */
bool gpu_batch_captures(struct gpu_batch *batch, void *stream);
/* -PKV_ERR_GPU_LOST once the device is. */
int gpu_batch_check(struct gpu_batch *batch);
/* Rows of the arena that were chosen so far: found in the cache, or read. Waits for the device. */
int gpu_batch_counters(struct gpu_batch *batch, uint64_t *ret_hits, uint64_t *ret_misses);

PKV_EXTERN_C_END

#endif
