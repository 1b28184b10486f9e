/* Who leaves the pool under pressure. Policy: a clock over the blocks of the tenant that needs room, sinks and recent blocks of
 * every holder kept; where it has none, the fullest chunk that can be emptied whole; on the device that needs it. Mechanism:
 * block_drop. */
#include "cachesvc/core/internal.h"

#define DROP_AT_ONCE 16u

static bool pinned_by(const struct seq *s, const struct block *b)
{
    return b->index < PKV_PIN_FIRST_BLOCKS || b->index + PKV_PIN_LAST_BLOCKS >= s->granted[b->layer];
}

bool block_can_leave(const struct core *core, uint32_t id)
{
    const struct block *b = &core->blocks[id];
    if (b->state != BLOCK_HOME || !b->rows || b->pins || b->dying || pinned_by(&core->seqs[b->seq], b))
        return false;
    for (uint32_t i = 0; b->holders > 1 && i < core->seq_end; i++)
        if (seq_holds(core, i, id) && pinned_by(&core->seqs[i], b))
            return false;
    return true;
}

static uint32_t choose_block(struct core *core, const struct place_kind *k)
{
    for (uint32_t i = 0; i < core->block_count; i++) {
        uint32_t id = core->clock_hand++ % core->block_count;
        const struct block *b = &core->blocks[id];
        if (b->row_bytes == k->slot_bytes && b->tenant == k->tenant && core->seqs[b->seq].device == k->device &&
            block_can_leave(core, id))
            return id;
    }
    return NONE;
}

static uint32_t choose_chunk(const struct core *core, uint32_t device)
{
    uint32_t best = NONE;
    for (uint32_t i = device; i < core->chunk_count[PKV_TIER_POOL]; i += core->config.pool_devices) {
        const struct chunk *c = &core->chunks[PKV_TIER_POOL][i];
        bool all = c->tenant != NONE && c->used;
        for (uint32_t s = 0; all && s < c->slots; s++)
            all = c->owner[s] >= RETIRED ||
                  (core->blocks[c->owner[s]].row_bytes == c->slot_bytes && block_can_leave(core, c->owner[s]));
        if (all && (best == NONE || c->used > core->chunks[PKV_TIER_POOL][best].used))
            best = i;
    }
    return best;
}

static void show_home(struct seq *s, const struct block *b)
{
    publish(&seq_entry(s, b->layer, b->index)->rows, b->home);
    publish_change(s);
}

static void block_drop(struct core *core, uint32_t id)
{
    struct block *b = &core->blocks[id];
    assert(b->state == BLOCK_HOME && b->rows && b->home);
    show_home(&core->seqs[b->seq], b);
    for (uint32_t i = 0; b->holders > 1 && i < core->seq_end; i++)
        if (seq_holds(core, i, id))
            show_home(&core->seqs[i], b);
    core->home_in_pool--, device_of(core, b->rows)->home_bytes -= b->row_bytes;
    place_retire(core, b->rows);
    b->rows = 0;
    core->totals.blocks_dropped++;
}

/* Places of this kind that only wait for their readers. */
static bool coming_back(const struct core *core, const struct place_kind *k)
{
    for (uint32_t i = k->device; i < core->chunk_count[PKV_TIER_POOL]; i += core->config.pool_devices) {
        const struct chunk *c = &core->chunks[PKV_TIER_POOL][i];
        if (c->retired && (place_chunk_fits(core, k, i) || !c->used))
            return true;
    }
    return false;
}

void make_room(struct core *core, const struct place_kind *k)
{
    struct barren now = {core->news, k->slot_bytes, k->device}, *last = &core->barren[k->tenant];
    bool same = last->news == now.news && last->slot_bytes == now.slot_bytes && last->device == now.device;
    if (same || !core->home_in_pool || coming_back(core, k))
        return;
    uint32_t dropped = 0, id;
    while (dropped < DROP_AT_ONCE && (id = choose_block(core, k)) != NONE) {
        block_drop(core, id);
        dropped++;
    }
    uint32_t chunk = dropped ? NONE : choose_chunk(core, k->device);
    if (chunk == NONE) {
        *last = dropped ? *last : now; /* who comes next need not walk before something has happened */
        return;
    }
    const struct chunk *c = &core->chunks[PKV_TIER_POOL][chunk];
    for (uint32_t s = 0; s < c->slots; s++)
        if (c->owner[s] < RETIRED)
            block_drop(core, c->owner[s]);
}
