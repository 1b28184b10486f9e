/* The core itself: life and end, actions, workers, models, and the walk over its invariants. */
#include "cachesvc/core/internal.h"

struct core *core_create(const struct core_config *config, const struct core_hooks *hooks)
{
    if (!config->pool_chunks || config->pool_chunks > PKV_CHUNKS_MAX || !config->arena_chunks ||
        config->arena_chunks > PKV_CHUNKS_MAX)
        return NULL;
    struct core *core = calloc(1, sizeof(*core));
    if (!core)
        return NULL;
    core->config = *config;
    core->hooks = *hooks;
    core->block_free = NONE;
    core->chunks[PKV_TIER_POOL] = malloc(config->pool_chunks * sizeof(struct chunk));
    core->chunks[PKV_TIER_ARENA] = malloc(config->arena_chunks * sizeof(struct chunk));
    if (!core->chunks[PKV_TIER_POOL] || !core->chunks[PKV_TIER_ARENA]) {
        free(core->chunks[PKV_TIER_POOL]), free(core->chunks[PKV_TIER_ARENA]), free(core);
        return NULL;
    }
    places_init(core);
    return core;
}

void core_destroy(struct core *core)
{
    if (!core)
        return;
    for (uint32_t i = 0; i < PKV_SEQS_MAX; i++)
        if (core->seqs[i].live)
            seq_free(core, i);
    places_destroy(core);
    free(core->blocks), free(core->actions), free(core);
}

void core_emit(struct core *core, const struct core_action *action)
{
    if (core->action_head && core->action_head == core->action_count)
        core->action_head = core->action_count = 0;
    if (core->action_count == core->action_room) {
        core->action_room = core->action_room ? core->action_room * 2 : 256;
        core->actions = realloc(core->actions, core->action_room * sizeof(*core->actions));
        assert(core->actions);
    }
    core->actions[core->action_count++] = *action;
}

bool core_next_action(struct core *core, struct core_action *ret)
{
    if (core->action_head == core->action_count)
        return false;
    *ret = core->actions[core->action_head++];
    return true;
}

uint64_t core_epoch(const struct core *core)
{
    return core->epoch;
}

static uint32_t tenant_find(struct core *core, const char *name)
{
    for (uint32_t t = 0; t < core->tenant_count; t++)
        if (!strcmp(core->tenants[t], name))
            return t;
    if (core->tenant_count == PKV_TENANTS_MAX)
        return NONE;
    strncpy(core->tenants[core->tenant_count], name, PKV_NAME_BYTES - 1);
    return core->tenant_count++;
}

enum pkv_err core_worker_join(struct core *core, const char *tenant, uint32_t *ret_worker)
{
    uint32_t w = 0;
    while (w < PKV_WORKERS_MAX && core->workers[w].live)
        w++;
    if (w == PKV_WORKERS_MAX)
        return PKV_ERR_WORKERS_FULL;
    uint32_t t = tenant_find(core, tenant[0] ? tenant : "default");
    if (t == NONE)
        return PKV_ERR_TENANTS_FULL;
    core->workers[w] = (struct worker){.live = true, .tenant = t};
    *ret_worker = w;
    return PKV_ERR_OK;
}

uint32_t core_worker_tenant(const struct core *core, uint32_t worker)
{
    return core->workers[worker].tenant;
}

enum pkv_err core_chunk_map(struct core *core, uint32_t worker, uint32_t tier, uint32_t chunk)
{
    if (tier == PKV_TIER_NONE || tier >= PKV_TIERS || chunk >= core->chunk_count[tier])
        return PKV_ERR_RANGE;
    if (core->chunks[tier][chunk].tenant != core->workers[worker].tenant)
        return PKV_ERR_TENANT;
    core->chunks[tier][chunk].mapped |= 1ull << worker;
    return PKV_ERR_OK;
}

enum pkv_err core_model_add(struct core *core, const struct pkv_model_request *request, uint32_t *ret_model)
{
    for (uint32_t m = 0; m < core->model_count; m++) {
        if (strcmp(core->models[m].name, request->name))
            continue;
        struct pkv_model_request same = *request; /* what follows the name's NUL does not matter */
        memcpy(same.name, core->models[m].name, sizeof(same.name));
        if (memcmp(&core->models[m], &same, sizeof(same)))
            return PKV_ERR_MODEL_MISMATCH;
        *ret_model = m;
        return PKV_ERR_OK;
    }
    if (core->model_count == PKV_MODELS_MAX)
        return PKV_ERR_MODELS_FULL;
    core->models[core->model_count] = *request;
    *ret_model = core->model_count++;
    return PKV_ERR_OK;
}

void core_stats(const struct core *core, struct core_stats *ret)
{
    *ret = (struct core_stats){.dropped = core->dropped, .freed = core->freed, .copies_failed = core->copies_failed};
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++) {
        ret->capacity[tier] = core->chunk_count[tier] * core->config.chunk_bytes;
        for (uint32_t c = 0; c < core->chunk_count[tier]; c++) {
            ret->used[tier] += core->chunks[tier][c].used * core->chunks[tier][c].slot_bytes;
            ret->retired[tier] += core->chunks[tier][c].retired * core->chunks[tier][c].slot_bytes;
        }
    }
    for (uint32_t b = 0; b < core->block_count; b++) {
        ret->granted += core->blocks[b].state == BLOCK_GRANTED;
        ret->sealed += core->blocks[b].state == BLOCK_SEALED;
        ret->home += core->blocks[b].state == BLOCK_HOME;
    }
    for (uint32_t i = 0; i < PKV_SEQS_MAX; i++)
        ret->seqs += core->seqs[i].live;
    for (uint32_t w = 0; w < PKV_WORKERS_MAX; w++)
        ret->workers += core->workers[w].live;
}

static bool owns(const struct core *core, uint64_t place, uint32_t tier, uint32_t block, uint32_t tenant)
{
    if (pkv_place_tier(place) != tier || pkv_place_chunk(place) >= core->chunk_count[tier])
        return false;
    const struct chunk *c = &core->chunks[tier][pkv_place_chunk(place)];
    uint32_t slot = pkv_place_slot(place);
    return slot < c->slots && c->owner[slot] == block && c->gen[slot] == pkv_place_gen(place) &&
           (tenant == NONE || c->tenant == tenant);
}

static const char *check_block(const struct core *core, uint32_t id, uint64_t *owned)
{
    const struct block *b = &core->blocks[id];
    if (b->state == BLOCK_FREE)
        return NULL;
    uint32_t tenant = b->dying ? NONE : core->seqs[b->seq].tenant;
    if (!owns(core, b->home, PKV_TIER_ARENA, id, tenant) || !owns(core, b->signatures, PKV_TIER_POOL, id, tenant))
        return "a block does not own its home or its signatures";
    if (b->rows ? !owns(core, b->rows, PKV_TIER_POOL, id, tenant) : b->state != BLOCK_HOME)
        return "a block does not own its rows, or lost them before it was home";
    *owned += b->rows ? 3 : 2;
    if (b->dying)
        return NULL;
    const struct seq *s = &core->seqs[b->seq];
    if (!s->live || s->blocks[(uint64_t)b->layer * s->blocks_max + b->index] != id)
        return "a block's sequence does not know it";
    const struct pkv_block_ref *ref = &pkv_table_layer(s->table, b->layer, s->blocks_max)[b->index];
    if (ref->signatures != b->signatures || ref->rows != (b->rows ? b->rows : b->home))
        return "the block table names another place";
    return NULL;
}

const char *core_check(const struct core *core)
{
    uint64_t owned = 0, used = 0, retired = 0;
    for (uint32_t b = 0; b < core->block_count; b++) {
        const char *wrong = check_block(core, b, &owned);
        if (wrong)
            return wrong;
    }
    for (uint32_t tier = PKV_TIER_POOL; tier < PKV_TIERS; tier++) {
        for (uint32_t i = 0; i < core->chunk_count[tier]; i++) {
            const struct chunk *c = &core->chunks[tier][i];
            uint32_t mine = 0, gone = 0, unused = 0;
            for (uint32_t s = 0; s < c->slots; s++)
                *(c->owner[s] == NONE ? &unused : c->owner[s] == RETIRED ? &gone : &mine) += 1;
            uint32_t listed = 0;
            for (uint32_t s = c->slots ? c->free_head : NONE; s != NONE && listed <= c->slots; s = c->next[s])
                listed++;
            if (mine != c->used || gone != c->retired || listed != unused)
                return "a chunk's slots do not add up";
            used += mine, retired += gone;
        }
    }
    if (used != owned)
        return "a slot is owned by nobody";
    if (retired != core->retired_count)
        return "a retired slot waits for no epoch";
    for (uint32_t i = 0; i < core->pending_count; i++)
        if (!core->workers[core->pending[i].worker].live)
            return "a grant waits for a worker that is gone";
    return NULL;
}
