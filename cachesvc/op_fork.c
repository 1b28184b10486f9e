/* Fork: a child that shares whole blocks; the answer waits for the copy of the tail block. */
#include "cachesvc/optable.h"

void op_fork(struct worker *w, const struct pkv_submission *s)
{
    enum pkv_err e = PKV_ERR_OK;
    uint64_t handle = 0, table = 0;
    if (core_seq_fork(w->daemon->core, daemon_now_ns(), w->id, s->tag, s->seq, &s->u.fork, &e, &handle, &table))
        worker_complete(w, s->tag, e, handle, table);
}
