/* Checksums that are looked at again, by hand: what is mended, what is damaged, and who is told. */
#include "cachesvc/core/internal.h" /* whether something was news */

#include "tests/unit/core.h"

enum { GOOD = 1, BAD = 2 }; /* checksums; copies home by copy_all() have GOOD */

/* The place that is looked at next; the look stays under way. */
static uint64_t look(uint32_t *ret_copy)
{
    struct core_action a;
    uint64_t bytes = 0;
    assert_true(core_scrub(core, &bytes));
    assert_true(core_next_action(core, &a));
    assert_int_equal(a.kind, CORE_CHECK);
    assert_int_equal(pkv_place_tier(a.from), PKV_TIER_ARENA);
    assert_int_equal(a.bytes, bytes);
    assert_null(core_check(core));
    *ret_copy = a.copy;
    return a.from;
}

/* Looks until it comes to that place, and answers. */
static void find(uint64_t place, uint64_t checksum)
{
    uint32_t copy;
    for (int i = 0; i < 1000; i++) {
        bool there = look(&copy) == place;
        core_copied(core, copy, true, there ? checksum : GOOD);
        if (there)
            return;
    }
    fail_msg("the place is never looked at");
}

static struct core_action the_copy(void)
{
    struct core_action a;
    assert_true(core_next_action(core, &a));
    assert_int_equal(a.kind, CORE_COPY);
    return a;
}

/* A sequence with block 2 of layer 0 in the arena alone. */
static uint64_t dropped(struct pkv_table **ret)
{
    struct core_action a;
    enum pkv_err e;
    start(5, 20);
    uint64_t h = create(20, 0, ret);
    assert_int_equal(grant(h, 0, 10), PKV_ERR_OK);
    assert_int_equal(core_seal(core, 0, alice, h, 0, 0, 9), PKV_ERR_OK);
    assert_int_equal(copy_all(true), 9);
    assert_int_equal(grant(h, 0, 16), PKV_ERR_OK);
    assert_int_equal(core_seal(core, 0, alice, h, 0, 9, 7), PKV_ERR_OK);
    assert_int_equal(copy_all(true), 7);
    assert_false(core_grant(core, 0, alice, 7, h, 0, 17 * PKV_BLOCK_TOKENS, &e));
    core_quiesce(core, 2, core_epoch(core));
    assert_true(core_next_action(core, &a) && a.err == PKV_ERR_OK);
    assert_int_equal(pkv_place_tier(pkv_table_layer(*ret, 0, 20)[2].rows), PKV_TIER_ARENA);
    return h;
}

static uint64_t rows_of(struct pkv_table *t, uint32_t block)
{
    return pkv_table_layer(t, 0, 20)[block].rows;
}

static bool damaged(uint64_t h)
{
    struct core_view view;
    assert_int_equal(core_seq_view(core, alice, h, 0, &view), PKV_ERR_OK);
    return view.damaged;
}

static void test_all_are_looked_at(void **state)
{
    (void)state;
    start(20, 20);
    struct pkv_table *t;
    uint64_t bytes, places[3 * LAYERS];
    assert_false(core_scrub(core, &bytes)); /* nothing is at home */
    text(3, &t);
    for (uint32_t i = 0, copy; i < 3 * LAYERS; i++) {
        places[i] = look(&copy);
        for (uint32_t before = 0; before < i; before++)
            assert_true(places[before] != places[i]);
        core_copied(core, copy, i % 2, GOOD); /* some could not be looked at */
    }
    assert_int_equal(core_health(core)->blocks_checked, 3);
    assert_int_equal(core_health(core)->checksum_failures, 0);
    uint32_t copies[3 * LAYERS];
    for (uint32_t i = 0; i < 3 * LAYERS; i++)
        look(&copies[i]);
    assert_false(core_scrub(core, &bytes)); /* all are being looked at */
    for (uint32_t i = 0; i < 3 * LAYERS; i++)
        core_copied(core, copies[i], true, GOOD);
    assert_true(core_scrub(core, &bytes));
    assert_int_equal(t->err, PKV_ERR_OK);
}

static void test_mended_from_the_pool(void **state)
{
    (void)state;
    start(20, 20);
    struct pkv_table *t;
    uint32_t copy;
    uint64_t h = text(3, &t), place = look(&copy);
    core_copied(core, copy, true, BAD);
    struct core_action a = the_copy();
    assert_int_equal(a.to, place);
    assert_null(core_check(core));
    core_copied(core, a.copy, true, GOOD);
    const struct core_health *health = core_health(core);
    assert_int_equal(health->checksum_failures, 1);
    assert_int_equal(health->blocks_mended, 1);
    assert_int_equal(health->blocks_damaged, 0);
    assert_false(damaged(h) || t->err);
    assert_null(core_check(core));
}

/* What is written there is not there afterwards: the block stays in the pool for good, right. */
static void test_memory_that_does_not_hold(void **state)
{
    (void)state;
    start(20, 20);
    struct pkv_table *t;
    uint32_t copy;
    uint64_t h = text(3, &t), place = look(&copy), bytes;
    core_copied(core, copy, true, BAD);
    for (int i = 0; i < 2; i++) {
        struct core_action a = the_copy();
        assert_int_equal(a.to, place);
        core_copied(core, a.copy, true, BAD);
    }
    struct core_action none;
    struct core_stats stats;
    core_stats(core, &stats);
    assert_false(core_next_action(core, &none));
    assert_int_equal(core_health(core)->blocks_mended, 0);
    assert_int_equal(stats.sealed, 1);
    assert_false(damaged(h));
    for (int i = 0; i < 20 && core_scrub(core, &bytes); i++) { /* it is not at home */
        assert_true(core_next_action(core, &none) && none.from != place);
        core_copied(core, none.copy, true, GOOD);
    }
    assert_null(core_check(core));
}

static void test_damaged_without_the_pool(void **state)
{
    (void)state;
    struct pkv_table *t;
    uint64_t h = dropped(&t), child = 0, at = 0, other;
    enum pkv_err e = PKV_ERR_OK;
    struct pkv_op_fork op = {.tokens = 0};
    struct pkv_table *ignored;
    other = create(20, 0, &ignored);
    find(rows_of(t, 2), BAD);
    assert_int_equal(t->err, PKV_ERR_CHECKSUM);
    assert_true(damaged(h) && !damaged(other));
    assert_int_equal(core_health(core)->blocks_damaged, 1);
    struct core_seq_info info;
    assert_true(core_seq_info(core, pkv_handle_index(h), &info) && info.damaged == 1);
    for (int i = 0; i < 40; i++) { /* it is known: not looked at again */
        uint32_t copy;
        assert_true(look(&copy) != rows_of(t, 2));
        core_copied(core, copy, true, GOOD);
    }
    op.tokens = PKV_BLOCK_TOKENS; /* layer 1 has none */
    assert_true(core_seq_fork(core, 0, alice, 1, h, &op, &e, &child, &at));
    assert_int_equal(e, PKV_ERR_LENGTH);
    assert_true(core_seq_truncate(core, 0, alice, 1, h, 0, 2 * PKV_BLOCK_TOKENS, &e));
    assert_int_equal(e, PKV_ERR_OK); /* without it all is well */
    assert_true(!t->err && !damaged(h));
    assert_null(core_check(core));
}

static void test_shared_damage(void **state)
{
    (void)state;
    start(12, 60);
    struct pkv_table *t, *c;
    struct core_action a;
    uint64_t h = text(12, &t), child = 0, at = 0, parent;
    enum pkv_err e = PKV_ERR_OK;
    struct pkv_op_fork op = {.tokens = 12 * PKV_BLOCK_TOKENS};
    assert_true(core_seq_fork(core, 0, alice, 1, h, &op, &e, &child, &at));
    c = (struct pkv_table *)(uintptr_t)at;
    parent = create(20, 0, &(struct pkv_table *){NULL});
    for (uint32_t blocks = 1; pkv_place_tier(rows_of(t, 3)) == PKV_TIER_POOL; blocks++) { /* until it has to leave */
        assert_true(blocks < 20);
        if (!core_grant(core, 0, alice, 7, parent, PKV_LAYER_ALL, (uint64_t)blocks * PKV_BLOCK_TOKENS, &e))
            core_quiesce(core, 2, core_epoch(core));
        carry_out(true, &a);
    }
    find(rows_of(t, 3), BAD);
    assert_true(damaged(h) && damaged(child) && t->err && c->err);
    op.tokens = 4 * PKV_BLOCK_TOKENS;
    assert_true(core_seq_fork(core, 0, alice, 1, h, &op, &e, &at, &at));
    assert_int_equal(e, PKV_ERR_CHECKSUM);
    op.tokens = 3 * PKV_BLOCK_TOKENS; /* before it all is well */
    uint64_t well = 0;
    assert_true(core_seq_fork(core, 0, alice, 1, h, &op, &e, &well, &at));
    assert_int_equal(e, PKV_ERR_OK);
    assert_false(damaged(well));
    assert_int_equal(core_seq_destroy(core, alice, h), PKV_ERR_OK);
    assert_true(damaged(child));
    assert_null(core_check(core));
}

/* A tail that must come back from home is looked at on its way. */
static void test_tail_from_home(void **state)
{
    (void)state;
    struct pkv_table *t;
    struct core_action a;
    uint64_t h = dropped(&t);
    enum pkv_err e = PKV_ERR_OK;
    assert_false(core_seq_truncate(core, 0, alice, 5, h, 0, 2 * PKV_BLOCK_TOKENS + 7, &e));
    core_quiesce(core, 3, core_epoch(core));
    uint32_t copies = 0;
    bool answered = false;
    while (core_next_action(core, &a)) {
        if (a.kind == CORE_COPY) {
            copies++;
            core_copied(core, a.copy, true, pkv_place_tier(a.from) == PKV_TIER_ARENA ? BAD : GOOD);
        } else if (a.kind == CORE_COMPLETE) {
            answered = a.tag == 5 && a.err == PKV_ERR_CHECKSUM;
        }
    }
    assert_int_equal(copies, 2);
    assert_true(answered && damaged(h) && t->err);
    assert_int_equal(core_health(core)->checksum_failures, 1);
    assert_null(core_check(core));
    /* Now that it is known, the tail is not even copied. */
    assert_false(core_seq_truncate(core, 0, alice, 6, h, 0, 2 * PKV_BLOCK_TOKENS + 7, &e));
    assert_true(core_next_action(core, &a));
    assert_true(a.kind == CORE_COMPLETE && a.err == PKV_ERR_CHECKSUM);
    assert_true(core_seq_truncate(core, 0, alice, 6, h, 0, 2 * PKV_BLOCK_TOKENS, &e));
    assert_true(e == PKV_ERR_OK && !damaged(h) && !t->err);
    assert_null(core_check(core));
}

/* A block that goes while it is looked at keeps its place until the look is over, and nobody is told. */
static void test_freed_while_looked_at(void **state)
{
    (void)state;
    start(20, 20);
    struct pkv_table *t;
    struct core_action a;
    uint32_t copy;
    uint64_t h = text(3, &t);
    struct core_stats before, after;
    look(&copy);
    assert_int_equal(core_seq_destroy(core, alice, h), PKV_ERR_OK);
    assert_null(core_check(core));
    core_quiesce(core, 1, core_epoch(core));
    core_stats(core, &before);
    assert_true(before.used[PKV_TIER_ARENA] > 0);
    core_copied(core, copy, true, BAD);
    core_quiesce(core, 2, core_epoch(core));
    core_stats(core, &after);
    assert_int_equal(after.used[PKV_TIER_ARENA] + after.retired[PKV_TIER_ARENA], 0);
    assert_int_equal(core_health(core)->checksum_failures, 1);
    assert_int_equal(core_health(core)->blocks_damaged, 0);
    assert_false(core_next_action(core, &a));
    assert_null(core_check(core));
}

/* However many blocks are not at home: a look costs no walk over them, for the loop asks in every turn. */
static void test_few_at_home_among_many(void **state)
{
    (void)state;
    start(1400, 1400);
    struct pkv_table *t, *many;
    uint32_t copy;
    assert_int_equal(grant(create(5000, 0, &many), 0, 5000), PKV_ERR_OK);
    uint64_t h = text(1, &t), bytes;
    for (uint32_t i = 0; i < 5; i++) {
        uint64_t place = look(&copy);
        core_copied(core, copy, true, GOOD);
        assert_true(look(&copy) != place); /* one a layer, in turn */
        core_copied(core, copy, true, GOOD);
    }
    assert_int_equal(core_seq_destroy(core, alice, h), PKV_ERR_OK);
    assert_false(core_scrub(core, &bytes));
}

/* A full pool of which nothing can leave: sinks and recent blocks alone. A look's end is no news to who waits, for he would
 * walk over all blocks, and there are hundreds of looks a second. */
static void test_a_look_is_no_news(void **state)
{
    (void)state;
    start(5, 20); /* 16 slots of rows */
    struct pkv_table *t;
    enum pkv_err e;
    uint32_t copy;
    for (int i = 0; i < 3; i++) {
        uint64_t h = create(20, 0, &t);
        assert_int_equal(grant(h, 0, 5), PKV_ERR_OK);
        assert_int_equal(core_seal(core, 0, alice, h, 0, 0, 5), PKV_ERR_OK);
    }
    assert_int_equal(copy_all(true), 15);
    assert_false(core_grant(core, 0, alice, 7, create(20, 0, &t), 0, 2 * PKV_BLOCK_TOKENS, &e));
    core_quiesce(core, 1, core_epoch(core));
    assert_int_equal(core->news, core->news_tried);
    for (int i = 0; i < 15; i++) {
        look(&copy);
        core_copied(core, copy, true, GOOD);
        assert_int_equal(core->news, core->news_tried);
    }
}

/* A block that could leave stays while it is looked at; who waits for its place gets it afterwards. */
static void test_who_waits_for_a_look(void **state)
{
    (void)state;
    start(5, 20); /* 16 slots of rows */
    struct pkv_table *t, *other;
    struct core_action a;
    enum pkv_err e;
    uint32_t copies[6];
    uint64_t h = create(20, 0, &t);
    assert_int_equal(grant(h, 0, 6), PKV_ERR_OK);
    assert_int_equal(core_seal(core, 0, alice, h, 0, 0, 6), PKV_ERR_OK);
    assert_int_equal(copy_all(true), 6);
    assert_int_equal(grant(create(20, 0, &other), 0, 10), PKV_ERR_OK);
    for (uint32_t i = 0; i < 6; i++)
        look(&copies[i]);
    assert_false(core_grant(core, 0, alice, 7, create(20, 0, &other), 0, PKV_BLOCK_TOKENS, &e));
    core_quiesce(core, 1, core_epoch(core));
    assert_int_equal(pkv_place_tier(rows_of(t, 2)), PKV_TIER_POOL);
    for (uint32_t i = 0; i < 6; i++)
        core_copied(core, copies[i], true, GOOD);
    core_quiesce(core, 2, core_epoch(core));
    assert_int_equal(pkv_place_tier(rows_of(t, 2)), PKV_TIER_ARENA);
    core_quiesce(core, 3, core_epoch(core));
    assert_true(core_next_action(core, &a));
    assert_true(a.kind == CORE_COMPLETE && a.tag == 7 && a.err == PKV_ERR_OK);
    assert_null(core_check(core));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_all_are_looked_at, stop),
        cmocka_unit_test_teardown(test_mended_from_the_pool, stop),
        cmocka_unit_test_teardown(test_memory_that_does_not_hold, stop),
        cmocka_unit_test_teardown(test_damaged_without_the_pool, stop),
        cmocka_unit_test_teardown(test_shared_damage, stop),
        cmocka_unit_test_teardown(test_tail_from_home, stop),
        cmocka_unit_test_teardown(test_freed_while_looked_at, stop),
        cmocka_unit_test_teardown(test_few_at_home_among_many, stop),
        cmocka_unit_test_teardown(test_a_look_is_no_news, stop),
        cmocka_unit_test_teardown(test_who_waits_for_a_look, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
