/* The core by hand: one worker, one model, copies that end when they are told to. Included by one file of each program. */
#ifndef TESTS_UNIT_CORE_H
#define TESTS_UNIT_CORE_H

#include "tests/lib/tables.h"
#include "tests/lib/test.h"

#include "cachesvc/core/core.h"

#include <stdlib.h>
#include <string.h>

#define LAYERS 2u

static struct core *core;
static uint32_t alice, model;

static inline struct pkv_model_request request(void)
{
    return (struct pkv_model_request){
        .geom = {.layers = LAYERS, .q_heads = 1, .kv_heads = 1, .head_dim = 64, .dtype = PKV_F16, .sig_bits = 64}, .name = "m"};
}

/* Chunks of four row slots. */
static inline void start_devices(uint32_t pool, uint32_t arena, uint32_t devices)
{
    struct core_config config = {
        .pool_chunks = pool, .arena_chunks = arena, .pool_devices = devices, .chunk_bytes = 65536, .grant_timeout_ns = 1000};
    core = core_create(&config, &(struct core_hooks){test_table_alloc, test_table_free, NULL});
    assert_non_null(core);
    struct pkv_model_request m = request();
    assert_int_equal(core_model_add(core, &m, &model), PKV_ERR_OK);
    assert_int_equal(core_worker_join(core, "", &alice), PKV_ERR_OK);
}

static inline void start(uint32_t pool, uint32_t arena)
{
    start_devices(pool, arena, 0);
}

static inline int stop(void **state)
{
    (void)state;
    core_destroy(core);
    core = NULL;
    return 0;
}

static inline uint64_t create(uint32_t blocks, uint32_t flags, struct pkv_table **ret)
{
    struct pkv_op_create op = {.model = model, .max_tokens = blocks * PKV_BLOCK_TOKENS, .flags = flags};
    uint64_t handle = 0, table = 0;
    assert_int_equal(core_seq_create(core, alice, &op, &handle, &table), PKV_ERR_OK);
    *ret = (struct pkv_table *)(uintptr_t)table;
    return handle;
}

static inline enum pkv_err grant(uint64_t handle, uint32_t layer, uint32_t blocks)
{
    enum pkv_err e; /* POOL_FULL, ARENA_FULL: perhaps it waits */
    core_grant(core, 0, alice, 9, handle, layer, (uint64_t)blocks * PKV_BLOCK_TOKENS, &e);
    return e;
}

/* Finishes all copies. */
static inline uint32_t copy_all(bool ok)
{
    struct core_action a;
    uint32_t copies = 0;
    while (core_next_action(core, &a))
        if (a.kind == CORE_COPY) {
            assert_int_equal(pkv_place_tier(a.from), PKV_TIER_POOL);
            assert_int_equal(pkv_place_tier(a.to), PKV_TIER_ARENA);
            core_copied(core, a.copy, ok, 1);
            copies++;
        }
    return copies;
}

/* Takes all actions: copies end well, or not; the last COMPLETE, if there was one. */
static inline bool carry_out(bool ok, struct core_action *ret)
{
    struct core_action a;
    bool complete = false;
    *ret = (struct core_action){.kind = CORE_COMPLETE};
    while (core_next_action(core, &a)) {
        if (a.kind == CORE_COPY) {
            core_copied(core, a.copy, ok, 1);
        } else if (a.kind == CORE_COMPLETE) {
            *ret = a;
            complete = true;
        }
    }
    assert_null(core_check(core));
    return complete;
}

static inline uint64_t text(uint32_t blocks, struct pkv_table **ret)
{
    uint64_t h = create(20, 0, ret);
    assert_int_equal(grant(h, PKV_LAYER_ALL, blocks + 1), PKV_ERR_OK);
    for (uint32_t l = 0; l < LAYERS; l++)
        assert_int_equal(core_seal(core, 0, alice, h, l, 0, blocks), PKV_ERR_OK);
    assert_int_equal(copy_all(true), blocks * LAYERS);
    return h;
}

#endif
