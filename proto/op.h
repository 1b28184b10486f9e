/* X-macros of operations and counters: the enum, the name, the payload, the statistics and the documentation all come
 * from one row each. */
#ifndef PROTO_OP_H
#define PROTO_OP_H

#include "proto/base.h"

/* X(NAME, name, payload struct, help): operations that travel through a worker's ring. */
#define PKV_OPS(X)                                                                                                 \
    X(NOP, nop, pkv_op_nop, "answers at once; measures the round trip")                                            \
    X(SEQ_CREATE, seq_create, pkv_op_create, "a new sequence; value0 handle, value1 offset of its block table")    \
    X(SEQ_OPEN, seq_open, pkv_op_open, "open a sequence; value0 tokens, value1 table offset, bit 0: may write it") \
    X(SEQ_CLOSE, seq_close, pkv_op_nop, "close; an unshared sequence that is not persistent is freed")             \
    X(SEQ_DESTROY, seq_destroy, pkv_op_nop, "free a sequence, whoever has it open")                                \
    X(FORK, fork, pkv_op_fork, "a child that shares whole blocks; value0 handle, value1 table offset")             \
    X(TRUNCATE, truncate, pkv_op_truncate, "drop the tokens from `tokens` on, in one layer or all")                \
    X(GRANT, grant, pkv_op_grant, "places for blocks up to `tokens`; they appear in the block table")              \
    X(SEAL, seal, pkv_op_seal, "blocks are full: copy them home")                                                  \
    X(APPEND, append, pkv_op_append, "served mode: rows and signatures from the data area")                        \
    X(SELECT, select, pkv_op_select, "served mode: select and gather into the data area")                          \
    X(READ, read, pkv_op_read, "served mode: whole blocks into the data area")                                     \
    X(SIGNED, signed, pkv_op_signed, "all signatures of a sequence are made with state `state` now, or with none")

enum pkv_op {
#define PKV_OP_ENUM(NAME, name, payload, help) PKV_OP_##NAME,
    PKV_OPS(PKV_OP_ENUM)
#undef PKV_OP_ENUM
        PKV_OP_COUNT
};

/* X(name, unit, help): counters that a worker keeps in its region and the daemon sums up. They only grow. */
#define PKV_WORKER_COUNTERS(X)                                                               \
    X(append_calls, calls, "append calls")                                                   \
    X(append_tokens, tokens, "tokens appended, times layers")                                \
    X(attend_calls, calls, "attend calls")                                                   \
    X(attend_dense, queries, "query tokens attended densely, times layers")                  \
    X(attend_sparse, queries, "query tokens attended over a selection, times layers")        \
    X(tokens_seen, tokens, "tokens that those queries could have attended, times kv heads")  \
    X(tokens_attended, tokens, "tokens that they did attend, times kv heads")                \
    X(rows_pool, rows, "rows read from the pool")                                            \
    X(rows_arena, rows, "rows read from the arena")                                          \
    X(sign_ns, ns, "time to turn queries into weights")                                      \
    X(scan_ns, ns, "time in scan")                                                           \
    X(select_ns, ns, "time in select")                                                       \
    X(gather_ns, ns, "time in gather")                                                       \
    X(attend_ns, ns, "time in attention over rows")                                          \
    X(grant_waits, calls, "appends that waited for a grant")                                 \
    X(grant_wait_ns, ns, "time that appends waited for grants")                              \
    X(audits, calls, "calls of pkv_audit")                                                   \
    X(audit_mass_ppm, ppm, "sum over audits of the softmax mass that the selection covered") \
    X(audit_error_ppm, ppm, "sum over audits of the relative error of the attention output") \
    X(attend_call_ns, ns, "time that attend calls took, samples left out")                   \
    X(samples, samples, "sampled (query token, layer, kv head): exact attention beside it")  \
    X(samples_dropped, samples, "samples given up: their sequence was cut or closed")        \
    X(sample_ns, ns, "time that samples took")                                               \
    X(sample_mass_ppm, ppm, "sum over samples of the softmax mass covered")                  \
    X(sample_error_ppm, ppm, "sum over samples of the relative error of the output")         \
    X(sample_error_to_1, samples, "samples with an error of at most 1 %")                    \
    X(sample_error_to_2, samples, "above 1 % and at most 2 %")                               \
    X(sample_error_to_5, samples, "above 2 % and at most 5 %")                               \
    X(sample_error_to_10, samples, "above 5 % and at most 10 %")                             \
    X(sample_error_to_20, samples, "above 10 % and at most 20 %")                            \
    X(sample_error_to_50, samples, "above 20 % and at most 50 %")                            \
    X(sample_error_beyond, samples, "above 50 %")

/* X(percent): the upper bounds of sample_error_to_*, ascending. */
#define PKV_SAMPLE_BOUNDS(X) X(1) X(2) X(5) X(10) X(20) X(50)

/* X(name, unit, help): counters of the daemon. */
#define PKV_DAEMON_COUNTERS(X)                                                                    \
    X(loop_turns, turns, "turns of the event loop")                                               \
    X(ops, operations, "operations completed")                                                    \
    X(ops_refused, operations, "operations refused by the checks")                                \
    X(workers_joined, workers, "workers that said hello")                                         \
    X(workers_refused, workers, "hellos refused")                                                 \
    X(workers_died, workers, "workers that left without saying goodbye")                          \
    X(blocks_granted, blocks, "blocks granted")                                                   \
    X(blocks_sealed, blocks, "blocks sealed")                                                     \
    X(blocks_home, blocks, "blocks copied to the arena")                                          \
    X(blocks_dropped, blocks, "pool copies dropped under pressure")                               \
    X(blocks_freed, blocks, "blocks freed")                                                       \
    X(blocks_cow, blocks, "blocks copied on write by fork and truncate")                          \
    X(copy_bytes, bytes, "bytes moved from pool to arena")                                        \
    X(copy_ns, ns, "time in those copies")                                                        \
    X(copies_held, copies, "copies home that gave way to a prefill for a while")                  \
    X(copies_failed, copies, "copies that failed; each is tried once more")                       \
    X(blocks_checked, blocks, "blocks in the arena whose checksum was looked at again")           \
    X(checksum_failures, blocks, "blocks whose checksum did not match")                           \
    X(blocks_mended, blocks, "of them, those whose rows were in the pool too: copied home again") \
    X(blocks_damaged, blocks, "of them, those that are lost")                                     \
    X(grants_delayed, grants, "grants that waited for room")                                      \
    X(grants_refused, grants, "grants refused: pool or arena full")                               \
    X(served_selects, queries, "query tokens selected for served workers")                        \
    X(served_rows, rows, "rows gathered for served workers")                                      \
    X(quality_alarms, alarms, "models whose mean error rose above the limit")                     \
    X(states_put, states, "signature states that workers shared")                                 \
    X(recalibrations, states, "of them, those that took the place of another")                    \
    X(quality_cleared, alarms, "of them, those that fell below it again")

#endif
