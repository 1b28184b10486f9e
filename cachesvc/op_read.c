/* Served read: the rows of whole blocks into the data area, one block after the other. */
#include "cachesvc/optable.h"
#include "cachesvc/served.h"

static void work(struct served *s)
{
    const struct pkv_op_read *r = &s->submission.u.read;
    struct daemon *d = s->worker->daemon;
    struct gpu_read_args args = {.geom = &s->geom,
                                 .space = memory_space(&d->memory),
                                 .blocks = s->blocks,
                                 .first_block = r->first_block,
                                 .count = r->count,
                                 .ret_rows = worker_data(s->worker) + r->out_off};
    s->err = (enum pkv_err) - gpu_read(s->gpu, &args);
}

void op_read(struct worker *w, const struct pkv_submission *s)
{
    const struct pkv_op_read *r = &s->u.read;
    struct served_span span = {.tokens = ((uint64_t)r->first_block + r->count) * PKV_BLOCK_TOKENS};
    struct served *job = served_new(w, s, &span, work);
    if (!job)
        return;
    if (r->count * pkv_geom_block_bytes(&job->geom) > r->out_bytes)
        served_refuse(job, PKV_ERR_DATA_SMALL);
    else
        served_submit(job);
}
