/* The main path against a private daemon: append, select, attend, direct and served, fork, truncate, two workers. */
#include "tests/integration/service.h"

#include <errno.h>

static struct test_daemon daemon_;

static int start(void **state)
{
    (void)state;
    test_daemon_start(&daemon_, (const char *const[]){"--pool-bytes", "16M", "--arena-bytes", "64M", "--threads", "1", NULL});
    return 0;
}

static int stop(void **state)
{
    (void)state;
    test_daemon_stop(&daemon_);
    return 0;
}

static void test_append_and_attend(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_seq *seq;
    GOOD(kv, pkv_seq_create(open_model(kv), 2000, 0, "a label", &seq));
    float *k = test_floats(1, 1000 * ROW), *v = test_floats(2, 1000 * ROW), *q = test_floats(3, QUERY);
    uint32_t pieces[] = {1, 63, 64, 1, 500, 371}, done = 0;
    for (size_t i = 0; i < sizeof(pieces) / sizeof(pieces[0]); done += pieces[i++]) {
        GOOD(kv, append_all(seq, k + done * ROW, v + done * ROW, pieces[i]));
        assert_exact(kv, seq, k, v, q, done + pieces[i]);
    }
    pkv_close(kv);
    free(k), free(v), free(q);
}

/* Selection is a list of ascending tokens with sinks and recent, rows are what was appended, and a full budget is exact. */
static void test_select(void **state)
{
    (void)state;
    enum { TOKENS = 700, K = 100, MAX = 16 + 64 + K, N = 3 };
    for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
        struct pkv *kv = attach(&daemon_, flags);
        struct pkv_seq *seq;
        GOOD(kv, pkv_seq_create(open_model(kv), 1000, 0, NULL, &seq));
        float *k = test_floats(1, TOKENS * ROW), *v = test_floats(2, TOKENS * ROW), *q = test_floats(3, N * QUERY);
        GOOD(kv, append_all(seq, k, v, TOKENS));
        static uint32_t index[N * KV_HEADS * MAX], count[N * KV_HEADS];
        static uint16_t score[N * KV_HEADS * MAX];
        static float rows[N * KV_HEADS * MAX * 2 * DIM];
        struct pkv_budget b = budget(K);
        GOOD(kv, pkv_select(seq, N, 1, q, &b, index, count, score, rows));
        for (uint32_t list = 0; list < N * KV_HEADS; list++) {
            uint32_t head = list % KV_HEADS, sees = TOKENS - N + 1 + list / KV_HEADS;
            assert_int_equal(count[list], MAX);
            for (uint32_t i = 0; i < MAX; i++) {
                uint32_t token = index[list * MAX + i];
                assert_true(token < sees && (!i || token > index[list * MAX + i - 1]));
                assert_true(i >= 16 || token == i);
                assert_true(i + 64 < MAX || token == sees - MAX + i);
                assert_memory_equal(&rows[(list * MAX + i) * 2 * DIM], &k[token * ROW + head * DIM], DIM * sizeof(float));
                assert_memory_equal(&rows[(list * MAX + i) * 2 * DIM + DIM], &v[token * ROW + head * DIM], DIM * sizeof(float));
                assert_true((score[list * MAX + i] == 0) == (i < 16 || i + 64 >= MAX));
            }
        }
        pkv_close(kv);
        free(k), free(v), free(q);
    }
}

static void test_direct_and_served_agree(void **state)
{
    (void)state;
    enum { TOKENS = 900, N = 5 };
    float *k = test_floats(5, TOKENS * ROW), *v = test_floats(6, TOKENS * ROW), *q = test_floats(7, 2 * N * QUERY);
    static float out[2][2 * N * QUERY], lse[2][2 * N * Q_HEADS];
    struct pkv_budget budgets[] = {budget(0), budget(64), budget(300), budget(64), budget(900)};
    budgets[3].top_p = 0.5f;
    for (size_t b = 0; b < sizeof(budgets) / sizeof(budgets[0]); b++) {
        for (uint32_t rule = 0; rule < 3; rule++) {
            struct pkv_explain explain[2];
            budgets[b].rule = budgets[b].top_p > 0 ? PKV_SOFTMAX_SUM : rule;
            for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
                struct pkv *kv = attach(&daemon_, flags);
                struct pkv_model *model = open_model(kv);
                struct pkv_seq *seqs[2];
                uint32_t queries[2] = {N, N};
                GOOD(kv, pkv_seq_create(model, 1000, 0, NULL, &seqs[0]));
                GOOD(kv, pkv_seq_create(model, 1000, 0, NULL, &seqs[1]));
                GOOD(kv, append_all(seqs[0], k, v, TOKENS));
                GOOD(kv, append_all(seqs[1], k + 100 * ROW, v + 100 * ROW, 333));
                budgets[b].dense_below = 400;
                GOOD(kv, pkv_attend(seqs, queries, 2, 1, q, &budgets[b], out[flags], lse[flags], &explain[flags]));
                pkv_close(kv);
            }
            assert_alike(out[0], out[1], sizeof(out[0]) / sizeof(float));
            assert_alike(lse[0], lse[1], sizeof(lse[0]) / sizeof(float));
            assert_true(on_gpu() || explain[0].tokens_attended == explain[1].tokens_attended);
            assert_int_equal(explain[0].queries_sparse, explain[1].queries_sparse);
        }
    }
    free(k), free(v), free(q);
}

static void test_fork_and_truncate(void **state)
{
    (void)state;
    for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
        struct pkv *kv = attach(&daemon_, flags);
        struct pkv_seq *seq, *child, *aligned;
        GOOD(kv, pkv_seq_create(open_model(kv), 1000, 0, NULL, &seq));
        float *k = test_floats(8, 800 * ROW), *v = test_floats(9, 800 * ROW), *q = test_floats(10, QUERY);
        GOOD(kv, append_all(seq, k, v, 500));
        GOOD(kv, pkv_seq_fork(seq, 300, 0, &child));
        GOOD(kv, pkv_seq_fork(seq, 256, 512, &aligned));
        assert_exact(kv, child, k, v, q, 300);
        /* Both write on; neither sees the other. */
        float *k2 = malloc(800 * ROW * sizeof(*k2)), *v2 = malloc(800 * ROW * sizeof(*v2));
        memcpy(k2, k, 300 * ROW * sizeof(*k2)), memcpy(v2, v, 300 * ROW * sizeof(*v2));
        memcpy(k2 + 300 * ROW, k + 600 * ROW, 200 * ROW * sizeof(*k2));
        memcpy(v2 + 300 * ROW, v + 600 * ROW, 200 * ROW * sizeof(*v2));
        GOOD(kv, append_all(child, k2 + 300 * ROW, v2 + 300 * ROW, 200));
        GOOD(kv, append_all(seq, k + 500 * ROW, v + 500 * ROW, 100));
        assert_exact(kv, child, k2, v2, q, 500);
        assert_exact(kv, seq, k, v, q, 600);
        assert_exact(kv, aligned, k, v, q, 256);
        assert_int_equal(append_all(aligned, k, v, 257), -EOVERFLOW);
        /* Back into a sealed block, and on again. */
        GOOD(kv, pkv_seq_truncate(seq, 100));
        assert_exact(kv, seq, k, v, q, 100);
        GOOD(kv, append_all(seq, k + 100 * ROW, v + 100 * ROW, 400));
        assert_exact(kv, seq, k, v, q, 500);
        GOOD(kv, pkv_seq_truncate(seq, 0));
        assert_int_equal(pkv_seq_tokens(seq), 0);
        GOOD(kv, pkv_seq_close(seq));
        assert_exact(kv, child, k2, v2, q, 500);
        assert_int_equal(pkv_seq_truncate(child, 501), -EOVERFLOW);
        assert_int_equal(pkv_seq_fork(child, 501, 0, &seq), -EOVERFLOW);
        pkv_close(kv);
        free(k), free(v), free(q), free(k2), free(v2);
    }
}

static void test_two_workers(void **state)
{
    (void)state;
    struct pkv *writer = attach(&daemon_, 0), *reader = attach(&daemon_, 0), *served = attach(&daemon_, PKV_CONNECT_SERVED);
    struct pkv_options other = {.size = sizeof(other), .tenant = "another", .threads = 1};
    struct pkv *stranger;
    GOOD(NULL, pkv_connect(daemon_.socket, &other, &stranger));
    struct pkv_seq *seq, *seen, *seen_served, *none;
    GOOD(writer, pkv_seq_create(open_model(writer), 1000, 0, NULL, &seq));
    float *k = test_floats(11, 500 * ROW), *v = test_floats(12, 500 * ROW), *q = test_floats(13, QUERY);
    GOOD(writer, append_all(seq, k, v, 400));
    uint64_t handle = pkv_seq_handle(seq);
    GOOD(reader, pkv_seq_open(open_model(reader), handle, &seen));
    GOOD(served, pkv_seq_open(open_model(served), handle, &seen_served));
    /* A reader sees what every layer has sealed: 6 blocks. */
    assert_exact(reader, seen, k, v, q, 384);
    assert_exact(served, seen_served, k, v, q, 384);
    GOOD(writer, append_all(seq, k + 400 * ROW, v + 400 * ROW, 50));
    GOOD(writer, pkv_ping(writer, NULL)); /* what was posted before it is done */
    assert_exact(reader, seen, k, v, q, 448);
    assert_int_equal(append_all(seen, k, v, 1), -EACCES);
    assert_int_equal(pkv_seq_truncate(seen, 0), -EACCES);
    assert_int_equal(pkv_seq_open(open_model(stranger), handle, &none), -ENOENT);
    /* The sequence goes when its last holder closes it, and readers of a destroyed one are told. */
    GOOD(writer, pkv_seq_destroy(seq));
    float out[QUERY];
    uint32_t one = 1;
    struct pkv_budget dense = budget(0);
    assert_int_equal(pkv_attend(&seen, &one, 1, 0, q, &dense, out, NULL, NULL), -ESTALE);
    assert_int_equal(pkv_attend(&seen_served, &one, 1, 0, q, &dense, out, NULL, NULL), -ESTALE);
    assert_int_equal(pkv_seq_open(open_model(stranger), handle, &none), -ESTALE);
    pkv_close(writer), pkv_close(reader), pkv_close(served), pkv_close(stranger);
    free(k), free(v), free(q);
}

/* A persistent sequence that one worker fills and leaves, in the hands of the next. */
static struct pkv *left_behind(const float *k, const float *v, uint32_t tokens, struct pkv_seq **ret)
{
    struct pkv *first = attach(&daemon_, 0);
    GOOD(first, pkv_seq_create(open_model(first), 1000, PKV_PERSISTENT, "kept", ret));
    GOOD(first, append_all(*ret, k, v, tokens));
    uint64_t handle = pkv_seq_handle(*ret);
    pkv_close(first);
    struct pkv *second = attach(&daemon_, 0);
    GOOD(second, pkv_seq_open(open_model(second), handle, ret));
    return second;
}

static void test_persistent(void **state)
{
    (void)state;
    float *k = test_floats(14, 500 * ROW), *v = test_floats(15, 500 * ROW), *q = test_floats(16, QUERY);
    struct pkv_seq *seq;
    struct pkv *second = left_behind(k, v, 200, &seq);
    assert_exact(second, seq, k, v, q, 192); /* sealed blocks stay */
    GOOD(second, append_all(seq, k + 192 * ROW, v + 192 * ROW, 300));
    assert_exact(second, seq, k, v, q, 492);
    GOOD(second, pkv_seq_destroy(seq));
    pkv_close(second);
    free(k), free(v), free(q);
}

/* Seals are posted, not waited for: a goodbye right after them must not overtake them. */
static void test_goodbye_after_seals(void **state)
{
    (void)state;
    float *k = test_floats(14, 500 * ROW), *v = test_floats(15, 500 * ROW);
    for (int round = 0; round < 40; round++) {
        struct pkv_seq *seq;
        struct pkv *second = left_behind(k, v, 448, &seq);
        assert_int_equal(pkv_seq_tokens(seq), 448);
        GOOD(second, pkv_seq_destroy(seq));
        pkv_close(second);
    }
    free(k), free(v);
}

static void test_batch(void **state)
{
    (void)state;
    enum { SEQS = 7 };
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model *model = open_model(kv);
    struct pkv_seq *seqs[SEQS];
    float *k = test_floats(17, 300 * ROW), *v = test_floats(18, 300 * ROW), *q = test_floats(19, SEQS * QUERY);
    uint32_t ones[SEQS], done;
    for (uint32_t i = 0; i < SEQS; i++) {
        GOOD(kv, pkv_seq_create(model, 400, 0, NULL, &seqs[i]));
        GOOD(kv, append_all(seqs[i], k, v, 20 * i + 1));
        ones[i] = 1;
    }
    for (uint32_t l = 0; l < LAYERS; l++)
        GOOD(kv, pkv_append_batch(seqs, SEQS, l, k + 250 * ROW, v + 250 * ROW, &done));
    assert_int_equal(done, SEQS);
    static float out[SEQS * QUERY];
    struct pkv_budget dense = budget(0);
    GOOD(kv, pkv_attend(seqs, ones, SEQS, 0, q, &dense, out, NULL, NULL));
    for (uint32_t i = 0; i < SEQS; i++) {
        uint32_t tokens = 20 * i + 2;
        double exact[QUERY];
        float *ki = malloc(tokens * ROW * sizeof(*ki)), *vi = malloc(tokens * ROW * sizeof(*vi));
        memcpy(ki, k, (tokens - 1) * ROW * sizeof(*ki)), memcpy(vi, v, (tokens - 1) * ROW * sizeof(*vi));
        memcpy(ki + (tokens - 1) * ROW, k + (250 + i) * ROW, ROW * sizeof(*ki));
        memcpy(vi + (tokens - 1) * ROW, v + (250 + i) * ROW, ROW * sizeof(*vi));
        test_attention(ki, vi, q + i * QUERY, tokens, Q_HEADS, KV_HEADS, DIM, exact);
        for (int n = 0; n < QUERY; n++)
            assert_true(out[i * QUERY + n] - exact[n] < 2e-5 && exact[n] - out[i * QUERY + n] < 2e-5);
        free(ki), free(vi);
    }
    pkv_close(kv);
    free(k), free(v), free(q);
}

static void test_nothing_leaks(void **state)
{
    (void)state;
    float *k = test_floats(20, 200 * ROW);
    int before = 0, mine = 0;
    for (int round = 0; round < 12; round++) {
        struct pkv *kv = attach(&daemon_, round % 2);
        struct pkv_seq *seq;
        GOOD(kv, pkv_seq_create(open_model(kv), 400, 0, NULL, &seq));
        GOOD(kv, append_all(seq, k, k, 200));
        pkv_close(kv);
        kv = attach(&daemon_, 0); /* by now the daemon has dealt with the goodbye */
        GOOD(kv, pkv_ping(kv, NULL));
        if (round == 4)
            before = test_fds(daemon_.pid), mine = test_fds(getpid());
        if (round > 4) {
            assert_int_equal(test_fds(daemon_.pid), before);
            assert_int_equal(test_fds(getpid()), mine);
        }
        pkv_close(kv);
    }
    free(k);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_append_and_attend),
        cmocka_unit_test(test_select),
        cmocka_unit_test(test_direct_and_served_agree),
        cmocka_unit_test(test_fork_and_truncate),
        cmocka_unit_test(test_two_workers),
        cmocka_unit_test(test_persistent),
        cmocka_unit_test(test_goodbye_after_seals),
        cmocka_unit_test(test_batch),
        cmocka_unit_test(test_nothing_leaks),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
