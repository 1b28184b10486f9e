/* Truncate: the answer waits for the copy of a tail block that must be written again. */
#include "cachesvc/optable.h"

void op_truncate(struct worker *w, const struct pkv_submission *s)
{
    enum pkv_err e = PKV_ERR_OK;
    if (core_seq_truncate(w->daemon->core, daemon_now_ns(), w->id, s->tag, s->seq, s->layer, s->u.truncate.tokens, &e))
        worker_complete(w, s->tag, e, 0, 0);
}
