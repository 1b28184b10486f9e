/* The door of the core: all that the daemon decides about sequences, blocks, places and epochs. Pure: no system call, clock,
 * thread or log inside; events go in, actions come out, time is an argument. One thread owns it: the daemon's loop.
 *
 *   FREE --grant--> GRANTED --seal--> SEALED --copied--> HOME (pool copy) --drop--> HOME (arena only)
 *
 * A block's home in the arena is taken at grant, so that what is sealed can always go home. Places that are given up are
 * retired with the epoch of that moment and reused only after core_quiesce has passed it: nothing moves under a reader.
 *
 * Failures, and what becomes of them: no room in the pool: copies of blocks that are home are dropped, the grant waits for
 * their places, POOL_FULL after its bound; no room in the arena: ARENA_FULL at once, nothing is lost; a worker dies:
 * its sequences go, persistent ones are cut to what every layer has sealed; a copy fails: it is tried once more, then the
 * block stays SEALED in the pool for good; a block freed while it is copied: its places wait for the copy. */
#ifndef CACHESVC_CORE_CORE_H
#define CACHESVC_CORE_CORE_H

#include "proto/err.h"
#include "proto/table.h"
#include "proto/wire.h"

#include <stdbool.h>

struct core;

/* Memory for block tables, shared with workers by the shell. Zeroed; NULL where there is no room. */
struct core_hooks {
    struct pkv_table *(*table_alloc)(void *context, uint32_t tenant, uint64_t bytes, uint64_t *ret_offset);
    void (*table_free)(void *context, uint32_t tenant, uint64_t offset, uint64_t bytes);
    void *context;
};

struct core_config {
    uint32_t pool_chunks, arena_chunks; /* at most PKV_CHUNKS_MAX each */
    uint64_t chunk_bytes;
    uint64_t grant_timeout_ns;
};

struct core *core_create(const struct core_config *config, const struct core_hooks *hooks);
void core_destroy(struct core *core);

/* What the shell must do now. Actions come out in order; each is taken once. */
enum core_action_kind { CORE_COPY, CORE_COMPLETE, CORE_CHUNK_RESET };
struct core_action {
    enum core_action_kind kind;
    uint32_t copy;     /* COPY: to be named to core_copied, once */
    uint64_t from, to; /* COPY: places */
    uint64_t bytes;
    uint32_t worker, tag; /* COMPLETE: an operation that was PENDING */
    enum pkv_err err;
    uint64_t value0, value1;
    uint32_t tier, chunk; /* CHUNK_RESET: another tenant takes the chunk: fresh memory, before anybody maps it */
};
bool core_next_action(struct core *core, struct core_action *ret);

/* ---- workers, models ---- */

enum pkv_err core_worker_join(struct core *core, const char *tenant, uint32_t *ret_worker);
/* The worker's process reads and writes nothing any more. */
void core_worker_leave(struct core *core, uint32_t worker);
uint32_t core_worker_tenant(const struct core *core, uint32_t worker);
/* Whether the chunk is the worker's tenant's, and remembers that the worker has it mapped. */
enum pkv_err core_chunk_map(struct core *core, uint32_t worker, uint32_t tier, uint32_t chunk);
enum pkv_err core_model_add(struct core *core, const struct pkv_model_request *request, uint32_t *ret_model);

/* ---- sequences ---- */

enum pkv_err core_seq_create(struct core *core, uint32_t worker, const struct pkv_op_create *op, uint64_t *ret_handle,
                             uint64_t *ret_table);
enum pkv_err core_seq_open(struct core *core, uint32_t worker, uint64_t handle, uint64_t *ret_tokens, uint64_t *ret_table);
enum pkv_err core_seq_close(struct core *core, uint32_t worker, uint64_t handle);
enum pkv_err core_seq_destroy(struct core *core, uint32_t worker, uint64_t handle);

/* Places for all blocks below `tokens` in one layer or all. True: the answer is in *ret_err; false: it comes as a COMPLETE
 * action, at most grant_timeout_ns later. */
bool core_grant(struct core *core, uint64_t now_ns, uint32_t worker, uint32_t tag, uint64_t handle, uint32_t layer,
                uint64_t tokens, enum pkv_err *ret_err);
enum pkv_err core_seal(struct core *core, uint32_t worker, uint64_t handle, uint32_t layer, uint32_t first, uint32_t count);
/* A copy is finished; `checksum` of what was copied. */
void core_copied(struct core *core, uint32_t copy, bool ok, uint64_t checksum);

/* ---- time ---- */

/* Grows when places are retired. The shell publishes it after each step, then reads the workers' epochs. */
uint64_t core_epoch(const struct core *core);
/* Every reader has entered epoch `epoch` or a later one, or reads nothing. */
void core_quiesce(struct core *core, uint64_t now_ns, uint64_t epoch);
/* Answers grants whose bound has passed. */
void core_tick(struct core *core, uint64_t now_ns);
uint64_t core_deadline(const struct core *core); /* of the next tick; UINT64_MAX: none */

/* ---- looking ---- */

struct core_stats {
    uint64_t capacity[PKV_TIERS], used[PKV_TIERS], retired[PKV_TIERS]; /* bytes */
    uint32_t workers, seqs, granted, sealed, home;                     /* blocks by state */
    uint64_t dropped, freed, copies_failed;
};
void core_stats(const struct core *core, struct core_stats *ret);

/* Walks everything; the sentence of the first invariant that does not hold, or NULL. */
const char *core_check(const struct core *core);

#endif
