/* Where the parts of a served call lie in the data area. Both sides compute it from numbers that were checked, so no
 * offset inside a call crosses the border. Every part begins on a multiple of 64 bytes. */
#ifndef PROTO_SERVED_H
#define PROTO_SERVED_H

#include "proto/wire.h"

static inline uint64_t pkv_served_part(uint64_t *end, uint64_t bytes)
{
    uint64_t at = *end;
    *end = PKV_ALIGN_UP(at + bytes, 64ull);
    return at;
}

/* APPEND. k, v [tokens][kv_heads][head_dim]; signatures [tokens][kv_heads][words]. With PKV_APPEND_SIGNATURES k and v are
 * absent. */
struct pkv_served_append {
    uint64_t k, v, signatures, bytes;
};
static inline struct pkv_served_append pkv_served_append(const struct pkv_geom *g, uint32_t tokens, uint32_t flags)
{
    struct pkv_served_append at = {0, 0, 0, 0};
    uint64_t half = flags & PKV_APPEND_SIGNATURES ? 0 : pkv_geom_row_bytes(g) / 2 * g->kv_heads * tokens;
    at.k = pkv_served_part(&at.bytes, half);
    at.v = pkv_served_part(&at.bytes, half);
    at.signatures = pkv_served_part(&at.bytes, (uint64_t)tokens * g->kv_heads * pkv_geom_words(g) * 4);
    return at;
}

/* SELECT, what goes in: struct pkv_select_args, then q [queries][q_heads][head_dim] in the model's dtype,
 * weights [queries][q_heads][sig_bits] int8, scales [queries][q_heads] float (log2-score per unit of integer score). */
struct pkv_served_query {
    uint64_t q, weights, scales, bytes;
};
static inline struct pkv_served_query pkv_served_query(const struct pkv_geom *g, uint32_t queries)
{
    struct pkv_served_query at = {0, 0, 0, sizeof(struct pkv_select_args)};
    uint64_t heads = (uint64_t)queries * g->q_heads;
    at.q = pkv_served_part(&at.bytes, heads * g->head_dim * pkv_dtype_bytes(g->dtype));
    at.weights = pkv_served_part(&at.bytes, heads * g->sig_bits);
    at.scales = pkv_served_part(&at.bytes, heads * sizeof(float));
    return at;
}

/* SELECT, what comes out: count [queries][kv_heads] uint32, index [queries][kv_heads][rows_max] uint32,
 * score [queries][kv_heads][rows_max] uint16, rows [queries][kv_heads][rows_max][2][head_dim] (absent with
 * PKV_SELECT_NO_ROWS). rows_max = sinks + recent + k. */
struct pkv_served_result {
    uint64_t count, index, score, rows, bytes;
};
static inline struct pkv_served_result pkv_served_result(const struct pkv_geom *g, uint32_t queries, uint32_t rows_max,
                                                         uint32_t flags)
{
    struct pkv_served_result at = {0, 0, 0, 0, 0};
    uint64_t lists = (uint64_t)queries * g->kv_heads;
    at.count = pkv_served_part(&at.bytes, lists * sizeof(uint32_t));
    at.index = pkv_served_part(&at.bytes, lists * rows_max * sizeof(uint32_t));
    at.score = pkv_served_part(&at.bytes, lists * rows_max * sizeof(uint16_t));
    at.rows = pkv_served_part(&at.bytes, flags & PKV_SELECT_NO_ROWS ? 0 : lists * rows_max * pkv_geom_row_bytes(g));
    return at;
}

#endif
