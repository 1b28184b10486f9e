/* The core by hand: the life of a block, and each refusal with its own error. */
#include "cachesvc/core/internal.h" /* whether something was news */

#include "tests/unit/core.h"

static void test_life_of_a_block(void **state)
{
    (void)state;
    start(5, 8);
    struct pkv_table *t;
    uint64_t h = create(20, 0, &t);
    assert_int_equal(grant(h, 0, 10), PKV_ERR_OK);
    struct pkv_block_ref *refs = pkv_table_layer(t, 0, t->blocks_max);
    for (uint32_t b = 0; b < 10; b++)
        assert_int_equal(pkv_place_tier(refs[b].rows), PKV_TIER_POOL);
    assert_int_equal(refs[10].rows, 0);
    assert_int_equal(t->changes, 0); /* nothing that was there before */
    assert_int_equal(core_seal(core, 0, alice, h, 0, 0, 9), PKV_ERR_OK);
    assert_int_equal(copy_all(true), 9);
    /* 16 row slots beside the signatures: six more fit, the seventh waits for dropped copies. */
    enum pkv_err e = PKV_ERR_OK;
    assert_int_equal(grant(h, 0, 16), PKV_ERR_OK);
    assert_false(core_grant(core, 0, alice, 77, h, 0, 17 * PKV_BLOCK_TOKENS, &e));
    assert_int_equal(pkv_place_tier(refs[0].rows), PKV_TIER_POOL);  /* sinks stay */
    assert_int_equal(pkv_place_tier(refs[2].rows), PKV_TIER_ARENA); /* this one went */
    assert_int_equal(pkv_place_tier(refs[2].signatures), PKV_TIER_POOL);
    assert_true(t->changes > 0);
    core_quiesce(core, 1, 0); /* a reader still looks */
    struct core_action a;
    assert_false(core_next_action(core, &a));
    core_quiesce(core, 2, core_epoch(core));
    assert_true(core_next_action(core, &a));
    assert_int_equal(a.kind, CORE_COMPLETE);
    assert_int_equal(a.tag, 77);
    assert_int_equal(a.err, PKV_ERR_OK);
    assert_int_equal(pkv_place_tier(refs[16].rows), PKV_TIER_POOL);
    assert_null(core_check(core));
}

/* Places that came back in pieces are given out in order: copies and caches like what lies together. */
static void test_what_came_back_lies_together(void **state)
{
    (void)state;
    start(8, 8);
    struct pkv_table *t[2], *whole;
    uint64_t h[2] = {create(20, 0, &t[0]), create(20, 0, &t[1])};
    for (uint32_t b = 1; b <= 8; b++)
        for (uint32_t s = 0; s < 2; s++)
            assert_int_equal(grant(h[s], 0, b), PKV_ERR_OK);
    for (uint32_t s = 0; s < 2; s++)
        assert_int_equal(core_seq_destroy(core, alice, h[s]), PKV_ERR_OK);
    core_quiesce(core, 0, core_epoch(core));
    assert_int_equal(grant(create(20, 0, &whole), 0, 16), PKV_ERR_OK);
    for (uint32_t b = 0; b < 16; b++) {
        const struct pkv_block_ref *ref = &pkv_table_layer(whole, 0, 20)[b];
        assert_int_equal(pkv_place_slot(ref->rows), b % 4); /* four of a chunk */
        assert_int_equal(pkv_place_slot(ref->signatures), b);
    }
    assert_null(core_check(core));
}

static void test_full_pool_is_bounded(void **state)
{
    (void)state;
    start(2, 8);
    struct pkv_table *t;
    uint64_t h = create(20, 0, &t);
    enum pkv_err e;
    assert_false(core_grant(core, 5, alice, 1, h, 0, 20 * PKV_BLOCK_TOKENS, &e));
    assert_int_equal(core_deadline(core), 1005);
    struct core_action a;
    core_tick(core, 1004);
    assert_false(core_next_action(core, &a));
    core_tick(core, 1005);
    assert_true(core_next_action(core, &a));
    assert_int_equal(a.err, PKV_ERR_POOL_FULL);
    assert_int_equal(core_deadline(core), UINT64_MAX);
}

/* Who waits in vain does not make news himself: he would walk over all blocks in every turn. */
static void test_waiting_is_no_news(void **state)
{
    (void)state;
    start(2, 20); /* four slots of rows */
    struct pkv_table *t;
    enum pkv_err e;
    assert_false(core_grant(core, 0, alice, 9, create(20, 0, &t), 0, 5 * PKV_BLOCK_TOKENS, &e));
    for (uint64_t now = 0; now < 3; now++) {
        core_quiesce(core, now, core_epoch(core));
        assert_int_equal(core->news, core->news_tried);
    }
    assert_null(core_check(core));
}

/* Nor does one after the other look through all blocks for what the first one of them has not found. */
static void test_found_nothing_once(void **state)
{
    (void)state;
    start(3, 20); /* eight slots of rows */
    struct pkv_table *t;
    enum pkv_err e;
    uint64_t h = create(20, 0, &t);
    assert_int_equal(grant(h, 0, 5), PKV_ERR_OK);
    assert_int_equal(core_seal(core, 0, alice, h, 0, 0, 5), PKV_ERR_OK);
    assert_int_equal(copy_all(true), 5);
    assert_int_equal(grant(create(20, 0, &t), 0, 3), PKV_ERR_OK); /* the pool is full; what is at home is pinned */
    assert_false(core_grant(core, 0, alice, 1, create(20, 0, &t), 0, PKV_BLOCK_TOKENS, &e));
    uint32_t hand = core->clock_hand;
    for (uint32_t i = 2; i < 6; i++)
        assert_false(core_grant(core, 0, alice, i, create(20, 0, &t), 0, PKV_BLOCK_TOKENS, &e));
    core_quiesce(core, 1, core_epoch(core));
    assert_int_equal(core->clock_hand, hand);
    assert_int_equal(core_seq_destroy(core, alice, h), PKV_ERR_OK);
    core_quiesce(core, 2, core_epoch(core));
    struct core_action a;
    for (uint32_t i = 1; i < 6; i++) /* five places, and who came first has his */
        assert_true(core_next_action(core, &a) && a.tag == i && a.err == PKV_ERR_OK);
    assert_null(core_check(core));
}

static void test_full_arena(void **state)
{
    (void)state;
    start(8, 1);
    struct pkv_table *t;
    uint64_t h = create(20, 0, &t);
    assert_int_equal(grant(h, 0, 4), PKV_ERR_OK);
    assert_int_equal(grant(h, 0, 5), PKV_ERR_ARENA_FULL);
    assert_int_equal(core_seal(core, 0, alice, h, 0, 0, 4), PKV_ERR_OK); /* what was granted still goes home */
    assert_int_equal(copy_all(true), 4);
}

static void test_refusals(void **state)
{
    (void)state;
    start(8, 8);
    struct pkv_table *t;
    uint64_t h = create(4, 0, &t), tokens, table;
    uint32_t bob, eve, other;
    assert_int_equal(core_worker_join(core, "", &bob), PKV_ERR_OK);
    assert_int_equal(core_worker_join(core, "eve", &eve), PKV_ERR_OK);
    enum pkv_err e;
    assert_true(core_grant(core, 0, bob, 1, h, 0, 64, &e));
    assert_int_equal(e, PKV_ERR_NOT_OPEN);
    assert_int_equal(core_seq_open(core, bob, h, &tokens, &table), PKV_ERR_OK);
    assert_true(core_grant(core, 0, bob, 1, h, 0, 64, &e));
    assert_int_equal(e, PKV_ERR_NOT_WRITER);
    assert_int_equal(core_seq_open(core, eve, h, &tokens, &table), PKV_ERR_NO_SEQ);
    assert_int_equal(grant(h, 0, 5), PKV_ERR_LENGTH);
    assert_int_equal(grant(h, LAYERS, 1), PKV_ERR_INVALID);
    assert_int_equal(core_seal(core, 0, alice, h, 0, 0, 1), PKV_ERR_NOT_GRANTED);
    assert_int_equal(core_seal(core, 0, alice, h, 0, UINT32_MAX, 2), PKV_ERR_NOT_GRANTED);
    assert_int_equal(grant(h, PKV_LAYER_ALL, 2), PKV_ERR_OK);
    assert_int_equal(core_seal(core, 0, alice, h, 1, 1, 1), PKV_ERR_NOT_GRANTED);
    assert_int_equal(core_chunk_map(core, eve, PKV_TIER_POOL, 0), PKV_ERR_TENANT);
    assert_int_equal(core_chunk_map(core, alice, PKV_TIER_POOL, 0), PKV_ERR_OK);
    assert_int_equal(core_chunk_map(core, alice, PKV_TIER_POOL, PKV_CHUNKS_MAX), PKV_ERR_RANGE);
    struct pkv_model_request m = request();
    m.geom.head_dim = 128;
    assert_int_equal(core_model_add(core, &m, &other), PKV_ERR_MODEL_MISMATCH);
    assert_int_equal(core_seq_destroy(core, alice, h), PKV_ERR_OK);
    assert_int_equal(core_seq_close(core, bob, h), PKV_ERR_STALE);
    assert_null(core_check(core));
}

static void test_death_of_a_worker(void **state)
{
    (void)state;
    start(8, 8);
    struct pkv_table *t, *kept;
    create(4, 0, &t);
    uint64_t h = create(4, PKV_SEQ_PERSISTENT, &kept), tokens, table;
    assert_int_equal(grant(h, PKV_LAYER_ALL, 3), PKV_ERR_OK);
    assert_int_equal(core_seal(core, 0, alice, h, 0, 0, 2), PKV_ERR_OK);
    assert_int_equal(core_seal(core, 0, alice, h, 1, 0, 1), PKV_ERR_OK);
    core_worker_leave(core, alice); /* copies are in flight */
    struct core_stats stats;
    core_stats(core, &stats);
    assert_int_equal(stats.seqs, 1);
    copy_all(true);
    assert_null(core_check(core));
    assert_int_equal(core_worker_join(core, "", &alice), PKV_ERR_OK);
    assert_int_equal(core_seq_open(core, alice, h, &tokens, &table), PKV_ERR_OK);
    assert_int_equal(tokens, PKV_BLOCK_TOKENS);               /* what every layer had sealed */
    assert_int_equal(grant(h, PKV_LAYER_ALL, 4), PKV_ERR_OK); /* and it can be written on */
    assert_int_equal(core_seq_destroy(core, alice, h), PKV_ERR_OK);
    core_quiesce(core, 0, core_epoch(core));
    core_stats(core, &stats);
    assert_int_equal(stats.used[PKV_TIER_POOL] + stats.used[PKV_TIER_ARENA], 0);
    assert_int_equal(stats.retired[PKV_TIER_POOL] + stats.retired[PKV_TIER_ARENA], 0);
}

static void test_failed_copy_is_tried_once_more(void **state)
{
    (void)state;
    start(8, 8);
    struct pkv_table *t;
    uint64_t h = create(4, 0, &t);
    assert_int_equal(grant(h, 0, 1), PKV_ERR_OK);
    assert_int_equal(core_seal(core, 0, alice, h, 0, 0, 1), PKV_ERR_OK);
    assert_int_equal(copy_all(false), 2);
    struct core_stats stats;
    core_stats(core, &stats);
    assert_int_equal(stats.sealed, 1); /* it stays where it is whole: in the pool */
    assert_int_equal(core_seq_destroy(core, alice, h), PKV_ERR_OK);
    assert_null(core_check(core));
}

/* Every place of a sequence lies on its worker's device; a full device takes nothing from another one. */
static void test_devices(void **state)
{
    (void)state;
    start_devices(5, 40, 2); /* 0, 2, 4 on the first, 1, 3 on the second */
    struct pkv_table *t, *other;
    uint32_t alien = alice, bob, eve;
    uint64_t h = create(20, 0, &t), tokens, table; /* of a worker without a device: on the first */
    assert_int_equal(core_worker_join(core, "", &bob), PKV_ERR_OK);
    assert_int_equal(core_worker_join(core, "", &eve), PKV_ERR_OK);
    core_worker_device(core, bob, 1), core_worker_device(core, eve, 0);
    alice = bob;
    uint64_t mine = create(20, 0, &other);
    assert_int_equal(grant(mine, 0, 4), PKV_ERR_OK); /* a chunk of rows, one of signatures */
    for (uint32_t b = 0; b < 4; b++) {
        const struct pkv_block_ref *ref = &pkv_table_layer(other, 0, 20)[b];
        assert_int_equal(pkv_place_chunk(ref->rows) % 2, 1);
        assert_int_equal(pkv_place_chunk(ref->signatures) % 2, 1);
    }
    assert_int_equal(grant(mine, 0, 5), PKV_ERR_POOL_FULL); /* though the first device is empty */
    assert_int_equal(core_seq_open(core, bob, h, &tokens, &table), PKV_ERR_GPU_DEVICE);
    assert_int_equal(core_seq_open(core, eve, mine, &tokens, &table), PKV_ERR_GPU_DEVICE);
    assert_int_equal(core_seq_open(core, eve, h, &tokens, &table), PKV_ERR_OK);
    assert_int_equal(core_seq_open(core, alien, mine, &tokens, &table), PKV_ERR_OK);
    alice = alien;
    assert_int_equal(grant(h, 0, 8), PKV_ERR_OK);
    for (uint32_t b = 0; b < 8; b++)
        assert_int_equal(pkv_place_chunk(pkv_table_layer(t, 0, 20)[b].rows) % 2, 0);
    assert_int_equal(core_chunk_map(core, bob, PKV_TIER_POOL, pkv_place_chunk(pkv_table_layer(t, 0, 20)[0].rows)),
                     PKV_ERR_GPU_DEVICE);
    assert_int_equal(core_chunk_map(core, bob, PKV_TIER_POOL, pkv_place_chunk(pkv_table_layer(other, 0, 20)[0].rows)),
                     PKV_ERR_OK);
    struct core_view view;
    assert_int_equal(core_seq_view(core, alice, mine, 0, &view), PKV_ERR_OK);
    assert_int_equal(view.device, 1);
    assert_null(core_check(core));
}

static void test_fork_shares_and_copies(void **state)
{
    (void)state;
    start(20, 20);
    struct pkv_table *t, *c;
    struct core_action a;
    uint64_t h = text(5, &t), child = 0, at = 0;
    enum pkv_err e = PKV_ERR_OK;
    struct pkv_op_fork op = {.tokens = 3 * PKV_BLOCK_TOKENS};
    assert_true(core_seq_fork(core, 0, alice, 1, h, &op, &e, &child, &at)); /* whole blocks: nothing to copy */
    c = (struct pkv_table *)(uintptr_t)at;
    for (uint32_t b = 0; b < 3; b++)
        assert_memory_equal(&pkv_table_layer(c, 1, 20)[b], &pkv_table_layer(t, 1, 20)[b], sizeof(struct pkv_block_ref));
    assert_int_equal(c->tokens, 3 * PKV_BLOCK_TOKENS);
    struct core_seq_info info;
    assert_true(core_seq_info(core, pkv_handle_index(h), &info));
    assert_int_equal(info.blocks.shared, 3 * LAYERS);
    op.tokens = 5 * PKV_BLOCK_TOKENS + 7; /* the tail is being written by the parent */
    assert_false(core_seq_fork(core, 0, alice, 2, h, &op, &e, &child, &at));
    assert_true(carry_out(true, &a));
    assert_int_equal(a.tag, 2);
    assert_int_equal(a.err, PKV_ERR_OK);
    c = (struct pkv_table *)(uintptr_t)a.value1;
    assert_int_equal(pkv_table_layer(c, 0, 20)[4].rows, pkv_table_layer(t, 0, 20)[4].rows);
    assert_int_not_equal(pkv_table_layer(c, 0, 20)[5].rows, pkv_table_layer(t, 0, 20)[5].rows);
    /* The parent goes, the child keeps what it shares. */
    assert_int_equal(core_seq_destroy(core, alice, h), PKV_ERR_OK);
    assert_null(core_check(core));
    assert_int_equal(pkv_place_tier(pkv_table_layer(c, 0, 20)[0].rows), PKV_TIER_POOL);
    op.tokens = 7 * PKV_BLOCK_TOKENS;
    assert_true(core_seq_fork(core, 0, alice, 3, a.value0, &op, &e, &child, &at));
    assert_int_equal(e, PKV_ERR_LENGTH);
}

static void test_fork_that_fails_leaves_nothing(void **state)
{
    (void)state;
    start(20, 20);
    struct pkv_table *t;
    struct core_action a;
    struct core_stats before, after;
    uint64_t h = text(5, &t), child = 0, at = 0;
    enum pkv_err e = PKV_ERR_OK;
    core_stats(core, &before);
    struct pkv_op_fork op = {.tokens = 2 * PKV_BLOCK_TOKENS + 1};
    assert_false(core_seq_fork(core, 0, alice, 1, h, &op, &e, &child, &at));
    assert_true(carry_out(false, &a)); /* a copy fails */
    assert_int_equal(a.err, PKV_ERR_SYSTEM);
    /* The parent goes while its tail is read: its places wait for the copies. */
    assert_false(core_seq_fork(core, 0, alice, 2, h, &op, &e, &child, &at));
    core_quiesce(core, 0, core_epoch(core));
    core_stats(core, &after);
    assert_int_equal(after.seqs, before.seqs + 1); /* the child that is being made */
    assert_int_equal(core_seq_destroy(core, alice, h), PKV_ERR_OK);
    assert_null(core_check(core));
    assert_true(carry_out(true, &a));
    assert_int_equal(a.err, PKV_ERR_OK);
    /* A worker that dies in the middle takes its child along. */
    assert_false(core_seq_fork(core, 0, alice, 3, a.value0, &op, &e, &child, &at));
    core_worker_leave(core, alice);
    carry_out(true, &a);
    core_quiesce(core, 0, core_epoch(core));
    core_stats(core, &after);
    assert_int_equal(after.seqs + after.granted + after.sealed + after.home, 0);
    assert_int_equal(after.used[PKV_TIER_POOL] + after.used[PKV_TIER_ARENA], 0);
    assert_null(core_check(core));
}

static void test_truncate(void **state)
{
    (void)state;
    start(20, 20);
    struct pkv_table *t;
    struct core_action a;
    uint64_t h = text(5, &t);
    enum pkv_err e = PKV_ERR_OK;
    const struct pkv_block_ref *refs = pkv_table_layer(t, 0, 20);
    assert_true(core_seq_truncate(core, 0, alice, 1, h, PKV_LAYER_ALL, 4 * PKV_BLOCK_TOKENS, &e)); /* at a border: at once */
    assert_int_equal(e, PKV_ERR_OK);
    assert_int_equal(refs[4].rows, 0);
    assert_int_equal(t->tokens, 4 * PKV_BLOCK_TOKENS);
    uint64_t sealed = refs[2].rows;
    assert_false(core_seq_truncate(core, 0, alice, 2, h, PKV_LAYER_ALL, 2 * PKV_BLOCK_TOKENS + 9, &e));
    assert_int_equal(refs[3].rows, 0);      /* whole blocks go at once */
    assert_int_equal(refs[2].rows, sealed); /* the tail stays until its copy is in */
    enum pkv_err busy = grant(h, 0, 4);
    assert_int_equal(busy, PKV_ERR_BUSY);
    assert_int_equal(core_seal(core, 0, alice, h, 0, 2, 1), PKV_ERR_BUSY);
    assert_true(carry_out(true, &a));
    assert_int_equal(a.tag, 2);
    assert_int_not_equal(refs[2].rows, sealed);
    assert_int_equal(core_seal(core, 0, alice, h, 0, 2, 1), PKV_ERR_OK); /* and is written and sealed again */
    carry_out(true, &a);
    /* One layer alone, and what is refused. */
    assert_true(core_seq_truncate(core, 0, alice, 3, h, 1, 0, &e));
    assert_int_equal(e, PKV_ERR_OK);
    assert_int_equal(pkv_table_layer(t, 1, 20)[0].rows, 0);
    assert_int_not_equal(refs[0].rows, 0);
    assert_int_equal(t->tokens, 0);
    assert_true(core_seq_truncate(core, 0, alice, 4, h, 0, 4 * PKV_BLOCK_TOKENS, &e));
    assert_int_equal(e, PKV_ERR_LENGTH);
    assert_true(core_seq_truncate(core, 0, alice, 5, h, LAYERS, 0, &e));
    assert_int_equal(e, PKV_ERR_INVALID);
}

static void test_states(void **state)
{
    (void)state;
    start(4, 8);
    struct pkv_table *t, *other;
    struct pkv_op_create op = {.model = model, .max_tokens = 64, .state = 3};
    struct pkv_op_fork whole = {0};
    uint64_t h = create(4, 0, &t), handle, table;
    uint32_t bob;
    enum pkv_err e;
    assert_int_equal(t->state, 0);
    assert_true(core_state_used(core, model, 0));
    assert_false(core_state_used(core, model, 1) || core_state_used(core, model + 1, 0));
    /* A fork has its parent's state, whatever becomes of that later. */
    assert_true(core_seq_fork(core, 0, alice, 1, h, &whole, &e, &handle, &table));
    assert_int_equal(e, PKV_ERR_OK);
    assert_int_equal(core_seq_signed(core, alice, h, 1), PKV_ERR_OK);
    assert_int_equal(t->state, 1);
    assert_int_equal(((struct pkv_table *)(uintptr_t)table)->state, 0);
    assert_true(core_seq_fork(core, 0, alice, 1, h, &whole, &e, &handle, &table));
    assert_int_equal(((struct pkv_table *)(uintptr_t)table)->state, 1);
    /* Once, and by its writer alone. */
    assert_int_equal(core_seq_signed(core, alice, h, 1), PKV_ERR_OK);
    assert_int_equal(core_seq_signed(core, alice, h, 2), PKV_ERR_STATE_EXISTS);
    assert_int_equal(core_seq_create(core, alice, &op, &handle, &table), PKV_ERR_OK);
    other = (struct pkv_table *)(uintptr_t)table;
    assert_int_equal(other->state, 3);
    assert_int_equal(core_seq_signed(core, alice, handle, 1), PKV_ERR_STATE_EXISTS);
    assert_int_equal(core_worker_join(core, "", &bob), PKV_ERR_OK);
    assert_int_equal(core_seq_signed(core, bob, h, 1), PKV_ERR_NOT_OPEN);
    uint64_t tokens;
    assert_int_equal(core_seq_open(core, bob, h, &tokens, &table), PKV_ERR_OK);
    assert_int_equal(core_seq_signed(core, bob, h, 1), PKV_ERR_NOT_WRITER);
    assert_true(core_state_used(core, model, 3));
    /* Anew: alone, and not to be forked until it is done. */
    assert_int_equal(core_seq_signed(core, alice, h, 0), PKV_ERR_BUSY); /* open elsewhere */
    assert_int_equal(core_seq_signed(core, alice, handle, 0), PKV_ERR_OK);
    assert_int_equal(other->state, 0);
    assert_true(core_seq_fork(core, 0, alice, 1, handle, &whole, &e, &tokens, &table));
    assert_int_equal(e, PKV_ERR_BUSY);
    assert_int_equal(core_seq_signed(core, alice, handle, 3), PKV_ERR_OK);
    assert_int_equal(core_seq_signed(core, alice, handle, 4), PKV_ERR_STATE_EXISTS);
    assert_int_equal(grant(handle, 0, 1), PKV_ERR_OK);
    assert_int_equal(grant(handle, 1, 1), PKV_ERR_OK);
    assert_int_equal(core_seal(core, 0, alice, handle, 0, 0, 1), PKV_ERR_OK);
    assert_int_equal(core_seal(core, 0, alice, handle, 1, 0, 1), PKV_ERR_OK);
    whole.tokens = PKV_BLOCK_TOKENS;
    uint64_t child;
    assert_true(core_seq_fork(core, 0, alice, 1, handle, &whole, &e, &child, &table));
    assert_int_equal(e, PKV_ERR_OK);
    assert_int_equal(core_seq_signed(core, alice, handle, 0), PKV_ERR_BUSY); /* shared */
    assert_int_equal(core_seq_close(core, alice, child), PKV_ERR_OK);
    assert_int_equal(core_seq_signed(core, alice, handle, 0), PKV_ERR_OK);
    assert_int_equal(core_seq_signed(core, alice, handle, 3), PKV_ERR_OK);
    assert_int_equal(core_seq_close(core, alice, handle), PKV_ERR_OK);
    assert_false(core_state_used(core, model, 3));
    assert_int_equal(core_seq_signed(core, alice, handle, 1), PKV_ERR_STALE);
}

/* Of seven chunks rows take all but that of signatures; of eight they leave one. */
static void test_rows_leave_a_chunk_to_signatures(void **state)
{
    (void)state;
    for (uint32_t chunks = 7; chunks <= 8; chunks++) {
        struct pkv_table *t;
        start(chunks, 40);
        uint64_t h = create(40, 0, &t);
        assert_int_equal(grant(h, 0, 24), PKV_ERR_OK);
        assert_int_equal(grant(h, 0, 25), PKV_ERR_POOL_FULL);
        assert_null(core_check(core));
        stop(NULL);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_life_of_a_block, stop),
        cmocka_unit_test_teardown(test_fork_shares_and_copies, stop),
        cmocka_unit_test_teardown(test_fork_that_fails_leaves_nothing, stop),
        cmocka_unit_test_teardown(test_truncate, stop),
        cmocka_unit_test_teardown(test_states, stop),
        cmocka_unit_test_teardown(test_what_came_back_lies_together, stop),
        cmocka_unit_test_teardown(test_full_pool_is_bounded, stop),
        cmocka_unit_test_teardown(test_waiting_is_no_news, stop),
        cmocka_unit_test_teardown(test_found_nothing_once, stop),
        cmocka_unit_test_teardown(test_full_arena, stop),
        cmocka_unit_test_teardown(test_refusals, stop),
        cmocka_unit_test_teardown(test_death_of_a_worker, stop),
        cmocka_unit_test_teardown(test_failed_copy_is_tried_once_more, stop),
        cmocka_unit_test_teardown(test_devices, stop),
        cmocka_unit_test(test_rows_leave_a_chunk_to_signatures),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
