/* Copies home that give way to a prefill, in a whole daemon: they go when it pauses, when the pool fills, when a sequence is
 * left to others; a daemon ends with some that wait. The GPU is the fake one (tests/fake). */
#include "tests/integration/service.h"
#include "tests/integration/stat.h"
#include "tests/lib/faults.h"

enum { TOKENS = 6000, PART = 640 }; /* three times the pool; ten blocks a layer */

static float *k, *v, *q;

/* Every block is a fast prefill, and may wait for ten minutes. */
static void start(struct test_daemon *d, const char *pool)
{
    test_daemon_start(d, (const char *const[]){"--pool-bytes", pool, "--arena-bytes", "64M", "--threads", "2", "--home-hold-ms",
                                               "600000", "--home-hold-rate", "1", NULL});
}

static struct pkv_seq *create(struct pkv *kv, uint32_t flags)
{
    struct pkv_seq *seq = NULL;
    GOOD(kv, pkv_seq_create(open_model(kv), TOKENS, flags, NULL, &seq));
    return seq;
}

static void await_home(const struct test_daemon *d, uint64_t blocks)
{
    for (int i = 0; i < 500 && stat_number(d, "blocks", "home") < blocks; i++)
        usleep(10000);
    assert_int_equal(stat_number(d, "blocks", "home"), blocks);
    assert_int_equal(stat_number(d, "blocks", "held") + stat_number(d, "blocks", "sealed"), 0);
}

static void test_a_pause_ends_it(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "32M");
    struct pkv *kv = attach(&d, 0);
    struct pkv_seq *seq = create(kv, 0);
    GOOD(kv, append_all(seq, k, v, PART));
    await_home(&d, PART / 64 * LAYERS);
    assert_true(stat_number(&d, "counters", "copies_held") > 0);
    assert_exact(kv, seq, k, v, q, PART);
    pkv_close(kv);
    test_daemon_stop(&d);
}

static void test_a_pool_that_fills_ends_it(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "4M");
    struct pkv *kv = attach(&d, 0);
    struct pkv_seq *seq = create(kv, 0);
    GOOD(kv, append_all(seq, k, v, TOKENS));
    assert_true(stat_number(&d, "counters", "blocks_dropped") > 0);
    assert_exact(kv, seq, k, v, q, TOKENS);
    pkv_close(kv);
    test_daemon_stop(&d);
}

static void test_what_is_left_to_others_is_whole(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "32M");
    struct pkv *kv = attach(&d, 0);
    struct pkv_seq *seq = create(kv, PKV_PERSISTENT), *gone = create(kv, 0);
    GOOD(kv, append_all(seq, k, v, PART));
    GOOD(kv, append_all(gone, k, v, PART));
    uint64_t handle = pkv_seq_handle(seq);
    pkv_close(kv); /* both at once: one stays, one goes, and has never been at home */
    await_home(&d, PART / 64 * LAYERS);
    kv = attach(&d, 0);
    GOOD(kv, pkv_seq_open(open_model(kv), handle, &seq));
    assert_exact(kv, seq, k, v, q, PART);
    GOOD(kv, append_all(seq, k, v, PART));
    test_daemon_stop(&d); /* while copies wait */
    pkv_close(kv);
}

int main(void)
{
    (void)test_faults();
    setenv("PIVOTKV_TEST_BACKEND", "cuda", 1);
    k = test_floats(1, TOKENS * ROW), v = test_floats(2, TOKENS * ROW), q = test_floats(3, QUERY);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_pause_ends_it),
        cmocka_unit_test(test_a_pool_that_fills_ends_it),
        cmocka_unit_test(test_what_is_left_to_others_is_whole),
    };
    int r = cmocka_run_group_tests(tests, NULL, NULL);
    free(k), free(v), free(q);
    return r;
}
