/* Served operations from the loop to a mover and back. One at a time per worker, in the order of its ring: worker_drain takes
 * nothing while worker->served is set. */
#include "cachesvc/served.h"

#include <stdlib.h>

#define PIN_BYTES_MAX (256ull << 20)

static enum pkv_err span_check(const struct core_view *v, const struct served_span *s)
{
    if (v->damaged)
        return PKV_ERR_CHECKSUM;
    uint64_t readable = (uint64_t)(v->writer ? v->granted : v->sealed) * PKV_BLOCK_TOKENS;
    if (s->write && !v->writer)
        return PKV_ERR_NOT_WRITER;
    if (s->tokens > readable)
        return s->write ? PKV_ERR_NOT_GRANTED : PKV_ERR_LENGTH;
    if (s->write && !s->write_sealed && s->first_token < (uint64_t)v->sealed * PKV_BLOCK_TOKENS)
        return PKV_ERR_NOT_GRANTED;
    return PKV_ERR_OK;
}

struct served *served_new(struct worker *w, const struct pkv_submission *s, const struct served_span *span,
                          void (*work)(struct served *))
{
    struct core_view view;
    struct served *job = NULL;
    enum pkv_err e = core_seq_view(w->daemon->core, w->id, s->seq, s->layer, &view);
    if (e == PKV_ERR_OK)
        e = span_check(&view, span);
    if (e == PKV_ERR_OK) {
        uint32_t count = pkv_tokens_blocks(span->tokens);
        job = malloc(sizeof(*job));
        struct pkv_block_ref *blocks = malloc(PKV_MAX(count, 1u) * sizeof(*blocks));
        if (job && blocks) {
            memcpy(blocks, view.blocks, count * sizeof(*blocks));
            *job = (struct served){.worker = w, .submission = *s, .geom = view.model->geom, .blocks = blocks, .count = count};
            job->work = work;
            job->gpu = w->daemon->gpus[view.device];
            return job;
        }
        free(blocks);
        free(job);
        e = PKV_ERR_NO_MEMORY;
    }
    worker_complete(w, s->tag, e, 0, 0);
    return NULL;
}

void served_refuse(struct served *s, enum pkv_err err)
{
    worker_complete(s->worker, s->submission.tag, err, 0, 0);
    free(s->blocks);
    free(s);
}

/* So that a GPU's gather writes straight into the data area: with the worker's first served call, since most never make one.
 * Where it may not be pinned, rows take the way over the backend's own memory. */
static void pin_region(struct worker *w)
{
    uint64_t address;
    const struct devices *devices = &w->daemon->devices;
    if (!devices->count || w->pin_tried || w->region_bytes > PIN_BYTES_MAX)
        return;
    w->pin_tried = true;
    w->pinned = !gpu_device_register(devices->device[0], w->region, w->region_bytes, false, &address);
}

static void run(struct mover_job *job)
{
    struct served *s = PKV_CONTAINER_OF(job, struct served, job);
    pin_region(s->worker);
    s->work(s);
}

static void done(struct mover_job *job)
{
    struct served *s = PKV_CONTAINER_OF(job, struct served, job);
    struct worker *w = s->worker;
    w->served = NULL;
    w->daemon->serving--;
    if (s->err == PKV_ERR_GPU_LOST)
        loss_report(w->daemon, "a served operation failed");
    w->daemon->counters.served_rows += s->value0;
    if (w->state == WORKER_LEFT) {
        worker_free(w);
    } else {
        /* A sequence that went meanwhile took its rows along: what was read may belong to nobody. */
        enum pkv_err e = core_seq_check(w->daemon->core, w->id, s->submission.seq);
        worker_complete(w, s->submission.tag, e != PKV_ERR_OK ? e : s->err, s->value0, 0);
    }
    free(s->blocks);
    free(s);
}

void served_submit(struct served *s)
{
    struct daemon *d = s->worker->daemon;
    s->epoch = core_epoch(d->core); /* of its places: what is retired from here on waits for it */
    daemon_act(d);                  /* the chunk of a place that this turn granted may be another tenant's until then */
    if (loss_happened(&d->loss)) {
        served_refuse(s, PKV_ERR_GPU_LOST);
        return;
    }
    s->job.run = run, s->job.done = done;
    s->worker->served = s;
    d->serving++;
    mover_submit(&d->served, &s->job);
}
