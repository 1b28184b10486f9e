/* What the files of the core share. */
#ifndef CACHESVC_CORE_INTERNAL_H
#define CACHESVC_CORE_INTERNAL_H

#include "cachesvc/core/core.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define NONE        UINT32_MAX
#define PENDING_MAX 256u

enum block_state { BLOCK_FREE, BLOCK_GRANTED, BLOCK_SEALED, BLOCK_HOME };

struct block {
    uint8_t state;
    bool dying; /* freed while a copy reads it */
    uint8_t copies_failed;
    uint32_t seq, layer, index;      /* the one reference to it */
    uint64_t rows, signatures, home; /* places; rows 0: dropped */
    uint64_t row_bytes, sig_bytes, checksum;
    uint32_t next; /* free list */
};

struct chunk {
    uint32_t tenant;      /* NONE: unassigned */
    uint32_t last_tenant; /* whose data it held */
    uint64_t slot_bytes;
    uint32_t slots, used, retired, free_head;
    uint32_t *next;  /* [slots] free list */
    uint32_t *owner; /* [slots] block, NONE free, NONE - 1 retired */
    uint16_t *gen;   /* [slots] */
    uint64_t mapped; /* workers, one bit each */
};
#define RETIRED (NONE - 1)

struct retired {
    uint64_t place, epoch;
};

struct seq {
    bool live, persistent;
    uint32_t gen, tenant, model, writer, layers, blocks_max;
    uint64_t open, table_offset, tokens; /* open: workers, one bit each */
    struct pkv_table *table;
    uint32_t *blocks;  /* [layers][blocks_max] block or NONE */
    uint32_t *granted; /* [layers] blocks */
    uint32_t *sealed;  /* [layers] blocks, from the first on */
};

struct worker {
    bool live;
    uint32_t tenant;
};

struct grant {
    uint32_t worker, tag, layer;
    uint64_t handle, tokens, deadline_ns;
};

struct core {
    struct core_config config;
    struct core_hooks hooks;
    struct chunk *chunks[PKV_TIERS];
    uint32_t chunk_count[PKV_TIERS];
    struct block *blocks;
    uint32_t block_count, block_room, block_free, clock_hand;
    struct seq seqs[PKV_SEQS_MAX];
    struct worker workers[PKV_WORKERS_MAX];
    char tenants[PKV_TENANTS_MAX][PKV_NAME_BYTES];
    uint32_t tenant_count;
    struct pkv_model_request models[PKV_MODELS_MAX];
    uint32_t model_count;
    struct retired *retired; /* in order of epochs, from retired_head on */
    uint64_t retired_head, retired_count, retired_room;
    uint64_t epoch;
    struct grant pending[PENDING_MAX];
    uint32_t pending_count;
    struct core_action *actions;
    uint64_t action_head, action_count, action_room;
    uint64_t dropped, freed, copies_failed;
};

void core_emit(struct core *core, const struct core_action *action);

/* places.c */
void places_init(struct core *core);
void places_destroy(struct core *core);
uint64_t place_take(struct core *core, uint32_t tier, uint32_t tenant, uint64_t slot_bytes, uint32_t block);
void place_retire(struct core *core, uint64_t place);
void places_quiesce(struct core *core, uint64_t epoch);
bool places_pending(const struct core *core);

/* blocks.c */
enum pkv_err block_grant(struct core *core, uint32_t seq, uint32_t layer, uint32_t index);
void block_free(struct core *core, uint32_t block);
/* Policy: a rows chunk that can be emptied or a block whose pool copy can go; NONE if there is nothing. */
uint32_t residency_choose(struct core *core, uint32_t tenant, uint64_t slot_bytes);
uint32_t residency_choose_chunk(const struct core *core);
void block_drop(struct core *core, uint32_t block);
void make_room(struct core *core, uint32_t tenant, uint64_t slot_bytes);

/* seqs.c */
struct seq *seq_find(struct core *core, uint32_t worker, uint64_t handle, enum pkv_err *ret_err);
void seq_free(struct core *core, uint32_t index);

static inline void publish(uint64_t *entry, uint64_t place)
{
    __atomic_store_n(entry, place, __ATOMIC_RELEASE);
}

#endif
