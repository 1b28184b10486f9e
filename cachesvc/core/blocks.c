/* Blocks: grant, seal, copies, drop, free; and the policy that chooses what leaves the pool. */
#include "cachesvc/core/internal.h"

static uint64_t *entry_rows(struct core *core, const struct block *b)
{
    struct seq *s = &core->seqs[b->seq];
    return &pkv_table_layer(s->table, b->layer, s->blocks_max)[b->index].rows;
}

static uint64_t *entry_signatures(struct core *core, const struct block *b)
{
    struct seq *s = &core->seqs[b->seq];
    return &pkv_table_layer(s->table, b->layer, s->blocks_max)[b->index].signatures;
}

static uint32_t block_take(struct core *core)
{
    if (core->block_free == NONE) {
        if (core->block_count == core->block_room) {
            uint32_t room = core->block_room ? core->block_room * 2 : 1024;
            struct block *more = realloc(core->blocks, room * sizeof(*more));
            if (!more)
                return NONE;
            core->blocks = more;
            core->block_room = room;
        }
        core->blocks[core->block_count] = (struct block){.next = NONE};
        core->block_free = core->block_count++;
    }
    uint32_t b = core->block_free;
    core->block_free = core->blocks[b].next;
    assert(core->blocks[b].state == BLOCK_FREE);
    return b;
}

static void block_put_back(struct core *core, uint32_t b)
{
    core->blocks[b] = (struct block){.next = core->block_free};
    core->block_free = b;
}

enum pkv_err block_grant(struct core *core, uint32_t seq, uint32_t layer, uint32_t index)
{
    struct seq *s = &core->seqs[seq];
    const struct pkv_geom *g = &core->models[s->model].geom;
    uint32_t id = block_take(core);
    if (id == NONE)
        return PKV_ERR_NO_MEMORY;
    struct block *b = &core->blocks[id];
    b->row_bytes = pkv_geom_block_bytes(g), b->sig_bytes = pkv_geom_sig_block_bytes(g);
    b->home = place_take(core, PKV_TIER_ARENA, s->tenant, b->row_bytes, id);
    b->rows = b->home ? place_take(core, PKV_TIER_POOL, s->tenant, b->row_bytes, id) : 0;
    b->signatures = b->rows ? place_take(core, PKV_TIER_POOL, s->tenant, b->sig_bytes, id) : 0;
    if (!b->signatures) {
        enum pkv_err e = b->home ? PKV_ERR_POOL_FULL : PKV_ERR_ARENA_FULL;
        uint64_t missing = b->rows ? b->sig_bytes : b->row_bytes;
        if (b->rows)
            place_retire(core, b->rows);
        if (b->home)
            place_retire(core, b->home);
        block_put_back(core, id);
        if (e == PKV_ERR_POOL_FULL)
            make_room(core, s->tenant, missing);
        return e;
    }
    b->state = BLOCK_GRANTED;
    b->seq = seq, b->layer = layer, b->index = index;
    s->blocks[(uint64_t)layer * s->blocks_max + index] = id;
    publish(entry_signatures(core, b), b->signatures);
    publish(entry_rows(core, b), b->rows);
    return PKV_ERR_OK;
}

static void copy_home(struct core *core, uint32_t id)
{
    const struct block *b = &core->blocks[id];
    core_emit(core,
              &(struct core_action){.kind = CORE_COPY, .copy = id, .from = b->rows, .to = b->home, .bytes = b->row_bytes});
}

enum pkv_err core_seal(struct core *core, uint32_t worker, uint64_t handle, uint32_t layer, uint32_t first, uint32_t count)
{
    enum pkv_err e;
    struct seq *s = seq_find(core, worker, handle, &e);
    if (!s)
        return e;
    if (s->writer != worker)
        return PKV_ERR_NOT_WRITER;
    if (layer >= s->layers)
        return PKV_ERR_INVALID;
    /* Blocks fill in order, so they are sealed in order. */
    if (first != s->sealed[layer] || count > s->granted[layer] - first)
        return PKV_ERR_NOT_GRANTED;
    for (uint32_t i = first; i < first + count; i++) {
        uint32_t id = s->blocks[(uint64_t)layer * s->blocks_max + i];
        assert(core->blocks[id].state == BLOCK_GRANTED);
        core->blocks[id].state = BLOCK_SEALED;
        copy_home(core, id);
    }
    s->sealed[layer] += count;
    uint32_t least = s->sealed[0];
    for (uint32_t l = 1; l < s->layers; l++)
        least = PKV_MIN(least, s->sealed[l]);
    s->tokens = (uint64_t)least * PKV_BLOCK_TOKENS;
    publish(&s->table->tokens, s->tokens);
    return PKV_ERR_OK;
}

static void block_release(struct core *core, uint32_t id)
{
    struct block *b = &core->blocks[id];
    if (b->rows)
        place_retire(core, b->rows);
    place_retire(core, b->signatures);
    place_retire(core, b->home);
    core->freed++;
    block_put_back(core, id);
}

void core_copied(struct core *core, uint32_t copy, bool ok, uint64_t checksum)
{
    assert(copy < core->block_count && core->blocks[copy].state == BLOCK_SEALED);
    struct block *b = &core->blocks[copy];
    if (b->dying) {
        block_release(core, copy);
        return;
    }
    if (ok) {
        b->state = BLOCK_HOME;
        b->checksum = checksum;
        return;
    }
    core->copies_failed++;
    if (++b->copies_failed < 2)
        copy_home(core, copy);
}

/* A copy in flight still reads the rows: they wait for it. A copy that failed for good is not in flight. */
void block_free(struct core *core, uint32_t id)
{
    struct block *b = &core->blocks[id];
    assert(b->state != BLOCK_FREE && !b->dying);
    publish(entry_rows(core, b), 0);
    publish(entry_signatures(core, b), 0);
    if (b->state == BLOCK_SEALED && b->copies_failed < 2)
        b->dying = true;
    else
        block_release(core, id);
}

/* ---- residency: policy ---- */

static bool droppable(const struct core *core, const struct block *b)
{
    if (b->state != BLOCK_HOME || !b->rows)
        return false;
    uint32_t granted = core->seqs[b->seq].granted[b->layer];
    return b->index >= PKV_PIN_FIRST_BLOCKS && b->index + PKV_PIN_LAST_BLOCKS < granted;
}

uint32_t residency_choose(struct core *core, uint32_t tenant, uint64_t slot_bytes)
{
    for (uint32_t i = 0; i < core->block_count; i++) {
        uint32_t id = core->clock_hand++ % core->block_count;
        const struct block *b = &core->blocks[id];
        if (droppable(core, b) && b->row_bytes == slot_bytes && core->seqs[b->seq].tenant == tenant)
            return id;
    }
    return NONE;
}

/* The fullest pool chunk in which every slot can be dropped. */
uint32_t residency_choose_chunk(const struct core *core)
{
    uint32_t best = NONE;
    for (uint32_t i = 0; i < core->chunk_count[PKV_TIER_POOL]; i++) {
        const struct chunk *c = &core->chunks[PKV_TIER_POOL][i];
        bool all = c->tenant != NONE && c->used;
        for (uint32_t s = 0; all && s < c->slots; s++)
            all = c->owner[s] >= RETIRED ||
                  (core->blocks[c->owner[s]].row_bytes == c->slot_bytes && droppable(core, &core->blocks[c->owner[s]]));
        if (all && (best == NONE || c->used > core->chunks[PKV_TIER_POOL][best].used))
            best = i;
    }
    return best;
}

/* ---- and mechanism ---- */

void block_drop(struct core *core, uint32_t id)
{
    struct block *b = &core->blocks[id];
    assert(b->state == BLOCK_HOME && b->rows && b->home);
    publish(entry_rows(core, b), b->home);
    place_retire(core, b->rows);
    b->rows = 0;
    core->dropped++;
}

/* A slot of this kind was missing. Unless enough is about to come back, let something go. */
void make_room(struct core *core, uint32_t tenant, uint64_t slot_bytes)
{
    uint32_t id = residency_choose(core, tenant, slot_bytes);
    if (id != NONE) {
        for (uint32_t n = 0; n < 16 && id != NONE; n++, id = residency_choose(core, tenant, slot_bytes))
            block_drop(core, id);
        return;
    }
    uint32_t chunk = residency_choose_chunk(core);
    if (chunk == NONE)
        return;
    const struct chunk *c = &core->chunks[PKV_TIER_POOL][chunk];
    for (uint32_t s = 0; s < c->slots; s++)
        if (c->owner[s] < RETIRED)
            block_drop(core, c->owner[s]);
}
