/* Models without signatures: attention over sinks and the last recent + k tokens, exactly, however the sequence came about, and
 * no byte of the pool but rows. */
#include "tests/integration/stat.h"

#include <errno.h>

enum { SINKS = 16, RECENT = 64, K = 100, TOKENS = 700, MAX = SINKS + RECENT + K, BLOCK = 64 * KV_HEADS * 2 * DIM * 4 };

static struct test_daemon daemon_;
static float *k, *v, *q;

static void start_with(const char *pool)
{
    test_daemon_start(&daemon_, (const char *const[]){"--pool-bytes", pool, "--arena-bytes", "64M", "--threads", "1",
                                                      "--grant-timeout-ms", "300", NULL});
}

static int start(void **state)
{
    (void)state;
    k = test_floats(21, 12000 * ROW), v = test_floats(22, 12000 * ROW), q = test_floats(23, TOKENS * QUERY);
    start_with("16M");
    return 0;
}

static int stop(void **state)
{
    (void)state;
    test_daemon_stop(&daemon_);
    free(k), free(v), free(q);
    return 0;
}

static struct pkv_model *open_none(struct pkv *kv)
{
    struct pkv_model_desc desc = described("none");
    struct pkv_model *model = NULL;
    desc.signature = PKV_NONE;
    GOOD(kv, pkv_model_open(kv, &desc, &model));
    return model;
}

static struct pkv_seq *create_in(struct pkv *kv, struct pkv_model *model, uint32_t max_tokens, uint32_t flags, uint32_t tokens)
{
    struct pkv_seq *seq = NULL;
    GOOD(kv, pkv_seq_create(model, max_tokens, flags, NULL, &seq));
    GOOD(kv, append_all(seq, k, v, tokens));
    return seq;
}

static struct pkv_seq *create(struct pkv *kv, uint32_t max_tokens, uint32_t flags, uint32_t tokens)
{
    return create_in(kv, open_none(kv), max_tokens, flags, tokens);
}

/* Exact attention of a query that sees `tokens` of k_, v_, over the rows that it should take. */
static void expected(const float *k_, const float *v_, const float *q_, uint32_t tokens, double *ret)
{
    static float rows[2][MAX * ROW];
    uint32_t last = tokens - (RECENT + K);
    assert_true(last >= SINKS);
    memcpy(rows[0], k_, SINKS * ROW * sizeof(float));
    memcpy(rows[1], v_, SINKS * ROW * sizeof(float));
    memcpy(rows[0] + SINKS * ROW, k_ + (uint64_t)last * ROW, (RECENT + K) * ROW * sizeof(float));
    memcpy(rows[1] + SINKS * ROW, v_ + (uint64_t)last * ROW, (RECENT + K) * ROW * sizeof(float));
    test_attention(rows[0], rows[1], q_, MAX, Q_HEADS, KV_HEADS, DIM, ret);
}

static void assert_by_age(struct pkv *kv, struct pkv_seq *seq, const float *k_, const float *v_, uint32_t tokens)
{
    enum { N = 3 };
    static float out[N * QUERY];
    struct pkv_budget b = budget(K);
    struct pkv_explain e;
    uint32_t queries = N;
    assert_int_equal(pkv_seq_tokens(seq), tokens);
    for (uint32_t l = 0; l < LAYERS; l++) {
        GOOD(kv, pkv_attend(&seq, &queries, 1, l, q, &b, out, NULL, &e));
        assert_int_equal(e.queries_sparse, N);
        assert_int_equal(e.tokens_attended, (uint64_t)N * KV_HEADS * MAX);
        for (uint32_t i = 0; i < N; i++) {
            double exact[QUERY];
            expected(k_, v_, q + i * QUERY, tokens - N + 1 + i, exact);
            for (int n = 0; n < QUERY; n++)
                assert_true(fabs(out[i * QUERY + n] - exact[n]) < 2e-5);
        }
    }
}

static void test_attends_by_age(void **state)
{
    (void)state;
    static float out[2][QUERY], again[QUERY], whole[QUERY];
    static uint32_t index[KV_HEADS * MAX], count[KV_HEADS];
    static uint16_t score[KV_HEADS * MAX];
    static float rows[KV_HEADS * MAX * 2 * DIM];
    uint32_t one = 1;
    for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
        struct pkv *kv = attach(&daemon_, flags);
        struct pkv_seq *seq = create(kv, 1000, 0, TOKENS);
        struct pkv_budget b = budget(K), other = b, dense = budget(0);
        other.top_p = 0.5f;
        assert_by_age(kv, seq, k, v, TOKENS);
        assert_exact(kv, seq, k, v, q, TOKENS);
        GOOD(kv, pkv_attend(&seq, &one, 1, 1, q, &b, out[flags], NULL, NULL));
        GOOD(kv, pkv_attend(&seq, &one, 1, 1, q, &other, again, NULL, NULL));
        assert_memory_equal(out[flags], again, sizeof(again)); /* a mass is not estimated */
        GOOD(kv, pkv_select(seq, 1, 1, q, &b, index, count, score, rows));
        for (uint32_t h = 0; h < KV_HEADS; h++) {
            assert_int_equal(count[h], MAX);
            for (uint32_t i = 0; i < MAX; i++) {
                uint32_t token = i < SINKS ? i : TOKENS - MAX + i;
                assert_int_equal(index[h * MAX + i], token);
                assert_int_equal(score[h * MAX + i], 0);
                assert_memory_equal(&rows[(h * MAX + i) * 2 * DIM], &k[token * ROW + h * DIM], DIM * sizeof(float));
            }
        }
        /* What the audit says is what the two attentions say. */
        double mass, error, sum = 0;
        GOOD(kv, pkv_audit(seq, 1, 1, q, &b, &mass, &error));
        GOOD(kv, pkv_attend(&seq, &one, 1, 1, q, &dense, whole, NULL, NULL));
        for (uint32_t h = 0; h < Q_HEADS; h++) {
            double difference = 0, norm = 0;
            for (uint32_t d = h * DIM; d < (h + 1) * DIM; d++)
                difference += pow((double)out[flags][d] - whole[d], 2), norm += pow(whole[d], 2);
            sum += sqrt(difference / norm) / Q_HEADS;
        }
        assert_true(mass > 0 && mass < 0.99 && error > 0.01);
        assert_true(fabs(error - sum) < 1e-4);
        b.k = TOKENS + 1;
        assert_int_equal(pkv_attend(&seq, &one, 1, 1, q, &b, again, NULL, NULL), -ERANGE);
        b.k = 0;
        assert_int_equal(pkv_attend(&seq, &one, 1, 1, q, &b, again, NULL, NULL), -EINVAL);
        b.k = TOKENS; /* all of it */
        GOOD(kv, pkv_attend(&seq, &one, 1, 1, q, &b, again, NULL, NULL));
        assert_alike(again, whole, QUERY);
        GOOD(kv, pkv_seq_recalibrate(seq));
        pkv_close(kv);
    }
    assert_alike(out[0], out[1], QUERY);
}

static void test_no_bytes(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_seq *seq = create(kv, 1000, 0, TOKENS);
    json_t *o = stat_json(&daemon_, "ls"), *s = json_array_get(json_object_get(o, "sequences"), 0);
    assert_int_equal(json_integer_value(json_object_get(s, "pool_bytes")), LAYERS * ((TOKENS + 63) / 64) * BLOCK);
    json_decref(o);
    o = stat_json(&daemon_, "stat");
    json_t *model = json_array_get(json_object_get(o, "models"), 0);
    assert_string_equal(json_string_value(json_object_get(model, "scheme")), "none");
    assert_int_equal(json_integer_value(json_object_get(model, "sig_bits")), 0);
    assert_int_equal(json_integer_value(json_object_get(json_object_get(o, "pool"), "used")),
                     LAYERS * ((TOKENS + 63) / 64) * BLOCK);
    json_decref(o);
    GOOD(kv, pkv_seq_close(seq));
    pkv_close(kv);
}

static void test_fork_and_truncate(void **state)
{
    (void)state;
    for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
        struct pkv *kv = attach(&daemon_, flags);
        struct pkv_seq *child, *seq = create(kv, 1000, 0, 500);
        float *k2 = malloc(600 * ROW * sizeof(*k2)), *v2 = malloc(600 * ROW * sizeof(*v2));
        memcpy(k2, k, 300 * ROW * sizeof(*k2)), memcpy(v2, v, 300 * ROW * sizeof(*v2));
        memcpy(k2 + 300 * ROW, k + 900 * ROW, 300 * ROW * sizeof(*k2));
        memcpy(v2 + 300 * ROW, v + 900 * ROW, 300 * ROW * sizeof(*v2));
        GOOD(kv, pkv_seq_fork(seq, 300, 0, &child));
        GOOD(kv, append_all(child, k2 + 300 * ROW, v2 + 300 * ROW, 300));
        assert_by_age(kv, child, k2, v2, 600);
        assert_by_age(kv, seq, k, v, 500);
        GOOD(kv, pkv_seq_truncate(seq, 290));
        assert_by_age(kv, seq, k, v, 290);
        GOOD(kv, append_all(seq, k + 290 * ROW, v + 290 * ROW, 400));
        assert_by_age(kv, seq, k, v, 690);
        GOOD(kv, pkv_seq_destroy(seq));
        assert_by_age(kv, child, k2, v2, 600);
        pkv_close(kv);
        free(k2), free(v2);
    }
}

static void test_other_workers(void **state)
{
    (void)state;
    struct pkv *writer = attach(&daemon_, 0), *reader = attach(&daemon_, 0), *served = attach(&daemon_, PKV_CONNECT_SERVED);
    struct pkv_seq *seen, *seq = create(writer, 1000, PKV_PERSISTENT, 448);
    uint64_t handle = pkv_seq_handle(seq);
    GOOD(writer, pkv_ping(writer, NULL));
    GOOD(reader, pkv_seq_open(open_none(reader), handle, &seen));
    assert_by_age(reader, seen, k, v, 448);
    GOOD(reader, pkv_seq_close(seen));
    pkv_close(writer);
    GOOD(served, pkv_seq_open(open_none(served), handle, &seen));
    GOOD(served, append_all(seen, k + 448 * ROW, v + 448 * ROW, 100));
    assert_by_age(served, seen, k, v, 548);
    GOOD(served, pkv_seq_destroy(seen));
    pkv_close(reader), pkv_close(served);
}

static void test_more_than_the_pool(void **state)
{
    (void)state;
    test_daemon_stop(&daemon_);
    start_with("4M");
    for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
        struct pkv *kv = attach(&daemon_, flags);
        struct pkv_seq *child, *seq = create(kv, 12000, 0, 12000); /* 24 MiB of rows */
        assert_by_age(kv, seq, k, v, 12000);
        assert_exact(kv, seq, k, v, q, 12000);
        GOOD(kv, pkv_seq_fork(seq, 5000, 0, &child)); /* its tail lies in the arena alone */
        assert_by_age(kv, child, k, v, 5000);
        GOOD(kv, pkv_seq_truncate(seq, 6001));
        assert_by_age(kv, seq, k, v, 6001);
        pkv_close(kv);
    }
    test_daemon_stop(&daemon_);
    start_with("16M");
}

/* A batch's bits are those of pkv_append and pkv_attend. */
static void test_batch(void **state)
{
    (void)state;
    static const uint32_t prefill[2] = {100, 400};
    static float out[2][2 * QUERY], lse[2][2 * Q_HEADS];
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_budget b = budget(K);
    struct pkv_seq *plain[2], *batched[2];
    struct pkv_batch *batch;
    uint32_t ones[2] = {1, 1};
    if (on_gpu()) { /* the arrays here are the CPU's; test_sizes.c has them on a GPU */
        pkv_close(kv);
        return;
    }
    b.dense_below = MAX + 1; /* pkv_attend refuses a k above the length; a batch attends densely */
    struct pkv_model *model = open_none(kv);
    for (uint32_t s = 0; s < 2; s++) {
        plain[s] = create_in(kv, model, 1000, 0, prefill[s]);
        batched[s] = create_in(kv, model, 1000, 0, prefill[s]);
    }
    GOOD(kv, pkv_batch_open(batched, 2, &b, NULL, &batch));
    for (uint32_t i = 0; i < 150; i++) {
        const float *ki = k + (1000 + 2 * i) * ROW, *vi = v + (1000 + 2 * i) * ROW, *qi = q + 2 * i * QUERY;
        GOOD(kv, pkv_batch_begin(batch, NULL));
        for (uint32_t l = 0; l < LAYERS; l++) {
            GOOD(kv, pkv_batch_append(batch, l, ki, vi, NULL));
            GOOD(kv, pkv_batch_attend(batch, l, qi, out[1], lse[1], NULL));
            GOOD(kv, pkv_append_batch(plain, 2, l, ki, vi, NULL));
            GOOD(kv, pkv_attend(plain, ones, 2, l, qi, &b, out[0], lse[0], NULL));
            assert_alike(out[0], out[1], 2 * QUERY);
            assert_alike(lse[0], lse[1], 2 * Q_HEADS);
        }
        GOOD(kv, pkv_batch_end(batch, NULL));
    }
    GOOD(kv, pkv_batch_close(batch));
    assert_int_equal(pkv_seq_tokens(batched[0]), prefill[0] + 150);
    pkv_close(kv);
}

static void refused(struct pkv *kv, const struct pkv_model_desc *desc, int status, const char *words)
{
    struct pkv_model *none;
    assert_int_equal(pkv_model_open(kv, desc, &none), -status);
    assert_non_null(strstr(pkv_error(kv), words));
}

static void test_refusals(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model_desc desc = described("other");
    desc.signature = PKV_NONE, desc.sig_bits = 32;
    refused(kv, &desc, EINVAL, "with none, 0");
    desc.sig_bits = 0, desc.weights = "/proc/self/maps";
    refused(kv, &desc, EMEDIUMTYPE, "another signature scheme");
    open_none(kv);
    desc = described("none");
    refused(kv, &desc, ENOTUNIQ, "another name");
    pkv_close(kv);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_bytes),           cmocka_unit_test(test_attends_by_age),
        cmocka_unit_test(test_fork_and_truncate),  cmocka_unit_test(test_other_workers),
        cmocka_unit_test(test_more_than_the_pool), cmocka_unit_test(test_batch),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
