/* Served mode: rows, signatures and selections travel through the data area; everything that is arithmetic runs here with the
 * kernels of direct mode, so the bits are the same. */
#include "client/internal.h"

#include "proto/served.h"

#include <math.h>

/* Blocks in memory of our own or in the data area, seen by the kernels as two chunks of a pool. */
struct staging {
    uint64_t base[2]; /* rows, signatures */
    struct pkv_block_ref *refs;
    void *memory;
};

static void staging_free(struct staging *s)
{
    free(s->refs);
    free(s->memory);
}

/* Signatures for `blocks` blocks; rows as well unless they lie at `rows`. */
static int staging_make(const struct pkv_geom *g, uint32_t blocks, void *rows, struct staging *s)
{
    uint64_t row_bytes = rows ? 0 : blocks * pkv_geom_block_bytes(g);
    s->refs = malloc(blocks * sizeof(*s->refs));
    s->memory = aligned_alloc(64, PKV_ALIGN_UP(row_bytes + blocks * pkv_geom_sig_block_bytes(g), 64));
    if (!s->refs || !s->memory) {
        staging_free(s);
        return -PKV_ERR_NO_MEMORY;
    }
    s->base[0] = (uint64_t)(uintptr_t)(rows ? rows : s->memory);
    s->base[1] = (uint64_t)(uintptr_t)s->memory + row_bytes;
    for (uint32_t b = 0; b < blocks; b++)
        s->refs[b] = (struct pkv_block_ref){pkv_place(PKV_TIER_POOL, 0, b, 1), pkv_place(PKV_TIER_POOL, 1, b, 1)};
    return 0;
}

static int staging_sign(struct pkv_seq *seq, uint32_t layer, struct gpu_scheme *scheme, const struct staging *s, uint32_t first,
                        uint32_t tokens)
{
    struct pkv_model *m = seq->model;
    struct gpu_sign_args args = {.geom = &m->geom,
                                 .space = {{NULL, s->base, NULL}},
                                 .scheme = scheme,
                                 .layer = layer,
                                 .blocks = s->refs,
                                 .first_token = first,
                                 .tokens = tokens};
    return gpu_sign(m->kv->gpu, &args);
}

static void signatures_out(const struct pkv_geom *g, const struct staging *s, uint32_t first, uint32_t tokens, char *to)
{
    gpu_signatures_list(g, (const void *)(uintptr_t)s->base[1], first, tokens, to);
}

static int send_append(struct pkv_seq *seq, uint32_t layer, uint64_t first, uint32_t tokens, uint32_t flags, uint64_t bytes)
{
    struct pkv_submission s = {.op = PKV_OP_APPEND, .layer = (uint16_t)layer, .seq = seq->handle};
    s.u.append = (struct pkv_op_append){.first_token = first, .tokens = tokens, .flags = flags, .data_bytes = bytes};
    return ring_call(seq->model->kv, &s, NULL);
}

/* Tokens of one APPEND that the data area holds. */
static uint32_t append_room(const struct pkv_seq *seq)
{
    const struct pkv_geom *g = &seq->model->geom;
    uint64_t each = g->kv_heads * (pkv_geom_row_bytes(g) + pkv_geom_words(g) * 4ull), room = seq->model->kv->data_bytes - 192;
    return (uint32_t)PKV_MIN(room / each, PKV_SEQ_TOKENS_MAX);
}

int served_append(struct pkv_seq *seq, uint32_t layer, uint64_t first, uint32_t tokens, const void *k, const void *v)
{
    struct pkv *kv = seq->model->kv;
    const struct pkv_geom *g = &seq->model->geom;
    uint32_t in = (uint32_t)(first % PKV_BLOCK_TOKENS), room = append_room(seq);
    uint64_t half = pkv_geom_row_bytes(g) / 2 * g->kv_heads;
    struct staging s;
    int r = room ? staging_make(g, pkv_tokens_blocks((uint64_t)in + tokens), NULL, &s) : -PKV_ERR_DATA_SMALL;
    if (r)
        return r;
    struct gpu_append_args rows = {
        .geom = g, .space = {{NULL, s.base, NULL}}, .blocks = s.refs, .first_token = in, .tokens = tokens, .k = k, .v = v};
    r = gpu_append(kv->gpu, &rows);
    r = r ? r : model_learn_keys(seq, layer, first, tokens, k);
    r = r ? r : staging_sign(seq, layer, seq_scheme(seq, layer), &s, in, tokens);
    for (uint32_t done = 0, n; done < tokens && !r; done += n) {
        n = PKV_MIN(room, tokens - done);
        struct pkv_served_append at = pkv_served_append(g, n, 0);
        memcpy(kv->data + at.k, (const char *)k + done * half, n * half);
        memcpy(kv->data + at.v, (const char *)v + done * half, n * half);
        signatures_out(g, &s, in + done, n, kv->data + at.signatures);
        r = send_append(seq, layer, first + done, n, 0, at.bytes);
    }
    staging_free(&s);
    return r;
}

int served_read(struct pkv_seq *seq, uint32_t layer, uint32_t first, uint32_t count)
{
    struct pkv *kv = seq->model->kv;
    struct pkv_submission s = {.op = PKV_OP_READ, .layer = (uint16_t)layer, .seq = seq->handle};
    s.u.read = (struct pkv_op_read){.first_block = first, .count = count, .out_bytes = kv->data_bytes};
    return ring_call(kv, &s, NULL);
}

int served_sign_list(struct pkv_seq *seq, uint32_t layer, struct gpu_scheme *scheme, uint64_t first, uint32_t tokens, char *ret)
{
    struct pkv *kv = seq->model->kv;
    const struct pkv_geom *g = &seq->model->geom;
    uint64_t each = g->kv_heads * pkv_geom_words(g) * 4ull, end = first + tokens;
    uint32_t room = (uint32_t)(kv->data_bytes / pkv_geom_block_bytes(g));
    int r = room ? 0 : -PKV_ERR_DATA_SMALL;
    for (uint64_t at = first, n; at < end && !r; at += n) {
        uint32_t block = (uint32_t)(at / PKV_BLOCK_TOKENS), in = (uint32_t)(at % PKV_BLOCK_TOKENS);
        n = PKV_MIN((uint64_t)room * PKV_BLOCK_TOKENS - in, end - at);
        uint32_t blocks = pkv_tokens_blocks(in + n);
        struct staging s;
        r = staging_make(g, blocks, kv->data, &s);
        if (r)
            return r;
        r = served_read(seq, layer, block, blocks);
        r = r ? r : staging_sign(seq, layer, scheme, &s, in, (uint32_t)n);
        if (!r)
            signatures_out(g, &s, in, (uint32_t)n, ret + (at - first) * each);
        staging_free(&s);
    }
    return r;
}

int served_put_signatures(struct pkv_seq *seq, uint32_t layer, uint32_t tokens, const char *list)
{
    struct pkv *kv = seq->model->kv;
    const struct pkv_geom *g = &seq->model->geom;
    uint64_t each = g->kv_heads * pkv_geom_words(g) * 4ull;
    uint32_t room = (uint32_t)PKV_MIN((kv->data_bytes - 192) / each, PKV_SEQ_TOKENS_MAX);
    int r = 0;
    for (uint32_t done = 0, n; done < tokens && !r; done += n) {
        n = PKV_MIN(room, tokens - done);
        struct pkv_served_append at = pkv_served_append(g, n, PKV_APPEND_SIGNATURES);
        memcpy(kv->data + at.signatures, list + done * each, n * each);
        r = send_append(seq, layer, done, n, PKV_APPEND_SIGNATURES, at.bytes);
    }
    return r;
}

/* ---- dense ---- */

/* References by which the kernels find block b at slot b % room of the data area, in the tier where it really lies. */
static struct pkv_block_ref *window_refs(const struct gpu_view *view, uint32_t room)
{
    uint32_t blocks = pkv_tokens_blocks(view->tokens);
    struct pkv_block_ref *refs = malloc(blocks * sizeof(*refs));
    for (uint32_t b = 0; refs && b < blocks; b++)
        refs[b] = (struct pkv_block_ref){pkv_place(pkv_place_tier(view->blocks[b].rows), 0, b % room, 1), 0};
    return refs;
}

static int attend_dense(const struct attend_part *p, struct gpu_explain *explain)
{
    struct pkv_model *m = p->seq->model;
    uint32_t room = (uint32_t)(m->kv->data_bytes / pkv_geom_block_bytes(&m->geom)), blocks = pkv_tokens_blocks(p->view.tokens);
    uint64_t heads = (uint64_t)p->view.queries * m->geom.q_heads, base = (uint64_t)(uintptr_t)m->kv->data;
    if (!room)
        return -PKV_ERR_DATA_SMALL;
    struct gpu_view view = p->view;
    struct pkv_block_ref *refs = window_refs(&p->view, room);
    float *state = malloc(2 * heads * sizeof(*state));
    int r = refs && state ? 0 : -PKV_ERR_NO_MEMORY;
    view.blocks = refs;
    struct gpu_dense_args args = {.geom = &m->geom,
                                  .space = {{NULL, &base, &base}},
                                  .scale = p->policy.scale,
                                  .seqs = 1,
                                  .views = &view,
                                  .q = p->q,
                                  .out = p->out,
                                  .max = state,
                                  .sum = state + heads,
                                  .lse = p->lse,
                                  .explain = explain};
    for (uint32_t b = 0; b < blocks && !r; b += args.blocks) {
        args.first_block = b, args.blocks = PKV_MIN(room, blocks - b);
        args.start = b == 0, args.finish = b + args.blocks == blocks;
        r = served_read(p->seq, p->layer, b, args.blocks);
        r = r ? r : gpu_dense(m->kv->gpu, &args);
    }
    free(refs);
    free(state);
    return r;
}

/* ---- select ---- */

/* How many queries the data area holds at once, with their results. */
static uint32_t select_room(const struct attend_part *p, uint32_t rows_max, uint32_t flags)
{
    const struct pkv_geom *g = &p->seq->model->geom;
    uint32_t n = p->view.queries;
    while (n && pkv_served_query(g, n).bytes + pkv_served_result(g, n, rows_max, flags).bytes > p->seq->model->kv->data_bytes)
        n /= 2;
    return n;
}

/* Query tokens [first, first + count) of a part, as a part of its own. */
static struct attend_part slice(const struct attend_part *p, uint32_t first, uint32_t count)
{
    const struct pkv_geom *g = &p->seq->model->geom;
    struct attend_part s = *p;
    uint64_t heads = (uint64_t)first * g->q_heads;
    s.view.tokens -= p->view.queries - first - count;
    s.view.queries = count;
    s.q = (const char *)p->q + heads * g->head_dim * pkv_dtype_bytes(g->dtype);
    s.out = p->out ? p->out + heads * g->head_dim : NULL;
    s.lse = p->lse ? p->lse + heads : NULL;
    return s;
}

/* Selects for all queries of the part; the result lies in the data area at out_off. */
static int select_call(const struct attend_part *p, uint32_t rows_max, uint32_t flags, uint64_t *ret_out_off)
{
    struct pkv_model *m = p->seq->model;
    const struct pkv_geom *g = &m->geom;
    char *data = m->kv->data;
    struct pkv_served_query at = pkv_served_query(g, p->view.queries);
    struct gpu_weights_args sign = {.geom = g,
                                    .scheme = seq_scheme(p->seq, p->layer),
                                    .layer = p->layer,
                                    .queries = p->view.queries,
                                    .scale = p->policy.scale,
                                    .q = p->q,
                                    .ret_weights = (int8_t *)data + at.weights,
                                    .ret_scales = (float *)(void *)(data + at.scales)};
    struct pkv_select_args args = {.tokens = p->view.tokens,
                                   .queries = p->view.queries,
                                   .k = p->policy.k,
                                   .top_p = p->policy.top_p,
                                   .scale = p->policy.scale > 0 ? p->policy.scale : 1.0f / sqrtf((float)g->head_dim),
                                   .sinks = p->policy.sinks,
                                   .recent = p->policy.recent,
                                   .rule = p->policy.rule,
                                   .flags = flags};
    enum pkv_err e = pkv_check_select(&args);
    int r = e != PKV_ERR_OK ? -(int)e : gpu_weights(m->kv->gpu, &sign);
    if (r)
        return r;
    memcpy(data, &args, sizeof(args));
    memcpy(data + at.q, p->q, (uint64_t)p->view.queries * g->q_heads * g->head_dim * pkv_dtype_bytes(g->dtype));
    struct pkv_submission s = {.op = PKV_OP_SELECT, .layer = (uint16_t)p->layer, .seq = p->seq->handle};
    s.u.select = (struct pkv_op_select){
        .data_bytes = at.bytes, .out_off = at.bytes, .out_bytes = pkv_served_result(g, p->view.queries, rows_max, flags).bytes};
    *ret_out_off = at.bytes;
    return ring_call(m->kv, &s, NULL);
}

static int attend_slice(const struct attend_part *p, uint32_t rows_max, struct gpu_explain *explain)
{
    struct pkv_model *m = p->seq->model;
    uint64_t off;
    int r = select_call(p, rows_max, 0, &off);
    if (r)
        return r;
    struct pkv_served_result at = pkv_served_result(&m->geom, p->view.queries, rows_max, 0);
    char *out = m->kv->data + off;
    struct gpu_rows rows = {
        .rows_max = rows_max, .index = (uint32_t *)(void *)(out + at.index), .count = (uint32_t *)(void *)(out + at.count)};
    struct gpu_select_args args = {
        .geom = &m->geom, .policy = p->policy, .seqs = 1, .views = &p->view, .q = p->q, .explain = explain};
    return gpu_attend_rows(m->kv->gpu, &args, &rows, out + at.rows, p->out, p->lse);
}

int served_attend(const struct attend_part *p, struct gpu_explain *explain)
{
    int dense = policy_dense(&p->policy, p->view.tokens);
    if (dense)
        return dense < 0 ? dense : attend_dense(p, explain);
    uint32_t rows_max = p->policy.sinks + p->policy.recent + p->policy.k, room = select_room(p, rows_max, 0);
    int r = room ? 0 : -PKV_ERR_DATA_SMALL;
    for (uint32_t at = 0, n; at < p->view.queries && !r; at += n) {
        n = PKV_MIN(room, p->view.queries - at);
        struct attend_part s = slice(p, at, n);
        r = attend_slice(&s, rows_max, explain);
    }
    return r;
}

int served_select(const struct attend_part *p, const struct gpu_rows *rows, void *gathered)
{
    const struct pkv_geom *g = &p->seq->model->geom;
    uint32_t flags = gathered ? 0 : PKV_SELECT_NO_ROWS, room = select_room(p, rows->rows_max, flags);
    int r = room ? 0 : -PKV_ERR_DATA_SMALL;
    for (uint32_t done = 0, n; done < p->view.queries && !r; done += n) {
        n = PKV_MIN(room, p->view.queries - done);
        struct attend_part s = slice(p, done, n);
        uint64_t off, lists = (uint64_t)n * g->kv_heads, list = (uint64_t)done * g->kv_heads;
        r = select_call(&s, rows->rows_max, flags, &off);
        if (r)
            break;
        struct pkv_served_result at = pkv_served_result(g, n, rows->rows_max, flags);
        const char *out = p->seq->model->kv->data + off;
        uint64_t first = list * rows->rows_max, count = lists * rows->rows_max;
        memcpy(rows->count + list, out + at.count, lists * sizeof(uint32_t));
        memcpy(rows->index + first, out + at.index, count * sizeof(uint32_t));
        if (rows->score)
            memcpy(rows->score + first, out + at.score, count * sizeof(uint16_t));
        if (gathered)
            memcpy((char *)gathered + first * pkv_geom_row_bytes(g), out + at.rows, count * pkv_geom_row_bytes(g));
    }
    return r;
}
