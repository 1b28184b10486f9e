/* Sequences: their life, their block tables. */
#include "client/internal.h"

int seq_check(const struct pkv_seq *seq, uint32_t layer)
{
    if (seq->batch && batch_busy(seq->batch))
        return -PKV_ERR_BUSY;
    if (layer >= seq->model->geom.layers)
        return -PKV_ERR_INVALID;
    if (!seq->writer && pkv_load64(&seq->table->seq) != seq->handle)
        return -PKV_ERR_STALE;
    return daemon_check(seq->model->kv);
}

/* A writer counts its own tokens; others see what every layer has sealed. */
uint64_t seq_layer_tokens(const struct pkv_seq *seq, uint32_t layer)
{
    return seq->writer ? seq->tokens[layer] : PKV_MIN(pkv_load64(&seq->table->tokens), seq->max_tokens);
}

/* The daemon may free the table at any moment: it takes the handle out of the header first (cachesvc/tables.c), so entries read
 * between two looks at the same handle are this sequence's. */
int seq_refs(const struct pkv_seq *seq, uint32_t layer, uint32_t first, uint32_t last, struct pkv_block_ref *to)
{
    struct pkv *kv = seq->model->kv;
    bool signs = seq->model->geom.sig_bits;
    struct pkv_table *table = (struct pkv_table *)(uintptr_t)seq->table;
    if (pkv_load64(&table->seq) != seq->handle || last > table->blocks_max)
        return -PKV_ERR_STALE;
    if (pkv_load32(&table->err))
        return -PKV_ERR_CHECKSUM;
    const struct pkv_block_ref *from = pkv_table_layer(table, layer, table->blocks_max);
    for (uint32_t b = first; b < last; b++) {
        to[b].rows = __atomic_load_n(&from[b].rows, __ATOMIC_RELAXED);
        to[b].signatures = __atomic_load_n(&from[b].signatures, __ATOMIC_RELAXED);
    }
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (pkv_load64(&table->seq) != seq->handle)
        return -PKV_ERR_STALE;
    for (uint32_t b = first; b < last; b++) {
        int r = pkv_place_tier(to[b].rows) && (!signs || pkv_place_tier(to[b].signatures)) ? 0 : -PKV_ERR_STALE;
        if (!r && !kv->served)
            r = region_map(kv, to[b].rows);
        if (!r && !kv->served && signs)
            r = region_map(kv, to[b].signatures);
        if (r)
            return r;
    }
    return 0;
}

void seq_claim(const struct pkv_seq *seq)
{
    struct pkv_region *region = seq->model->kv->region;
    uint32_t at = pkv_handle_index(seq->handle) % PKV_WORKER_SEQS_MAX;
    pkv_store64(&region->seq_tokens[at], pkv_seq_tokens(seq));
    pkv_store64(&region->seq_handle[at], seq->handle);
}

static int seq_new(struct pkv_model *model, uint64_t handle, uint64_t table, struct pkv_seq **ret)
{
    uint32_t layers = model->geom.layers;
    *ret = NULL;
    struct pkv_seq *s = calloc(1, sizeof(*s));
    if (s) {
        s->tokens = calloc(layers, sizeof(*s->tokens));
        s->granted = calloc(layers, sizeof(*s->granted));
        s->sealed = calloc(layers, sizeof(*s->sealed));
    }
    if (!s || !s->tokens || !s->granted || !s->sealed) {
        if (s)
            free(s->tokens), free(s->granted), free(s->sealed);
        free(s);
        return -PKV_ERR_NO_MEMORY;
    }
    s->model = model, s->handle = handle;
    s->table = (const struct pkv_table *)(const void *)(model->kv->tables + table);
    s->max_tokens = (uint64_t)s->table->blocks_max * PKV_BLOCK_TOKENS;
    s->next = model->seqs;
    model->seqs = s;
    *ret = s;
    return 0;
}

void seq_forget(struct pkv_seq *seq)
{
    audit_forget(seq);
    struct pkv_seq **at = &seq->model->seqs;
    while (*at != seq)
        at = &(*at)->next;
    *at = seq->next;
    free(seq->tokens);
    free(seq->granted);
    free(seq->sealed);
    free(seq->stage);
    free(seq);
}

static void set_layer(struct pkv_seq *s, uint32_t layer, uint64_t tokens)
{
    s->tokens[layer] = tokens;
    s->staged = PKV_MIN(s->staged, tokens);
    s->granted[layer] = pkv_tokens_blocks(tokens);
    s->sealed[layer] = (uint32_t)(tokens / PKV_BLOCK_TOKENS);
}

static void set_length(struct pkv_seq *s, uint64_t tokens)
{
    for (uint32_t l = 0; l < s->model->geom.layers; l++)
        set_layer(s, l, tokens);
    seq_claim(s);
}

int seq_cut(struct pkv_seq *seq, uint32_t layer, uint64_t tokens)
{
    struct pkv_submission s = {.op = PKV_OP_TRUNCATE, .layer = (uint16_t)layer, .seq = seq->handle};
    s.u.truncate = (struct pkv_op_truncate){.tokens = tokens};
    audit_forget(seq);
    seq->cuts++;
    int r = ring_call(seq->model->kv, &s, NULL);
    uint32_t first = layer == PKV_LAYER_ALL ? 0 : layer, last = layer == PKV_LAYER_ALL ? seq->model->geom.layers : layer + 1;
    /* Without room for the tail's copy, whole blocks have gone and the tail is as it was. */
    bool tail = r == -PKV_ERR_POOL_FULL || r == -PKV_ERR_ARENA_FULL || r == -PKV_ERR_SYSTEM || r == -PKV_ERR_CHECKSUM;
    uint64_t left = tail ? PKV_ALIGN_UP(tokens, PKV_BLOCK_TOKENS) : tokens;
    for (uint32_t l = first; l < last && (!r || tail); l++)
        set_layer(seq, l, PKV_MIN(left, seq->tokens[l]));
    seq_claim(seq);
    return r;
}

/* Takes over a sequence of the daemon; gives it back where this side has no memory, or no state, for it. */
static int adopt(struct pkv_model *model, uint64_t handle, uint64_t table, struct pkv_seq **ret)
{
    int r = seq_new(model, handle, table, ret);
    struct pkv_submission close = {.op = PKV_OP_SEQ_CLOSE, .seq = handle};
    if (!r && (*ret)->table->model != model->id)
        r = -PKV_ERR_MODEL_MISMATCH;
    else if (!r)
        r = seq_adopt_state(*ret);
    if (r && *ret)
        seq_forget(*ret);
    if (r)
        (void)ring_call(model->kv, &close, NULL);
    return r;
}

int pkv_seq_create(struct pkv_model *model, uint32_t max_tokens, uint32_t flags, const char *label, struct pkv_seq **ret)
{
    struct pkv_submission s = {.op = PKV_OP_SEQ_CREATE};
    struct pkv_completion c;
    size_t bytes = label ? strlen(label) : 0;
    s.u.create = (struct pkv_op_create){
        .model = model->id, .max_tokens = max_tokens, .flags = flags & PKV_PERSISTENT ? PKV_SEQ_PERSISTENT : 0};
    memcpy(s.u.create.label, label ? label : "", PKV_MIN(bytes, sizeof(s.u.create.label) - 1));
    int r = flags & ~PKV_PERSISTENT || !max_tokens ? -PKV_ERR_INVALID : max_tokens > PKV_SEQ_TOKENS_MAX ? -PKV_ERR_LENGTH : 0;
    for (int tries = 0; !r; tries++) { /* the latest state may be another one meanwhile, and this one gone */
        r = model_latest(model, &s.u.create.state);
        r = r ? r : ring_call(model->kv, &s, &c);
        if (r != -PKV_ERR_NO_STATE || tries == 3)
            break;
        r = 0;
    }
    r = r ? r : adopt(model, c.value0, c.value1, ret);
    if (r)
        return kv_done(model->kv, r);
    (*ret)->writer = true;
    (*ret)->max_tokens = max_tokens;
    set_length(*ret, 0);
    return 0;
}

/* The daemon knows who has a sequence open by worker, and a writer counts its tokens itself: one handle a connection. */
static bool open_here(const struct pkv *kv, uint64_t handle)
{
    for (const struct pkv_model *m = kv->models; m; m = m->next)
        for (const struct pkv_seq *s = m->seqs; s; s = s->next)
            if (s->handle == handle)
                return true;
    return false;
}

/* A persistent sequence without a writer has one from now on: whoever opened it. */
int pkv_seq_open(struct pkv_model *model, uint64_t handle, struct pkv_seq **ret)
{
    struct pkv_submission s = {.op = PKV_OP_SEQ_OPEN, .seq = handle};
    struct pkv_completion c;
    int r = open_here(model->kv, handle) ? -PKV_ERR_OPEN_TWICE : ring_call(model->kv, &s, &c);
    r = r ? r : adopt(model, handle, c.value1 & ~1ull, ret);
    if (r)
        return kv_done(model->kv, r);
    (*ret)->writer = c.value1 & 1;
    (*ret)->foreign = (*ret)->writer && !(*ret)->state && c.value0;
    set_length(*ret, c.value0);
    return kv_done(model->kv, 0);
}

static int leave(struct pkv_seq *seq, uint8_t op)
{
    struct pkv *kv = seq->model->kv;
    struct pkv_submission s = {.op = op, .seq = seq->handle};
    int r = seq->batch ? -PKV_ERR_BUSY : ring_call(kv, &s, NULL);
    if (r == -PKV_ERR_BUSY)
        return kv_done(kv, r);
    if (r == -PKV_ERR_NOT_WRITER)
        return kv_done(kv, r);
    seq_forget(seq);
    /* A sequence that is gone already is closed. */
    return kv_done(kv, op == PKV_OP_SEQ_CLOSE && r == -PKV_ERR_STALE ? 0 : r);
}

int pkv_seq_close(struct pkv_seq *seq)
{
    return seq ? leave(seq, PKV_OP_SEQ_CLOSE) : 0;
}

int pkv_seq_destroy(struct pkv_seq *seq)
{
    return leave(seq, PKV_OP_SEQ_DESTROY);
}

uint64_t pkv_seq_handle(const struct pkv_seq *seq)
{
    return seq->handle;
}

uint64_t pkv_seq_tokens(const struct pkv_seq *seq)
{
    uint64_t least = seq_layer_tokens(seq, 0);
    for (uint32_t l = 1; l < seq->model->geom.layers; l++)
        least = PKV_MIN(least, seq_layer_tokens(seq, l));
    return least;
}

int pkv_seq_fork(struct pkv_seq *seq, uint64_t tokens, uint32_t max_tokens, struct pkv_seq **ret)
{
    struct pkv *kv = seq->model->kv;
    struct pkv_submission s = {.op = PKV_OP_FORK, .seq = seq->handle};
    struct pkv_completion c;
    s.u.fork = (struct pkv_op_fork){.tokens = tokens, .max_tokens = max_tokens};
    int r = seq_check(seq, 0);
    if (!r && (tokens > pkv_seq_tokens(seq) || (max_tokens && tokens > max_tokens)))
        r = -PKV_ERR_LENGTH;
    r = r || !seq->foreign ? r : seq_settle(seq, 0); /* the child's blocks are these, and nothing tells how they are signed */
    r = r ? r : ring_call(kv, &s, &c);
    r = r ? r : adopt(seq->model, c.value0, c.value1, ret);
    if (r)
        return kv_done(kv, r);
    (*ret)->writer = true;
    (*ret)->heir = (!seq->writer || seq->heir) && tokens;
    (*ret)->max_tokens = max_tokens ? max_tokens : seq->max_tokens;
    set_length(*ret, tokens);
    return 0;
}

int pkv_seq_truncate(struct pkv_seq *seq, uint64_t tokens)
{
    int r = !seq->writer ? -PKV_ERR_NOT_WRITER : seq_check(seq, 0);
    if (!r && tokens > pkv_seq_tokens(seq))
        r = -PKV_ERR_LENGTH;
    return kv_done(seq->model->kv, r ? r : seq_cut(seq, PKV_LAYER_ALL, tokens));
}

/* This side's count of places. */
static void granted(struct pkv_seq *seq, uint64_t tokens)
{
    for (uint32_t l = 0; l < seq->model->geom.layers; l++)
        seq->granted[l] = PKV_MAX(seq->granted[l], pkv_tokens_blocks(tokens));
}

static struct pkv_submission grant_of(const struct pkv_seq *seq, uint64_t tokens)
{
    struct pkv_submission s = {.op = PKV_OP_GRANT, .layer = PKV_LAYER_ALL, .seq = seq->handle};
    s.u.grant.tokens = tokens;
    return s;
}

int seq_reserve(struct pkv_seq *seq, uint64_t tokens)
{
    struct pkv_submission s = grant_of(seq, tokens);
    int r = tokens > seq->max_tokens ? -PKV_ERR_LENGTH : ring_call(seq->model->kv, &s, NULL);
    if (!r)
        granted(seq, tokens);
    return r;
}

void seq_ask(struct pkv_seq *seq, uint64_t tokens)
{
    struct pkv_submission s = grant_of(seq, tokens);
    if (tokens <= seq->max_tokens)
        (void)ring_ask(seq->model->kv, &s);
}

/* Blocks come in order, their rows last (cachesvc/core/blocks.c): the last one's tells of all. */
bool seq_granted(struct pkv_seq *seq, uint64_t tokens)
{
    struct pkv_table *table = (struct pkv_table *)(uintptr_t)seq->table;
    uint32_t blocks = pkv_tokens_blocks(tokens);
    bool all = blocks <= table->blocks_max && pkv_load64(&table->seq) == seq->handle;
    for (uint32_t l = 0; l < seq->model->geom.layers && all; l++)
        all = pkv_load64(&pkv_table_layer(table, l, table->blocks_max)[blocks - 1].rows) != 0;
    if (all)
        granted(seq, tokens);
    return all;
}

int pkv_seq_reserve(struct pkv_seq *seq, uint32_t tokens)
{
    uint64_t most = 0;
    int r = !seq->writer ? -PKV_ERR_NOT_WRITER : seq_check(seq, 0);
    for (uint32_t l = 0; l < seq->model->geom.layers; l++)
        most = PKV_MAX(most, seq->tokens[l]);
    return kv_done(seq->model->kv, r ? r : seq_reserve(seq, most + tokens));
}
