/* The block table as readers see it. The daemon alone writes it; workers map it read-only.
 *
 * One table per sequence: a header, then references [layers][blocks_max]. An entry's words change whole (64-bit
 * atomic stores). A place named by an entry stays valid for a reader that entered its epoch (region.h) before it
 * read the entry, until the reader leaves that epoch. */
#ifndef PROTO_TABLE_H
#define PROTO_TABLE_H

#include "proto/geom.h"

enum pkv_tier { PKV_TIER_NONE = 0, PKV_TIER_POOL = 1, PKV_TIER_ARENA = 2, PKV_TIERS = 3 };

/* A place: bits 0..31 slot, 32..45 chunk, 46..47 tier, 48..63 generation of the slot. Zero means no place. */
static inline PKV_HD uint64_t pkv_place(uint32_t tier, uint32_t chunk, uint32_t slot, uint32_t gen)
{
    return (uint64_t)slot | (uint64_t)(chunk & 0x3fffu) << 32 | (uint64_t)(tier & 3u) << 46 | (uint64_t)(gen & 0xffffu) << 48;
}

static inline PKV_HD uint32_t pkv_place_slot(uint64_t p)
{
    return (uint32_t)p;
}
static inline PKV_HD uint32_t pkv_place_chunk(uint64_t p)
{
    return (uint32_t)(p >> 32) & 0x3fffu;
}
static inline PKV_HD uint32_t pkv_place_tier(uint64_t p)
{
    return (uint32_t)(p >> 46) & 3u;
}
static inline PKV_HD uint32_t pkv_place_gen(uint64_t p)
{
    return (uint32_t)(p >> 48);
}

struct pkv_block_ref {
    uint64_t rows;       /* place of the block's rows: pool or arena */
    uint64_t signatures; /* place of its signatures: always pool */
};
PKV_WIRE_ASSERT(struct pkv_block_ref, 16, 8, 2 * 8, signatures, 8);

struct pkv_table {
    uint64_t seq;        /* handle, see wire.h */
    uint64_t tokens;     /* the length that the daemon last knew */
    uint32_t blocks_max; /* per layer */
    uint32_t layers;
    uint32_t model;
    uint32_t state; /* of the model, that all its signatures are made with; 0: none yet, or none any more */
    /* Grows after an entry that named a place names another or none. A reader that keeps copies of entries looks at it inside
     * its epoch: unchanged, the copies hold. Entries behind the ones it has copied may appear without it. */
    uint64_t changes;
    uint32_t err;         /* enum pkv_err: calls that read rows of it fail so; CHECKSUM as long as it has a damaged block */
    uint32_t reserved0;   /* zero */
    uint64_t reserved[2]; /* zero */
};
PKV_WIRE_ASSERT(struct pkv_table, 64, 8, 2 * 8 + 6 * 4 + 3 * 8, reserved, 48);

static inline PKV_HD uint64_t pkv_table_bytes(uint32_t layers, uint32_t blocks_max)
{
    return sizeof(struct pkv_table) + (uint64_t)layers * blocks_max * sizeof(struct pkv_block_ref);
}

/* The references of one layer: [blocks_max]. */
static inline PKV_HD struct pkv_block_ref *pkv_table_layer(struct pkv_table *t, uint32_t layer, uint32_t blocks_max)
{
    return (struct pkv_block_ref *)(t + 1) + (uint64_t)layer * blocks_max;
}

/* Address of `slot` in a chunk mapped at `base`; slots of one chunk are all of `slot_bytes`. */
static inline PKV_HD uint64_t pkv_place_address(uint64_t base, uint64_t place, uint64_t slot_bytes)
{
    return base + (uint64_t)pkv_place_slot(place) * slot_bytes;
}

#endif
