/* Blocks: made, held, sealed, copied, freed. */
#include "cachesvc/core/internal.h"

/* A copy's id names the block that it fills, brings home or looks at, and which of these it is. */
enum copy_kind { COPY_HOME, COPY_TAIL_ROWS, COPY_TAIL_SIGNATURES, COPY_LOOK, COPY_KINDS };

static void set_state(struct core *core, struct block *b, enum block_state state)
{
    core->by_state[b->state]--;
    core->by_state[state]++;
    b->state = (uint8_t)state;
    scrub_mark(core, (uint32_t)(b - core->blocks));
}

static bool set_grow(struct set *s, uint32_t before, uint32_t room)
{
    uint64_t *words = realloc(s->word, room / 64 * sizeof(*words));
    if (!words)
        return false;
    memset(words + before / 64, 0, (room - before) / 64 * sizeof(*words));
    s->word = words;
    return true;
}

static bool blocks_grow(struct core *core)
{
    uint32_t room = core->block_room ? core->block_room * 2 : 1024;
    struct block *more = realloc(core->blocks, room * sizeof(*more));
    core->blocks = more ? more : core->blocks;
    if (!more || !set_grow(&core->block_free, core->block_room, room) || !set_grow(&core->to_look, core->block_room, room))
        return false;
    core->block_room = room;
    return true;
}

static uint32_t block_take(struct core *core)
{
    if (!core->by_state[BLOCK_FREE]) {
        if (core->block_count == core->block_room && !blocks_grow(core))
            return NONE;
        core->blocks[core->block_count] = (struct block){.state = BLOCK_FREE};
        core->by_state[BLOCK_FREE]++;
        set_put(&core->block_free, core->block_count++);
    }
    uint32_t b = set_take(&core->block_free);
    assert(core->blocks[b].state == BLOCK_FREE);
    return b;
}

static void block_put_back(struct core *core, uint32_t b)
{
    set_state(core, &core->blocks[b], BLOCK_FREE);
    core->blocks[b] = (struct block){.state = BLOCK_FREE};
    set_put(&core->block_free, b);
}

enum pkv_err block_make(struct core *core, uint32_t seq, uint32_t layer, uint32_t index, uint32_t *ret_block)
{
    const struct seq *s = &core->seqs[seq];
    const struct pkv_geom *g = &core->models[s->model].geom;
    uint32_t id = block_take(core);
    if (id == NONE)
        return PKV_ERR_NO_MEMORY;
    struct block *b = &core->blocks[id];
    b->row_bytes = pkv_geom_block_bytes(g), b->sig_bytes = pkv_geom_sig_block_bytes(g);
    struct place_kind kind = {.tier = PKV_TIER_ARENA, .tenant = s->tenant, .device = s->device, .slot_bytes = b->row_bytes};
    b->home = place_take(core, &kind, id);
    kind.tier = PKV_TIER_POOL, kind.rows = true;
    b->rows = b->home ? place_take(core, &kind, id) : 0;
    bool all = b->rows;
    if (all && b->sig_bytes) {
        kind.slot_bytes = b->sig_bytes, kind.rows = false;
        b->signatures = place_take(core, &kind, id);
        all = b->signatures;
    }
    if (!all) {
        enum pkv_err e = b->home ? PKV_ERR_POOL_FULL : PKV_ERR_ARENA_FULL;
        if (b->rows)
            place_put_back(core, b->rows);
        if (b->home)
            place_put_back(core, b->home);
        block_put_back(core, id);
        if (e == PKV_ERR_POOL_FULL)
            make_room(core, &kind);
        return e;
    }
    set_state(core, b, BLOCK_GRANTED);
    b->seq = seq, b->tenant = s->tenant, b->layer = layer, b->index = index, b->source = NONE;
    core->totals.blocks_granted++;
    *ret_block = id;
    return PKV_ERR_OK;
}

void block_install(struct core *core, uint32_t seq, uint32_t id)
{
    struct block *b = &core->blocks[id];
    struct seq *s = &core->seqs[seq];
    assert(*seq_block(s, b->layer, b->index) == NONE && !b->dying);
    *seq_block(s, b->layer, b->index) = id;
    core->news++; /* blocks before it are no longer the last */
    b->holders++;
    b->seq = seq;
    struct pkv_block_ref *entry = seq_entry(s, b->layer, b->index);
    publish(&entry->signatures, b->signatures);
    publish(&entry->rows, b->rows ? b->rows : b->home);
    if (b->damaged)
        seq_damage(s, true);
}

/* From the one that was found last: all blocks of a fork that goes are its parent's. */
static uint32_t another_holder(struct core *core, uint32_t id)
{
    for (uint32_t n = 0, i = core->heir; n < core->seq_end; n++, i++) {
        i = i < core->seq_end ? i : 0;
        if (seq_holds(core, i, id))
            return core->heir = i;
    }
    return NONE;
}

void block_leave(struct core *core, uint32_t seq, uint32_t layer, uint32_t index)
{
    struct seq *s = &core->seqs[seq];
    uint32_t id = *seq_block(s, layer, index);
    struct block *b = &core->blocks[id];
    assert(b->state != BLOCK_FREE && b->holders && !b->dying);
    *seq_block(s, layer, index) = NONE;
    core->news++;
    publish(&seq_entry(s, layer, index)->rows, 0);
    publish(&seq_entry(s, layer, index)->signatures, 0);
    publish_change(s);
    if (b->damaged)
        seq_damage(s, false);
    if (--b->holders == 0)
        block_retire(core, id);
    else if (b->seq == seq)
        b->seq = another_holder(core, id);
}

void block_retire(struct core *core, uint32_t id)
{
    struct block *b = &core->blocks[id];
    assert(!b->holders);
    if (b->held)
        homing_drop(core, id);
    bool dying = b->going_home || b->pins || b->fills;
    core->dying += dying - b->dying;
    b->dying = dying;
    scrub_mark(core, id);
    if (dying)
        return;
    if (b->state == BLOCK_HOME && b->rows)
        core->home_in_pool--, device_of(core, b->rows)->home_bytes -= b->row_bytes;
    if (b->rows)
        place_retire(core, b->rows);
    if (b->signatures)
        place_retire(core, b->signatures);
    place_retire(core, b->home);
    core->totals.blocks_freed++;
    block_put_back(core, id);
}

/* ---- copies ---- */

static void emit_copy(struct core *core, uint32_t id, enum copy_kind kind, uint64_t from, uint64_t to, uint64_t bytes)
{
    core_emit(core,
              &(struct core_action){.kind = CORE_COPY, .copy = id * COPY_KINDS + kind, .from = from, .to = to, .bytes = bytes});
}

void block_go_home(struct core *core, uint32_t id)
{
    struct block *b = &core->blocks[id];
    assert(b->state == BLOCK_SEALED && !b->going_home && !b->held);
    b->going_home = true;
    device_of(core, b->rows)->flying++;
    emit_copy(core, id, COPY_HOME, b->rows, b->home, b->row_bytes);
}

void block_look(struct core *core, uint32_t id)
{
    struct block *b = &core->blocks[id];
    assert(b->state == BLOCK_HOME && !b->dying);
    b->looked_at = true, b->pins++; /* it stays where it is */
    scrub_mark(core, id);
    core_emit(core, &(struct core_action){
                        .kind = CORE_CHECK, .copy = id * COPY_KINDS + COPY_LOOK, .from = b->home, .bytes = b->row_bytes});
}

/* The rows in the pool are as they should be. */
static void mend(struct core *core, uint32_t id)
{
    struct block *b = &core->blocks[id];
    core->home_in_pool--, device_of(core, b->rows)->home_bytes -= b->row_bytes;
    set_state(core, b, BLOCK_SEALED);
    b->mending = true, b->copies_failed = 0;
    block_go_home(core, id);
}

static void failed(struct core *core, uint32_t id)
{
    struct block *b = &core->blocks[id];
    core->health.checksum_failures++;
    if (b->dying || b->damaged) /* nobody's any more; or known */
        return;
    if (b->rows) {
        mend(core, id);
        return;
    }
    b->damaged = true;
    scrub_mark(core, id);
    core->health.blocks_damaged++;
    for (uint32_t i = 0; i < core->seq_end; i++)
        if (seq_holds(core, i, id))
            seq_damage(&core->seqs[i], true);
}

static void looked(struct core *core, uint32_t id, bool ok, uint64_t checksum)
{
    struct block *b = &core->blocks[id];
    b->looked_at = false;
    scrub_mark(core, id);
    core->health.blocks_checked += ok;
    if (ok && checksum != b->checksum)
        failed(core, id);
    block_unpin(core, id);
}

static void copied_home(struct core *core, uint32_t id, bool ok, uint64_t checksum)
{
    struct block *b = &core->blocks[id];
    assert(b->state == BLOCK_SEALED && b->going_home);
    b->going_home = false;
    device_of(core, b->rows)->flying--;
    if (ok && b->mending) { /* memory that does not hold what is written there is no home: the block stays in the pool */
        ok = checksum == b->checksum;
        core->health.blocks_mended += ok;
        b->mending = !ok;
    }
    if (ok) {
        set_state(core, b, BLOCK_HOME);
        core->home_in_pool++, device_of(core, b->rows)->home_bytes += b->row_bytes;
        b->checksum = checksum;
        core->totals.blocks_home++;
    } else {
        core->totals.copies_failed++;
        if (++b->copies_failed < 2 && !b->dying)
            block_go_home(core, id);
    }
    if (b->dying)
        block_retire(core, id);
}

void block_unpin(struct core *core, uint32_t id)
{
    assert(core->blocks[id].pins);
    if (--core->blocks[id].pins == 0 && core->blocks[id].dying)
        block_retire(core, id);
    else
        core->news += block_can_leave(core, id);
}

void block_fill(struct core *core, uint32_t id, uint32_t source)
{
    struct block *b = &core->blocks[id];
    const struct block *from = &core->blocks[source];
    assert(from->pins);
    b->source = source, b->fills = b->sig_bytes ? 2 : 1, b->filled_from_home = !from->rows;
    core->totals.blocks_cow++;
    emit_copy(core, id, COPY_TAIL_ROWS, from->rows ? from->rows : from->home, b->rows, b->row_bytes);
    if (b->sig_bytes)
        emit_copy(core, id, COPY_TAIL_SIGNATURES, from->signatures, b->signatures, b->sig_bytes);
}

/* Rows that come back from home are looked at: what is damaged goes nowhere. */
static enum pkv_err fetched(struct core *core, const struct block *b, uint64_t checksum)
{
    struct block *from = &core->blocks[b->source];
    if (!b->filled_from_home || checksum == from->checksum)
        return PKV_ERR_OK;
    failed(core, b->source);
    return PKV_ERR_CHECKSUM;
}

static void copied_tail(struct core *core, uint32_t id, bool rows, bool ok, uint64_t checksum)
{
    struct block *b = &core->blocks[id];
    assert(b->fills);
    enum pkv_err e = !ok ? PKV_ERR_SYSTEM : rows ? fetched(core, b, checksum) : PKV_ERR_OK;
    b->fill_err = b->fill_err ? b->fill_err : (uint32_t)e;
    core->totals.copies_failed += !ok;
    if (--b->fills)
        return;
    block_unpin(core, b->source);
    b->source = NONE;
    if (b->dying)
        block_retire(core, id);
    else
        cow_filled(core, b->seq, (enum pkv_err)b->fill_err);
}

void core_copied(struct core *core, uint32_t copy, bool ok, uint64_t checksum)
{
    assert(copy / COPY_KINDS < core->block_count);
    core->news += copy % COPY_KINDS != COPY_LOOK; /* a look is none, unless what it held can leave now */
    switch (copy % COPY_KINDS) {
    case COPY_HOME:
        copied_home(core, copy / COPY_KINDS, ok, checksum);
        break;
    case COPY_LOOK:
        looked(core, copy / COPY_KINDS, ok, checksum);
        break;
    default:
        copied_tail(core, copy / COPY_KINDS, copy % COPY_KINDS == COPY_TAIL_ROWS, ok, checksum);
    }
}

enum pkv_err core_seal(struct core *core, uint64_t now_ns, uint32_t worker, uint64_t handle, uint32_t layer, uint32_t first,
                       uint32_t count)
{
    enum pkv_err e;
    struct seq *s = seq_find(core, worker, handle, &e);
    if (!s)
        return e;
    if (s->writer != worker)
        return PKV_ERR_NOT_WRITER;
    if (s->cow.kind != COW_NONE)
        return PKV_ERR_BUSY;
    if (layer >= s->layers)
        return PKV_ERR_INVALID;
    /* Blocks fill in order, so they are sealed in order. */
    if (first != s->sealed[layer] || count > s->granted[layer] - first)
        return PKV_ERR_NOT_GRANTED;
    for (uint32_t i = first; i < first + count; i++) {
        uint32_t id = *seq_block(s, layer, i);
        assert(core->blocks[id].state == BLOCK_GRANTED);
        set_state(core, &core->blocks[id], BLOCK_SEALED);
        homing_add(core, now_ns, id);
    }
    core->totals.blocks_sealed += count;
    s->sealed[layer] += count;
    seq_publish_tokens(s);
    return PKV_ERR_OK;
}
