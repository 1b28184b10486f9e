/* Geometry of a model and the index arithmetic that follows from it; host and device read the same functions.
 *
 * A row is K then V of one token and kv head, adjacent. A block holds PKV_BLOCK_TOKENS tokens of one layer:
 *   rows        [kv_heads][PKV_BLOCK_TOKENS] of { K [head_dim], V [head_dim] } in the model's dtype
 *   signatures  [kv_heads][PKV_BLOCK_TOKENS / 4][words][4] uint32: groups of four tokens, word by word, so that one
 *               16-byte load holds one word of four tokens (reference/kernels: it is the tensor-core fragment). */
#ifndef PROTO_GEOM_H
#define PROTO_GEOM_H

#include "proto/limits.h"

enum pkv_dtype { PKV_F32 = 0, PKV_F16 = 1, PKV_BF16 = 2, PKV_DTYPES = 3 };

struct pkv_geom {
    uint16_t layers;
    uint16_t q_heads;
    uint16_t kv_heads; /* divides q_heads; q head h reads kv head h / (q_heads / kv_heads) */
    uint16_t head_dim; /* 64, 96, 128 or 256 */
    uint16_t dtype;    /* enum pkv_dtype, of K and V */
    uint16_t sig_bits; /* per token and kv head: 32..256, a multiple of 32; 0: no signatures (PKV_SCHEME_NONE) */
    uint32_t reserved; /* zero */
};
PKV_WIRE_ASSERT(struct pkv_geom, 16, 4, 6 * 2 + 4, reserved, 12);

static inline PKV_HD uint32_t pkv_dtype_bytes(uint32_t dtype)
{
    return dtype == PKV_F32 ? 4u : 2u;
}

static inline PKV_HD uint32_t pkv_geom_group(const struct pkv_geom *g)
{
    return g->q_heads / (uint32_t)g->kv_heads;
}

static inline PKV_HD uint32_t pkv_geom_words(const struct pkv_geom *g)
{
    return g->sig_bits / 32u;
}

/* Bytes of one row: K and V of one token and kv head. */
static inline PKV_HD uint64_t pkv_geom_row_bytes(const struct pkv_geom *g)
{
    return 2ull * g->head_dim * pkv_dtype_bytes(g->dtype);
}

static inline PKV_HD uint64_t pkv_geom_block_bytes(const struct pkv_geom *g)
{
    return (uint64_t)g->kv_heads * PKV_BLOCK_TOKENS * pkv_geom_row_bytes(g);
}

static inline PKV_HD uint64_t pkv_geom_sig_block_bytes(const struct pkv_geom *g)
{
    return (uint64_t)g->kv_heads * PKV_BLOCK_TOKENS * pkv_geom_words(g) * 4u;
}

/* Byte offset of the row of `token` (0..63) and `head` in its block. */
static inline PKV_HD uint64_t pkv_geom_row_offset(const struct pkv_geom *g, uint32_t head, uint32_t token)
{
    return ((uint64_t)head * PKV_BLOCK_TOKENS + token) * pkv_geom_row_bytes(g);
}

/* Index, in uint32 words, of word `word` of the signature of `token` (0..63) and `head` in its signature block. */
static inline PKV_HD uint32_t pkv_geom_sig_index(const struct pkv_geom *g, uint32_t head, uint32_t token, uint32_t word)
{
    uint32_t words = pkv_geom_words(g);
    return head * PKV_BLOCK_TOKENS * words + (token / 4u) * 4u * words + word * 4u + token % 4u;
}

static inline PKV_HD uint32_t pkv_tokens_blocks(uint64_t tokens)
{
    return (uint32_t)((tokens + PKV_BLOCK_TOKENS - 1) / PKV_BLOCK_TOKENS);
}

#endif
