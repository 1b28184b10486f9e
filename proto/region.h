/* The shared region of one worker: rings, the worker's words, its counters, the data area. The daemon makes it (a sealed
 * memfd), both map it writable. Hostile ground for the daemon: it reads a value once, copies, and checks the copy; it
 * keeps its own indices and never follows one that the worker wrote further than the mask allows. */
#ifndef PROTO_REGION_H
#define PROTO_REGION_H

#include "proto/wire.h"

/* An index on a cache line of its own. */
struct pkv_index {
    uint32_t value;
    uint32_t waiting; /* the reader of this index sleeps, or is about to: wake it */
    uint32_t reserved[14];
};
PKV_WIRE_ASSERT(struct pkv_index, 64, 64, 4 + 4 + 14 * 4, reserved, 8);

/* No reads are in flight. */
#define PKV_EPOCH_IDLE UINT64_MAX

/* What a worker's samples say of one model. */
struct pkv_model_quality {
    uint64_t samples, mass_ppm, error_ppm;
    uint64_t state; /* of the sequences that were sampled; the sums begin anew when it changes */
};
PKV_WIRE_ASSERT(struct pkv_model_quality, 32, 8, 3 * 8 + 8, state, 24);

struct pkv_region {
    uint32_t magic;
    uint32_t worker;
    uint64_t bytes;
    uint64_t data_off; /* of the data area in the region */
    uint64_t data_bytes;
    uint64_t reserved[4];
    struct pkv_index sq_tail; /* worker writes; `waiting` is set by a daemon that sleeps */
    struct pkv_index sq_head; /* daemon writes */
    struct pkv_index cq_tail; /* daemon writes; `waiting` is set by a worker that sleeps on `value` (futex) */
    struct pkv_index cq_head; /* worker writes */
    /* Per slot, the control page's epoch as it was when the reads that hold the slot began, or PKV_EPOCH_IDLE. Slot 0 is the
     * calling thread's; the others are for steps in flight on a GPU: the thread writes the epoch before it reads the tables,
     * the stream writes IDLE behind its last read. The oldest counts. */
    uint64_t epoch[PKV_EPOCH_SLOTS];
    struct pkv_submission sq[PKV_RING_ENTRIES];
    struct pkv_completion cq[PKV_RING_ENTRIES];
    /* Claims: the length of each open sequence as its worker counts it, by handle index modulo the array's length. The
     * daemon clamps what it reads to what it granted and what was sealed. */
    uint64_t seq_handle[PKV_WORKER_SEQS_MAX];
    uint64_t seq_tokens[PKV_WORKER_SEQS_MAX];
#define PKV_COUNTER_MEMBER(name, unit, help) uint64_t name;
    struct pkv_worker_counters {
        PKV_WORKER_COUNTERS(PKV_COUNTER_MEMBER)
    } counters;
    struct pkv_model_quality quality[PKV_MODELS_MAX]; /* by model id */
};

/* Signature states of a model, as the daemon publishes them. */
struct pkv_model_states {
    uint32_t latest; /* new sequences are signed with it; 0: there is none yet */
    uint32_t wanted; /* the daemon asks for this one to be learnt from the tokens now coming; 0: for none */
};
PKV_WIRE_ASSERT(struct pkv_model_states, 8, 4, 4 + 4, wanted, 4);

/* Read-only to every worker; the daemon writes. */
struct pkv_control {
    uint32_t magic;
    uint32_t version_major, version_minor;
    uint32_t audit_ppm; /* share of attend time that samples may take; 0: none are taken */
    uint64_t epoch;     /* grows each time that places are retired */
    uint64_t instance;  /* random, of this run of the daemon */
    uint64_t pool_bytes, arena_bytes;
    uint64_t lost; /* enum pkv_err; GPU_LOST: the daemon can serve no more and ends */
    uint64_t reserved;
    struct pkv_model_states models[PKV_MODELS_MAX]; /* by id */
};
PKV_WIRE_ASSERT(struct pkv_control, 64 + 8 * PKV_MODELS_MAX, 8, 4 * 4 + 4 * 8 + 2 * 8 + 8 * PKV_MODELS_MAX, models, 64);
static_assert(sizeof(struct pkv_control) <= 4096, "the control page is one page");

static inline uint64_t pkv_region_data_off(void)
{
    return PKV_ALIGN_UP(sizeof(struct pkv_region), 4096ull);
}
static inline uint64_t pkv_region_bytes(uint64_t data_bytes)
{
    return pkv_region_data_off() + data_bytes;
}

#endif
