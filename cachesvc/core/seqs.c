/* Sequences, and the grants that wait for room. */
#include "cachesvc/core/internal.h"

struct seq *seq_find(struct core *core, uint32_t worker, uint64_t handle, enum pkv_err *ret_err)
{
    uint32_t index = pkv_handle_index(handle);
    if (index >= PKV_SEQS_MAX || !handle) {
        *ret_err = PKV_ERR_NO_SEQ;
        return NULL;
    }
    struct seq *s = &core->seqs[index];
    if (!s->live || s->gen != pkv_handle_gen(handle))
        *ret_err = PKV_ERR_STALE;
    else if (s->tenant != core->workers[worker].tenant)
        *ret_err = PKV_ERR_NO_SEQ;
    else if (!(s->open >> worker & 1))
        *ret_err = PKV_ERR_NOT_OPEN;
    else
        return s;
    return NULL;
}

static enum pkv_err seq_alloc(struct core *core, struct seq *s, const struct pkv_op_create *op)
{
    const struct pkv_geom *g = &core->models[op->model].geom;
    s->layers = g->layers, s->blocks_max = pkv_tokens_blocks(op->max_tokens), s->model = op->model;
    uint64_t entries = (uint64_t)s->layers * s->blocks_max, bytes = pkv_table_bytes(s->layers, s->blocks_max);
    s->blocks = malloc(entries * sizeof(*s->blocks));
    s->granted = calloc(s->layers, sizeof(*s->granted));
    s->sealed = calloc(s->layers, sizeof(*s->sealed));
    if (s->blocks && s->granted && s->sealed)
        s->table = core->hooks.table_alloc(core->hooks.context, s->tenant, bytes, &s->table_offset);
    if (!s->table) {
        free(s->blocks), free(s->granted), free(s->sealed);
        return PKV_ERR_TABLE_FULL;
    }
    memset(s->blocks, 0xff, entries * sizeof(*s->blocks));
    return PKV_ERR_OK;
}

enum pkv_err core_seq_create(struct core *core, uint32_t worker, const struct pkv_op_create *op, uint64_t *ret_handle,
                             uint64_t *ret_table)
{
    if (op->model >= core->model_count)
        return PKV_ERR_NO_MODEL;
    if (pkv_geom_block_bytes(&core->models[op->model].geom) > core->config.chunk_bytes)
        return PKV_ERR_BLOCK_TOO_LARGE;
    uint32_t index = 0;
    while (index < PKV_SEQS_MAX && core->seqs[index].live)
        index++;
    if (index == PKV_SEQS_MAX)
        return PKV_ERR_SEQS_FULL;
    struct seq *s = &core->seqs[index];
    *s = (struct seq){.gen = s->gen + 1,
                      .tenant = core->workers[worker].tenant,
                      .writer = worker,
                      .open = 1ull << worker,
                      .persistent = op->flags & PKV_SEQ_PERSISTENT};
    s->gen += s->gen == 0; /* handle 0 is no sequence */
    enum pkv_err e = seq_alloc(core, s, op);
    if (e != PKV_ERR_OK)
        return e;
    s->live = true;
    *ret_handle = pkv_handle(index, s->gen);
    *s->table = (struct pkv_table){.seq = *ret_handle, .blocks_max = s->blocks_max, .layers = s->layers, .model = s->model};
    *ret_table = s->table_offset;
    return PKV_ERR_OK;
}

enum pkv_err core_seq_open(struct core *core, uint32_t worker, uint64_t handle, uint64_t *ret_tokens, uint64_t *ret_table)
{
    enum pkv_err e = PKV_ERR_OK;
    struct seq *s = seq_find(core, worker, handle, &e);
    if (!s && e != PKV_ERR_NOT_OPEN)
        return e;
    s = &core->seqs[pkv_handle_index(handle)];
    s->open |= 1ull << worker;
    if (s->writer == NONE)
        s->writer = worker;
    *ret_tokens = s->tokens, *ret_table = s->table_offset;
    return PKV_ERR_OK;
}

static void grant_forget(struct core *core, uint32_t i)
{
    core->pending[i] = core->pending[--core->pending_count];
}

static void grant_answer(struct core *core, uint32_t i, enum pkv_err e)
{
    const struct grant *g = &core->pending[i];
    core_emit(core, &(struct core_action){.kind = CORE_COMPLETE, .worker = g->worker, .tag = g->tag, .err = e});
    grant_forget(core, i);
}

void seq_free(struct core *core, uint32_t index)
{
    struct seq *s = &core->seqs[index];
    uint64_t handle = pkv_handle(index, s->gen);
    for (uint32_t i = core->pending_count; i-- > 0;)
        if (core->pending[i].handle == handle)
            grant_answer(core, i, PKV_ERR_STALE);
    for (uint64_t i = 0; i < (uint64_t)s->layers * s->blocks_max; i++)
        if (s->blocks[i] != NONE)
            block_free(core, s->blocks[i]);
    free(s->blocks), free(s->granted), free(s->sealed);
    core->hooks.table_free(core->hooks.context, s->tenant, s->table_offset, pkv_table_bytes(s->layers, s->blocks_max));
    *s = (struct seq){.gen = s->gen};
}

/* A persistent sequence without a writer: what every layer has sealed stays. */
static void seq_orphan(struct core *core, struct seq *s)
{
    uint32_t keep = (uint32_t)(s->tokens / PKV_BLOCK_TOKENS);
    for (uint32_t l = 0; l < s->layers; l++) {
        for (uint32_t i = keep; i < s->granted[l]; i++) {
            uint32_t *id = &s->blocks[(uint64_t)l * s->blocks_max + i];
            block_free(core, *id);
            *id = NONE;
        }
        s->granted[l] = s->sealed[l] = keep;
    }
    s->writer = NONE;
}

static void seq_leave(struct core *core, uint32_t index, uint32_t worker)
{
    struct seq *s = &core->seqs[index];
    s->open &= ~(1ull << worker);
    for (uint32_t i = core->pending_count; i-- > 0;)
        if (core->pending[i].worker == worker && core->pending[i].handle == pkv_handle(index, s->gen))
            grant_answer(core, i, PKV_ERR_NOT_OPEN);
    if (!s->open && !s->persistent)
        seq_free(core, index);
    else if (s->writer == worker)
        seq_orphan(core, s);
}

enum pkv_err core_seq_close(struct core *core, uint32_t worker, uint64_t handle)
{
    enum pkv_err e = PKV_ERR_OK;
    if (seq_find(core, worker, handle, &e))
        seq_leave(core, pkv_handle_index(handle), worker);
    return e;
}

enum pkv_err core_seq_destroy(struct core *core, uint32_t worker, uint64_t handle)
{
    enum pkv_err e = PKV_ERR_OK;
    if (seq_find(core, worker, handle, &e))
        seq_free(core, pkv_handle_index(handle));
    return e;
}

void core_worker_leave(struct core *core, uint32_t worker)
{
    assert(core->workers[worker].live);
    for (uint32_t i = 0; i < PKV_SEQS_MAX; i++)
        if (core->seqs[i].live && core->seqs[i].open >> worker & 1)
            seq_leave(core, i, worker);
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++)
        for (uint32_t c = 0; c < core->chunk_count[tier]; c++)
            core->chunks[tier][c].mapped &= ~(1ull << worker);
    core->workers[worker].live = false;
}

/* As far as there is room; POOL_FULL means that the rest may come later. */
static enum pkv_err grant_try(struct core *core, struct seq *s, uint32_t layer, uint64_t tokens)
{
    uint32_t from = layer == PKV_LAYER_ALL ? 0 : layer, to = layer == PKV_LAYER_ALL ? s->layers : layer + 1;
    for (uint32_t l = from; l < to; l++) {
        for (; s->granted[l] < pkv_tokens_blocks(tokens); s->granted[l]++) {
            enum pkv_err e = block_grant(core, (uint32_t)(s - core->seqs), l, s->granted[l]);
            if (e != PKV_ERR_OK)
                return e;
        }
    }
    return PKV_ERR_OK;
}

bool core_grant(struct core *core, uint64_t now_ns, uint32_t worker, uint32_t tag, uint64_t handle, uint32_t layer,
                uint64_t tokens, enum pkv_err *ret_err)
{
    struct seq *s = seq_find(core, worker, handle, ret_err);
    if (!s)
        return true;
    *ret_err = s->writer != worker                                   ? PKV_ERR_NOT_WRITER
               : layer != PKV_LAYER_ALL && layer >= s->layers        ? PKV_ERR_INVALID
               : tokens > (uint64_t)s->blocks_max * PKV_BLOCK_TOKENS ? PKV_ERR_LENGTH
                                                                     : grant_try(core, s, layer, tokens);
    if (*ret_err != PKV_ERR_POOL_FULL)
        return true;
    if (core->pending_count == PENDING_MAX)
        return true;
    core->pending[core->pending_count++] = (struct grant){.worker = worker,
                                                          .tag = tag,
                                                          .layer = layer,
                                                          .handle = handle,
                                                          .tokens = tokens,
                                                          .deadline_ns = now_ns + core->config.grant_timeout_ns};
    return false;
}

void core_quiesce(struct core *core, uint64_t now_ns, uint64_t epoch)
{
    places_quiesce(core, epoch);
    for (uint32_t i = core->pending_count; i-- > 0;) {
        const struct grant *g = &core->pending[i];
        enum pkv_err e = grant_try(core, &core->seqs[pkv_handle_index(g->handle)], g->layer, g->tokens);
        if (e != PKV_ERR_POOL_FULL)
            grant_answer(core, i, e);
    }
    core_tick(core, now_ns);
}

void core_tick(struct core *core, uint64_t now_ns)
{
    for (uint32_t i = core->pending_count; i-- > 0;)
        if (now_ns >= core->pending[i].deadline_ns)
            grant_answer(core, i, PKV_ERR_POOL_FULL);
}

uint64_t core_deadline(const struct core *core)
{
    uint64_t next = UINT64_MAX;
    for (uint32_t i = 0; i < core->pending_count; i++)
        next = PKV_MIN(next, core->pending[i].deadline_ns);
    return next;
}
