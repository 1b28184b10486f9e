/* One row per operation of the ring (proto/op.h): what runs when a submission has passed pkv_check_submission. A handler
 * answers with worker_complete, now or later, exactly once. */
#ifndef CACHESVC_OPTABLE_H
#define CACHESVC_OPTABLE_H

#include "cachesvc/worker.h"

struct op_row {
    const char *name;
    void (*run)(struct worker *worker, const struct pkv_submission *submission);
};
extern const struct op_row optable[PKV_OP_COUNT];

#define PKV_OP_HANDLER(NAME, name, payload, help) \
    void op_##name(struct worker *worker, const struct pkv_submission *submission);
PKV_OPS(PKV_OP_HANDLER)
#undef PKV_OP_HANDLER

#endif
