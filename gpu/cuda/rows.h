/* Launchers for what only the synchronous calls need: signatures that were made elsewhere, rows by lists that were made
 * elsewhere, attention in pieces. All pointers are device-visible. */
#ifndef GPU_CUDA_ROWS_H
#define GPU_CUDA_ROWS_H

#include "gpu/cuda/cuda.h"

PKV_EXTERN_C_BEGIN

struct cuda_signatures {
    struct pkv_geom geom;
    const uint64_t *base[PKV_TIERS];
    const struct pkv_block_ref *blocks; /* from block 0 of the layer */
    uint64_t first_token;
    uint32_t tokens;
    const uint32_t *from; /* [tokens][kv_heads][words] */
};

/* A list is one query token and kv head. */
struct cuda_rows {
    struct pkv_geom geom;
    const uint64_t *base[PKV_TIERS];
    const struct cuda_seq *seqs;
    const struct cuda_query *query; /* [queries] */
    uint32_t queries, rows_max;
    const uint32_t *index; /* [queries][kv_heads][rows_max] */
    const uint32_t *count; /* [queries][kv_heads] */
    char *to;              /* [queries][kv_heads][rows_max] rows */
};

/* A piece's attention (out, lse) into the state of dense attention: running maximum, sum, and out not yet divided. */
struct cuda_merge {
    uint32_t heads, head_dim; /* heads: query tokens x q heads */
    const float *out, *lse;   /* [heads][head_dim], [heads]; a head that saw no row has an lse of -infinity */
    float *state, *max, *sum; /* [heads][head_dim], [heads], [heads] */
};

int cuda_rows_preload(void);
int cuda_merge_launch(const struct cuda_merge *m, cuda_stream stream);
int cuda_signatures_launch(const struct cuda_signatures *s, cuda_stream stream);
int cuda_rows_launch(const struct cuda_rows *r, cuda_stream stream);

PKV_EXTERN_C_END

#endif
