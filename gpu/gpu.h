/* The door of gpu: arrays into arrays, on the CPU (`host`) or on a GPU (`cuda`, where the module and a device are). Nothing
 * here prints, exits, or knows of sockets. Functions return 0 or -enum pkv_err (negated error id, so that the caller has the
 * sentence: pkv_err_text(-r), pkv_err_status(-r)).
 *
 * Arrays are the caller's, in CPU memory, whatever the backend; what a place names is the backend's: a gpu_space holds
 * addresses of the CPU on `host`, of the device on `cuda`. A call returns when its work is done. On `cuda` every wait has a
 * bound; a device that does not answer counts as lost: -PKV_ERR_GPU_LOST, from then on.
 *
 * A struct gpu belongs to one thread at a time; it owns its worker threads and its workspace. */
#ifndef GPU_GPU_H
#define GPU_GPU_H

#include "proto/err.h"
#include "proto/table.h"
#include "proto/wire.h"

#include <stdbool.h>

PKV_EXTERN_C_BEGIN

struct gpu;
struct gpu_device;
struct gpu_scheme;

struct gpu_options {
    const char *backend;       /* "host" or "cuda"; NULL: "host" */
    const char *isa;           /* host: "c", "avx2", "avx512"; NULL: the best that the CPU has */
    uint32_t threads;          /* host: 1..64; 0: one per CPU that the process may use */
    struct gpu_device *device; /* cuda: the one to use (gpu/device.h), open longer than this */
};

int gpu_open(const struct gpu_options *options, struct gpu **ret);
void gpu_close(struct gpu *gpu);
bool gpu_on_device(const struct gpu *gpu);       /* places are a device's */
const char *gpu_describe(const struct gpu *gpu); /* "host avx512, 2 threads" */

/* Where chunks are mapped in this process. */
struct gpu_space {
    const uint64_t *base[PKV_TIERS]; /* [tier][PKV_CHUNKS_MAX] addresses; 0: not mapped. base[PKV_TIER_NONE] is unused */
};

/* One sequence as the kernels see it, in one layer. */
struct gpu_view {
    const struct pkv_block_ref *blocks; /* [blocks of tokens] */
    uint64_t tokens;                    /* length, the queries' own tokens included */
    uint32_t queries;                   /* query tokens; query i sees the first tokens - queries + 1 + i tokens */
    uint32_t reserved;
};

struct gpu_policy {
    uint32_t k;             /* selected rows beside sinks and recent, per query token and kv head */
    float top_p;            /* 0: fixed k; else the smallest k whose estimated mass reaches top_p, k being the cap */
    float scale;            /* of the softmax; 0: 1 / sqrt(head_dim) */
    uint32_t sinks, recent; /* always attended */
    uint32_t rule;          /* enum pkv_rule */
    uint32_t dense_below;   /* sequences shorter than this are attended densely */
};

/* What a call did; added to, never reset. */
struct gpu_explain {
    uint64_t dense, sparse;  /* query tokens */
    uint64_t seen, attended; /* tokens times kv heads */
    uint64_t rows_pool, rows_arena;
    uint64_t sign_ns, scan_ns, select_ns, gather_ns, attend_ns;
};

/* ---- append ---- */

/* Rows of `tokens` new tokens of one sequence and layer into blocks that are writable in `space`. NaN or infinity in k
 * or v is found before anything is written: -PKV_ERR_NOT_FINITE. */
struct gpu_append_args {
    const struct pkv_geom *geom;
    struct gpu_space space; /* writable mappings */
    const struct pkv_block_ref *blocks;
    uint64_t first_token;
    uint32_t tokens;
    const void *k, *v;                       /* [tokens][kv_heads][head_dim] in the model's dtype */
    uint64_t k_token_stride, v_token_stride; /* bytes; 0: dense */
};
int gpu_append(struct gpu *gpu, const struct gpu_append_args *args);

/* Signatures of tokens whose rows lie in the blocks already. */
struct gpu_sign_args {
    const struct pkv_geom *geom;
    struct gpu_space space;
    const struct gpu_scheme *scheme;
    uint32_t layer;
    const struct pkv_block_ref *blocks;
    uint64_t first_token;
    uint32_t tokens;
};
int gpu_sign(struct gpu *gpu, const struct gpu_sign_args *args);
/* Into `ret` instead of the blocks, as gpu_put_signatures takes them. -PKV_ERR_UNSUPPORTED: on a device. */
int gpu_sign_list(struct gpu *gpu, const struct gpu_sign_args *args, void *ret);

/* Signatures that were made elsewhere, [tokens][kv_heads][words], into blocks that are writable in `space`. */
struct gpu_signatures_args {
    const struct pkv_geom *geom;
    struct gpu_space space;
    const struct pkv_block_ref *blocks;
    uint64_t first_token;
    uint32_t tokens;
    const void *signatures;
};
int gpu_put_signatures(struct gpu *gpu, const struct gpu_signatures_args *args);

/* From signature blocks in CPU memory, one after the other, into that order: tokens [first, first + tokens) of them. */
void gpu_signatures_list(const struct pkv_geom *geom, const void *blocks, uint32_t first, uint32_t tokens, void *ret);

/* Whole blocks, as geom.h lays them out, one after the other. */
struct gpu_read_args {
    const struct pkv_geom *geom;
    struct gpu_space space;
    const struct pkv_block_ref *blocks; /* from block 0 of the layer */
    uint32_t first_block, count;
    void *ret_rows;       /* [count] blocks; NULL: not wanted */
    void *ret_signatures; /* likewise */
};
int gpu_read(struct gpu *gpu, const struct gpu_read_args *args);

/* ---- select and attend ---- */

/* Queries into weights: one int8 per signature bit and q head, one scale per q head such that
 * scale x (sum of the weights of the set bits) estimates log2(e) x softmax scale x (q . k) up to a constant per query. */
struct gpu_weights_args {
    const struct pkv_geom *geom;
    const struct gpu_scheme *scheme;
    uint32_t layer;
    uint32_t queries;
    float scale;         /* of the softmax; 0: 1 / sqrt(head_dim) */
    const void *q;       /* [queries][q_heads][head_dim] */
    int8_t *ret_weights; /* [queries][q_heads][sig_bits] */
    float *ret_scales;   /* [queries][q_heads] */
};
int gpu_weights(struct gpu *gpu, const struct gpu_weights_args *args);

/* Which rows each query token and kv head attends: sinks, the k best of the others, recent; ascending token indices.
 * Exact top-k over the codes (gpu/code.h), ties to the lower index. Lists of a query shorter than sinks + recent + k
 * hold all its tokens. */
struct gpu_rows {
    uint32_t rows_max; /* sinks + recent + k */
    uint32_t *index;   /* [queries][kv_heads][rows_max] */
    uint32_t *count;   /* [queries][kv_heads] */
    uint16_t *score;   /* [queries][kv_heads][rows_max] codes, 0 for sinks and recent; may be NULL */
};
struct gpu_select_args {
    const struct pkv_geom *geom;
    struct gpu_space space;
    struct gpu_policy policy;
    uint32_t seqs;
    const struct gpu_view *views; /* [seqs]; queries of all views lie one after the other below */
    const void *q;                /* [queries][q_heads][head_dim] */
    const int8_t *weights;        /* [queries][q_heads][sig_bits] */
    const float *scales;          /* [queries][q_heads] */
    struct gpu_explain *explain;  /* may be NULL */
};
int gpu_select(struct gpu *gpu, const struct gpu_select_args *args, const struct gpu_rows *ret_rows);

/* Rows side by side: ret [queries][kv_heads][rows_max][2][head_dim] in the model's dtype. */
int gpu_gather(struct gpu *gpu, const struct gpu_select_args *args, const struct gpu_rows *rows, void *ret);

/* Exact attention over listed rows. `gathered` as gpu_gather made it, or NULL to read the rows where the views say.
 * Same bits either way. out [queries][q_heads][head_dim] float, lse [queries][q_heads] natural logarithm. */
int gpu_attend_rows(struct gpu *gpu, const struct gpu_select_args *args, const struct gpu_rows *rows, const void *gathered,
                    float *ret_out, float *ret_lse);

/* Exact attention over all tokens, block by block in order, so that the result does not depend on how a caller cuts the
 * blocks into pieces. `first_block`, `blocks`: the piece (views[i].blocks still starts at block 0 of the sequence).
 * State per query and q head: running maximum, sum, and out not yet divided; `start` resets, `finish` divides. */
struct gpu_dense_args {
    const struct pkv_geom *geom;
    struct gpu_space space;
    float scale;
    uint32_t seqs;
    const struct gpu_view *views;
    const void *q;
    uint32_t first_block, blocks; /* UINT32_MAX blocks: to the end */
    uint32_t first_head, heads;   /* kv heads; 0 heads: all. State and out of the others are not touched */
    bool start, finish;
    float *out; /* [queries][q_heads][head_dim] */
    float *max; /* [queries][q_heads] */
    float *sum; /* [queries][q_heads] */
    float *lse; /* [queries][q_heads], written by finish */
    struct gpu_explain *explain;
};
int gpu_dense(struct gpu *gpu, const struct gpu_dense_args *args);

/* The whole attend of direct mode: weights, scan, select, attention; dense for views shorter than dense_below or than
 * sinks + recent + k. */
struct gpu_attend_args {
    const struct pkv_geom *geom;
    struct gpu_space space;
    struct gpu_policy policy;
    const struct gpu_scheme *scheme;
    uint32_t layer;
    uint32_t seqs;
    const struct gpu_view *views;
    const void *q;
    float *out; /* [queries][q_heads][head_dim] */
    float *lse; /* [queries][q_heads]; may be NULL */
    struct gpu_explain *explain;
};
int gpu_attend(struct gpu *gpu, const struct gpu_attend_args *args);

/* ---- signature schemes ---- */

/* `path`: weights in safetensors; may be NULL for `sign`, `none` and `code`. `ret_digest` of the file, zero without one. */
int gpu_scheme_open(uint32_t kind, const struct pkv_geom *geom, const char *path, struct gpu_scheme **ret,
                    uint8_t ret_digest[PKV_DIGEST_BYTES]);
void gpu_scheme_close(struct gpu_scheme *scheme);

/* Whether `code` needs no file in this build. */
bool gpu_scheme_calibrates(void);

/* A scheme without a file learns from the first tokens: `sign` the keys' mean per layer and head, within observe. `code` serves
 * as `sign`, until one that has gathered the moments of keys and queries is solved, beside the serving path. */
#define GPU_LEARN_EARLY  1008u /* keys, and tokens with queries, of a layer that can be solved */
#define GPU_LEARN_TOKENS 4080u /* more are not gathered; half as many: 1 to 3 % more error */

/* Post-RoPE vectors of consecutive tokens of a layer. */
struct gpu_observation {
    uint32_t layer, tokens;
    uint64_t first_token;
    uint64_t context; /* tokens that are to be served, above zero */
    const void *k;    /* [tokens][kv_heads][head_dim] or NULL */
    const void *q;    /* [tokens][q_heads][head_dim] or NULL */
};
/* True: `sign` knows the layer's mean now, and blocks signed before must be signed again. */
bool gpu_scheme_observe(struct gpu_scheme *scheme, const struct gpu_observation *observation);
uint64_t gpu_scheme_version(const struct gpu_scheme *scheme); /* another one after every change of what it signs */
bool gpu_scheme_settled(const struct gpu_scheme *scheme);     /* no layer will change any more */

/* From now on observe gathers, too (67 MB for 32 layers x 8 heads of 128); positions turn vectors by this rope (base 0: not at
 * all). -PKV_ERR_UNSUPPORTED: not a `code` without a file. */
int gpu_scheme_gather(struct gpu_scheme *scheme, float base, uint32_t dims, bool interleaved);
bool gpu_scheme_gathered(const struct gpu_scheme *scheme, uint32_t layer, uint32_t tokens); /* so many, of both sides */
/* A layer's moments as they are now, to a scheme that gathers too. */
void gpu_scheme_gathered_copy(const struct gpu_scheme *from, uint32_t layer, struct gpu_scheme *to);
/* Ends the gathering. Takes seconds for a large model, on any thread while nobody else uses the scheme. A layer that cannot be
 * solved is left to `sign`; with `all` that is a failure. `stop` (may be NULL), set by another thread, ends it within a layer's
 * time: -PKV_ERR_BUSY. -PKV_ERR_NOT_FINITE: nothing can be solved from what was gathered. */
int gpu_scheme_solve(struct gpu_scheme *scheme, bool all, const bool *stop);

/* The learnt state as bytes, so that other workers sign alike. Import refuses what does not fit: -PKV_ERR_FILE_FIT. */
uint64_t gpu_scheme_state_bytes(const struct gpu_scheme *scheme);
void gpu_scheme_state_export(const struct gpu_scheme *scheme, void *ret);
int gpu_scheme_state_import(struct gpu_scheme *scheme, const void *state, uint64_t bytes);

PKV_EXTERN_C_END

#endif
