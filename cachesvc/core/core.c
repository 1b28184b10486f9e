/* The core itself: life and end, actions, workers, models. */
#include "cachesvc/core/internal.h"

struct core *core_create(const struct core_config *config, const struct core_hooks *hooks)
{
    if (!config->pool_chunks || config->pool_devices > config->pool_chunks || config->pool_chunks > PKV_CHUNKS_MAX ||
        !config->arena_chunks || config->arena_chunks > PKV_CHUNKS_MAX || (config->hold_ns && !config->hold_rate))
        return NULL;
    struct core *core = calloc(1, sizeof(*core));
    if (!core)
        return NULL;
    core->config = *config;
    core->config.pool_devices = PKV_MAX(config->pool_devices, 1u);
    core->hooks = *hooks;
    core->chunks[PKV_TIER_POOL] = malloc(config->pool_chunks * sizeof(struct chunk));
    core->chunks[PKV_TIER_ARENA] = malloc(config->arena_chunks * sizeof(struct chunk));
    core->devices = malloc(core->config.pool_devices * sizeof(*core->devices));
    if (!core->chunks[PKV_TIER_POOL] || !core->chunks[PKV_TIER_ARENA] || !core->devices) {
        free(core->chunks[PKV_TIER_POOL]), free(core->chunks[PKV_TIER_ARENA]), free(core->devices), free(core);
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
    free(core->blocks), free(core->block_free.word), free(core->to_look.word), free(core->actions), free(core);
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
    core->workers[w] = (struct worker){.live = true, .tenant = t, .device = NONE};
    *ret_worker = w;
    return PKV_ERR_OK;
}

uint32_t core_worker_tenant(const struct core *core, uint32_t worker)
{
    return core->workers[worker].tenant;
}

void core_worker_device(struct core *core, uint32_t worker, uint32_t device)
{
    assert(device < core->config.pool_devices);
    core->workers[worker].device = device;
}

enum pkv_err core_chunk_map(struct core *core, uint32_t worker, uint32_t tier, uint32_t chunk)
{
    if (tier == PKV_TIER_NONE || tier >= PKV_TIERS || chunk >= core->chunk_count[tier])
        return PKV_ERR_RANGE;
    if (core->chunks[tier][chunk].tenant != core->workers[worker].tenant)
        return PKV_ERR_TENANT;
    uint32_t device = core->workers[worker].device;
    if (tier == PKV_TIER_POOL && device != NONE && chunk % core->config.pool_devices != device)
        return PKV_ERR_GPU_DEVICE;
    core->chunks[tier][chunk].mapped |= 1ull << worker;
    return PKV_ERR_OK;
}

const struct pkv_model_request *core_model(const struct core *core, uint32_t model)
{
    return model < core->model_count ? &core->models[model] : NULL;
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
