/* What the files of the library share. Inside, functions return 0 or -enum pkv_err, as gpu does; the public functions turn
 * that into a negative errno and keep the sentence (kv_done). One thread at a time owns a connection and what hangs on it. */
#ifndef CLIENT_INTERNAL_H
#define CLIENT_INTERNAL_H

#include "client/audit.h"
#include "client/pivotkv.h"
#include "gpu/device.h"
#include "gpu/gpu.h"
#include "proto/check.h"
#include "proto/ring.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

struct pkv {
    int socket, process, event; /* process: pidfd of the daemon; event: wakes it when it sleeps */
    bool served, gone;
    uint32_t worker, timeout_ms, spin_us;
    struct pkv_region *region; /* writable, shared with the daemon */
    uint64_t region_bytes;
    char *data;
    uint64_t data_bytes;
    const struct pkv_control *control; /* read-only */
    const char *tables;                /* read-only, PKV_TABLE_BYTES */
    uint32_t sq_tail, cq_head, next_tag;
    enum pkv_err late;             /* first failure of an operation that nobody waited for */
    uint64_t *readable[PKV_TIERS]; /* [PKV_CHUNKS_MAX] chunks mapped read-only, as the backend addresses them */
    uint64_t *writable;            /* [PKV_CHUNKS_MAX] pool chunks mapped writable */
    uint64_t *arena;               /* [PKV_CHUNKS_MAX] on a device: where this process has the arena's chunks */
    struct gpu_chunk *imported;    /* [PKV_CHUNKS_MAX] on a device: the pool's chunks */
    uint64_t chunk_bytes, maps;    /* maps: chunks mapped so far */
    uint64_t maps_all;             /* the same + 1 when region_map_all last looked for more; 0: never */
    struct gpu_device *device;     /* NULL: the host backend */
    struct gpu *gpu;
    struct pkv_model *models;
    struct pkv_batch *batches;
    struct pkv_block_ref *refs; /* scratch, [refs_room] */
    uint64_t refs_room;
    struct audit audit;
    char error[256], description[384];
};

/* A way to make signatures that will not change any more. */
struct model_state {
    struct model_state *next;
    uint32_t number; /* the daemon's */
    struct gpu_scheme *scheme;
};

/* calibrate.c: a thread that solves. */
struct solver {
    pthread_t thread;
    struct gpu_scheme *scheme;
    bool running, all, shares; /* all: every layer must be solved; shares: exports the state, to `fd` */
    bool stop, solved;         /* for the thread, by the thread */
    int result, fd;
};
struct calibration {
    uint32_t number, given_up;  /* of the state to be, 0: none is; the last one that could not be made here */
    struct gpu_scheme *learner; /* gathers */
    struct gpu_scheme *early;   /* what `early_layers` layers of it had at GPU_LEARN_EARLY */
    uint32_t early_layers;
    bool early_over;
    struct solver solver; /* of one of the two */
};
#define CALIBRATION_CALL 16u /* tokens; shorter calls do not teach a first state, so that it depends on what was read alone */

/* turn.c: sequences without a state turn to another way to make signatures. */
struct turn {
    struct gpu_scheme *to; /* NULL: they do not */
    uint32_t number;       /* of the state; 0: none, and `to` becomes scheme0 */
    uint32_t layers;       /* that have turned */
};

struct pkv_model {
    struct pkv *kv;
    struct pkv_model *next;
    struct pkv_seq *seqs;
    uint32_t id, kind;
    struct pkv_geom geom;
    float rope_base;
    uint32_t rope_dims, rope_interleaved;
    bool learns;                /* its signatures need no file */
    struct gpu_scheme *scheme0; /* of a file; else of sequences without a state, NULL when there are none */
    struct model_state *states; /* latest first */
    struct calibration calibration;
    struct turn turn;
};

struct pkv_seq {
    struct pkv_model *model;
    struct pkv_seq *next;
    uint64_t handle, max_tokens;
    const struct pkv_table *table;
    struct gpu_scheme *scheme; /* that its signatures are made with, but in layers that have turned: seq_scheme */
    uint32_t state;            /* its number; 0: a file's, or this worker's own way */
    bool writer, foreign;      /* foreign: what is there was signed in another worker's own way, or partly */
    bool heir, gone;           /* heir: forked from another worker's, and may share its blocks; gone: found so by turn.c */
    uint64_t *tokens;          /* [layers] as this writer counts them */
    uint32_t *granted;         /* [layers] blocks */
    uint32_t *sealed;          /* [layers] blocks */
    uint64_t cuts;             /* how often tokens were taken back */
    uint64_t staged; /* tokens of the layer that turns whose new signatures are in `stage` [tokens][kv_heads][words] */
    char *stage;
    uint64_t stage_bytes;
    struct pkv_batch *batch; /* that it is in, or NULL */
};

/* connect.c: a request on the socket and its reply. `fd` travels along (-1: none); *ret_fd the one that comes back. */
int socket_call(struct pkv *kv, const void *request, size_t bytes, int fd, struct pkv_reply *ret, int *ret_fd);
/* -PKV_ERR_DAEMON_GONE once the daemon is not there any more; costs one system call. */
int daemon_check(struct pkv *kv);
/* Keeps the sentence of `r` (0 or -enum pkv_err) and returns its negative errno. */
int kv_done(struct pkv *kv, int r);

/* backend.c: what hello offers and requires; then, by the daemon's answer, the device and the kernels. Falls back to served
 * where the caller named no backend. */
int backend_offer(const struct pkv *kv, const struct pkv_options *o, struct pkv_hello *hello);
int backend_settle(struct pkv *kv, const struct pkv_options *o, const struct pkv_reply *reply);
void backend_close(struct pkv *kv);

/* ring.c: one operation and its answer, within timeout_ms. `ret` may be NULL. */
int ring_call(struct pkv *kv, const struct pkv_submission *submission, struct pkv_completion *ret);
/* Without waiting; a failure shows in kv->late. */
int ring_post(struct pkv *kv, const struct pkv_submission *submission);
/* The same; what becomes of it is no matter. */
int ring_ask(struct pkv *kv, const struct pkv_submission *submission);

/* region.c: chunks are mapped when a place in them is met first. */
int region_map(struct pkv *kv, uint64_t place);
/* Every chunk that is this tenant's by now, so that no later call meets a new one until the daemon takes another for it. */
int region_map_all(struct pkv *kv);
void region_unmap_all(struct pkv *kv);
struct gpu_space region_readable(const struct pkv *kv);
struct gpu_space region_writable(const struct pkv *kv);
struct pkv_block_ref *region_refs(struct pkv *kv, uint64_t count); /* scratch; NULL without memory */

/* state.c */
static inline struct pkv_model_states model_published(const struct pkv_model *m)
{
    struct pkv_model_states states = {0};
    if (m->id < PKV_MODELS_MAX) {
        states.latest = __atomic_load_n(&m->kv->control->models[m->id].latest, __ATOMIC_ACQUIRE);
        states.wanted = __atomic_load_n(&m->kv->control->models[m->id].wanted, __ATOMIC_RELAXED);
    }
    return states;
}
int model_scheme(struct pkv_model *model, struct gpu_scheme **ret); /* a fresh one that learns */
/* The scheme of a state; 0: scheme0. -PKV_ERR_NO_STATE: gone. */
int model_state_get(struct pkv_model *model, uint32_t number, struct gpu_scheme **ret);
/* Takes over the daemon's latest state; 0: there is none. */
int model_latest(struct pkv_model *model, uint32_t *ret_number);
/* A settled scheme as a sealed memfd; by any thread. */
int state_export(const struct gpu_scheme *scheme, int *ret);
/* Shares a scheme that has been exported; on success it is the model's. */
int model_state_put(struct pkv_model *model, uint32_t number, struct gpu_scheme *scheme, int fd);
int model_sign_share(struct pkv_model *model); /* a `sign` that has settled, as the first state */
/* Lets go of states that no sequence here is signed with; the latest stays. */
void model_trim(struct pkv_model *model);
void model_states_close(struct pkv_model *model);
/* All signatures are of a state now, which belongs to the model. */
int seq_say_signed(struct pkv_seq *seq, uint32_t number, struct gpu_scheme *scheme);
/* The scheme that the sequence's table names. */
int seq_adopt_state(struct pkv_seq *seq);
/* Before its signatures are used, in a call of so many tokens: a reader follows the table, a writer carries on what its model
 * has under way. */
int seq_settle(struct pkv_seq *seq, uint64_t tokens);

/* calibrate.c: shows a writer's keys or queries; takes over what has been solved; waits, with a bound, until nothing is being
 * solved. */
void calibration_observe(struct pkv_model *model, const struct gpu_observation *observation);
void calibration_poll(struct pkv_model *model);
int calibration_wait(struct pkv_model *model);
void calibration_close(struct pkv_model *model);

/* turn.c: to a scheme of this worker's own: true if it is the model's now; to the first state, if there is one; a slice as
 * large as a call of so many tokens may bring; all of it: -PKV_ERR_BUSY while a batch's step is open or in flight. */
bool model_turn_early(struct pkv_model *model, struct gpu_scheme *scheme);
int model_turn_begin(struct pkv_model *model);
int model_turn_some(struct pkv_model *model, uint64_t tokens);
int model_turn_all(struct pkv_model *model);
bool model_turns(struct pkv_model *model); /* or begins to */
static inline struct gpu_scheme *seq_scheme(const struct pkv_seq *s, uint32_t layer)
{
    const struct turn *t = &s->model->turn;
    return t->to && !s->state && !s->foreign && layer < t->layers ? t->to : s->scheme;
}

/* sign.c: signatures of rows that lie in their blocks: in place, `refs` [blocks] being theirs; of a whole layer; as a list
 * [tokens][kv_heads][words] that is put in place later. */
int seq_sign_rows(struct pkv_seq *seq, uint32_t layer, struct gpu_scheme *scheme, const struct pkv_block_ref *refs,
                  uint64_t first, uint32_t tokens);
int seq_sign_again(struct pkv_seq *seq, uint32_t layer, struct gpu_scheme *scheme);
int seq_sign_list(struct pkv_seq *seq, uint32_t layer, struct gpu_scheme *scheme, uint64_t first, uint32_t tokens, char *ret);
int seq_put_signatures(struct pkv_seq *seq, uint32_t layer, uint32_t tokens, char *list);

/* seq.c */
int seq_check(const struct pkv_seq *seq, uint32_t layer);
uint64_t seq_layer_tokens(const struct pkv_seq *seq, uint32_t layer);
/* Copies the references of blocks [first, last) of a layer to `to` [last], every place mapped. Inside an epoch. -PKV_ERR_STALE:
 * it is gone; -PKV_ERR_CHECKSUM: one of its blocks, perhaps another, is damaged. */
int seq_refs(const struct pkv_seq *seq, uint32_t layer, uint32_t first, uint32_t last, struct pkv_block_ref *to);
/* Places for blocks up to `tokens` in every layer. */
int seq_reserve(struct pkv_seq *seq, uint64_t tokens);
/* The same without waiting: the places show in the table, or they never come. seq_granted: whether they are there by now. */
void seq_ask(struct pkv_seq *seq, uint64_t tokens);
bool seq_granted(struct pkv_seq *seq, uint64_t tokens);
/* Truncates one layer or all (PKV_LAYER_ALL), here and at the daemon. */
int seq_cut(struct pkv_seq *seq, uint32_t layer, uint64_t tokens);
void seq_claim(const struct pkv_seq *seq);
void seq_forget(struct pkv_seq *seq);

/* append.c: shows keys or queries (finite) to what still learns. What was signed before `sign` knew a layer's mean is signed
 * again; a `sign` that is complete is shared. Outside of an epoch. */
int model_learn(struct pkv_seq *seq, const struct gpu_observation *observation);
/* Tells the daemon that the blocks below `tokens` are full and written. */
int seq_seal(struct pkv_seq *seq, uint32_t layer, uint64_t tokens);
int model_learn_keys(struct pkv_seq *seq, uint32_t layer, uint64_t first, uint32_t tokens, const void *k);

/* attend.c */
int budget_policy(const struct pkv_budget *budget, struct gpu_policy *ret);

/* batch.c: whether a step is open or in flight; looks after those that have ended. */
bool batch_busy(struct pkv_batch *batch);
/* Waits, with a bound, for the steps in flight of a model's batches. -PKV_ERR_BUSY: one is open. */
int batch_quiet(struct pkv_model *model);
void batch_close_all(struct pkv *kv);

/* One call's queries of one sequence. */
struct attend_part {
    struct pkv_seq *seq;
    uint32_t layer;
    struct gpu_view view;
    struct gpu_policy policy;
    const void *q;
    float *out, *lse; /* lse may be NULL */
};

/* served.c: the same as direct, through the data area. */
int served_append(struct pkv_seq *seq, uint32_t layer, uint64_t first, uint32_t tokens, const void *k, const void *v);
int served_sign_list(struct pkv_seq *seq, uint32_t layer, struct gpu_scheme *scheme, uint64_t first, uint32_t tokens,
                     char *ret);
int served_put_signatures(struct pkv_seq *seq, uint32_t layer, uint32_t tokens, const char *list);
int served_attend(const struct attend_part *part, struct gpu_explain *explain);
/* Rows of blocks to the start of the data area. */
int served_read(struct pkv_seq *seq, uint32_t layer, uint32_t first, uint32_t count);
int served_select(const struct attend_part *part, const struct gpu_rows *rows, void *gathered);

/* audit.c: around a call of pkv_attend. begin returns where to put the log-sum-exps: `lse`, or room of its own where the caller
 * wants none. end after a call that succeeded. */
struct audit_call {
    const struct gpu_policy *policy;
    const void *q;
    const float *out, *lse;
    uint64_t sparse; /* query tokens that were not attended densely */
};
float *audit_begin(struct pkv_seq *const *seqs, const uint32_t *queries, uint32_t count, uint32_t layer, float *lse);
void audit_end(struct pkv *kv, const struct audit_call *call);
/* The same for a step of a batch (batch_audit.c): what its device kept of one query token and kv head of a writer's sequence...
 */
struct audit_kept {
    struct pkv_seq *seq;
    uint32_t layer, head;
    uint64_t tokens; /* that the query saw */
    float scale;
    const void *q;          /* [group][head_dim] */
    const float *out, *lse; /* [group][head_dim], [group] */
};
uint64_t audit_draw(struct audit *audit);                        /* a random number */
void audit_adopt(struct pkv *kv, const struct audit_kept *kept); /* becomes the sample, if there is none */
void audit_turn(struct pkv *kv, uint64_t attend_ns);             /* ...and a slice of it, after so much time of attending */
void audit_forget(const struct pkv_seq *seq);                    /* before its tokens change, or it goes */
void audit_close(struct audit *audit);

static inline uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* Whether attend is dense: 1 or 0; -enum pkv_err for a budget that cannot be. */
static inline int policy_dense(const struct gpu_policy *p, uint64_t tokens)
{
    if (tokens < p->dense_below)
        return 1;
    if (tokens > (uint64_t)p->sinks + p->recent + p->k)
        return p->k ? 0 : -PKV_ERR_BUDGET;
    return !p->k ? -PKV_ERR_BUDGET : p->k > tokens ? -PKV_ERR_BUDGET_LENGTH : 1;
}

#endif
