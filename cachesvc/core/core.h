/* The door of the core: all that the daemon decides about sequences, blocks, places and epochs. Pure: no system call, clock,
 * thread or log inside; events go in, actions come out, time is an argument. One thread owns it: the daemon's loop.
 *
 *   FREE --grant--> GRANTED --seal--> SEALED --copied--> HOME (pool copy) --drop--> HOME (arena only)
 *
 * A block's home in the arena is taken at grant, so that what is sealed can always go home; its copy may give way to a
 * prefill for a while (homing.c). A fork shares sealed blocks by counting references; they lie at the same layer and index in
 * every holder. A tail block that must be written again (fork, truncate) is copied. Places that are given up are retired with
 * the epoch of that moment and reused only after core_quiesce has passed it: nothing moves under a reader.
 *
 * What is at home is looked at again (scrub.c): a block that no longer has its checksum goes home once more where its rows are
 * in the pool too; else it is damaged, and so is each sequence that holds it, until it is cut off or freed.
 *
 * Failures, and what becomes of them: no room in the pool: copies of blocks that are home are dropped, the operation waits for
 * their places, POOL_FULL after its bound; no room in the arena: ARENA_FULL at once, nothing is lost; a worker dies: its
 * sequences go, persistent ones are cut to what every layer has sealed, its fork or truncate is undone; a copy home fails: it
 * is tried once more, then the block stays SEALED in the pool for good; a copy of a tail fails: SYSTEM, and all is as before;
 * a block freed while a copy reads or writes it: its places wait for the copy. */
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
    uint32_t pool_devices;              /* 0 is 1: chunk c of the pool lies on device c % pool_devices */
    uint64_t chunk_bytes;
    uint64_t grant_timeout_ns;
    uint64_t hold_ns;   /* a copy home gives way to a fast prefill for at most so long; 0: to none */
    uint64_t hold_rate; /* bytes a second; a prefill is fast whose blocks are sealed faster */
};

struct core *core_create(const struct core_config *config, const struct core_hooks *hooks);
void core_destroy(struct core *core);

/* What the shell must do now. Actions come out in order; each is taken once. */
enum core_action_kind { CORE_COPY, CORE_CHECK, CORE_COMPLETE, CORE_CHUNK_RESET };
struct core_action {
    enum core_action_kind kind;
    uint32_t copy;     /* COPY, CHECK: to be named to core_copied, once */
    uint64_t from, to; /* COPY, CHECK: places; slots of `bytes` bytes. CHECK copies nothing: its checksum is wanted */
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
/* A worker runs on one device: what it creates lives there, whole, and it opens nothing that lives elsewhere. Without this call
 * it has none: what it creates is spread over the devices, and it opens everything. */
void core_worker_device(struct core *core, uint32_t worker, uint32_t device);
/* Whether the chunk is the worker's tenant's, and remembers that the worker has it mapped. */
enum pkv_err core_chunk_map(struct core *core, uint32_t worker, uint32_t tier, uint32_t chunk);
enum pkv_err core_model_add(struct core *core, const struct pkv_model_request *request, uint32_t *ret_model);
const struct pkv_model_request *core_model(const struct core *core, uint32_t model); /* NULL: none */

/* ---- sequences ---- */

enum pkv_err core_seq_create(struct core *core, uint32_t worker, const struct pkv_op_create *op, uint64_t *ret_handle,
                             uint64_t *ret_table);
enum pkv_err core_seq_open(struct core *core, uint32_t worker, uint64_t handle, uint64_t *ret_tokens, uint64_t *ret_table);
enum pkv_err core_seq_close(struct core *core, uint32_t worker, uint64_t handle);
enum pkv_err core_seq_destroy(struct core *core, uint32_t worker, uint64_t handle);

/* Operations that may have to wait return true where the answer is in *ret_err now; false: it comes as a COMPLETE action,
 * at most grant_timeout_ns plus the time of the copies later. A sequence has at most one fork or truncate under way: BUSY. */

/* Places for all blocks below `tokens` in one layer or all. */
bool core_grant(struct core *core, uint64_t now_ns, uint32_t worker, uint32_t tag, uint64_t handle, uint32_t layer,
                uint64_t tokens, enum pkv_err *ret_err);
/* A child of the worker's with the first `op->tokens` tokens. Whole blocks must be sealed, the tail block granted. COMPLETE
 * brings the handle and the table's offset. */
bool core_seq_fork(struct core *core, uint64_t now_ns, uint32_t worker, uint32_t tag, uint64_t handle,
                   const struct pkv_op_fork *op, enum pkv_err *ret_err, uint64_t *ret_handle, uint64_t *ret_table);
/* Forgets the tokens from `tokens` on in one layer or all. Whole blocks go at once; if the tail block cannot be copied, it
 * stays as it is. */
bool core_seq_truncate(struct core *core, uint64_t now_ns, uint32_t worker, uint32_t tag, uint64_t handle, uint32_t layer,
                       uint64_t tokens, enum pkv_err *ret_err);
/* Blocks [first, first + count) of a layer are full. Their copies home follow as actions, perhaps after a while (hold_ns). */
enum pkv_err core_seal(struct core *core, uint64_t now_ns, uint32_t worker, uint64_t handle, uint32_t layer, uint32_t first,
                       uint32_t count);
/* A copy is finished; `checksum` of what lies in the arena now: where it came from, or went to. */
void core_copied(struct core *core, uint32_t copy, bool ok, uint64_t checksum);

/* The next block at home is to be looked at: a CHECK action of *ret_bytes. False: there is none. */
bool core_scrub(struct core *core, uint64_t *ret_bytes);

/* One layer of a sequence as its holder may read it; valid until the next call of the core. */
struct core_view {
    const struct pkv_block_ref *blocks; /* [blocks_max] */
    const struct pkv_model_request *model;
    uint32_t model_id, blocks_max;
    uint32_t granted, sealed; /* blocks of the layer */
    uint32_t device;          /* where its pool places are */
    bool writer;              /* the worker may write granted, unsealed blocks */
    bool damaged;             /* the sequence has a damaged block: nothing of it is to be served */
};
enum pkv_err core_seq_view(struct core *core, uint32_t worker, uint64_t handle, uint32_t layer, struct core_view *ret);
/* All signatures of a sequence that had no state are made with state `state` now; its writer says so. `state` 0: it is about to
 * make them anew, with any state; BUSY while another worker or sequence shares them, and nobody can fork it until it is done.
 */
enum pkv_err core_seq_signed(struct core *core, uint32_t worker, uint64_t handle, uint32_t state);
/* Whether a sequence's signatures are made with it. */
bool core_state_used(const struct core *core, uint32_t model, uint32_t state);
/* Whether the worker still has the sequence open. */
enum pkv_err core_seq_check(struct core *core, uint32_t worker, uint64_t handle);

/* ---- time ---- */

/* Grows when places are retired. The shell publishes it after each step, then reads the workers' epochs. */
uint64_t core_epoch(const struct core *core);
/* Every reader has entered epoch `epoch` or a later one, or reads nothing. */
void core_quiesce(struct core *core, uint64_t now_ns, uint64_t epoch);
/* Answers operations whose bound has passed, and starts copies home that have waited long enough. */
void core_tick(struct core *core, uint64_t now_ns);
uint64_t core_deadline(const struct core *core); /* of the next tick; UINT64_MAX: none */

/* ---- looking ---- */

struct core_stats {
    uint64_t capacity[PKV_TIERS], used[PKV_TIERS], retired[PKV_TIERS]; /* bytes */
    uint32_t workers, seqs, granted, sealed, home;                     /* blocks by state, now */
    uint32_t held;                                                     /* of those sealed: they give way to a prefill */
    uint64_t blocks_granted, blocks_sealed, blocks_home, blocks_dropped, blocks_freed, blocks_cow; /* since the start */
    uint64_t copies_held, copies_failed, grants_delayed, grants_refused;
};
void core_stats(const struct core *core, struct core_stats *ret);

/* Of what is at home, since the start. */
struct core_health {
    uint64_t blocks_checked, checksum_failures;
    uint64_t blocks_mended, blocks_damaged; /* of the failures: whose rows were in the pool too; or not */
};
const struct core_health *core_health(const struct core *core);

/* Blocks of a layer, or of all: being written; on their way home; home with and without a copy in the pool; and how many of
 * them another sequence holds too. */
struct core_layer_info {
    uint32_t granted, sealed, home_pool, home_arena, shared;
};
struct core_seq_info {
    uint64_t handle, tokens /* that every layer has sealed */, max_tokens;
    uint64_t open; /* workers, one bit each */
    const char *tenant, *label;
    const struct pkv_model_request *model;
    bool persistent;
    uint32_t damaged; /* blocks */
    uint32_t writer;  /* UINT32_MAX: none */
    uint32_t state;   /* of the model; 0: none yet */
    struct core_layer_info blocks;
    uint64_t pool_bytes, arena_bytes; /* of its blocks, shared ones included */
};
/* index 0 .. PKV_SEQS_MAX - 1; false: no sequence lives there. */
bool core_seq_info(const struct core *core, uint32_t index, struct core_seq_info *ret);
bool core_layer_info(const struct core *core, uint32_t index, uint32_t layer, struct core_layer_info *ret);

/* Walks everything; the sentence of the first invariant that does not hold, or NULL. */
const char *core_check(const struct core *core);

#endif
