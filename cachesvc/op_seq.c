/* The life of a sequence: create, open, signed, close, destroy. */
#include "cachesvc/optable.h"
#include "cachesvc/states.h"

void op_seq_create(struct worker *w, const struct pkv_submission *s)
{
    uint64_t handle = 0, table = 0;
    const struct pkv_op_create *op = &s->u.create;
    enum pkv_err e = op->state && !states_find(w->daemon, op->model, op->state) ? PKV_ERR_NO_STATE : PKV_ERR_OK;
    if (e == PKV_ERR_OK)
        e = core_seq_create(w->daemon->core, w->id, op, &handle, &table);
    worker_complete(w, s->tag, e, handle, table);
}

void op_seq_open(struct worker *w, const struct pkv_submission *s)
{
    uint64_t tokens = 0, table = 0;
    struct core_view view = {0};
    enum pkv_err e = core_seq_open(w->daemon->core, w->id, s->seq, &tokens, &table);
    if (e == PKV_ERR_OK)
        e = core_seq_view(w->daemon->core, w->id, s->seq, 0, &view);
    worker_complete(w, s->tag, e, tokens, table | view.writer);
}

void op_seq_close(struct worker *w, const struct pkv_submission *s)
{
    worker_complete(w, s->tag, core_seq_close(w->daemon->core, w->id, s->seq), 0, 0);
}

void op_seq_destroy(struct worker *w, const struct pkv_submission *s)
{
    worker_complete(w, s->tag, core_seq_destroy(w->daemon->core, w->id, s->seq), 0, 0);
}

void op_signed(struct worker *w, const struct pkv_submission *s)
{
    struct core_view view;
    enum pkv_err e = core_seq_view(w->daemon->core, w->id, s->seq, 0, &view);
    uint32_t state = s->u.signed_.state;
    if (e == PKV_ERR_OK && state && !states_find(w->daemon, view.model_id, state))
        e = PKV_ERR_NO_STATE;
    if (e == PKV_ERR_OK)
        e = core_seq_signed(w->daemon->core, w->id, s->seq, state);
    worker_complete(w, s->tag, e, 0, 0);
}
