/* Seal: the copies home follow as actions of the core. */
#include "cachesvc/optable.h"

void op_seal(struct worker *w, const struct pkv_submission *s)
{
    enum pkv_err e =
        core_seal(w->daemon->core, daemon_now_ns(), w->id, s->seq, s->layer, s->u.seal.first_block, s->u.seal.count);
    worker_complete(w, s->tag, e, 0, 0);
}
