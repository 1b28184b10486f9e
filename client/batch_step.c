/* A step of a batch, from begin to end: places, a slot, the epoch, what the device has to know; then launches alone. States and
 * failures: batch.c. */
#include "client/batch.h"

#define SLEEP_NS    20000
#define AHEAD_SHARE 8u /* of the pool, at most, is asked for ahead */
#define AHEAD_STEPS 2u /* the host is ahead of the stream, and may be as fast as the daemon */

/* Lengths after the step; every layer must have the same now. */
static int lengths_of(struct pkv_batch *b)
{
    for (uint32_t i = 0; i < b->count; i++) {
        const struct batch_seq *s = &b->seqs[i];
        for (uint32_t l = 1; l < b->model->geom.layers; l++)
            if (s->seq->tokens[l] != s->seq->tokens[0])
                return -PKV_ERR_SHAPE;
        if (s->seq->scheme != s->scheme || gpu_scheme_version(s->scheme) != s->version ||
            (!s->seq->state && model_turns(b->model)))
            return -PKV_ERR_BATCH_STALE;
        b->lengths[i] = s->seq->tokens[0] + b->queries;
        if (b->lengths[i] > s->seq->max_tokens)
            return -PKV_ERR_LENGTH;
    }
    return 0;
}

/* Tokens for which every layer has places. */
static uint64_t room(const struct pkv_seq *s)
{
    uint32_t granted = s->granted[0];
    for (uint32_t l = 1; l < s->model->geom.layers; l++)
        granted = PKV_MIN(granted, s->granted[l]);
    return (uint64_t)granted * PKV_BLOCK_TOKENS;
}

static int reserve(struct pkv_batch *b)
{
    int r = 0;
    for (uint32_t i = 0; i < b->count && !r; i++) {
        struct pkv_seq *s = b->seqs[i].seq;
        if (b->lengths[i] <= room(s) || (b->seqs[i].asked >= b->lengths[i] && seq_granted(s, b->lengths[i])))
            continue;
        r = seq_reserve(s, b->lengths[i]);
        if (r == -PKV_ERR_POOL_FULL && batch_oldest(b)) { /* what is in flight keeps blocks from going home */
            r = batch_drain(b);
            r = r ? r : seq_reserve(s, b->lengths[i]);
        }
    }
    return r;
}

/* Slots are the connection's: other batches hold some. */
static bool slot_free(const struct pkv_batch *b, uint32_t slot)
{
    for (const struct pkv_batch *o = b->kv->batches; o; o = o->next)
        if (o->steps[slot].flying || (o->open && o->slot == slot))
            return false;
    return batch_slot_ended(b, slot);
}

static int slot_take(struct pkv_batch *b, uint32_t *ret)
{
    uint64_t begin = clock_ns();
    for (;;) {
        int r = batch_reap(b);
        for (struct pkv_batch *o = b->kv->batches; o; o = o->next)
            if (o != b)
                (void)batch_busy(o); /* looks after steps of it that have ended */
        for (uint32_t i = 1; i < PKV_EPOCH_SLOTS && !r; i++)
            if (slot_free(b, i)) {
                *ret = i;
                return 0;
            }
        r = r ? r : gpu_batch_check(b->gpu);
        if (r)
            return r;
        if (clock_ns() - begin > b->kv->timeout_ms * 1000000ull)
            return -PKV_ERR_TIMEOUT;
        nanosleep(&(struct timespec){0, SLEEP_NS}, NULL);
    }
}

static int begin(struct pkv_batch *b, void *stream)
{
    struct pkv *kv = b->kv;
    int r = b->open ? -PKV_ERR_BUSY : daemon_check(kv);
    r = r ? r : batch_reap(b);
    if (!r && kv->late != PKV_ERR_OK) {
        r = -(int)kv->late;
        kv->late = PKV_ERR_OK;
    }
    r = r ? r : lengths_of(b);
    r = r ? r : reserve(b);
    r = r ? r : slot_take(b, &b->slot);
    if (r)
        return r;
    pkv_epoch_enter_slot(kv->region, kv->control, b->slot);
    r = batch_tables(b, stream);
    if (!r) {
        struct gpu_batch_step step = {b->slot, (uint32_t)b->entries_count, b->lengths, b->entries, batch_audit_wish(b)};
        r = gpu_batch_step(b->gpu, &step, stream);
        if (r)
            batch_tables_forget(b);
    }
    if (r) {
        batch_audit_ended(b, b->slot, false);
        pkv_store64(&kv->region->epoch[b->slot], PKV_EPOCH_IDLE);
        return r;
    }
    for (uint32_t i = 0; i < b->count; i++)
        b->steps[b->slot].before[i] = b->lengths[i] - b->queries;
    b->open = true;
    return 0;
}

int pkv_batch_begin(struct pkv_batch *b, void *stream)
{
    return kv_done(b->kv, begin(b, stream));
}

/* A layer's calls belong to a step; one that is captured runs later. */
static int in_step(struct pkv_batch *b, void *stream)
{
    return b->open || gpu_batch_captures(b->gpu, stream) ? 0 : -PKV_ERR_INVALID;
}

int pkv_batch_append(struct pkv_batch *b, uint32_t layer, const void *k, const void *v, void *stream)
{
    int r = in_step(b, stream);
    return kv_done(b->kv, r ? r : gpu_batch_append(b->gpu, layer, k, v, stream));
}

int pkv_batch_attend(struct pkv_batch *b, uint32_t layer, const void *q, float *out, float *lse, void *stream)
{
    int r = in_step(b, stream);
    return kv_done(b->kv, r ? r : gpu_batch_attend(b->gpu, layer, q, out, lse, batch_audit_keeps(b, layer), stream));
}

/* The next steps' places, so that begin need not wait for the daemon; where they are a small part of the pool. */
static void ask_ahead(struct pkv_batch *b)
{
    const struct pkv_geom *g = &b->model->geom;
    uint64_t ahead = b->queries > 1 ? AHEAD_STEPS * (uint64_t)b->queries : 1;
    uint64_t blocks = pkv_tokens_blocks(ahead + PKV_BLOCK_TOKENS - 1ull), bytes = blocks * g->layers * pkv_geom_block_bytes(g);
    if (bytes * b->count > b->kv->control->pool_bytes / AHEAD_SHARE)
        return;
    for (uint32_t i = 0; i < b->count; i++) {
        struct batch_seq *s = &b->seqs[i];
        uint64_t next = PKV_MIN(s->seq->tokens[0] + ahead, s->seq->max_tokens);
        if (next <= room(s->seq) || next <= s->asked)
            continue;
        seq_ask(s->seq, next);
        s->asked = next;
    }
}

static int end(struct pkv_batch *b, bool grows, void *stream)
{
    struct pkv *kv = b->kv;
    struct pkv_worker_counters *c = &kv->region->counters;
    uint32_t layers = b->model->geom.layers;
    if (!b->open)
        return -PKV_ERR_INVALID;
    uint64_t word = b->page + offsetof(struct pkv_region, epoch) + b->slot * sizeof(kv->region->epoch[0]);
    int r = gpu_batch_end(b->gpu, b->slot, word, stream);
    b->open = false;
    struct batch_step *step = &b->steps[b->slot];
    step->flying = true, step->number = ++b->steps_begun, step->grows = grows && !r;
    if (r || !grows)
        return r;
    for (uint32_t i = 0; i < b->count; i++) {
        for (uint32_t l = 0; l < layers; l++)
            b->seqs[i].seq->tokens[l] += b->queries;
        seq_claim(b->seqs[i].seq);
    }
    c->append_calls += layers, c->append_tokens += (uint64_t)layers * b->count * b->queries, c->attend_calls += layers;
    ask_ahead(b);
    batch_audit_turn(b);
    return 0;
}

int pkv_batch_end(struct pkv_batch *b, void *stream)
{
    return kv_done(b->kv, end(b, true, stream));
}

int pkv_batch_cancel(struct pkv_batch *b, void *stream)
{
    return kv_done(b->kv, end(b, false, stream));
}

int pkv_batch_wait(struct pkv_batch *b)
{
    return kv_done(b->kv, b->open ? -PKV_ERR_BUSY : batch_drain(b));
}

int pkv_batch_rows(struct pkv_batch *b, uint64_t *ret_cached, uint64_t *ret_fetched)
{
    int r = b->open ? -PKV_ERR_BUSY : batch_drain(b);
    return kv_done(b->kv, r ? r : gpu_batch_counters(b->gpu, ret_cached, ret_fetched));
}
