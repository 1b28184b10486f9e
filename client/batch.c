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
 *   the daemon is gone                 begin: DAEMON_GONE; steps in flight end by themselves: their memory is ours too
 *   this process dies in a step        its slots go with its region; the daemon frees what it held (cachesvc/worker.c)
 *
 * This file opens and closes; batch_step.c has the steps, batch_flight.c what becomes of them, batch_tables.c what the device
 * knows of the tables, batch_audit.c the samples. Owner: the connection's thread. */
#include "client/batch.h"

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
    *s = (struct batch_seq){.seq = seq, .cuts = seq->cuts};
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
    for (uint32_t i = 0; i < b->count && !r; i++) /* settling a later one may have changed an earlier one's */
        b->seqs[i].scheme = seqs[i]->scheme, b->seqs[i].version = gpu_scheme_version(seqs[i]->scheme);
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
    int r = batch_drain(b);
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
        (void)batch_drain(b); /* what has not ended by now holds memory that this process is about to lose anyway */
        unlink_batch(b);
        release(b);
    }
}
