/* pivotkv: the client library of the KV-cache service for very long contexts.
 *
 * Attach to a daemon, open a model, create sequences, append K and V layer by layer, attend over the tokens that a
 * Hamming search selects. Functions return 0 or a negative errno; pkv_error() has the sentence (cause and remedy) of the
 * last failure of that connection. A connection and all that hangs on it belong to one thread at a time; a process may
 * hold several. Arrays are dense, row-major, and read or written only during the call; they are the CPU's, also where the
 * daemon's pool lies on a GPU, but for pkv_batch_*. Every wait is bounded (pkv_options.timeout_ms). */
#ifndef PIVOTKV_H
#define PIVOTKV_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef PKV_API
#define PKV_API __attribute__((visibility("default")))
#endif

struct pkv;       /* a connection to a daemon */
struct pkv_model; /* geometry and signature scheme, opened on a connection */
struct pkv_seq;   /* one context's cache */

enum pkv_type { PKV_TYPE_F32 = 0, PKV_TYPE_F16 = 1, PKV_TYPE_BF16 = 2 };
/* PKV_NONE: no signatures are made, and the k tokens before the recent ones are selected. */
enum pkv_signature { PKV_SIGN = 0, PKV_CODE = 1, PKV_LINEAR = 2, PKV_HASH = 3, PKV_NONE = 4 };
enum pkv_group_rule { PKV_SOFTMAX_SUM = 0, PKV_SUM = 1, PKV_MAX_SCORE = 2 };

/* ---- connection ---- */

#define PKV_CONNECT_SERVED 1u /* map neither pool nor arena: rows come and go through the shared region */

struct pkv_options {
    uint32_t size;       /* sizeof(struct pkv_options): lets the struct grow */
    uint32_t flags;      /* PKV_CONNECT_* */
    const char *tenant;  /* at most 31 bytes; NULL: "default" */
    const char *label;   /* shown by `pivotkv stat`; NULL: the program's name */
    uint32_t threads;    /* of the host backend; 0: one per CPU */
    uint32_t timeout_ms; /* bound of every wait; 0: 10000 */
    uint32_t spin_us;    /* spin for answers this long before sleeping; 0: 50 */
    uint32_t device;     /* cuda: 1 + the GPU's number in this process; 0: the one that the daemon gives */
    uint64_t data_bytes; /* of the shared region's data area, a multiple of 4096; 0: 64 MiB */
    const char *backend; /* "host", "cuda"; NULL: the daemon's, or served where this process cannot use that */
    const char *isa;     /* host backend: "c", "avx2", "avx512"; NULL: the best */
};

/* `path`: the daemon's socket; NULL: $PIVOTKV_SOCKET, then the default path of this user. `options` may be NULL.
 * On a daemon with a pool on GPUs a connection lives on one of them, and so do its sequences: open one connection per GPU.
 * -ECONNREFUSED no daemon, -ENAMETOOLONG path, -EPERM another user's socket, or another tenant maps a pool
 * that only one may (operating.md, share), -EPROTO version, features or backend, -EUSERS
 * full, -ENODEV the GPU that was asked for cannot be used. */
PKV_API int pkv_connect(const char *path, const struct pkv_options *options, struct pkv **ret);
/* Closes all that hangs on the connection. NULL is allowed. */
PKV_API void pkv_close(struct pkv *kv);
/* The sentence of the last failure; with NULL, of the last failed pkv_connect of this thread. Never NULL. */
PKV_API const char *pkv_error(const struct pkv *kv);
/* How the connection attends: "direct on cuda NVIDIA H100", "served: <why it is not direct>; host avx512, 2 threads". */
PKV_API const char *pkv_describe(const struct pkv *kv);
/* One round trip through the rings; *ret_ns how long it took (may be NULL). */
PKV_API int pkv_ping(struct pkv *kv, uint64_t *ret_ns);
PKV_API const char *pkv_version(void);

/* ---- model ---- */

struct pkv_model_desc {
    uint32_t size; /* sizeof(struct pkv_model_desc) */
    uint32_t layers, q_heads, kv_heads, head_dim;
    uint32_t type;       /* enum pkv_type, of K, V and q */
    uint32_t signature;  /* enum pkv_signature */
    uint32_t sig_bits;   /* 32..256, a multiple of 32; 0: one per head dimension, rounded up to 32; with PKV_NONE, 0 */
    const char *name;    /* at most 63 bytes; the identity of the weights that make K and V */
    const char *weights; /* safetensors file of the scheme; NULL: PKV_SIGN, PKV_NONE need none, PKV_CODE calibrates itself */
    float rope_base;     /* 0: no rope; a PKV_CODE that calibrates itself undoes it, token numbers being positions */
    uint32_t rope_dims;  /* 0: head_dim */
    uint32_t rope_interleaved;
};

/* Clears the description and fills in what most want: the size, and PKV_CODE with one bit per head dimension, which calibrates
 * itself from the first tokens (PKV_SIGN where the library was built without LAPACK). Geometry, type, name and rope are yours.
 */
PKV_API void pkv_model_defaults(struct pkv_model_desc *ret);
/* -ENOTUNIQ: the name is registered with another description. */
PKV_API int pkv_model_open(struct pkv *kv, const struct pkv_model_desc *desc, struct pkv_model **ret);
/* Until the calibration that this connection's calls have fed is in use: solves under way are waited for, and its sequences are
 * signed with what they gave (as they come, other calls do that bit by bit, when the solve happens to be done). For results
 * that do not depend on the machine's speed: after reading, before measuring. Nothing under way: returns at once. -ETIMEDOUT.
 */
PKV_API int pkv_model_settle(struct pkv_model *model);
/* Sequences of the model must be closed first: -EBUSY. */
PKV_API int pkv_model_close(struct pkv_model *model);

/* ---- sequence ---- */

#define PKV_PERSISTENT 1u /* survives its worker: its sealed blocks stay until pkv_seq_destroy */

PKV_API int pkv_seq_create(struct pkv_model *model, uint32_t max_tokens, uint32_t flags, const char *label,
                           struct pkv_seq **ret);
/* By handle, of the same tenant. -ESTALE: gone; -ENOENT: not this tenant's; -EALREADY: this connection has it open. */
PKV_API int pkv_seq_open(struct pkv_model *model, uint64_t handle, struct pkv_seq **ret);
PKV_API int pkv_seq_close(struct pkv_seq *seq);   /* frees the cache, unless persistent or open elsewhere */
PKV_API int pkv_seq_destroy(struct pkv_seq *seq); /* frees the cache; other holders get -ESTALE */
PKV_API uint64_t pkv_seq_handle(const struct pkv_seq *seq);
/* Rows of a sequence that CPU memory has lost are not served: from when the daemon finds out (scrub-bytes-s), every call that
 * would read rows of the sequence, and pkv_batch_begin, gives -EBADMSG, until it is truncated before them, or freed. */
/* Tokens that every layer has. */
PKV_API uint64_t pkv_seq_tokens(const struct pkv_seq *seq);
/* A child with the parent's first `tokens` tokens; whole blocks are shared, the tail block is copied. -EBADMSG: rows of them
 * are lost. */
PKV_API int pkv_seq_fork(struct pkv_seq *seq, uint64_t tokens, uint32_t max_tokens, struct pkv_seq **ret);
/* Forgets the tokens from `tokens` on, in all layers. -ENOSPC, -ENOMEM: no room to copy the tail block; -EBADMSG: it is
 * lost; then the sequence is cut to the next multiple of 64. */
PKV_API int pkv_seq_truncate(struct pkv_seq *seq, uint64_t tokens);
/* Signs the sequence again with its model's latest calibration; it has kept the one it began with. Reads all its keys, in this
 * call. -EBUSY: another worker has it open, or a fork shares its blocks; -EACCES: another worker writes it. */
PKV_API int pkv_seq_recalibrate(struct pkv_seq *seq);
/* Room for `tokens` more tokens in every layer, so that the appends that follow do not wait. */
PKV_API int pkv_seq_reserve(struct pkv_seq *seq, uint32_t tokens);

/* ---- append ---- */

/* K and V (after RoPE) of new tokens of one layer: k, v [tokens][kv_heads][head_dim] in the model's type. Layers grow
 * independently; a call either appends all its tokens or none.
 * -EOVERFLOW beyond max_tokens, -ENOSPC pool full, -ENOMEM arena full, -EDOM NaN or infinity. */
PKV_API int pkv_append(struct pkv_seq *seq, uint32_t layer, uint32_t tokens, const void *k, const void *v);
/* One token of each of `seqs` sequences: k, v [seqs][kv_heads][head_dim]. On failure, sequences before the failing one
 * have grown: *ret_done of them (may be NULL). */
PKV_API int pkv_append_batch(struct pkv_seq *const *seqs, uint32_t count, uint32_t layer, const void *k, const void *v,
                             uint32_t *ret_done);

/* ---- attend ---- */

struct pkv_budget {
    uint32_t size;        /* sizeof(struct pkv_budget) */
    uint32_t k;           /* selected rows per query token and kv head, beside sinks and recent */
    uint32_t sinks;       /* first tokens, always attended; usual 128 */
    uint32_t recent;      /* last tokens, always attended; usual 128 */
    float top_p;          /* 0: fixed k; else smallest k whose estimated mass reaches top_p, at most k, beside at least one
                           of sinks and recent; PKV_NONE: ignored */
    float scale;          /* of the softmax; 0: 1 / sqrt(head_dim) */
    uint32_t rule;        /* enum pkv_group_rule */
    uint32_t dense;       /* 1: exact attention over all tokens; k, sinks, recent are ignored */
    uint32_t dense_below; /* shorter sequences are attended densely */
};

/* What one call did. */
struct pkv_explain {
    uint64_t queries_dense, queries_sparse;
    uint64_t tokens_seen, tokens_attended; /* times kv heads */
    uint64_t rows_pool, rows_arena;
    uint64_t sign_ns, scan_ns, select_ns, gather_ns, attend_ns;
};

/* Attention of one layer. q [tokens][q_heads][head_dim] in the model's type: the last `queries[i]` tokens of sequence i,
 * sequence after sequence (causal: query j of n sees all but the last n - 1 - j tokens of its sequence).
 * out [tokens][q_heads][head_dim] float, lse [tokens][q_heads] natural logarithm of the softmax sum (may be NULL);
 * explain may be NULL. Direct and served connections give the same bits on the host backend.
 * -EINVAL k of 0, -ERANGE k above a sequence's length (unless it is attended densely), -EDOM NaN or infinity in q. */
PKV_API int pkv_attend(struct pkv_seq *const *seqs, const uint32_t *queries, uint32_t count, uint32_t layer, const void *q,
                       const struct pkv_budget *budget, float *out, float *lse, struct pkv_explain *explain);

/* The selection itself, of one sequence. All arrays are the caller's; rows_max = sinks + recent + k:
 *   index [queries][kv_heads][rows_max] ascending token indices, count [queries][kv_heads],
 *   score [queries][kv_heads][rows_max] (0 for sinks and recent; may be NULL),
 *   rows [queries][kv_heads][rows_max][2][head_dim] K and V in the model's type (may be NULL). */
PKV_API int pkv_select(struct pkv_seq *seq, uint32_t queries, uint32_t layer, const void *q, const struct pkv_budget *budget,
                       uint32_t *index, uint32_t *count, uint16_t *score, void *rows);

/* What the selection costs: exact attention beside it. Means over the queries and q heads given.
 *   *ret_mass softmax probability covered, *ret_error norm(out - exact) / norm(exact). Added to the worker's counters. */
PKV_API int pkv_audit(struct pkv_seq *seq, uint32_t queries, uint32_t layer, const void *q, const struct pkv_budget *budget,
                      double *ret_mass, double *ret_error);

/* ---- decoding in batches: steps in a stream of the caller's ----
 *
 *   pkv_batch_open                      once; all memory is taken here
 *   for each step:
 *     pkv_batch_begin(batch, stream)    places for the new tokens, lengths and tables to the device; never waits for the device
 *                                       unless PKV_BATCH_STEPS steps are in flight
 *     for each layer:
 *       pkv_batch_append, pkv_batch_attend   launches alone: may be captured into a CUDA graph, once, and replayed
 *     pkv_batch_end(batch, stream)      behind the step's last launch; the sequences have grown
 *
 * On a CUDA daemon `stream` is a CUstream (cudaStream_t) and k, v, q, out, lse are device addresses, read and written when the
 * stream comes to it: they must stay until then, and for replays their addresses must be the captured ones. On the host backend
 * the stream is ignored, arrays are the CPU's, calls have done their work when they return, and the bits are those of
 * pkv_append and pkv_attend. A captured graph replays with whatever lengths and tables the step has that it is launched in.
 *
 * While a step is open or in flight its sequences refuse other calls: -EBUSY; pkv_batch_wait ends that. They cannot be closed
 * while they are in a batch. Batches teach a PKV_CODE nothing: prefill with pkv_append and pkv_attend does. They are audited:
 * of each pass over the layers one attend call, captured ones included, launches two small kernels more. */

struct pkv_batch;
#define PKV_BATCH_STEPS 7u /* in flight */

struct pkv_batch_options {
    uint32_t size;        /* sizeof(struct pkv_batch_options) */
    uint32_t queries;     /* new tokens of each sequence in a step; 0: 1 */
    uint64_t cache_bytes; /* of GPU memory, for rows that were fetched from the arena; 0: none */
};

/* Sequences of one model that this worker writes, in the order of the arrays below; `options` may be NULL. Those not longer
 * than sinks + recent + k, or dense_below, are attended densely. -EOPNOTSUPP: a served connection. */
PKV_API int pkv_batch_open(struct pkv_seq *const *seqs, uint32_t count, const struct pkv_budget *budget,
                           const struct pkv_batch_options *options, struct pkv_batch **ret);
/* Waits, with a bound, for the steps in flight. -ETIMEDOUT: they have not ended, and the batch stays. */
PKV_API int pkv_batch_close(struct pkv_batch *batch);
/* -EDOM: an earlier step met NaN or infinity: its tokens and those of later steps are taken back. -ENOSPC, -EOVERFLOW as
 * pkv_append; -ESTALE: a sequence is gone, or its signatures are made in another way now: open the batch again (a captured
 * graph too). After a failure the step is not open. */
PKV_API int pkv_batch_begin(struct pkv_batch *batch, void *stream);
/* k, v [seqs][queries][kv_heads][head_dim] of the step's new tokens, after RoPE. */
PKV_API int pkv_batch_append(struct pkv_batch *batch, uint32_t layer, const void *k, const void *v, void *stream);
/* q, out [seqs][queries][q_heads][head_dim], lse [seqs][queries][q_heads] (may be NULL); after the layer's append. */
PKV_API int pkv_batch_attend(struct pkv_batch *batch, uint32_t layer, const void *q, float *out, float *lse, void *stream);
PKV_API int pkv_batch_end(struct pkv_batch *batch, void *stream);
/* Instead of end: the step's tokens do not count. */
PKV_API int pkv_batch_cancel(struct pkv_batch *batch, void *stream);
/* Until all steps have ended, with a bound. -EDOM as in begin. */
PKV_API int pkv_batch_wait(struct pkv_batch *batch);
/* Rows of the arena that attend chose so far: found in the cache, or fetched. Waits. */
PKV_API int pkv_batch_rows(struct pkv_batch *batch, uint64_t *ret_cached, uint64_t *ret_fetched);

#ifdef __cplusplus
}
#endif

#endif
