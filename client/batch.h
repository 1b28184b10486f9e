/* What the files of batches share. */
#ifndef CLIENT_BATCH_H
#define CLIENT_BATCH_H

#include "client/internal.h"
#include "gpu/batch.h"

/* A sequence in a batch, and what the batch's device knows of its tables. */
struct batch_seq {
    struct pkv_seq *seq;
    const struct gpu_scheme *scheme;
    uint64_t version;           /* of the scheme, when the batch was opened */
    uint64_t cuts;              /* of the sequence, when the device last heard of it */
    uint64_t changes;           /* of its table, before `refs` were read */
    uint32_t known;             /* blocks of each layer in refs; 0: none yet */
    uint64_t asked;             /* length that the daemon was asked for ahead; 0: none since the last cut */
    struct pkv_block_ref *refs; /* [layers][blocks_max] as the device has them */
};

/* A step that holds slot i of the region's epochs. */
struct batch_step {
    bool flying;
    bool grows;       /* its tokens count */
    uint64_t number;  /* of steps begun */
    uint64_t *before; /* [count] lengths */
};

/* batch_audit.c */
struct batch_audit {
    bool on;
    uint32_t last, keeps; /* layers: the last one attended; the one of this pass whose call keeps */
    uint32_t slot;        /* of the step that has a wish; 0: none */
    uint32_t seq;         /* of the wish: an index */
    uint64_t tokens;      /* that its query sees */
    struct gpu_batch_wish wish;
};

struct pkv_batch {
    struct pkv *kv;
    struct pkv_model *model;
    struct pkv_batch *next;
    uint32_t count, queries, slot;
    bool open;
    int late; /* -enum pkv_err that was found when nobody asked */
    uint64_t steps_begun, maps, page;
    struct batch_seq *seqs;
    struct batch_step steps[PKV_EPOCH_SLOTS]; /* slot 0 is the calling thread's */
    struct gpu_batch *gpu;
    uint64_t *lengths;             /* [count] of the step being begun */
    struct gpu_batch_ref *entries; /* [entries_room] */
    uint64_t entries_count, entries_room;
    struct gpu_policy policy;
    struct batch_audit audit;
};

/* batch_flight.c: whether the step in a slot has ended; the slot of the oldest in flight, or 0; looks after all steps that have
 * ended, in their order; the same after waiting for all, each with the connection's bound. */
bool batch_slot_ended(const struct pkv_batch *batch, uint32_t slot);
uint32_t batch_oldest(const struct pkv_batch *batch);
int batch_reap(struct pkv_batch *batch);
int batch_drain(struct pkv_batch *batch);
/* batch_tables.c: what is new in the tables of all sequences, for lengths as in batch->lengths; inside the step's epoch. */
int batch_tables(struct pkv_batch *batch, void *stream);
/* batch_audit.c: a wish for the step that begins, or NULL; the step has ended (not cancelled, nor taken back: `good`); whether
 * the call of this layer keeps; the step is on its way. */
const struct gpu_batch_wish *batch_audit_wish(struct pkv_batch *batch);
void batch_audit_ended(struct pkv_batch *batch, uint32_t slot, bool good);
bool batch_audit_keeps(struct pkv_batch *batch, uint32_t layer);
void batch_audit_turn(struct pkv_batch *batch);
/* The device did not get what batch_tables found. */
void batch_tables_forget(struct pkv_batch *batch);

#endif
