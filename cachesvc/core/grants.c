/* Grants, and the queue of operations that wait for room in the pool: first come, first served, each with a bound. */
#include "cachesvc/core/internal.h"

/* As far as there is room; POOL_FULL means that the rest may come later. */
static enum pkv_err grant_try(struct core *core, uint32_t index, uint32_t layer, uint64_t tokens)
{
    struct seq *s = &core->seqs[index];
    uint32_t from = layer == PKV_LAYER_ALL ? 0 : layer, to = layer == PKV_LAYER_ALL ? s->layers : layer + 1, block;
    for (uint32_t l = from; l < to; l++) {
        for (; s->granted[l] < pkv_tokens_blocks(tokens); s->granted[l]++) {
            enum pkv_err e = block_make(core, index, l, s->granted[l], &block);
            if (e != PKV_ERR_OK)
                return e;
            block_install(core, index, block);
        }
    }
    return PKV_ERR_OK;
}

bool waiting_helps(const struct core *core, enum pkv_err e)
{
    bool coming = core->dying > 0;
    for (uint32_t i = 0; i < core->chunk_count[PKV_TIER_ARENA] && !coming; i++)
        coming = core->chunks[PKV_TIER_ARENA][i].retired > 0;
    return e == PKV_ERR_POOL_FULL || (e == PKV_ERR_ARENA_FULL && coming);
}

bool waiting_add(struct core *core, const struct waiting *entry)
{
    if (core->waiting_count == PENDING_MAX)
        return false;
    core->waiting[core->waiting_count++] = *entry;
    core->totals.grants_delayed++;
    return true;
}

static void waiting_remove(struct core *core, uint32_t i)
{
    memmove(&core->waiting[i], &core->waiting[i + 1], (--core->waiting_count - i) * sizeof(*core->waiting));
}

static void answer(struct core *core, const struct waiting *w, enum pkv_err e)
{
    core->totals.grants_refused += e != PKV_ERR_OK;
    if (w->cow)
        cow_abort(core, pkv_handle_index(w->handle), e);
    else
        core_emit(core, &(struct core_action){.kind = CORE_COMPLETE, .worker = w->worker, .tag = w->tag, .err = e});
}

void waiting_drop(struct core *core, uint64_t handle, uint32_t worker, enum pkv_err e)
{
    for (uint32_t i = core->waiting_count; i-- > 0;) {
        struct waiting w = core->waiting[i];
        if (w.handle != handle || (worker != NONE && w.worker != worker))
            continue;
        waiting_remove(core, i);
        if (!w.cow) /* a fork or truncate is answered where it is undone */
            core_emit(core, &(struct core_action){.kind = CORE_COMPLETE, .worker = w.worker, .tag = w.tag, .err = e});
    }
}

bool core_grant(struct core *core, uint64_t now_ns, uint32_t worker, uint32_t tag, uint64_t handle, uint32_t layer,
                uint64_t tokens, enum pkv_err *ret_err)
{
    struct seq *s = seq_find(core, worker, handle, ret_err);
    if (!s)
        return true;
    *ret_err = s->writer != worker                            ? PKV_ERR_NOT_WRITER
               : s->cow.kind != COW_NONE                      ? PKV_ERR_BUSY
               : layer != PKV_LAYER_ALL && layer >= s->layers ? PKV_ERR_INVALID
               : tokens > s->max_tokens                       ? PKV_ERR_LENGTH
                                                              : PKV_ERR_OK;
    if (*ret_err != PKV_ERR_OK)
        return true;
    *ret_err = grant_try(core, pkv_handle_index(handle), layer, tokens);
    if (!waiting_helps(core, *ret_err)) {
        core->totals.grants_refused += *ret_err != PKV_ERR_OK;
        return true;
    }
    return !waiting_add(core, &(struct waiting){.worker = worker,
                                                .tag = tag,
                                                .layer = layer,
                                                .missing = *ret_err,
                                                .handle = handle,
                                                .tokens = tokens,
                                                .deadline_ns = now_ns + core->config.grant_timeout_ns});
}

static enum pkv_err retry(struct core *core, const struct waiting *w)
{
    uint32_t index = pkv_handle_index(w->handle);
    return w->cow ? cow_try(core, index) : grant_try(core, index, w->layer, w->tokens);
}

void core_quiesce(struct core *core, uint64_t now_ns, uint64_t epoch)
{
    places_quiesce(core, epoch);
    bool news = core->news != core->news_tried; /* else all would look through all blocks, and find as little as before */
    core->news_tried = core->news;
    for (uint32_t i = 0; news && i < core->waiting_count;) {
        struct waiting w = core->waiting[i];
        enum pkv_err e = retry(core, &w);
        if (waiting_helps(core, e)) {
            core->waiting[i++].missing = e;
            continue;
        }
        waiting_remove(core, i);
        if (!w.cow || e != PKV_ERR_OK) /* a fork or truncate is answered after its copies */
            answer(core, &w, e);
    }
    core_tick(core, now_ns);
}

void core_tick(struct core *core, uint64_t now_ns)
{
    for (uint32_t i = 0; i < core->waiting_count;) {
        struct waiting w = core->waiting[i];
        if (now_ns < w.deadline_ns) {
            i++;
            continue;
        }
        waiting_remove(core, i);
        answer(core, &w, w.missing);
    }
    homing_turn(core, now_ns);
}

uint64_t core_deadline(const struct core *core)
{
    uint64_t next = homing_deadline(core);
    for (uint32_t i = 0; i < core->waiting_count; i++)
        next = PKV_MIN(next, core->waiting[i].deadline_ns);
    return next;
}
