/* Pools and arenas that are too small: rows leave the pool and are still read, what does not fit is refused within a bound, and
 * nothing is lost. */
#include "tests/integration/service.h"

#include <errno.h>

/* One block of the test's model is 64 KiB, its signatures 1 KiB; chunks are 1 MiB. */
static void start(struct test_daemon *d, const char *pool, const char *arena)
{
    test_daemon_start(d, (const char *const[]){"--pool-bytes", pool, "--arena-bytes", arena, "--threads", "1",
                                               "--grant-timeout-ms", "300", NULL});
}

static void test_more_than_the_pool(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "4M", "64M");
    for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
        struct pkv *kv = attach(&d, flags);
        struct pkv_seq *seq, *child;
        enum { TOKENS = 12000 };
        GOOD(kv, pkv_seq_create(open_model(kv), TOKENS, 0, NULL, &seq));
        float *k = test_floats(1, TOKENS * ROW), *v = test_floats(2, TOKENS * ROW), *q = test_floats(3, QUERY);
        GOOD(kv, append_all(seq, k, v, TOKENS)); /* 24 MiB of rows */
        assert_exact(kv, seq, k, v, q, TOKENS);
        struct pkv_budget b = budget(500);
        struct pkv_explain e;
        float out[QUERY];
        uint32_t one = 1;
        GOOD(kv, pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, &e));
        assert_true(e.rows_arena > 0);
        assert_int_equal(e.rows_pool + e.rows_arena, KV_HEADS * (16 + 64 + 500));
        /* A tail that lies in the arena alone can be forked and written again. */
        GOOD(kv, pkv_seq_fork(seq, 5000, 0, &child));
        assert_exact(kv, child, k, v, q, 5000);
        GOOD(kv, append_all(child, k + 5000 * ROW, v + 5000 * ROW, 100));
        assert_exact(kv, child, k, v, q, 5100);
        GOOD(kv, pkv_seq_truncate(seq, 6001));
        GOOD(kv, append_all(seq, k + 6001 * ROW, v + 6001 * ROW, 999));
        assert_exact(kv, seq, k, v, q, 7000);
        pkv_close(kv);
        free(k), free(v), free(q);
    }
    test_daemon_stop(&d);
}

static void test_full_pool(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "4M", "64M");
    struct pkv *kv = attach(&d, 0);
    struct pkv_model *model = open_model(kv);
    struct pkv_seq *seqs[64];
    float *k = test_floats(4, 400 * ROW), *v = test_floats(5, 400 * ROW), *q = test_floats(6, QUERY);
    int r = 0, n = 0;
    /* Short sequences are pinned whole: sinks and recent. */
    while (!r && n < 64) {
        GOOD(kv, pkv_seq_create(model, 400, 0, NULL, &seqs[n]));
        r = append_all(seqs[n], k, v, 250);
        n++;
    }
    assert_int_equal(r, -ENOSPC);
    assert_non_null(strstr(pkv_error(kv), "raise pool-bytes"));
    assert_true(n > 2);
    for (int i = 0; i < n - 1; i++)
        assert_exact(kv, seqs[i], k, v, q, 250);
    /* The one that failed is as it was, and goes on once there is room. */
    uint64_t had = pkv_seq_tokens(seqs[n - 1]);
    assert_true(had == 0);
    GOOD(kv, pkv_seq_close(seqs[0]));
    GOOD(kv, pkv_seq_truncate(seqs[n - 1], 0));
    GOOD(kv, append_all(seqs[n - 1], k, v, 250));
    assert_exact(kv, seqs[n - 1], k, v, q, 250);
    pkv_close(kv);
    test_daemon_stop(&d);
    free(k), free(v), free(q);
}

static void test_full_arena(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "16M", "4M");
    struct pkv *kv = attach(&d, 0);
    struct pkv_seq *seq, *other;
    struct pkv_model *model = open_model(kv);
    enum { TOKENS = 10000 };
    GOOD(kv, pkv_seq_create(model, TOKENS, 0, NULL, &seq));
    float *k = test_floats(7, TOKENS * ROW), *v = test_floats(8, TOKENS * ROW), *q = test_floats(9, QUERY);
    GOOD(kv, append_all(seq, k, v, 1000));
    /* 10000 tokens of one layer are 157 blocks; the arena holds 64. The whole call is taken back. */
    assert_int_equal(pkv_append(seq, 0, 9000, k + 1000 * ROW, v + 1000 * ROW), -ENOMEM);
    assert_non_null(strstr(pkv_error(kv), "arena is full"));
    assert_exact(kv, seq, k, v, q, 1000);
    GOOD(kv, append_all(seq, k + 1000 * ROW, v + 1000 * ROW, 500));
    assert_exact(kv, seq, k, v, q, 1500);
    GOOD(kv, pkv_seq_create(model, TOKENS, 0, NULL, &other));
    assert_int_equal(append_all(other, k, v, 3000), -ENOMEM);
    GOOD(kv, pkv_seq_close(seq));
    GOOD(kv, pkv_seq_truncate(other, 0));
    GOOD(kv, append_all(other, k, v, 1500));
    assert_exact(kv, other, k, v, q, 1500);
    pkv_close(kv);
    test_daemon_stop(&d);
    free(k), free(v), free(q);
}

/* Another tenant gets chunks only with fresh memory, and only when their holder is gone. */
static void test_tenants_share_by_turns(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "4M", "8M");
    float *k = test_floats(10, 2000 * ROW), *q = test_floats(11, QUERY);
    for (int round = 0; round < 4; round++) {
        struct pkv_options o = {.size = sizeof(o), .tenant = round % 2 ? "a" : "b", .threads = 1};
        struct pkv *kv;
        GOOD(NULL, pkv_connect(d.socket, &o, &kv));
        struct pkv_seq *seq;
        GOOD(kv, pkv_seq_create(open_model(kv), 2000, 0, NULL, &seq));
        GOOD(kv, append_all(seq, k, k, 2000));
        assert_exact(kv, seq, k, k, q, 2000);
        pkv_close(kv);
    }
    test_daemon_stop(&d);
    free(k), free(q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_more_than_the_pool),
        cmocka_unit_test(test_full_pool),
        cmocka_unit_test(test_full_arena),
        cmocka_unit_test(test_tenants_share_by_turns),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
