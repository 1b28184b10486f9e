/* Looking at the core: statistics, what ls and inspect show, and the walk over its invariants. */
#include "cachesvc/core/internal.h"

void core_stats(const struct core *core, struct core_stats *ret)
{
    *ret = core->totals;
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++) {
        ret->capacity[tier] = core->chunk_count[tier] * core->config.chunk_bytes;
        for (uint32_t c = 0; c < core->chunk_count[tier]; c++) {
            ret->used[tier] += core->chunks[tier][c].used * core->chunks[tier][c].slot_bytes;
            ret->retired[tier] += core->chunks[tier][c].retired * core->chunks[tier][c].slot_bytes;
        }
    }
    ret->granted = core->by_state[BLOCK_GRANTED], ret->sealed = core->by_state[BLOCK_SEALED];
    ret->home = core->by_state[BLOCK_HOME];
    for (uint32_t d = 0; d < core->config.pool_devices; d++)
        ret->held += core->devices[d].held;
    for (uint32_t i = 0; i < core->seq_end; i++)
        ret->seqs += core->seqs[i].live;
    for (uint32_t w = 0; w < PKV_WORKERS_MAX; w++)
        ret->workers += core->workers[w].live;
}

const struct core_health *core_health(const struct core *core)
{
    return &core->health;
}

bool core_layer_info(const struct core *core, uint32_t index, uint32_t layer, struct core_layer_info *ret)
{
    const struct seq *s = &core->seqs[index];
    if (!s->live || layer >= s->layers)
        return false;
    *ret = (struct core_layer_info){0};
    for (uint32_t i = 0; i < s->granted[layer]; i++) {
        const struct block *b = &core->blocks[*seq_block(s, layer, i)];
        ret->granted += b->state == BLOCK_GRANTED;
        ret->sealed += b->state == BLOCK_SEALED;
        ret->home_pool += b->state == BLOCK_HOME && b->rows;
        ret->home_arena += b->state == BLOCK_HOME && !b->rows;
        ret->shared += b->holders > 1;
    }
    return true;
}

bool core_seq_info(const struct core *core, uint32_t index, struct core_seq_info *ret)
{
    const struct seq *s = &core->seqs[index];
    if (!s->live)
        return false;
    *ret = (struct core_seq_info){.handle = pkv_handle(index, s->gen),
                                  .tokens = s->tokens,
                                  .max_tokens = s->max_tokens,
                                  .open = s->open,
                                  .tenant = core->tenants[s->tenant],
                                  .label = s->label,
                                  .model = &core->models[s->model],
                                  .persistent = s->persistent,
                                  .damaged = s->damaged,
                                  .writer = s->writer,
                                  .state = s->state};
    struct core_layer_info n;
    for (uint32_t l = 0; core_layer_info(core, index, l, &n); l++) {
        ret->blocks.granted += n.granted, ret->blocks.sealed += n.sealed, ret->blocks.shared += n.shared;
        ret->blocks.home_pool += n.home_pool, ret->blocks.home_arena += n.home_arena;
    }
    const struct pkv_geom *g = &ret->model->geom;
    uint64_t rows = ret->blocks.granted + ret->blocks.sealed + ret->blocks.home_pool, all = rows + ret->blocks.home_arena;
    ret->pool_bytes = rows * pkv_geom_block_bytes(g) + all * pkv_geom_sig_block_bytes(g);
    ret->arena_bytes = all * pkv_geom_block_bytes(g);
    return true;
}

/* ---- invariants ---- */

static bool owns(const struct core *core, uint64_t place, uint32_t tier, uint32_t block)
{
    if (pkv_place_tier(place) != tier || pkv_place_chunk(place) >= core->chunk_count[tier])
        return false;
    const struct chunk *c = &core->chunks[tier][pkv_place_chunk(place)];
    uint32_t slot = pkv_place_slot(place);
    return slot < c->slots && c->owner[slot] == block && c->gen[slot] == pkv_place_gen(place) &&
           c->tenant == core->blocks[block].tenant;
}

static const char *check_block(const struct core *core, uint32_t id, uint32_t seen, uint64_t *owned)
{
    const struct block *b = &core->blocks[id];
    if (set_has(&core->block_free, id) != (b->state == BLOCK_FREE) ||
        (b->state == BLOCK_FREE && id / 64 < core->block_free.first))
        return "a free block is not to be had, or another is";
    if (b->state == BLOCK_FREE)
        return seen ? "a table refers to a free block" : NULL;
    bool signs = b->sig_bytes;
    if (!owns(core, b->home, PKV_TIER_ARENA, id) || (signs ? !owns(core, b->signatures, PKV_TIER_POOL, id) : b->signatures))
        return "a block does not own its home or its signatures";
    if (b->rows ? !owns(core, b->rows, PKV_TIER_POOL, id) : b->state != BLOCK_HOME)
        return "a block does not own its rows, or lost them before it was home";
    *owned += 1u + (b->rows != 0) + signs;
    if (b->damaged && (b->state != BLOCK_HOME || b->rows))
        return "a block is damaged that could be mended";
    if (b->holders != seen)
        return "a block's holders are not counted right";
    if (b->holders && !seq_holds(core, b->seq, id))
        return "a block names a holder that does not hold it";
    if (!b->holders && !b->dying && !b->fills) {
        const struct seq *s = &core->seqs[b->seq]; /* filled, and waits for the other tails of its operation */
        if (!s->live || s->cow.kind == COW_NONE || s->cow.target[b->layer] != id)
            return "a block belongs to nobody";
    }
    if (b->dying && !b->going_home && !b->pins && !b->fills)
        return "a dying block waits for no copy";
    if (b->held ? b->state != BLOCK_SEALED || b->going_home || b->dying
                : b->state == BLOCK_SEALED && !b->going_home && !b->dying && b->copies_failed < 2)
        return "a sealed block neither goes home nor waits for it";
    if (b->source != NONE && (core->blocks[b->source].state == BLOCK_FREE || !core->blocks[b->source].pins))
        return "a tail is copied from a block that is not pinned";
    return NULL;
}

static const char *check_seq(const struct core *core, uint32_t index, uint32_t *seen)
{
    const struct seq *s = &core->seqs[index];
    uint32_t damaged = 0;
    for (uint32_t l = 0; l < s->layers; l++) {
        if (s->sealed[l] > s->granted[l])
            return "more blocks sealed than granted";
        for (uint32_t i = 0; i < s->blocks_max; i++) {
            uint32_t id = *seq_block(s, l, i);
            const struct pkv_block_ref *ref = seq_entry(s, l, i);
            if ((id == NONE) != (i >= s->granted[l]))
                return "a sequence's blocks have a hole";
            if (id == NONE) {
                if (ref->rows || ref->signatures)
                    return "the block table names a place where there is no block";
                continue;
            }
            const struct block *b = &core->blocks[id];
            seen[id]++;
            damaged += b->damaged;
            if (b->layer != l || b->index != i || b->tenant != s->tenant)
                return "a block lies elsewhere than its holder thinks";
            if ((b->state == BLOCK_GRANTED) != (i >= s->sealed[l]))
                return "a block's state is not what its sequence says";
            if ((b->signatures && pkv_place_chunk(b->signatures) % core->config.pool_devices != s->device) ||
                (b->rows && pkv_place_chunk(b->rows) % core->config.pool_devices != s->device))
                return "a block lies on another device than its sequence";
            if (ref->signatures != b->signatures || ref->rows != (b->rows ? b->rows : b->home))
                return "the block table names another place";
        }
    }
    if (damaged != s->damaged || s->table->err != (damaged ? PKV_ERR_CHECKSUM : PKV_ERR_OK))
        return "a sequence's damaged blocks are not told right";
    return NULL;
}

static const char *check_chunks(const struct core *core, uint64_t owned)
{
    uint64_t used = 0, retired = 0;
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++) {
        for (uint32_t i = 0; i < core->chunk_count[tier]; i++) {
            const struct chunk *c = &core->chunks[tier][i];
            uint32_t mine = 0, gone = 0;
            bool right = true;
            for (uint32_t s = 0; s < c->slots; s++) {
                mine += c->owner[s] < RETIRED, gone += c->owner[s] == RETIRED;
                right &= set_has(&c->free, s) == (c->owner[s] == NONE) && (!set_has(&c->free, s) || s / 64 >= c->free.first);
            }
            if (mine != c->used || gone != c->retired || !right)
                return "a chunk's slots do not add up";
            used += mine, retired += gone;
        }
    }
    if (used != owned)
        return "a slot is owned by nobody";
    return retired != core->retired_count ? "a retired slot waits for no epoch" : NULL;
}

/* The counts of one device, and its queue of blocks that wait to go home. */
static const char *check_device(const struct core *core, uint32_t device)
{
    const struct device *d = &core->devices[device];
    struct device count = {.capacity = 0};
    for (uint32_t c = device; c < core->chunk_count[PKV_TIER_POOL]; c += core->config.pool_devices) {
        const struct chunk *chunk = &core->chunks[PKV_TIER_POOL][c];
        count.capacity += core->config.chunk_bytes;
        count.taken += (chunk->used + chunk->retired) * chunk->slot_bytes;
    }
    for (uint32_t i = 0; i < core->block_count; i++) {
        const struct block *b = &core->blocks[i];
        if (b->state == BLOCK_FREE || !b->rows || device_of(core, b->rows) != d)
            continue;
        count.home_bytes += b->state == BLOCK_HOME ? b->row_bytes : 0;
        count.held += b->held, count.flying += b->going_home;
    }
    if (count.capacity != d->capacity || count.taken != d->taken || count.home_bytes != d->home_bytes ||
        count.held != d->held || count.flying != d->flying)
        return "a device's counts do not add up";
    uint32_t queued = 0, before = NONE;
    for (uint32_t i = d->first; i != NONE && queued <= d->held; before = i, i = core->blocks[i].next, queued++)
        if (!core->blocks[i].held || core->blocks[i].before != before)
            return "a block waits to go home in no order";
    return queued != d->held || d->last != before || d->due > d->held ? "the queue of blocks that go home has a hole" : NULL;
}

static const char *check_blocks(const struct core *core, const uint32_t *seen)
{
    uint64_t owned = 0;
    uint32_t by_state[BLOCK_STATES] = {0}, home_in_pool = 0;
    for (uint32_t b = 0; b < core->block_count; b++) {
        const char *wrong = check_block(core, b, seen[b], &owned);
        if (wrong)
            return wrong;
        by_state[core->blocks[b].state]++;
        home_in_pool += core->blocks[b].state == BLOCK_HOME && core->blocks[b].rows;
    }
    if (home_in_pool != core->home_in_pool)
        return "the count of blocks that can leave the pool is wrong";
    if (memcmp(by_state, core->by_state, sizeof(by_state)))
        return "the counts of blocks by state do not add up";
    for (uint32_t d = 0; d < core->config.pool_devices; d++) {
        const char *wrong = check_device(core, d);
        if (wrong)
            return wrong;
    }
    return check_chunks(core, owned);
}

const char *core_check(const struct core *core)
{
    uint32_t *seen = calloc(core->block_count + 1ull, sizeof(*seen));
    const char *wrong = seen ? NULL : "no memory for the walk";
    for (uint32_t i = 0; i < PKV_SEQS_MAX && !wrong && i < core->seq_end; i++)
        if (core->seqs[i].live)
            wrong = check_seq(core, i, seen);
    wrong = wrong ? wrong : check_blocks(core, seen);
    wrong = wrong ? wrong : scrub_check(core);
    free(seen);
    for (uint32_t i = 0; i < core->waiting_count && !wrong; i++)
        if (!core->workers[core->waiting[i].worker].live)
            wrong = "an operation waits for a worker that is gone";
    return wrong;
}
