/* Served append: rows and signatures from the data area into granted blocks. */
#include "cachesvc/optable.h"
#include "cachesvc/served.h"

static void work(struct served *s)
{
    struct daemon *d = s->worker->daemon;
    const struct pkv_op_append *a = &s->submission.u.append;
    const char *data = worker_data(s->worker) + a->data_off;
    struct pkv_served_append at = pkv_served_append(&s->geom, a->tokens, a->flags);
    struct gpu_append_args args = {.geom = &s->geom,
                                   .space = memory_space(&d->memory),
                                   .blocks = s->blocks,
                                   .first_token = a->first_token,
                                   .tokens = a->tokens,
                                   .k = data + at.k,
                                   .v = data + at.v};
    int r = a->flags & PKV_APPEND_SIGNATURES ? 0 : gpu_append(s->gpu, &args);
    struct gpu_signatures_args signatures = {.geom = &s->geom,
                                             .space = args.space,
                                             .blocks = s->blocks,
                                             .first_token = a->first_token,
                                             .tokens = a->tokens,
                                             .signatures = data + at.signatures};
    r = r ? r : gpu_put_signatures(s->gpu, &signatures);
    s->err = (enum pkv_err) - r;
}

void op_append(struct worker *w, const struct pkv_submission *s)
{
    const struct pkv_op_append *a = &s->u.append;
    struct served_span span = {.tokens = a->first_token + a->tokens,
                               .write = true,
                               .write_sealed = a->flags & PKV_APPEND_SIGNATURES,
                               .first_token = a->first_token};
    struct served *job = served_new(w, s, &span, work);
    if (!job)
        return;
    if (pkv_served_append(&job->geom, a->tokens, a->flags).bytes > a->data_bytes)
        served_refuse(job, PKV_ERR_DATA_SMALL);
    else
        served_submit(job);
}
