/* Chunks and slots of both tiers: taken, retired, and free again after their epoch. */
#include "cachesvc/core/internal.h"

#define CHUNKS_MANY 8u

void places_init(struct core *core)
{
    core->chunk_count[PKV_TIER_POOL] = core->config.pool_chunks;
    core->chunk_count[PKV_TIER_ARENA] = core->config.arena_chunks;
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++)
        for (uint32_t c = 0; c < core->chunk_count[tier]; c++)
            core->chunks[tier][c] = (struct chunk){.tenant = NONE, .last_tenant = NONE};
    for (uint32_t d = 0; d < core->config.pool_devices; d++)
        core->devices[d] = (struct device){.first = NONE, .last = NONE};
    for (uint32_t c = 0; c < core->config.pool_chunks; c++)
        core->devices[c % core->config.pool_devices].capacity += core->config.chunk_bytes;
}

static void chunk_release(struct chunk *c)
{
    assert(!c->used && !c->retired);
    free(c->free.word), free(c->owner), free(c->gen);
    c->free.word = NULL, c->owner = NULL, c->gen = NULL;
    c->last_tenant = c->tenant;
    c->tenant = NONE;
    c->slots = 0;
}

void places_destroy(struct core *core)
{
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++) {
        for (uint32_t c = 0; c < core->chunk_count[tier]; c++) {
            struct chunk *chunk = &core->chunks[tier][c];
            free(chunk->free.word), free(chunk->owner), free(chunk->gen);
        }
        free(core->chunks[tier]);
    }
    free(core->retired), free(core->devices);
}

/* Gives an unassigned chunk to a tenant. Another tenant's former data goes with its memory, and only when nobody who had it
 * mapped is left. */
static bool chunk_assign(struct core *core, uint32_t tier, uint32_t index, uint32_t tenant, uint64_t slot_bytes)
{
    struct chunk *c = &core->chunks[tier][index];
    assert(c->tenant == NONE);
    bool foreign = c->last_tenant != NONE && c->last_tenant != tenant;
    if (foreign && c->mapped)
        return false;
    uint32_t slots = (uint32_t)(core->config.chunk_bytes / slot_bytes);
    c->free = (struct set){.word = calloc(PKV_DIV_UP(slots, 64u), sizeof(*c->free.word))};
    c->owner = malloc(slots * sizeof(*c->owner));
    c->gen = calloc(slots, sizeof(*c->gen));
    if (!slots || !c->free.word || !c->owner || !c->gen) {
        free(c->free.word), free(c->owner), free(c->gen);
        c->free.word = NULL, c->owner = NULL, c->gen = NULL;
        return false;
    }
    for (uint32_t s = 0; s < slots; s++)
        set_put(&c->free, s), c->owner[s] = NONE;
    c->slots = slots, c->slot_bytes = slot_bytes, c->tenant = tenant;
    if (foreign)
        core_emit(core, &(struct core_action){.kind = CORE_CHUNK_RESET, .tier = tier, .chunk = index});
    return true;
}

static uint64_t slot_take(struct core *core, uint32_t tier, uint32_t index, uint32_t block)
{
    struct chunk *c = &core->chunks[tier][index];
    uint32_t slot = set_take(&c->free);
    assert(slot < c->slots && c->owner[slot] == NONE);
    c->owner[slot] = block;
    c->used++;
    uint64_t place = pkv_place(tier, index, slot, ++c->gen[slot]);
    if (tier == PKV_TIER_POOL)
        device_of(core, place)->taken += c->slot_bytes;
    return place;
}

static bool on_device(const struct core *core, const struct place_kind *k, uint32_t chunk)
{
    return k->tier != PKV_TIER_POOL || chunk % core->config.pool_devices == k->device;
}

bool place_chunk_fits(const struct core *core, const struct place_kind *k, uint32_t chunk)
{
    const struct chunk *c = &core->chunks[k->tier][chunk];
    return c->tenant == k->tenant && c->slot_bytes == k->slot_bytes && on_device(core, k, chunk);
}

/* Signatures never leave the pool, and sinks, recent and granted blocks lie all over the chunks of rows, so that none could be
 * emptied when signatures need one more. So rows leave the last free chunk to them, where a device has CHUNKS_MANY. */
static bool left_to_signatures(const struct core *core, const struct place_kind *k)
{
    uint32_t free = 0, count = core->chunk_count[PKV_TIER_POOL];
    if (k->tier != PKV_TIER_POOL || !k->rows || count / core->config.pool_devices < CHUNKS_MANY)
        return false;
    for (uint32_t i = k->device; i < count; i += core->config.pool_devices)
        free += core->chunks[PKV_TIER_POOL][i].tenant == NONE;
    return free <= 1;
}

uint64_t place_take(struct core *core, const struct place_kind *k, uint32_t block)
{
    uint32_t count = core->chunk_count[k->tier];
    struct chunk *chunks = core->chunks[k->tier];
    uint32_t *hint = &core->chunk_hint[k->tier][HINTS - 1 - (uint32_t)__builtin_clz((uint32_t)k->slot_bytes)];
    /* From the chunk that had room last: chunks before it are mostly full. */
    for (uint32_t n = 0, i = *hint < count ? *hint : 0; n < count; n++, i = i + 1 < count ? i + 1 : 0) {
        if (chunks[i].used + chunks[i].retired == chunks[i].slots || !place_chunk_fits(core, k, i))
            continue;
        *hint = i;
        return slot_take(core, k->tier, i, block);
    }
    if (left_to_signatures(core, k))
        return 0;
    for (uint32_t i = 0; i < count; i++)
        if (chunks[i].tenant == NONE && on_device(core, k, i) && chunk_assign(core, k->tier, i, k->tenant, k->slot_bytes))
            return slot_take(core, k->tier, i, block);
    return 0;
}

void place_retire(struct core *core, uint64_t place)
{
    struct chunk *c = &core->chunks[pkv_place_tier(place)][pkv_place_chunk(place)];
    uint32_t slot = pkv_place_slot(place);
    assert(c->owner[slot] < RETIRED && c->gen[slot] == pkv_place_gen(place));
    c->owner[slot] = RETIRED;
    c->used--, c->retired++;
    if (core->retired_head && core->retired_head + core->retired_count == core->retired_room) {
        memmove(core->retired, core->retired + core->retired_head, core->retired_count * sizeof(*core->retired));
        core->retired_head = 0;
    }
    if (core->retired_count == core->retired_room) {
        core->retired_room = core->retired_room ? core->retired_room * 2 : 1024;
        core->retired = realloc(core->retired, core->retired_room * sizeof(*core->retired));
        assert(core->retired);
    }
    core->epoch++, core->news++;
    core->retired[core->retired_head + core->retired_count++] = (struct retired){place, core->epoch};
}

static void slot_free(struct core *core, uint64_t place)
{
    struct chunk *c = &core->chunks[pkv_place_tier(place)][pkv_place_chunk(place)];
    uint32_t slot = pkv_place_slot(place);
    c->owner[slot] = NONE;
    set_put(&c->free, slot);
    if (pkv_place_tier(place) == PKV_TIER_POOL)
        device_of(core, place)->taken -= c->slot_bytes;
    if (!c->used && !c->retired)
        chunk_release(c);
}

void place_put_back(struct core *core, uint64_t place)
{
    struct chunk *c = &core->chunks[pkv_place_tier(place)][pkv_place_chunk(place)];
    assert(c->owner[pkv_place_slot(place)] < RETIRED && c->gen[pkv_place_slot(place)] == pkv_place_gen(place));
    c->used--;
    slot_free(core, place);
}

void places_quiesce(struct core *core, uint64_t epoch)
{
    while (core->retired_count && core->retired[core->retired_head].epoch <= epoch) {
        uint64_t place = core->retired[core->retired_head++].place;
        core->retired_count--;
        struct chunk *c = &core->chunks[pkv_place_tier(place)][pkv_place_chunk(place)];
        uint32_t slot = pkv_place_slot(place);
        assert(c->owner[slot] == RETIRED);
        c->retired--, core->news++;
        slot_free(core, place);
    }
}
