/* When copies home give way to a prefill, and what ends that: a pause, time, a pool that fills, an operation that waits, a
 * writer that leaves a persistent sequence, the end of a sequence. */
#include "tests/lib/tables.h"
#include "tests/lib/test.h"

#include "cachesvc/core/core.h"

#include <stdlib.h>

#define MS      1000000ull
#define HOLD    (1000 * MS)
#define RATE    2340500ull /* a block of 16 KiB takes 7 ms: no burst by itself */
#define BLOCK   16384u
#define PAUSE   (100 * MS) /* that the bucket forgets at most */
#define BURST   (8 * MS)
#define CHUNK   65536u
#define FLIGHTS 2048u

static struct core *core;
static uint32_t alice, model;
static uint32_t flying[4096], in_flight; /* copies */

static void start(uint32_t pool, uint32_t devices, uint64_t hold_ns, uint64_t chunk_bytes)
{
    struct core_config config = {.pool_chunks = pool,
                                 .arena_chunks = 64,
                                 .pool_devices = devices,
                                 .chunk_bytes = chunk_bytes,
                                 .grant_timeout_ns = 5000 * MS,
                                 .hold_ns = hold_ns,
                                 .hold_rate = RATE};
    in_flight = 0;
    core = core_create(&config, &(struct core_hooks){test_table_alloc, test_table_free, NULL});
    assert_non_null(core);
    struct pkv_model_request m = {
        .geom = {.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 64, .dtype = PKV_F16, .sig_bits = 64}, .name = "m"};
    assert_int_equal(core_model_add(core, &m, &model), PKV_ERR_OK);
    assert_int_equal(core_worker_join(core, "", &alice), PKV_ERR_OK);
}

static int stop(void **state)
{
    (void)state;
    core_destroy(core);
    core = NULL;
    return 0;
}

/* A sequence of `worker` with `blocks` granted. */
static uint64_t text_of(uint32_t worker, uint32_t blocks, uint32_t flags)
{
    struct pkv_op_create op = {.model = model, .max_tokens = 4096 * PKV_BLOCK_TOKENS, .flags = flags};
    uint64_t handle = 0, table = 0;
    enum pkv_err e = PKV_ERR_COUNT;
    assert_int_equal(core_seq_create(core, worker, &op, &handle, &table), PKV_ERR_OK);
    assert_true(core_grant(core, 0, worker, 1, handle, 0, (uint64_t)blocks * PKV_BLOCK_TOKENS, &e));
    assert_int_equal(e, PKV_ERR_OK);
    return handle;
}

static void seal(uint64_t now, uint64_t handle, uint32_t first, uint32_t count)
{
    assert_int_equal(core_seal(core, now, alice, handle, 0, first, count), PKV_ERR_OK);
}

/* Copies that the core wants begun at `now`, in order; they stay under way. */
static uint32_t begun(uint64_t now)
{
    struct core_action a;
    uint32_t n = 0;
    core_tick(core, now);
    while (core_next_action(core, &a))
        if (a.kind == CORE_COPY) {
            assert_in_range(in_flight, 0, 4095);
            flying[in_flight++] = a.copy;
            n++;
        }
    assert_null(core_check(core));
    return n;
}

static void land(void)
{
    for (uint32_t i = 0; i < in_flight; i++)
        core_copied(core, flying[i], true, 1);
    in_flight = 0;
    assert_null(core_check(core));
}

static uint32_t held(void)
{
    struct core_stats s;
    core_stats(core, &s);
    return s.held;
}

static void test_without_a_bound_nothing_waits(void **state)
{
    (void)state;
    start(64, 1, 0, CHUNK);
    uint64_t h = text_of(alice, 40, 0);
    seal(5 * MS, h, 0, 40);
    assert_int_equal(held(), 0);
    assert_int_equal(core_deadline(core), UINT64_MAX);
    assert_int_equal(begun(5 * MS), 40);
    land();
}

/* Blocks that fill one by one go at once. */
static void test_decoding_waits_for_nothing(void **state)
{
    (void)state;
    start(64, 1, HOLD, CHUNK);
    uint64_t h = text_of(alice, 40, 0), now = 0;
    for (uint32_t b = 0; b < 20; b++, now += 20 * MS) { /* each empties out before the next */
        seal(now, h, b, 1);
        assert_int_equal(begun(now), 1);
    }
    assert_int_equal(in_flight, 20);
    land();
}

static void test_a_prefill_goes_first_and_its_end_is_seen(void **state)
{
    (void)state;
    start(64, 1, HOLD, CHUNK);
    uint64_t h = text_of(alice, 40, 0), now = 7 * MS;
    for (uint32_t b = 0; b < 40; b += 4, now += 5 * MS) { /* four blocks take 28 ms at the rate: they come faster */
        seal(now, h, b, 4);
        assert_int_equal(begun(now), 0);
    }
    assert_int_equal(held(), 40);
    now -= 5 * MS; /* of the last */
    assert_int_equal(core_deadline(core), now + PAUSE - BURST);
    assert_int_equal(begun(now + PAUSE - BURST - 1), 0);
    assert_int_equal(begun(now + PAUSE - BURST), 40);
    assert_int_equal(core_deadline(core), UINT64_MAX);
    land();
    struct core_stats s;
    core_stats(core, &s);
    assert_int_equal(s.home, 40);
    assert_int_equal(s.copies_held, 40);
}

/* However long the prefill lasts: each block's own time counts. */
static void test_time_is_bounded(void **state)
{
    (void)state;
    start(64, 1, HOLD, CHUNK);
    uint64_t h = text_of(alice, 60, 0), now = 0;
    for (uint32_t b = 0; b < 60; b += 3, now += 20 * MS) { /* 21 ms each */
        seal(now, h, b, 3);
        assert_int_equal(begun(now), 0);
    }
    assert_int_equal(held(), 60);
    for (; now < HOLD; now += 20 * MS) { /* the bucket is kept full by another sequence's blocks */
        assert_int_equal(begun(now), 0);
        uint64_t other = text_of(alice, 3, 0);
        seal(now, other, 0, 3);
        assert_int_equal(core_seq_destroy(core, alice, other), PKV_ERR_OK);
        core_quiesce(core, now, core_epoch(core));
    }
    assert_int_equal(core_deadline(core), HOLD);
    assert_int_equal(begun(HOLD), 3); /* those of the first moment, no others */
    assert_int_equal(begun(HOLD + 20 * MS - 1), 0);
    assert_int_equal(begun(HOLD + 20 * MS), 3);
    land();
}

/* Half of the pool is left for what comes; a block that is home is room. */
static void test_a_pool_that_fills_ends_it(void **state)
{
    (void)state;
    start(10, 1, HOLD, CHUNK); /* 40 slots of rows, less a chunk of signatures */
    uint64_t h = text_of(alice, 10, 0), more;
    seal(0, h, 0, 10);
    assert_int_equal(begun(0), 0);
    more = text_of(alice, 12, 0); /* 22 of 40 are taken */
    assert_int_equal(begun(1), 10);
    land(); /* 12 of 40 are not home */
    seal(2, more, 0, 12);
    assert_int_equal(begun(2), 0);
    assert_int_equal(held(), 12);
}

/* Who waits for room ends it at once, and gets the first block that has come home. */
static void test_a_wait_for_room_ends_it(void **state)
{
    (void)state;
    start(4, 1, HOLD, CHUNK); /* 12 slots of rows, in three chunks, beside the signatures */
    struct core_action a;
    enum pkv_err e;
    uint32_t eve;
    uint64_t h = text_of(alice, 7, 0);
    seal(0, h, 0, 7);
    assert_int_equal(begun(0), 0);                                     /* 7 of 16, and a few signatures */
    assert_int_equal(core_worker_join(core, "eve", &eve), PKV_ERR_OK); /* needs two chunks of her own: one is free */
    struct pkv_op_create op = {.model = model, .max_tokens = PKV_BLOCK_TOKENS};
    uint64_t hers, table;
    assert_int_equal(core_seq_create(core, eve, &op, &hers, &table), PKV_ERR_OK);
    assert_false(core_grant(core, 1, eve, 7, hers, 0, PKV_BLOCK_TOKENS, &e));
    assert_int_equal(begun(1), 7);
    assert_int_equal(held(), 0);
    land();
    (void)core_next_action(core, &a);
}

/* What is parked for others goes home; what nobody holds any more goes nowhere. */
static void test_parked_and_closed(void **state)
{
    (void)state;
    start(64, 1, HOLD, CHUNK);
    uint64_t kept = text_of(alice, 6, PKV_SEQ_PERSISTENT), gone = text_of(alice, 6, 0);
    seal(0, gone, 0, 3);
    seal(0, kept, 0, 6);
    seal(0, gone, 3, 3);
    assert_int_equal(begun(0), 0);
    assert_int_equal(core_seq_close(core, alice, gone), PKV_ERR_OK);
    assert_int_equal(held(), 6);
    assert_null(core_check(core));
    assert_int_equal(begun(1), 0);
    assert_int_equal(core_seq_close(core, alice, kept), PKV_ERR_OK); /* its writer leaves it to others */
    assert_int_equal(begun(2), 6);
    land();
    core_quiesce(core, 3, core_epoch(core));
    struct core_stats s;
    core_stats(core, &s);
    assert_int_equal(s.home, 6);
    assert_int_equal(s.used[PKV_TIER_ARENA], 6 * BLOCK); /* the others' homes are free, though never filled */
}

/* A worker's death is both at once; a tail that is copied while its block waits is no matter of the queue. */
static void test_death_and_tails(void **state)
{
    (void)state;
    start(64, 1, HOLD, CHUNK);
    uint64_t kept = text_of(alice, 4, PKV_SEQ_PERSISTENT), cut = text_of(alice, 6, 0);
    struct core_action a;
    enum pkv_err e;
    seal(0, cut, 0, 6);
    seal(0, kept, 0, 4);
    assert_int_equal(begun(0), 0);
    assert_false(core_seq_truncate(core, 0, alice, 2, cut, 0, 3 * PKV_BLOCK_TOKENS + 5, &e));
    assert_int_equal(held(), 8); /* the tail's block still waits: the sequence has it until its copy is in */
    assert_null(core_check(core));
    uint32_t tails = 0;
    while (core_next_action(core, &a))
        if (a.kind == CORE_COPY)
            core_copied(core, a.copy, true, 1), tails++;
    assert_int_equal(tails, 2);
    assert_int_equal(held(), 7);
    assert_null(core_check(core));
    core_worker_leave(core, alice);
    assert_int_equal(held(), 4);
    assert_int_equal(begun(1), 4);
    land();
}

/* A tail is copied from a block whose copy home waits, and whoever had that block goes: it lives as long as the copy. */
static void test_the_source_of_a_tail_goes(void **state)
{
    (void)state;
    start(64, 1, HOLD, CHUNK);
    uint64_t parent = text_of(alice, 4, 0), child = 0, table = 0;
    struct pkv_op_fork op = {.tokens = 2 * PKV_BLOCK_TOKENS + 5};
    struct core_stats s;
    enum pkv_err e;
    seal(0, parent, 0, 4);
    assert_int_equal(begun(0), 0);
    assert_false(core_seq_fork(core, 0, alice, 2, parent, &op, &e, &child, &table));
    assert_int_equal(core_seq_destroy(core, alice, parent), PKV_ERR_OK);
    assert_int_equal(held(), 2); /* what the child has of it */
    assert_null(core_check(core));
    assert_int_equal(begun(1), 2); /* the copies of the tail, and none home */
    land();
    core_quiesce(core, 2, core_epoch(core));
    core_stats(core, &s);
    assert_int_equal(s.used[PKV_TIER_ARENA], 3 * BLOCK); /* the child's alone */
    assert_null(core_check(core));
}

/* The next prefill finds few copies under way; they come in bites, not one by one. */
static void test_few_at_a_time(void **state)
{
    (void)state;
    start(64, 1, HOLD, 64 * CHUNK);
    uint64_t h = text_of(alice, FLIGHTS + 300, 0);
    seal(0, h, 0, FLIGHTS + 300);
    assert_int_equal(begun(0), 0);
    assert_int_equal(begun(PAUSE), FLIGHTS);
    assert_int_equal(core_deadline(core), UINT64_MAX); /* a copy's end wakes the loop */
    assert_int_equal(begun(PAUSE + 1), 0);
    for (uint32_t i = 0; i < FLIGHTS / 4 - 1; i++)
        core_copied(core, flying[--in_flight], true, 1);
    assert_int_equal(begun(PAUSE + 2), 0);
    core_copied(core, flying[--in_flight], true, 1);
    assert_int_equal(begun(PAUSE + 3), 300);
    land();
}

/* A link each. */
static void test_devices_are_apart(void **state)
{
    (void)state;
    start(64, 2, HOLD, CHUNK);
    uint32_t bob;
    assert_int_equal(core_worker_join(core, "", &bob), PKV_ERR_OK);
    core_worker_device(core, alice, 0), core_worker_device(core, bob, 1);
    uint64_t fast = text_of(alice, 20, 0), slow = text_of(bob, 1, 0);
    seal(0, fast, 0, 20);
    uint32_t first = alice;
    alice = bob;
    seal(0, slow, 0, 1);
    alice = first;
    assert_int_equal(begun(3 * MS), 1); /* one block is no prefill */
    assert_int_equal(held(), 20);
    assert_int_equal(begun(PAUSE), 20);
    land();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_without_a_bound_nothing_waits, stop),
        cmocka_unit_test_teardown(test_decoding_waits_for_nothing, stop),
        cmocka_unit_test_teardown(test_a_prefill_goes_first_and_its_end_is_seen, stop),
        cmocka_unit_test_teardown(test_time_is_bounded, stop),
        cmocka_unit_test_teardown(test_a_pool_that_fills_ends_it, stop),
        cmocka_unit_test_teardown(test_a_wait_for_room_ends_it, stop),
        cmocka_unit_test_teardown(test_parked_and_closed, stop),
        cmocka_unit_test_teardown(test_death_and_tails, stop),
        cmocka_unit_test_teardown(test_the_source_of_a_tail_goes, stop),
        cmocka_unit_test_teardown(test_few_at_a_time, stop),
        cmocka_unit_test_teardown(test_devices_are_apart, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
