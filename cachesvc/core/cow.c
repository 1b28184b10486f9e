/* Fork and truncate: copy-on-write of the tail block.
 *
 * Happy path: checked -> tail blocks granted (as room comes) -> each filled by two copies -> all in -> put in place at once ->
 * answered. Failures: no room within the bound, a failed copy, a tail that is damaged at home, the sequence or its worker gone:
 * blocks that are being filled are freed when their copies end, the others at once; nothing of the sequence has changed by
 * then. */
#include "cachesvc/core/internal.h"

static void cow_end(struct seq *s)
{
    free(s->cow.source);
    free(s->cow.target);
    s->cow = (struct cow){.kind = COW_NONE};
}

static void cow_undo(struct core *core, struct seq *s)
{
    for (uint32_t l = 0; l < s->layers; l++) {
        if (s->cow.target[l] != NONE)
            block_retire(core, s->cow.target[l]);
        else if (s->cow.source[l] != NONE)
            block_unpin(core, s->cow.source[l]);
    }
    cow_end(s);
}

void cow_drop(struct core *core, uint32_t index)
{
    struct seq *s = &core->seqs[index];
    if (s->cow.kind == COW_NONE)
        return;
    core_emit(core,
              &(struct core_action){.kind = CORE_COMPLETE, .worker = s->cow.worker, .tag = s->cow.tag, .err = PKV_ERR_STALE});
    cow_undo(core, s);
}

void cow_abort(struct core *core, uint32_t index, enum pkv_err answer)
{
    struct seq *s = &core->seqs[index];
    struct core_action a = {.kind = CORE_COMPLETE, .worker = s->cow.worker, .tag = s->cow.tag, .err = answer};
    bool fork = s->cow.kind == COW_FORK;
    waiting_drop(core, pkv_handle(index, s->gen), NONE, answer);
    cow_undo(core, s);
    if (fork)
        seq_free(core, index);
    core_emit(core, &a);
}

/* Everything behind `tokens` goes, in the layers of the operation. */
static void cut(struct core *core, uint32_t index, uint32_t first_layer, uint32_t last_layer, uint64_t tokens)
{
    struct seq *s = &core->seqs[index];
    uint32_t keep = pkv_tokens_blocks(tokens);
    for (uint32_t l = first_layer; l < last_layer; l++) {
        for (uint32_t i = keep; i < s->granted[l]; i++)
            block_leave(core, index, l, i);
        s->granted[l] = PKV_MIN(s->granted[l], keep);
        s->sealed[l] = PKV_MIN(s->sealed[l], (uint32_t)(tokens / PKV_BLOCK_TOKENS));
    }
    seq_publish_tokens(s);
}

static void cow_finish(struct core *core, uint32_t index)
{
    struct seq *s = &core->seqs[index];
    struct core_action a = {.kind = CORE_COMPLETE, .worker = s->cow.worker, .tag = s->cow.tag};
    if (s->cow.kind == COW_TRUNCATE)
        cut(core, index, s->cow.first_layer, s->cow.last_layer, s->cow.tokens);
    else
        a.value0 = pkv_handle(index, s->gen), a.value1 = s->table_offset;
    uint32_t tail = (uint32_t)(s->cow.tokens / PKV_BLOCK_TOKENS);
    for (uint32_t l = 0; l < s->layers; l++) {
        if (s->cow.target[l] == NONE)
            continue;
        if (s->cow.kind == COW_TRUNCATE)
            block_leave(core, index, l, tail);
        block_install(core, index, s->cow.target[l]);
        s->granted[l] = tail + 1;
    }
    cow_end(s);
    core_emit(core, &a);
}

void cow_filled(struct core *core, uint32_t index, enum pkv_err err)
{
    struct seq *s = &core->seqs[index];
    assert(s->cow.kind != COW_NONE && s->cow.filling);
    s->cow.failed = s->cow.failed ? s->cow.failed : err;
    s->cow.filling--;
    if (s->cow.filling || (s->cow.missing && !s->cow.failed))
        return;
    if (s->cow.failed)
        cow_abort(core, index, s->cow.failed);
    else
        cow_finish(core, index);
}

enum pkv_err cow_try(struct core *core, uint32_t index)
{
    struct seq *s = &core->seqs[index];
    uint32_t tail = (uint32_t)(s->cow.tokens / PKV_BLOCK_TOKENS);
    for (uint32_t l = 0; l < s->layers; l++) {
        if (s->cow.source[l] == NONE || s->cow.target[l] != NONE)
            continue;
        enum pkv_err e = block_make(core, index, l, tail, &s->cow.target[l]);
        if (e != PKV_ERR_OK) {
            s->cow.target[l] = NONE;
            return e;
        }
        s->cow.missing--;
        s->cow.filling++;
        block_fill(core, s->cow.target[l], s->cow.source[l]);
    }
    return PKV_ERR_OK;
}

/* Starts what was described in s->cow; sources are set. The answer comes later unless the arena is full. */
static bool cow_start(struct core *core, uint64_t now_ns, uint32_t index, enum pkv_err *ret_err)
{
    struct seq *s = &core->seqs[index];
    enum pkv_err e = cow_try(core, index);
    struct waiting entry = {.cow = true,
                            .worker = s->cow.worker,
                            .tag = s->cow.tag,
                            .missing = e,
                            .handle = pkv_handle(index, s->gen),
                            .deadline_ns = now_ns + core->config.grant_timeout_ns};
    if (e == PKV_ERR_OK || (waiting_helps(core, e) && waiting_add(core, &entry)))
        return false;
    *ret_err = e;
    cow_abort(core, index, e);
    return false;
}

static bool cow_prepare(struct seq *s, enum cow_kind kind, uint32_t worker, uint32_t tag, uint64_t tokens)
{
    uint32_t *source = malloc(s->layers * sizeof(*source)), *target = malloc(s->layers * sizeof(*target));
    if (!source || !target) {
        free(source), free(target);
        return false;
    }
    memset(source, 0xff, s->layers * sizeof(*source));
    memset(target, 0xff, s->layers * sizeof(*target));
    s->cow = (struct cow){.kind = kind,
                          .worker = worker,
                          .tag = tag,
                          .last_layer = s->layers,
                          .tokens = tokens,
                          .source = source,
                          .target = target};
    return true;
}

static void cow_source(struct core *core, struct seq *s, uint32_t layer, uint32_t block)
{
    s->cow.source[layer] = block;
    s->cow.missing++;
    core->blocks[block].pins++; /* from now on, however long its copy waits for room */
}

static bool any_damaged(const struct core *core, const struct seq *s, uint32_t blocks)
{
    for (uint32_t l = 0; l < s->layers && s->damaged; l++)
        for (uint32_t i = 0; i < blocks; i++)
            if (core->blocks[*seq_block(s, l, i)].damaged)
                return true;
    return false;
}

static enum pkv_err fork_check(const struct core *core, const struct seq *s, const struct pkv_op_fork *op)
{
    if (s->cow.kind != COW_NONE || s->signing)
        return PKV_ERR_BUSY;
    if (op->max_tokens && op->tokens > op->max_tokens)
        return PKV_ERR_LENGTH;
    for (uint32_t l = 0; l < s->layers; l++)
        if (op->tokens / PKV_BLOCK_TOKENS > s->sealed[l] || pkv_tokens_blocks(op->tokens) > s->granted[l])
            return PKV_ERR_LENGTH;
    return any_damaged(core, s, pkv_tokens_blocks(op->tokens)) ? PKV_ERR_CHECKSUM : PKV_ERR_OK;
}

bool core_seq_fork(struct core *core, uint64_t now_ns, uint32_t worker, uint32_t tag, uint64_t handle,
                   const struct pkv_op_fork *op, enum pkv_err *ret_err, uint64_t *ret_handle, uint64_t *ret_table)
{
    struct seq *parent = seq_find(core, worker, handle, ret_err);
    if (!parent)
        return true;
    uint32_t index, whole = (uint32_t)(op->tokens / PKV_BLOCK_TOKENS), max = op->max_tokens;
    *ret_err = fork_check(core, parent, op);
    if (*ret_err == PKV_ERR_OK)
        *ret_err = seq_make(core, worker, parent->model, max ? max : (uint32_t)parent->max_tokens,
                            op->flags & PKV_SEQ_PERSISTENT, parent->label, &index);
    if (*ret_err != PKV_ERR_OK)
        return true;
    struct seq *child = &core->seqs[index];
    seq_publish_state(child, parent->state); /* it shares the parent's signatures */
    child->device = parent->device;          /* where the shared blocks are */
    for (uint32_t l = 0; l < child->layers; l++) {
        for (uint32_t i = 0; i < whole; i++)
            block_install(core, index, *seq_block(parent, l, i));
        child->granted[l] = child->sealed[l] = whole;
    }
    seq_publish_tokens(child);
    if (op->tokens % PKV_BLOCK_TOKENS == 0) {
        *ret_handle = pkv_handle(index, child->gen), *ret_table = child->table_offset;
        return true;
    }
    if (!cow_prepare(child, COW_FORK, worker, tag, op->tokens)) {
        seq_free(core, index);
        *ret_err = PKV_ERR_NO_MEMORY;
        return true;
    }
    for (uint32_t l = 0; l < child->layers; l++)
        cow_source(core, child, l, *seq_block(parent, l, whole));
    return cow_start(core, now_ns, index, ret_err);
}

bool core_seq_truncate(struct core *core, uint64_t now_ns, uint32_t worker, uint32_t tag, uint64_t handle, uint32_t layer,
                       uint64_t tokens, enum pkv_err *ret_err)
{
    struct seq *s = seq_find(core, worker, handle, ret_err);
    if (!s)
        return true;
    uint32_t index = pkv_handle_index(handle), first = layer == PKV_LAYER_ALL ? 0 : layer;
    uint32_t last = layer == PKV_LAYER_ALL ? s->layers : layer + 1, tail = (uint32_t)(tokens / PKV_BLOCK_TOKENS);
    *ret_err = s->writer != worker       ? PKV_ERR_NOT_WRITER
               : s->cow.kind != COW_NONE ? PKV_ERR_BUSY
               : last > s->layers        ? PKV_ERR_INVALID
                                         : PKV_ERR_OK;
    for (uint32_t l = first; l < last && *ret_err == PKV_ERR_OK; l++)
        if (pkv_tokens_blocks(tokens) > s->granted[l])
            *ret_err = PKV_ERR_LENGTH;
    if (*ret_err == PKV_ERR_OK && !cow_prepare(s, COW_TRUNCATE, worker, tag, tokens))
        *ret_err = PKV_ERR_NO_MEMORY;
    if (*ret_err != PKV_ERR_OK)
        return true;
    waiting_drop(core, handle, NONE, PKV_ERR_BUSY); /* grants of a length that is given up */
    /* Whole blocks go at once: a full arena gets room for the tail's copy from them. */
    cut(core, index, first, last, PKV_ALIGN_UP(tokens, PKV_BLOCK_TOKENS));
    s->cow.first_layer = first, s->cow.last_layer = last;
    for (uint32_t l = first; l < last && tokens % PKV_BLOCK_TOKENS; l++) {
        uint32_t id = *seq_block(s, l, tail);
        if (core->blocks[id].state != BLOCK_GRANTED)
            cow_source(core, s, l, id);
    }
    bool damaged = false;
    for (uint32_t l = first; l < last; l++)
        damaged |= s->cow.source[l] != NONE && core->blocks[s->cow.source[l]].damaged;
    if (damaged) { /* cut off, or left for good */
        cow_abort(core, index, PKV_ERR_CHECKSUM);
        return false;
    }
    if (s->cow.missing)
        return cow_start(core, now_ns, index, ret_err);
    cut(core, index, first, last, tokens);
    cow_end(s);
    return true;
}
