/* Signatures of rows that lie in their blocks: in place, or beside them and later put in place. */
#include "client/internal.h"

int seq_sign_rows(struct pkv_seq *seq, uint32_t layer, struct gpu_scheme *scheme, const struct pkv_block_ref *refs,
                  uint64_t first, uint32_t tokens)
{
    struct pkv_model *m = seq->model;
    struct gpu_sign_args args = {.geom = &m->geom,
                                 .space = region_writable(m->kv),
                                 .scheme = scheme,
                                 .layer = layer,
                                 .blocks = refs,
                                 .first_token = first,
                                 .tokens = tokens};
    return gpu_sign(m->kv->gpu, &args);
}

/* What is done with a layer's tokens [first, first + tokens), their blocks held. */
struct work {
    struct pkv_seq *seq;
    uint32_t layer, tokens;
    uint64_t first;
    struct gpu_scheme *scheme;
    char *list;
    int (*of)(const struct work *work, const struct pkv_block_ref *refs);
};

/* Rows may lie in the arena: a reader like any other. */
static int in_epoch(const struct work *w)
{
    struct pkv *kv = w->seq->model->kv;
    uint32_t first = (uint32_t)(w->first / PKV_BLOCK_TOKENS), last = pkv_tokens_blocks(w->first + w->tokens);
    struct pkv_block_ref *refs = malloc(last * sizeof(*refs));
    if (!refs)
        return -PKV_ERR_NO_MEMORY;
    pkv_epoch_enter(kv->region, kv->control);
    int r = seq_refs(w->seq, w->layer, first, last, refs);
    r = r ? r : w->of(w, refs);
    pkv_epoch_leave(kv->region);
    free(refs);
    return r;
}

static int into_place(const struct work *w, const struct pkv_block_ref *refs)
{
    return seq_sign_rows(w->seq, w->layer, w->scheme, refs, w->first, w->tokens);
}

static int into_list(const struct work *w, const struct pkv_block_ref *refs)
{
    struct pkv_model *m = w->seq->model;
    struct gpu_sign_args args = {.geom = &m->geom,
                                 .space = region_writable(m->kv),
                                 .scheme = w->scheme,
                                 .layer = w->layer,
                                 .blocks = refs,
                                 .first_token = w->first,
                                 .tokens = w->tokens};
    return gpu_sign_list(m->kv->gpu, &args, w->list);
}

static int list_into_place(const struct work *w, const struct pkv_block_ref *refs)
{
    struct pkv_model *m = w->seq->model;
    struct gpu_signatures_args args = {.geom = &m->geom,
                                       .space = region_writable(m->kv),
                                       .blocks = refs,
                                       .first_token = w->first,
                                       .tokens = w->tokens,
                                       .signatures = w->list};
    return gpu_put_signatures(m->kv->gpu, &args);
}

int seq_sign_list(struct pkv_seq *seq, uint32_t layer, struct gpu_scheme *scheme, uint64_t first, uint32_t tokens, char *ret)
{
    struct work w = {seq, layer, tokens, first, scheme, ret, into_list};
    return seq->model->kv->served ? served_sign_list(seq, layer, scheme, first, tokens, ret) : in_epoch(&w);
}

int seq_put_signatures(struct pkv_seq *seq, uint32_t layer, uint32_t tokens, char *list)
{
    struct work w = {seq, layer, tokens, 0, NULL, list, list_into_place};
    return seq->model->kv->served ? served_put_signatures(seq, layer, tokens, list) : in_epoch(&w);
}

int seq_sign_again(struct pkv_seq *seq, uint32_t layer, struct gpu_scheme *scheme)
{
    const struct pkv_geom *g = &seq->model->geom;
    struct work w = {seq, layer, (uint32_t)seq->tokens[layer], 0, scheme, NULL, into_place};
    if (!seq->writer || !w.tokens)
        return 0;
    if (!seq->model->kv->served)
        return in_epoch(&w);
    char *list = malloc((uint64_t)w.tokens * g->kv_heads * pkv_geom_words(g) * 4);
    int r = list ? served_sign_list(seq, layer, scheme, 0, w.tokens, list) : -PKV_ERR_NO_MEMORY;
    r = r ? r : served_put_signatures(seq, layer, w.tokens, list);
    free(list);
    return r;
}
