/* The life of sequences, and of the workers that hold them. */
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

enum pkv_err core_seq_check(struct core *core, uint32_t worker, uint64_t handle)
{
    enum pkv_err e = PKV_ERR_OK;
    seq_find(core, worker, handle, &e);
    return e;
}

enum pkv_err core_seq_view(struct core *core, uint32_t worker, uint64_t handle, uint32_t layer, struct core_view *ret)
{
    enum pkv_err e = PKV_ERR_OK;
    const struct seq *s = seq_find(core, worker, handle, &e);
    if (!s)
        return e;
    if (layer >= s->layers)
        return PKV_ERR_INVALID;
    *ret = (struct core_view){.blocks = seq_entry(s, layer, 0),
                              .model = &core->models[s->model],
                              .model_id = s->model,
                              .blocks_max = s->blocks_max,
                              .granted = s->granted[layer],
                              .sealed = s->sealed[layer],
                              .writer = s->writer == worker,
                              .damaged = s->damaged,
                              .device = s->device};
    return PKV_ERR_OK;
}

void seq_publish_tokens(struct seq *s)
{
    uint32_t least = s->sealed[0];
    for (uint32_t l = 1; l < s->layers; l++)
        least = PKV_MIN(least, s->sealed[l]);
    s->tokens = (uint64_t)least * PKV_BLOCK_TOKENS;
    publish(&s->table->tokens, s->tokens);
}

void seq_publish_state(struct seq *s, uint32_t state)
{
    s->state = state;
    __atomic_store_n(&s->table->state, state, __ATOMIC_RELEASE);
}

/* Nobody else has it open, and no block is another sequence's too. */
static bool alone(const struct core *core, const struct seq *s, uint32_t worker)
{
    if (s->open != 1ull << worker || s->cow.kind != COW_NONE)
        return false;
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t i = 0; i < s->granted[l]; i++)
            if (core->blocks[*seq_block(s, l, i)].holders > 1)
                return false;
    return true;
}

enum pkv_err core_seq_signed(struct core *core, uint32_t worker, uint64_t handle, uint32_t state)
{
    enum pkv_err e = PKV_ERR_OK;
    struct seq *s = seq_find(core, worker, handle, &e);
    if (!s)
        return e;
    if (s->writer != worker)
        return PKV_ERR_NOT_WRITER;
    if (!state && !alone(core, s, worker))
        return PKV_ERR_BUSY;
    /* Sequences without a state may share blocks: all of them turn to the first one. */
    if (state && !s->signing && s->state != state && (s->state || state != 1))
        return PKV_ERR_STATE_EXISTS;
    s->signing = !state;
    seq_publish_state(s, state);
    return PKV_ERR_OK;
}

bool core_state_used(const struct core *core, uint32_t model, uint32_t state)
{
    for (uint32_t i = 0; i < core->seq_end; i++)
        if (core->seqs[i].live && core->seqs[i].model == model && core->seqs[i].state == state)
            return true;
    return false;
}

static enum pkv_err seq_alloc(struct core *core, struct seq *s)
{
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

enum pkv_err seq_make(struct core *core, uint32_t worker, uint32_t model, uint32_t max_tokens, bool persistent,
                      const char *label, uint32_t *ret_index)
{
    uint32_t index = 0;
    while (index < PKV_SEQS_MAX && core->seqs[index].live)
        index++;
    if (index == PKV_SEQS_MAX)
        return PKV_ERR_SEQS_FULL;
    struct seq *s = &core->seqs[index];
    uint32_t device = core->workers[worker].device;
    *s = (struct seq){.gen = s->gen + 1,
                      .device = device == NONE ? core->device_next++ % core->config.pool_devices : device,
                      .tenant = core->workers[worker].tenant,
                      .writer = worker,
                      .open = 1ull << worker,
                      .persistent = persistent,
                      .model = model,
                      .layers = core->models[model].geom.layers,
                      .max_tokens = max_tokens,
                      .blocks_max = pkv_tokens_blocks(max_tokens)};
    s->gen += s->gen == 0; /* handle 0 is no sequence */
    strncpy(s->label, label, sizeof(s->label) - 1);
    for (char *c = s->label; *c; c++)
        *c = *c < ' ' || *c > '~' ? '?' : *c; /* shown on terminals */
    enum pkv_err e = seq_alloc(core, s);
    if (e != PKV_ERR_OK)
        return e;
    s->live = true;
    core->seq_end = PKV_MAX(core->seq_end, index + 1);
    *s->table = (struct pkv_table){.tokens = 0, .blocks_max = s->blocks_max, .layers = s->layers, .model = model};
    publish(&s->table->seq, pkv_handle(index, s->gen));
    *ret_index = index;
    return PKV_ERR_OK;
}

enum pkv_err core_seq_create(struct core *core, uint32_t worker, const struct pkv_op_create *op, uint64_t *ret_handle,
                             uint64_t *ret_table)
{
    if (op->model >= core->model_count)
        return PKV_ERR_NO_MODEL;
    if (pkv_geom_block_bytes(&core->models[op->model].geom) > core->config.chunk_bytes)
        return PKV_ERR_BLOCK_TOO_LARGE;
    uint32_t index;
    enum pkv_err e =
        seq_make(core, worker, op->model, op->max_tokens, op->flags & PKV_SEQ_PERSISTENT, (const char *)op->label, &index);
    if (e != PKV_ERR_OK)
        return e;
    seq_publish_state(&core->seqs[index], op->state);
    *ret_handle = pkv_handle(index, core->seqs[index].gen);
    *ret_table = core->seqs[index].table_offset;
    return PKV_ERR_OK;
}

enum pkv_err core_seq_open(struct core *core, uint32_t worker, uint64_t handle, uint64_t *ret_tokens, uint64_t *ret_table)
{
    enum pkv_err e = PKV_ERR_OK;
    struct seq *s = seq_find(core, worker, handle, &e);
    if (!s && e != PKV_ERR_NOT_OPEN)
        return e;
    s = &core->seqs[pkv_handle_index(handle)];
    if (s->cow.kind == COW_FORK)
        return PKV_ERR_STALE; /* not born yet: its handle was guessed */
    if (core->workers[worker].device != NONE && core->workers[worker].device != s->device)
        return PKV_ERR_GPU_DEVICE;
    s->open |= 1ull << worker;
    if (s->writer == NONE)
        s->writer = worker;
    *ret_tokens = s->tokens, *ret_table = s->table_offset;
    return PKV_ERR_OK;
}

void seq_free(struct core *core, uint32_t index)
{
    struct seq *s = &core->seqs[index];
    waiting_drop(core, pkv_handle(index, s->gen), NONE, PKV_ERR_STALE);
    cow_drop(core, index);
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t i = 0; i < s->granted[l]; i++)
            block_leave(core, index, l, i);
    free(s->blocks), free(s->granted), free(s->sealed);
    core->hooks.table_free(core->hooks.context, s->tenant, s->table_offset, pkv_table_bytes(s->layers, s->blocks_max));
    *s = (struct seq){.gen = s->gen};
    while (core->seq_end && !core->seqs[core->seq_end - 1].live)
        core->seq_end--;
}

/* A persistent sequence without a writer: what every layer has sealed stays. */
static void seq_orphan(struct core *core, uint32_t index)
{
    struct seq *s = &core->seqs[index];
    uint32_t keep = (uint32_t)(s->tokens / PKV_BLOCK_TOKENS);
    for (uint32_t l = 0; l < s->layers; l++) {
        for (uint32_t i = keep; i < s->granted[l]; i++)
            block_leave(core, index, l, i);
        s->granted[l] = s->sealed[l] = keep;
    }
    homing_hurry(core, s->device);
    s->writer = NONE;
}

static void seq_leave(struct core *core, uint32_t index, uint32_t worker)
{
    struct seq *s = &core->seqs[index];
    s->open &= ~(1ull << worker);
    waiting_drop(core, pkv_handle(index, s->gen), worker, PKV_ERR_NOT_OPEN);
    bool unborn = s->cow.kind == COW_FORK;
    if ((!s->open && !s->persistent) || unborn) {
        seq_free(core, index);
        return;
    }
    if (s->cow.kind != COW_NONE && s->cow.worker == worker)
        cow_abort(core, index, PKV_ERR_NOT_OPEN);
    if (s->writer == worker)
        seq_orphan(core, index);
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
    for (uint32_t i = 0; i < core->seq_end; i++)
        if (core->seqs[i].live && core->seqs[i].open >> worker & 1)
            seq_leave(core, i, worker);
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++)
        for (uint32_t c = 0; c < core->chunk_count[tier]; c++)
            core->chunks[tier][c].mapped &= ~(1ull << worker);
    core->news++; /* chunks that only it held back */
    core->workers[worker].live = false;
}
