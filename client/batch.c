/* Batches: steps of decoding in a stream of the caller's (pivotkv.h), on the daemon's memory.
 *
 *   IDLE --begin--> OPEN --end, cancel--> IDLE; the step is in flight until its stream has written "idle" into its epoch slot
 *
 * begin: steps that have ended are looked after (their full blocks sealed, which may go home now) -> places for the new tokens
 * -> a free epoch slot -> epoch entered -> table entries that changed and lengths go to the device. end: the stream empties the
 * slot behind the step's last read, the sequences have grown, and the daemon is asked for the next steps' places, where they
 * are no great part of the pool, so that begin finds them instead of waiting for an answer.
 *
 * Failures, and what becomes of them:
 *   no places for the new tokens       what is in flight is waited for and sealed, once; then begin fails, nothing has changed
 *   all slots in flight                begin waits for one, with the connection's bound: TIMEOUT. Slots are shared by a
 *                                      connection's batches; each looks after the others' steps that have ended
 *   a step meets NaN                   found when it has ended: its tokens and all later ones are taken back, begin or wait
 *                                      says so
 *   a sequence destroyed elsewhere     begin: STALE; its places stay until the steps that read them have ended
 *   signatures made anew               begin: BATCH_STALE, for the device works with a copy of the scheme, captured by value
 *   the stream never ends              wait, close and begin: TIMEOUT; what the steps hold stays held
 *   the device is lost                 every call that asks it: GPU_LOST; close frees this side
 *   the daemon is gone                 begin: DAEMON_GONE; steps in flight end by themselves, their memory is this process's
 * too this process dies in a step        its slots go with its region; the daemon frees what it held (cachesvc/worker.c) Owner:
 * the connection's thread. */
#include "client/batch.h"

#define SLEEP_NS    20000
#define AHEAD_SHARE 8u /* of the pool, at most, is asked for ahead */
#define AHEAD_STEPS 2u /* the host is ahead of the stream, and may be as fast as the daemon */

/* ---- steps that have ended ---- */

static bool ended(const struct pkv_batch *b, uint32_t slot)
{
    return pkv_load64(&b->kv->region->epoch[slot]) == PKV_EPOCH_IDLE;
}

/* The slot of the oldest step in flight; 0: none. */
static uint32_t oldest(const struct pkv_batch *b)
{
    uint32_t found = 0;
    for (uint32_t i = 1; i < PKV_EPOCH_SLOTS; i++)
        if (b->steps[i].flying && (!found || b->steps[i].number < b->steps[found].number))
            found = i;
    return found;
}

static int wait_slot(struct pkv_batch *b, uint32_t slot)
{
    uint64_t begin = clock_ns();
    while (!ended(b, slot)) {
        int r = gpu_batch_check(b->gpu);
        if (r)
            return r;
        if (clock_ns() - begin > b->kv->timeout_ms * 1000000ull)
            return -PKV_ERR_TIMEOUT;
        if (clock_ns() - begin > b->kv->spin_us * 1000ull)
            nanosleep(&(struct timespec){0, SLEEP_NS}, NULL);
    }
    return 0;
}

/* A step met NaN: as if it and what came after had not been. */
static int take_back(struct pkv_batch *b, uint32_t slot)
{
    int r = 0;
    for (uint32_t i = 1; i < PKV_EPOCH_SLOTS && !r; i++)
        r = b->steps[i].flying ? wait_slot(b, i) : 0;
    r = r ? r : gpu_batch_reset(b->gpu);
    if (r)
        return r;
    for (uint32_t i = 1; i < PKV_EPOCH_SLOTS; i++) {
        b->steps[i].flying = false;
        batch_audit_ended(b, i, false);
    }
    for (uint32_t i = 0; i < b->count && !r; i++) {
        struct pkv_seq *s = b->seqs[i].seq;
        if (s->tokens[0] > b->steps[slot].before[i])
            r = seq_cut(s, PKV_LAYER_ALL, b->steps[slot].before[i]);
    }
    return r ? r : -PKV_ERR_NOT_FINITE;
}

/* Blocks that the step filled may go home; the daemon copies them as they are now. */
static int seal_all(struct pkv_batch *b, const struct batch_step *step)
{
    int r = 0;
    for (uint32_t i = 0; i < b->count && step->grows; i++)
        for (uint32_t l = 0; l < b->model->geom.layers && !r; l++)
            r = seq_seal(b->seqs[i].seq, l, step->before[i] + b->queries);
    return r;
}

/* Looks after all steps that have ended, in their order. */
static int reap(struct pkv_batch *b)
{
    int r = b->late;
    b->late = 0;
    for (uint32_t slot; !r && (slot = oldest(b)) && ended(b, slot);) {
        if (gpu_batch_bad(b->gpu, slot))
            return take_back(b, slot);
        b->steps[slot].flying = false;
        batch_audit_ended(b, slot, b->steps[slot].grows);
        r = seal_all(b, &b->steps[slot]);
    }
    return r;
}

static int drain(struct pkv_batch *b)
{
    int r = reap(b);
    for (uint32_t slot; !r && (slot = oldest(b));) {
        r = wait_slot(b, slot);
        r = r ? r : reap(b);
    }
    return r;
}

bool batch_busy(struct pkv_batch *b)
{
    if (!b->open && oldest(b))
        b->late = reap(b); /* for the batch's own next call */
    return b->open || oldest(b);
}

int batch_quiet(struct pkv_model *m)
{
    int r = 0;
    for (struct pkv_batch *b = m->kv->batches; b && !r; b = b->next)
        if (b->model == m)
            r = b->open ? -PKV_ERR_BUSY : (b->late = drain(b)) == -PKV_ERR_TIMEOUT ? b->late : 0;
    return r;
}

/* ---- opening ---- */

static int seq_joins(struct pkv_batch *b, uint32_t index, struct pkv_seq *seq)
{
    struct batch_seq *s = &b->seqs[index];
    uint64_t entries = (uint64_t)b->model->geom.layers * seq->table->blocks_max;
    int r = seq->model != b->model ? -PKV_ERR_INVALID : seq->batch ? -PKV_ERR_BUSY : seq_check(seq, 0);
    if (!r && !seq->writer)
        r = -PKV_ERR_NOT_WRITER;
    r = r ? r : seq_settle(seq, 0);
    if (r)
        return r;
    *s = (struct batch_seq){.seq = seq, .scheme = seq->scheme, .version = gpu_scheme_version(seq->scheme), .cuts = seq->cuts};
    s->refs = calloc(entries, sizeof(*s->refs));
    if (!s->refs)
        return -PKV_ERR_NO_MEMORY;
    seq->batch = b;
    return 0;
}

static int gpu_side(struct pkv_batch *b, uint64_t cache_bytes)
{
    struct gpu_batch_run *run = calloc(b->count, sizeof(*run));
    uint32_t *blocks_max = malloc(b->count * sizeof(*blocks_max));
    struct gpu_batch_options o = {.geom = &b->model->geom,
                                  .policy = b->policy,
                                  .seqs = b->count,
                                  .queries = b->queries,
                                  .blocks_max = blocks_max,
                                  .run = run,
                                  .cache_bytes = cache_bytes,
                                  .keeps = b->audit.on};
    for (uint32_t i = 0; i < b->count && run && blocks_max; i++) {
        const struct gpu_scheme *scheme = b->seqs[i].scheme;
        blocks_max[i] = b->seqs[i].seq->table->blocks_max;
        if (!o.runs || run[o.runs - 1].scheme != scheme)
            run[o.runs++].scheme = scheme;
        run[o.runs - 1].seqs++;
    }
    int r = run && blocks_max ? gpu_batch_open(b->kv->gpu, &o, &b->gpu) : -PKV_ERR_NO_MEMORY;
    free(run), free(blocks_max);
    return r ? r : gpu_batch_page(b->gpu, b->kv->region, &b->page);
}

static void release(struct pkv_batch *b)
{
    gpu_batch_close(b->gpu);
    for (uint32_t i = 0; b->seqs && i < b->count; i++) {
        if (b->seqs[i].seq)
            b->seqs[i].seq->batch = NULL;
        free(b->seqs[i].refs);
    }
    for (uint32_t i = 1; i < PKV_EPOCH_SLOTS; i++)
        free(b->steps[i].before);
    free(b->seqs), free(b->lengths), free(b->entries);
    free(b);
}

static int batch_make(struct pkv_batch *b, struct pkv_seq *const *seqs, uint64_t cache_bytes)
{
    b->seqs = calloc(b->count, sizeof(*b->seqs)), b->lengths = calloc(b->count, sizeof(*b->lengths));
    int r = b->seqs && b->lengths ? 0 : -PKV_ERR_NO_MEMORY;
    for (uint32_t i = 1; i < PKV_EPOCH_SLOTS && !r; i++) {
        b->steps[i].before = calloc(b->count, sizeof(*b->lengths));
        r = b->steps[i].before ? 0 : -PKV_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < b->count && !r; i++)
        r = seq_joins(b, i, seqs[i]);
    return r ? r : gpu_side(b, cache_bytes);
}

int pkv_batch_open(struct pkv_seq *const *seqs, uint32_t count, const struct pkv_budget *budget,
                   const struct pkv_batch_options *options, struct pkv_batch **ret)
{
    struct pkv_batch_options o = {.size = sizeof(o)};
    struct gpu_policy policy;
    struct pkv *kv = seqs[0]->model->kv;
    int r = !count || count > PKV_BATCH_MAX ? -PKV_ERR_SHAPE : options && options->size != sizeof(o) ? -PKV_ERR_INVALID : 0;
    if (!r && options)
        o = *options;
    r = r ? r : budget_policy(budget, &policy);
    if (!r && (uint64_t)count * PKV_MAX(o.queries, 1u) > PKV_QUERIES_MAX)
        r = -PKV_ERR_SHAPE;
    if (!r && kv->served)
        r = -PKV_ERR_SERVED_ONLY;
    struct pkv_batch *b = r ? NULL : calloc(1, sizeof(*b));
    if (!b)
        return kv_done(kv, r ? r : -PKV_ERR_NO_MEMORY);
    *b = (struct pkv_batch){.kv = kv, .model = seqs[0]->model, .count = count, .queries = PKV_MAX(o.queries, 1u)};
    b->policy = policy;
    b->audit = (struct batch_audit){.on = kv->control->audit_ppm, .last = UINT32_MAX};
    r = calibration_wait(b->model); /* or it would soon be stale */
    r = r && r != -PKV_ERR_TIMEOUT ? r : model_turn_all(b->model);
    r = r ? r : batch_make(b, seqs, o.cache_bytes);
    if (!r && kv->device && kv->maps_all != kv->maps + 1) { /* the arena's too: mapping one within a step would be felt */
        (void)region_map_all(kv);
        kv->maps_all = kv->maps + 1;
    }
    if (r) {
        release(b);
        return kv_done(kv, r);
    }
    b->next = kv->batches;
    kv->batches = b;
    *ret = b;
    return 0;
}

static void unlink_batch(struct pkv_batch *b)
{
    struct pkv_batch **at = &b->kv->batches;
    while (*at != b)
        at = &(*at)->next;
    *at = b->next;
}

/* What was asked for and not used goes back, but for a block that the next tokens will need. */
static void give_back(struct pkv_batch *b)
{
    for (uint32_t i = 0; i < b->count; i++) {
        struct pkv_seq *s = b->seqs[i].seq;
        if (b->seqs[i].asked > s->tokens[0] + PKV_BLOCK_TOKENS && !b->kv->gone)
            (void)seq_cut(s, PKV_LAYER_ALL, s->tokens[0]);
    }
}

int pkv_batch_close(struct pkv_batch *b)
{
    if (!b)
        return 0;
    struct pkv *kv = b->kv;
    if (b->open)
        (void)pkv_batch_cancel(b, NULL);
    int r = drain(b);
    if (r == -PKV_ERR_TIMEOUT)
        return kv_done(kv, r);
    if (!r)
        give_back(b);
    unlink_batch(b);
    release(b);
    return kv_done(kv, r == -PKV_ERR_NOT_FINITE || r == -PKV_ERR_GPU_LOST ? r : 0);
}

void batch_close_all(struct pkv *kv)
{
    while (kv->batches) {
        struct pkv_batch *b = kv->batches;
        (void)drain(b); /* what has not ended by now holds memory that this process is about to lose anyway */
        unlink_batch(b);
        release(b);
    }
}

/* ---- a step ---- */

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
        if (r == -PKV_ERR_POOL_FULL && oldest(b)) { /* what is in flight keeps blocks from going home */
            r = drain(b);
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
    return ended(b, slot);
}

static int slot_take(struct pkv_batch *b, uint32_t *ret)
{
    uint64_t begin = clock_ns();
    for (;;) {
        int r = reap(b);
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
    r = r ? r : reap(b);
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
    return kv_done(b->kv, b->open ? -PKV_ERR_BUSY : drain(b));
}

int pkv_batch_rows(struct pkv_batch *b, uint64_t *ret_cached, uint64_t *ret_fetched)
{
    int r = b->open ? -PKV_ERR_BUSY : drain(b);
    return kv_done(b->kv, r ? r : gpu_batch_counters(b->gpu, ret_cached, ret_fetched));
}
