/* Grant: the answer waits, with a bound, for room in the pool. */
#include "cachesvc/optable.h"

void op_grant(struct worker *w, const struct pkv_submission *s)
{
    enum pkv_err e = PKV_ERR_OK;
    if (core_grant(w->daemon->core, daemon_now_ns(), w->id, s->tag, s->seq, s->layer, s->u.grant.tokens, &e))
        worker_complete(w, s->tag, e, 0, 0);
}
