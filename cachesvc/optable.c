/* The table, complete by construction: an operation without op_<name>() does not link. */
#include "cachesvc/optable.h"

const struct op_row optable[PKV_OP_COUNT] = {
#define PKV_OP_ROW(NAME, name, payload, help) [PKV_OP_##NAME] = {#name, op_##name},
    PKV_OPS(PKV_OP_ROW)
#undef PKV_OP_ROW
};

void op_nop(struct worker *w, const struct pkv_submission *s)
{
    worker_complete(w, s->tag, PKV_ERR_OK, 0, 0);
}
