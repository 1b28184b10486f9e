/* Steps of batches in flight: they end in their order, when the stream has written "idle" into their slot; then their full
 * blocks are sealed, their samples judged, and what met NaN is taken back. Failures: batch.c. */
#include "client/batch.h"

#define SLEEP_NS 20000

bool batch_slot_ended(const struct pkv_batch *b, uint32_t slot)
{
    return pkv_load64(&b->kv->region->epoch[slot]) == PKV_EPOCH_IDLE;
}

uint32_t batch_oldest(const struct pkv_batch *b)
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
    while (!batch_slot_ended(b, slot)) {
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

int batch_reap(struct pkv_batch *b)
{
    int r = b->late;
    b->late = 0;
    for (uint32_t slot; !r && (slot = batch_oldest(b)) && batch_slot_ended(b, slot);) {
        if (gpu_batch_bad(b->gpu, slot))
            return take_back(b, slot);
        b->steps[slot].flying = false;
        batch_audit_ended(b, slot, b->steps[slot].grows);
        r = seal_all(b, &b->steps[slot]);
    }
    return r;
}

int batch_drain(struct pkv_batch *b)
{
    int r = batch_reap(b);
    for (uint32_t slot; !r && (slot = batch_oldest(b));) {
        r = wait_slot(b, slot);
        r = r ? r : batch_reap(b);
    }
    return r;
}

bool batch_busy(struct pkv_batch *b)
{
    if (!b->open && batch_oldest(b))
        b->late = batch_reap(b); /* for the batch's own next call */
    return b->open || batch_oldest(b);
}

static int quiet(struct pkv_batch *b)
{
    int r = b->open ? -PKV_ERR_BUSY : batch_drain(b);
    if (r && (b->open || batch_oldest(b)))
        return r;
    b->late = r; /* for the batch's own next call */
    return 0;
}

int batch_quiet(struct pkv_model *m)
{
    int r = 0;
    for (struct pkv_batch *b = m->kv->batches; b && !r; b = b->next)
        r = b->model == m ? quiet(b) : 0;
    return r;
}
