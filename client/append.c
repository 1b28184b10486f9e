/* Append: grant, write rows, learn, sign, seal. In pieces, so that a prefill larger than the pool passes through it: what one
 * piece sealed can leave the pool while the next waits for its grant. A piece that fails takes the earlier ones back. */
#include "client/internal.h"

#define PIECE_BLOCKS  64u
#define PIECE_SHARE   8u /* of the pool, at most: two pieces of several workers are in it at once */
#define CACHED_BLOCKS 8u

static int grant(struct pkv_seq *seq, uint32_t layer, uint64_t tokens)
{
    struct pkv *kv = seq->model->kv;
    if (pkv_tokens_blocks(tokens) <= seq->granted[layer])
        return 0;
    struct pkv_submission s = {.op = PKV_OP_GRANT, .layer = (uint16_t)layer, .seq = seq->handle};
    s.u.grant.tokens = tokens;
    uint64_t begin = clock_ns();
    int r = ring_call(kv, &s, NULL);
    kv->region->counters.grant_waits++;
    kv->region->counters.grant_wait_ns += clock_ns() - begin;
    if (!r)
        seq->granted[layer] = pkv_tokens_blocks(tokens);
    return r;
}

int seq_seal(struct pkv_seq *seq, uint32_t layer, uint64_t tokens)
{
    uint32_t full = (uint32_t)(tokens / PKV_BLOCK_TOKENS);
    if (full <= seq->sealed[layer])
        return 0;
    struct pkv_submission s = {.op = PKV_OP_SEAL, .layer = (uint16_t)layer, .seq = seq->handle};
    s.u.seal = (struct pkv_op_seal){.first_block = seq->sealed[layer], .count = full - seq->sealed[layer]};
    int r = ring_post(seq->model->kv, &s);
    if (!r)
        seq->sealed[layer] = full;
    return r;
}

static int learn_sign(struct pkv_seq *seq, const struct gpu_observation *o)
{
    struct pkv_model *m = seq->model;
    if (seq->state || seq->scheme != m->scheme0 || !gpu_scheme_observe(m->scheme0, o))
        return 0;
    for (struct pkv_seq *s = m->seqs; s; s = s->next) {
        bool old = s->scheme == m->scheme0 && !s->gone && !(m->turn.to && o->layer < m->turn.layers);
        int r = old ? seq_sign_again(s, o->layer, m->scheme0) : 0;
        s->gone |= r == -PKV_ERR_STALE;
        s->foreign |= r && !s->gone; /* its own next call signs all of it */
    }
    return m->kind == PKV_SCHEME_SIGN && gpu_scheme_settled(m->scheme0) ? model_sign_share(m) : 0;
}

int model_learn(struct pkv_seq *seq, const struct gpu_observation *o)
{
    if (!seq->model->learns)
        return 0;
    calibration_observe(seq->model, o);
    return model_published(seq->model).latest || o->tokens < CALIBRATION_CALL ? 0 : learn_sign(seq, o);
}

int model_learn_keys(struct pkv_seq *seq, uint32_t layer, uint64_t first, uint32_t tokens, const void *k)
{
    struct gpu_observation o = {.layer = layer, .tokens = tokens, .first_token = first, .context = seq->max_tokens, .k = k};
    return model_learn(seq, &o);
}

/* On the CPU rows are signed while they are still in its cache, once the scheme has nothing more to learn from them. */
static int append_direct(struct pkv_seq *seq, uint32_t layer, uint64_t first, uint32_t tokens, const void *k, const void *v)
{
    struct pkv_model *m = seq->model;
    struct pkv *kv = m->kv;
    uint32_t first_block = (uint32_t)(first / PKV_BLOCK_TOKENS), blocks = pkv_tokens_blocks(first + tokens);
    bool cached = gpu_scheme_settled(seq_scheme(seq, layer)) && !gpu_on_device(kv->gpu);
    uint32_t step = cached ? CACHED_BLOCKS * PKV_BLOCK_TOKENS : tokens;
    uint64_t bytes = pkv_geom_row_bytes(&m->geom) / 2 * m->geom.kv_heads;
    struct pkv_block_ref *refs = region_refs(kv, blocks);
    if (!refs)
        return -PKV_ERR_NO_MEMORY;
    /* No epoch: blocks that are granted and not sealed stay where they are. */
    int r = seq_refs(seq, layer, first_block, blocks, refs);
    for (uint32_t done = 0, n; done < tokens && !r; done += n) {
        n = PKV_MIN(step, tokens - done);
        struct gpu_append_args args = {.geom = &m->geom,
                                       .space = region_writable(kv),
                                       .blocks = refs,
                                       .first_token = first + done,
                                       .tokens = n,
                                       .k = (const char *)k + done * bytes,
                                       .v = (const char *)v + done * bytes};
        r = gpu_append(kv->gpu, &args);
        r = r ? r : model_learn_keys(seq, layer, first + done, n, args.k);
        r = r ? r : seq_sign_rows(seq, layer, seq_scheme(seq, layer), refs, first + done, n);
    }
    return r;
}

static int append_piece(struct pkv_seq *seq, uint32_t layer, uint32_t tokens, const char *k, const char *v)
{
    uint64_t first = seq->tokens[layer];
    int r = grant(seq, layer, first + tokens);
    if (r)
        return r;
    r = (seq->model->kv->served ? served_append : append_direct)(seq, layer, first, tokens, k, v);
    r = r ? r : seq_seal(seq, layer, first + tokens);
    if (!r)
        seq->tokens[layer] = first + tokens;
    return r;
}

static uint32_t piece_blocks(const struct pkv_seq *seq)
{
    uint64_t share = seq->model->kv->control->pool_bytes / PIECE_SHARE / pkv_geom_block_bytes(&seq->model->geom);
    return (uint32_t)PKV_MIN(PKV_MAX(share, 1ull), PIECE_BLOCKS);
}

static int append(struct pkv_seq *seq, uint32_t layer, uint32_t tokens, const char *k, const char *v)
{
    struct pkv *kv = seq->model->kv;
    const struct pkv_geom *g = &seq->model->geom;
    int r = seq_check(seq, layer);
    if (!r)
        r = !tokens ? -PKV_ERR_SHAPE : !seq->writer ? -PKV_ERR_NOT_WRITER : 0;
    if (!r && kv->late != PKV_ERR_OK) {
        r = -(int)kv->late;
        kv->late = PKV_ERR_OK;
    }
    if (!r && tokens > seq->max_tokens - seq->tokens[layer])
        r = -PKV_ERR_LENGTH;
    r = r ? r : seq_settle(seq, tokens);
    uint32_t most = piece_blocks(seq);
    uint64_t before = seq->tokens[r ? 0 : layer], bytes = pkv_geom_row_bytes(g) / 2 * g->kv_heads;
    for (uint32_t done = 0, piece; !r && done < tokens; done += piece) {
        uint64_t at = seq->tokens[layer], end = (at / PKV_BLOCK_TOKENS + most) * PKV_BLOCK_TOKENS;
        piece = (uint32_t)PKV_MIN(end - at, (uint64_t)tokens - done);
        r = append_piece(seq, layer, piece, k + done * bytes, v + done * bytes);
        if (r && done)
            (void)seq_cut(seq, layer, before); /* the first failure is the one to tell */
    }
    if (r)
        return r;
    kv->region->counters.append_calls++;
    kv->region->counters.append_tokens += tokens;
    seq_claim(seq);
    return 0;
}

int pkv_append(struct pkv_seq *seq, uint32_t layer, uint32_t tokens, const void *k, const void *v)
{
    return kv_done(seq->model->kv, append(seq, layer, tokens, k, v));
}

int pkv_append_batch(struct pkv_seq *const *seqs, uint32_t count, uint32_t layer, const void *k, const void *v,
                     uint32_t *ret_done)
{
    uint32_t done = 0;
    int r = 0;
    for (; done < count && !r; done += !r) {
        const struct pkv_geom *g = &seqs[done]->model->geom;
        uint64_t at = done * (pkv_geom_row_bytes(g) / 2 * g->kv_heads);
        r = append(seqs[done], layer, 1, (const char *)k + at, (const char *)v + at);
    }
    if (ret_done)
        *ret_done = done;
    return count ? kv_done(seqs[PKV_MIN(done, count - 1)]->model->kv, r) : 0;
}
