/* A served operation: what its mover thread needs, copied in the loop's thread. The block references are a copy too, and the
 * job counts as a reader of their epoch until it is done (turn.c), so nothing moves under it. */
#ifndef CACHESVC_SERVED_H
#define CACHESVC_SERVED_H

#include "cachesvc/worker.h"
#include "proto/served.h"

struct served {
    struct mover_job job;
    struct worker *worker;
    struct gpu *gpu; /* on the sequence's device */
    struct pkv_submission submission;
    uint64_t epoch;
    struct pkv_geom geom;
    struct pkv_block_ref *blocks; /* [count], from block 0 of the layer */
    uint32_t count;
    struct pkv_select_args select; /* SELECT: the checked copy of its head */
    void (*work)(struct served *served);
    enum pkv_err err; /* what `work` leaves */
    uint64_t value0;
};

/* What part of a layer an operation touches. */
struct served_span {
    uint64_t tokens;          /* blocks of these are needed */
    bool write, write_sealed; /* by the writer alone; sealed blocks too (their signatures) */
    uint64_t first_token;     /* of a write */
};

/* Checks and copies; answers the worker itself and returns NULL if that fails. */
struct served *served_new(struct worker *worker, const struct pkv_submission *submission, const struct served_span *span,
                          void (*work)(struct served *served));
void served_submit(struct served *served);
/* Answers instead of submitting. */
void served_refuse(struct served *served, enum pkv_err err);

#endif
