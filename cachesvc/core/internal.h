/* What the files of the core share. */
#ifndef CACHESVC_CORE_INTERNAL_H
#define CACHESVC_CORE_INTERNAL_H

#include "cachesvc/core/core.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define NONE        UINT32_MAX
#define PENDING_MAX 256u
#define HINTS       32u /* where the last slot was, by size: rows and signatures lie in chunks of their own */

enum block_state { BLOCK_FREE, BLOCK_GRANTED, BLOCK_SEALED, BLOCK_HOME, BLOCK_STATES };

struct block {
    uint8_t state, copies_failed;
    bool going_home;                 /* a copy home is in flight */
    bool dying;                      /* nobody holds it, but a copy reads or writes it */
    uint32_t holders;                /* sequences that refer to it; 1 while it is filled */
    uint32_t pins;                   /* forks and truncates that copy it, or wait to; a look */
    uint32_t source, fills;          /* a tail being copied: from which block; copies in flight into this one */
    bool filled_from_home;           /* and so has the source's checksum */
    uint32_t fill_err;               /* enum pkv_err: one of them failed */
    bool looked_at;                  /* its checksum is on its way */
    bool damaged;                    /* it is at home alone, and has another checksum */
    bool mending;                    /* it was at home damaged, and goes there once more */
    uint32_t seq;                    /* a holder; the only one unless shared; whose tail this becomes */
    uint32_t tenant, layer, index;   /* the same in every holder */
    uint64_t rows, signatures, home; /* places; rows 0: dropped; signatures 0: sig_bytes is 0 */
    uint64_t row_bytes, sig_bytes, checksum;
    uint32_t next, before; /* of those whose copies home wait */
    bool held;             /* it is one of them */
    uint64_t sealed_ns;
};

/* One of the devices over which the pool's chunks are spread; without a GPU, the pool. */
struct device {
    uint64_t capacity, taken; /* bytes of its chunks, and of slots that are not free */
    uint64_t home_bytes;      /* rows of blocks that are home: room, if need be */
    uint32_t first, last;     /* blocks whose copies home wait, the longest first; NONE */
    uint32_t held, due;       /* how many; how many of them, from the first on, wait no longer */
    uint32_t flying;          /* copies home under way */
    uint64_t pace_ns, at_ns;  /* what was sealed would take so long at hold_rate; less what has passed, up to then */
};

/* Numbers, of which the lowest is taken first: what is given out together lies together, however it came back. */
struct set {
    uint64_t *word;
    uint32_t first; /* no word before it has a number */
};

struct chunk {
    uint32_t tenant;      /* NONE: unassigned */
    uint32_t last_tenant; /* whose data it held */
    uint64_t slot_bytes;
    uint32_t slots, used, retired;
    struct set free; /* slots */
    uint32_t *owner; /* [slots] block, NONE free, NONE - 1 retired */
    uint16_t *gen;   /* [slots] */
    uint64_t mapped; /* workers, one bit each */
};
#define RETIRED (NONE - 1)

struct retired {
    uint64_t place, epoch;
};

/* A fork or truncate under way: tail blocks are granted, filled by copies, then put in place all at once. */
enum cow_kind { COW_NONE, COW_FORK, COW_TRUNCATE };
struct cow {
    enum cow_kind kind;
    uint32_t worker, tag, first_layer, last_layer;
    uint64_t tokens;
    uint32_t *source, *target; /* [layers] blocks, NONE: this layer needs no copy, or not granted yet */
    uint32_t missing, filling; /* targets not granted yet; targets with copies in flight */
    enum pkv_err failed;       /* a copy has */
};

struct seq {
    bool live, persistent;
    uint32_t gen, tenant, model, writer, layers, blocks_max, device;
    uint32_t state;                                  /* of the model, that its signatures are made with; as in its table */
    uint32_t damaged;                                /* blocks of it that are */
    bool signing;                                    /* anew: state is 0 meanwhile, and nobody may come to share its blocks */
    uint64_t open, table_offset, tokens, max_tokens; /* open: workers, one bit each */
    struct pkv_table *table;
    uint32_t *blocks;  /* [layers][blocks_max] block or NONE */
    uint32_t *granted; /* [layers] blocks */
    uint32_t *sealed;  /* [layers] blocks, from the first on */
    struct cow cow;
    char label[24];
};

/* The last walk of a tenant's over all blocks that found none to leave the pool, and the news of that moment. */
struct barren {
    uint64_t news, slot_bytes; /* slot_bytes 0: none yet */
    uint32_t device;
};

struct worker {
    bool live;
    uint32_t tenant, device; /* device NONE: any */
};

/* An operation that waits for room in the pool. */
struct waiting {
    bool cow; /* the sequence's fork or truncate; else a grant */
    uint32_t worker, tag, layer;
    enum pkv_err missing; /* POOL_FULL or ARENA_FULL: the answer when the bound has passed */
    uint64_t handle, tokens, deadline_ns;
};

struct core {
    struct core_config config;
    struct core_hooks hooks;
    struct chunk *chunks[PKV_TIERS];
    uint32_t chunk_count[PKV_TIERS], chunk_hint[PKV_TIERS][HINTS];
    struct device *devices; /* [config.pool_devices] */
    struct block *blocks;
    uint32_t block_count, block_room, clock_hand, scrub_hand;
    struct set block_free;
    struct set to_look; /* blocks at home that can be looked at; its `first` means nothing */
    uint32_t to_look_count;
    uint32_t by_state[BLOCK_STATES], dying;
    uint32_t home_in_pool; /* blocks at home that have rows in the pool: only they can leave it */
    struct seq seqs[PKV_SEQS_MAX];
    uint32_t seq_end;     /* no live sequence from here on */
    uint32_t heir;        /* who took over a shared block last */
    uint32_t device_next; /* of a worker without one */
    struct worker workers[PKV_WORKERS_MAX];
    char tenants[PKV_TENANTS_MAX][PKV_NAME_BYTES];
    uint32_t tenant_count;
    struct pkv_model_request models[PKV_MODELS_MAX];
    uint32_t model_count;
    struct retired *retired; /* in order of epochs, from retired_head on */
    uint64_t retired_head, retired_count, retired_room;
    uint64_t epoch;
    struct waiting waiting[PENDING_MAX]; /* first come first */
    uint32_t waiting_count;
    uint64_t news, news_tried; /* what may make room has happened so often; and had, when those that wait were tried last */
    struct barren barren[PKV_TENANTS_MAX];
    struct core_action *actions;
    uint64_t action_head, action_count, action_room;
    struct core_stats totals; /* the counters since the start */
    struct core_health health;
};

void core_emit(struct core *core, const struct core_action *action);

/* places.c */
void places_init(struct core *core);
void places_destroy(struct core *core);
/* What may hold a slot: chunks of one tier (of the pool: of one device) that are the tenant's, or nobody's yet. */
struct place_kind {
    uint32_t tier, tenant, device;
    bool rows; /* of the pool: rows, which can leave it */
    uint64_t slot_bytes;
};
bool place_chunk_fits(const struct core *core, const struct place_kind *kind, uint32_t chunk);
uint64_t place_take(struct core *core, const struct place_kind *kind, uint32_t block);
/* One that no table has shown: nobody reads it. */
void place_put_back(struct core *core, uint64_t place);
void place_retire(struct core *core, uint64_t place);
void places_quiesce(struct core *core, uint64_t epoch);

/* blocks.c */
/* A new block in state GRANTED that nobody's table shows yet. */
enum pkv_err block_make(struct core *core, uint32_t seq, uint32_t layer, uint32_t index, uint32_t *ret_block);
/* Into a sequence's table: its own new block, or one more holder of a shared one. */
void block_install(struct core *core, uint32_t seq, uint32_t block);
/* Out of a sequence's table; the last holder frees it. */
void block_leave(struct core *core, uint32_t seq, uint32_t layer, uint32_t index);
/* Frees a block without holders, or leaves that to the copies in flight. */
void block_retire(struct core *core, uint32_t block);
/* Starts the two copies of a tail block; the source is pinned until they end. */
void block_fill(struct core *core, uint32_t block, uint32_t source);
/* One that needed it where it is does so no longer; the last of them frees a block without holders. */
void block_unpin(struct core *core, uint32_t block);
/* Starts the copy home of a sealed block. */
void block_go_home(struct core *core, uint32_t block);
/* Wants its checksum, as it is at home. */
void block_look(struct core *core, uint32_t block);

/* scrub.c */
/* Whether a block is to be looked at may have changed. */
void scrub_mark(struct core *core, uint32_t block);
/* For core_check: the sentence of what is wrong with the marks, or NULL. */
const char *scrub_check(const struct core *core);
/* A damaged block joins or leaves a sequence. */
void seq_damage(struct seq *seq, bool joins);

/* homing.c: policy answers when, blocks.c copies. */
/* A block has been sealed: its copy starts now or waits. */
void homing_add(struct core *core, uint64_t now_ns, uint32_t block);
/* Nobody holds it any more: it need not go home. */
void homing_drop(struct core *core, uint32_t block);
/* What a sequence has sealed is to be at home soon: its writer is gone, it stays. */
void homing_hurry(struct core *core, uint32_t device);
/* Starts what need not wait any longer. */
void homing_turn(struct core *core, uint64_t now_ns);
uint64_t homing_deadline(const struct core *core);

/* residency.c: policy chooses, mechanism drops. */
/* Whether its copy in the pool may be dropped. */
bool block_can_leave(const struct core *core, uint32_t block);
void make_room(struct core *core, const struct place_kind *kind);

/* seqs.c */
struct seq *seq_find(struct core *core, uint32_t worker, uint64_t handle, enum pkv_err *ret_err);
enum pkv_err seq_make(struct core *core, uint32_t worker, uint32_t model, uint32_t max_tokens, bool persistent,
                      const char *label, uint32_t *ret_index); /* on the worker's device, or the next one */
void seq_free(struct core *core, uint32_t index);
void seq_publish_tokens(struct seq *seq);
void seq_publish_state(struct seq *seq, uint32_t state);

/* grants.c */
/* Places for what failed with `e` may come by themselves: dropped copies, or what only waits for readers and copies. */
bool waiting_helps(const struct core *core, enum pkv_err e);
/* Joins the queue; false where it is full. */
bool waiting_add(struct core *core, const struct waiting *entry);
void waiting_drop(struct core *core, uint64_t handle, uint32_t worker, enum pkv_err answer); /* worker NONE: anybody's */

/* cow.c */
/* Grants what is missing: OK once all copies have been started. */
enum pkv_err cow_try(struct core *core, uint32_t seq);
/* A copy into a block of the operation is done; it may have been the last. */
void cow_filled(struct core *core, uint32_t seq, enum pkv_err err);
/* Undoes the operation and answers it; a fork's child is gone afterwards. */
void cow_abort(struct core *core, uint32_t seq, enum pkv_err answer);
/* The same without an answer or the end of the child: the sequence is being freed. */
void cow_drop(struct core *core, uint32_t seq);

static inline uint32_t *seq_block(const struct seq *s, uint32_t layer, uint32_t index)
{
    return &s->blocks[(uint64_t)layer * s->blocks_max + index];
}

static inline struct pkv_block_ref *seq_entry(const struct seq *s, uint32_t layer, uint32_t index)
{
    return &pkv_table_layer(s->table, layer, s->blocks_max)[index];
}

static inline void set_put(struct set *s, uint32_t n)
{
    s->word[n / 64] |= 1ull << n % 64;
    s->first = PKV_MIN(s->first, n / 64);
}

/* There is one. */
static inline uint32_t set_take(struct set *s)
{
    while (!s->word[s->first])
        s->first++;
    uint32_t bit = (uint32_t)__builtin_ctzll(s->word[s->first]);
    s->word[s->first] &= s->word[s->first] - 1;
    return s->first * 64 + bit;
}

static inline bool set_has(const struct set *s, uint32_t n)
{
    return s->word[n / 64] >> n % 64 & 1;
}

static inline bool seq_holds(const struct core *core, uint32_t seq, uint32_t block)
{
    const struct seq *s = &core->seqs[seq];
    const struct block *b = &core->blocks[block];
    return s->live && s->tenant == b->tenant && b->layer < s->layers && b->index < s->blocks_max &&
           *seq_block(s, b->layer, b->index) == block;
}

/* Of a place in the pool. */
static inline struct device *device_of(const struct core *core, uint64_t place)
{
    return &core->devices[pkv_place_chunk(place) % core->config.pool_devices];
}

static inline void publish(uint64_t *entry, uint64_t place)
{
    __atomic_store_n(entry, place, __ATOMIC_RELEASE);
}

/* After an entry that named a place names another or none. */
static inline void publish_change(struct seq *s)
{
    publish(&s->table->changes, s->table->changes + 1);
}

#endif
