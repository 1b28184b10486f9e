/* Batches against the calls that they stand for, and each failure of client/batch.c's list. On a GPU arrays are still the CPU's
 * in this file: it runs on the host backend and on the fake GPU (tests/fake), whose streams end when the test lets them. */
#include "tests/integration/stat.h"
#include "tests/lib/faults.h"

#include <errno.h>

enum { SEQS = 3, STEPS = 150, MAX_TOKENS = 700, N = 2 };

static struct test_daemon daemon_;
static struct fake_faults *faults; /* NULL on the host backend */
static float *k, *v, *q;

static void start_with(const char *pool)
{
    test_daemon_start(&daemon_, (const char *const[]){"--pool-bytes", pool, "--arena-bytes", "64M", "--threads", "1",
                                                      "--grant-timeout-ms", "300", NULL});
}

static int start(void **state)
{
    (void)state;
    const char *backend = getenv("PIVOTKV_TEST_BACKEND");
    if (backend && !strcmp(backend, "cuda"))
        faults = test_faults();
    k = test_floats(11, SEQS * 2 * MAX_TOKENS * ROW), v = test_floats(12, SEQS * 2 * MAX_TOKENS * ROW);
    q = test_floats(13, SEQS * 2 * MAX_TOKENS * QUERY);
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

static struct pkv *attach_for(uint32_t timeout_ms)
{
    struct pkv_options o = {.size = sizeof(o), .threads = 1, .label = "batch", .timeout_ms = timeout_ms};
    struct pkv *kv = NULL;
    int r = -ETIMEDOUT;
    for (int i = 0; i < 20 && r == -ETIMEDOUT;
         i++) /* the bound is for what follows; a busy machine may take longer to connect */
        r = pkv_connect(daemon_.socket, &o, &kv);
    GOOD(NULL, r);
    return kv;
}

static struct pkv_seq *create(struct pkv *kv, struct pkv_model *model, uint32_t tokens, uint32_t from)
{
    struct pkv_seq *seq = NULL;
    GOOD(kv, pkv_seq_create(model, MAX_TOKENS, 0, NULL, &seq));
    if (tokens)
        GOOD(kv, append_all(seq, k + (uint64_t)from * ROW, v + (uint64_t)from * ROW, tokens));
    return seq;
}

/* One sequence in a batch of its own. */
static struct pkv_batch *batch_of(struct pkv *kv, struct pkv_seq *seq)
{
    struct pkv_budget b = budget(20);
    struct pkv_batch *batch = NULL;
    GOOD(kv, pkv_batch_open(&seq, 1, &b, NULL, &batch));
    return batch;
}

/* A step of a batch over all layers; *k_ and so on [seqs][n]. */
static int step(struct pkv_batch *batch, const float *k_, const float *v_, const float *q_, float *out, float *lse,
                uint64_t out_layer, uint64_t lse_layer)
{
    int r = pkv_batch_begin(batch, NULL);
    for (uint32_t l = 0; l < LAYERS && !r; l++) {
        r = pkv_batch_append(batch, l, k_, v_, NULL);
        r = r ? r : pkv_batch_attend(batch, l, q_, out + l * out_layer, lse + l * lse_layer, NULL);
        if (r)
            (void)pkv_batch_cancel(batch, NULL);
    }
    return r ? r : pkv_batch_end(batch, NULL);
}

/* Sequences of unequal length grow over many block borders; each step's bits are those of pkv_append and pkv_attend. */
static void compare(const struct pkv_budget *b, uint32_t n)
{
    static const uint32_t prefill[SEQS] = {5, 300, 127};
    static float out[2][LAYERS][SEQS * N * QUERY], lse[2][LAYERS][SEQS * N * Q_HEADS];
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model *model = open_model(kv);
    struct pkv_seq *plain[SEQS], *batched[SEQS];
    struct pkv_batch *batch;
    uint32_t queries[SEQS] = {n, n, n};
    for (uint32_t s = 0; s < SEQS; s++) {
        plain[s] = create(kv, model, prefill[s], s * MAX_TOKENS);
        batched[s] = create(kv, model, prefill[s], s * MAX_TOKENS);
    }
    struct pkv_batch_options o = {.size = sizeof(o), .queries = n, .cache_bytes = 1 << 20};
    GOOD(kv, pkv_batch_open(batched, SEQS, b, &o, &batch));
    for (uint32_t i = 0; i < STEPS; i++) {
        uint64_t at = (uint64_t)(SEQS * MAX_TOKENS + i * SEQS * n);
        const float *ki = k + at * ROW, *vi = v + at * ROW, *qi = q + at * QUERY;
        GOOD(kv, step(batch, ki, vi, qi, out[1][0], lse[1][0], SEQS * N * QUERY, SEQS * N * Q_HEADS));
        for (uint32_t l = 0; l < LAYERS; l++) {
            for (uint32_t s = 0; s < SEQS; s++)
                GOOD(kv, pkv_append(plain[s], l, n, ki + s * n * ROW, vi + s * n * ROW));
            GOOD(kv, pkv_attend(plain, queries, SEQS, l, qi, b, out[0][l], lse[0][l], NULL));
            assert_memory_equal(out[0][l], out[1][l], SEQS * n * QUERY * sizeof(float));
            assert_memory_equal(lse[0][l], lse[1][l], SEQS * n * Q_HEADS * sizeof(float));
        }
    }
    GOOD(kv, pkv_batch_wait(batch));
    for (uint32_t s = 0; s < SEQS; s++)
        assert_int_equal(pkv_seq_tokens(batched[s]), prefill[s] + STEPS * n);
    GOOD(kv, pkv_batch_close(batch));
    pkv_close(kv);
}

static void test_same_bits(void **state)
{
    (void)state;
    struct pkv_budget sparse = budget(40), short_ones_dense = budget(40), dense = budget(0), top_p = budget(60),
                      sum = budget(40), max = budget(40);
    short_ones_dense.dense_below = 350, top_p.top_p = 0.4f;
    sparse.dense_below = 121; /* pkv_attend refuses a k above the length; a batch attends densely */
    top_p.dense_below = 141, sum.dense_below = max.dense_below = 121, sum.rule = PKV_SUM, max.rule = PKV_MAX_SCORE;
    compare(&sparse, 1), compare(&sparse, 2), compare(&short_ones_dense, 1), compare(&dense, 2), compare(&top_p, 1);
    compare(&sum, 2), compare(&max, 1);
}

/* Rows of a pool that is too small go to the arena while batches read: exact attention over all of them stays exact. */
static void test_blocks_leave_the_pool(void **state)
{
    (void)state;
    test_daemon_stop(&daemon_);
    start_with("4M");
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model *model = open_model(kv);
    struct pkv_seq *seqs[4];
    struct pkv_budget dense = budget(0);
    struct pkv_batch *batch;
    enum { COUNT = 4, GROW = 500 };
    static float kb[COUNT * ROW], vb[COUNT * ROW], out[LAYERS][COUNT * QUERY], lse[LAYERS][COUNT * Q_HEADS];
    double exact[QUERY];
    for (uint32_t s = 0; s < COUNT; s++)
        seqs[s] = create(kv, model, 100, 0);
    GOOD(kv, pkv_batch_open(seqs, COUNT, &dense, NULL, &batch));
    for (uint32_t i = 100; i < 100 + GROW; i++) {
        for (uint32_t s = 0; s < COUNT; s++) {
            memcpy(kb + s * ROW, k + (uint64_t)i * ROW, ROW * sizeof(float));
            memcpy(vb + s * ROW, v + (uint64_t)i * ROW, ROW * sizeof(float));
        }
        GOOD(kv, step(batch, kb, vb, q, out[0], lse[0], COUNT * QUERY, COUNT * Q_HEADS));
        if (i % 50)
            continue;
        for (uint32_t s = 0; s < COUNT; s++) {
            test_attention(k, v, q + s * QUERY, i + 1, Q_HEADS, KV_HEADS, DIM, exact);
            for (uint32_t d = 0; d < QUERY; d++)
                assert_true(fabs(out[1][s * QUERY + d] - exact[d]) < 2e-5);
        }
    }
    GOOD(kv, pkv_batch_close(batch));
    pkv_close(kv);
    test_daemon_stop(&daemon_);
    start_with("16M");
}

static void test_order_of_calls(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0), *other = attach(&daemon_, 0);
    struct pkv_model *model = open_model(kv);
    struct pkv_seq *seqs[2] = {create(kv, model, 100, 0), create(kv, model, 100, 0)}, *foreign;
    struct pkv_budget b = budget(20), none = budget(20);
    struct pkv_batch *batch, *second;
    uint32_t one = 1;
    float out[2 * QUERY], lse[2 * Q_HEADS];
    none.k = 0, none.dense = 0;
    assert_int_equal(pkv_batch_open(seqs, 0, &b, NULL, &batch), -EINVAL);
    assert_int_equal(pkv_batch_open(seqs, 2, &none, NULL, &batch), -EINVAL);
    assert_int_equal(pkv_batch_open(seqs, 2, &b, &(struct pkv_batch_options){.size = 3}, &batch), -EINVAL);
    assert_int_equal(pkv_batch_open((struct pkv_seq *[]){seqs[0], seqs[0]}, 2, &b, NULL, &batch), -EBUSY);
    GOOD(other, pkv_seq_open(open_model(other), pkv_seq_handle(seqs[0]), &foreign));
    assert_int_equal(pkv_batch_open(&foreign, 1, &b, NULL, &batch), -EACCES);
    GOOD(kv, pkv_batch_open(seqs, 2, &b, NULL, &batch));
    assert_int_equal(pkv_batch_open(seqs, 1, &b, NULL, &second), -EBUSY);
    /* Outside of a step. */
    assert_int_equal(pkv_batch_append(batch, 0, k, v, NULL), -EINVAL);
    assert_int_equal(pkv_batch_attend(batch, 0, q, out, lse, NULL), -EINVAL);
    assert_int_equal(pkv_batch_end(batch, NULL), -EINVAL);
    assert_int_equal(pkv_seq_close(seqs[0]), -EBUSY);
    /* Inside of one. */
    GOOD(kv, pkv_batch_begin(batch, NULL));
    assert_int_equal(pkv_batch_begin(batch, NULL), -EBUSY);
    assert_int_equal(pkv_batch_wait(batch), -EBUSY);
    assert_int_equal(pkv_batch_append(batch, LAYERS, k, v, NULL), -EINVAL);
    assert_int_equal(append_all(seqs[1], k, v, 1), -EBUSY);
    assert_int_equal(pkv_attend(&seqs[1], &one, 1, 0, q, &b, out, lse, NULL), -EBUSY);
    assert_int_equal(pkv_seq_truncate(seqs[0], 50), -EBUSY);
    GOOD(kv, pkv_batch_cancel(batch, NULL));
    GOOD(kv, pkv_batch_wait(batch));
    assert_int_equal(pkv_seq_tokens(seqs[0]), 100);
    /* Between steps its sequences are as any other: cut, grown, and the batch goes on from there. */
    GOOD(kv, step(batch, k + 100 * ROW, v + 100 * ROW, q, out, lse, 0, 0));
    GOOD(kv, pkv_batch_wait(batch));
    GOOD(kv, pkv_seq_truncate(seqs[0], 70));
    GOOD(kv, append_all(seqs[0], k + 70 * ROW, v + 70 * ROW, 10));
    assert_exact(kv, seqs[0], k, v, q, 80);
    float *kb = malloc(2 * ROW * sizeof(float)), *vb = malloc(2 * ROW * sizeof(float));
    memcpy(kb, k + 80 * ROW, ROW * sizeof(float)), memcpy(vb, v + 80 * ROW, ROW * sizeof(float));
    memcpy(kb + ROW, k + 101 * ROW, ROW * sizeof(float)), memcpy(vb + ROW, v + 101 * ROW, ROW * sizeof(float));
    GOOD(kv, step(batch, kb, vb, q, out, lse, 0, 0));
    GOOD(kv, pkv_batch_wait(batch));
    assert_exact(kv, seqs[0], k, v, q, 81);
    free(kb), free(vb);
    /* Layers that do not match. */
    GOOD(kv, pkv_append(seqs[0], 0, 1, k, v));
    assert_int_equal(pkv_batch_begin(batch, NULL), -EINVAL);
    GOOD(kv, pkv_append(seqs[0], 1, 1, k, v));
    GOOD(kv, pkv_batch_begin(batch, NULL));
    GOOD(kv, pkv_batch_close(batch)); /* an open step is cancelled */
    assert_int_equal(pkv_seq_tokens(seqs[0]), 82);
    GOOD(kv, pkv_seq_close(seqs[0]));
    pkv_close(other);
    pkv_close(kv);
}

/* Blocks that sequences of this test's daemon hold; copies of those that were dropped end first. */
static uint64_t blocks_held(uint64_t expected)
{
    uint64_t held = expected + 1;
    for (int i = 0; i < 100 && held != expected; i++) {
        held = stat_number(&daemon_, "counters", "blocks_granted") - stat_number(&daemon_, "counters", "blocks_freed");
        usleep(held == expected ? 0 : 10000);
    }
    return held;
}

/* Two steps' places are asked for behind each step; what a batch leaves unused, the daemon has back. */
static void test_places_ahead(void **state)
{
    (void)state;
    enum { PIECE = 64, BLOCKS = LAYERS * PIECE / 64 };
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_seq *seq = create(kv, open_model(kv), 0, 0);
    struct pkv_budget b = budget(20);
    struct pkv_batch_options o = {.size = sizeof(o), .queries = PIECE};
    struct pkv_batch *batch;
    float *out = malloc(PIECE * (QUERY + Q_HEADS) * sizeof(*out));
    assert_int_equal(blocks_held(0), 0);
    GOOD(kv, pkv_batch_open(&seq, 1, &b, &o, &batch));
    for (uint32_t i = 0; i < 3; i++) {
        GOOD(kv, step(batch, k + (uint64_t)i * PIECE * ROW, v + (uint64_t)i * PIECE * ROW, q, out, out + PIECE * QUERY, 0, 0));
        GOOD(kv, pkv_ping(kv, NULL));
        assert_int_equal(blocks_held((i + 3) * BLOCKS), (i + 3) * BLOCKS);
    }
    GOOD(kv, pkv_batch_wait(batch));
    GOOD(kv, pkv_seq_truncate(seq, PIECE + 10)); /* what was asked for goes too, and is asked for again */
    GOOD(kv, step(batch, k + (PIECE + 10) * ROW, v + (PIECE + 10) * ROW, q, out, out + PIECE * QUERY, 0, 0));
    GOOD(kv, pkv_batch_wait(batch));
    assert_int_equal(blocks_held(5 * LAYERS), 5 * LAYERS);
    GOOD(kv, pkv_batch_close(batch));
    assert_int_equal(blocks_held(3 * LAYERS), 3 * LAYERS);
    assert_exact(kv, seq, k, v, q, 2 * PIECE + 10);
    free(out);
    pkv_close(kv);
}

/* More batches than slots, all of them at work: what one leaves behind does not stand in the others' way. */
static void test_many_batches(void **state)
{
    (void)state;
    enum { COUNT = 10 };
    struct pkv *kv = attach_for(500);
    struct pkv_model *model = open_model(kv);
    struct pkv_seq *seqs[COUNT];
    struct pkv_batch *batches[COUNT];
    float out[QUERY], lse[Q_HEADS];
    for (uint32_t i = 0; i < COUNT; i++) {
        seqs[i] = create(kv, model, 60, 0);
        batches[i] = batch_of(kv, seqs[i]);
    }
    for (uint32_t t = 60; t < 70; t++)
        for (uint32_t i = 0; i < COUNT; i++)
            GOOD(kv, step(batches[i], k + t * ROW, v + t * ROW, q, out, lse, 0, 0));
    for (uint32_t i = 0; i < COUNT; i++) {
        GOOD(kv, pkv_batch_wait(batches[i]));
        assert_exact(kv, seqs[i], k, v, q, 70);
    }
    pkv_close(kv); /* with the batches open */
}

static void test_limits(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0), *served = attach(&daemon_, PKV_CONNECT_SERVED);
    struct pkv_model *model = open_model(kv);
    struct pkv_seq *seq = create(kv, model, MAX_TOKENS - 1, 0), *seq2 = NULL;
    struct pkv_budget b = budget(20);
    struct pkv_batch *batch;
    float out[QUERY], lse[Q_HEADS];
    batch = batch_of(kv, seq);
    GOOD(kv, step(batch, k, v, q, out, lse, 0, 0));
    assert_int_equal(pkv_batch_begin(batch, NULL), -EOVERFLOW);
    GOOD(kv, pkv_batch_wait(batch));
    GOOD(kv, pkv_seq_truncate(seq, 128));
    GOOD(kv, step(batch, k, v, q, out, lse, 0, 0));
    GOOD(kv, pkv_batch_close(batch));
    GOOD(served, pkv_seq_create(open_model(served), 100, 0, NULL, &seq2));
    assert_int_equal(pkv_batch_open(&seq2, 1, &b, NULL, &batch), -EOPNOTSUPP);
    pkv_close(served);
    pkv_close(kv);
}

/* NaN: at once where the CPU works, behind the step's end where a stream does; either way its tokens do not count. */
static void test_not_finite(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_seq *seq = create(kv, open_model(kv), 64, 0);
    float out[QUERY], lse[Q_HEADS], bad[ROW];
    memcpy(bad, k, sizeof(bad));
    bad[7] = NAN;
    struct pkv_batch *batch = batch_of(kv, seq);
    GOOD(kv, step(batch, k + 64 * ROW, v + 64 * ROW, q, out, lse, 0, 0));
    int r = step(batch, bad, v, q, out, lse, 0, 0);
    if (faults) {
        GOOD(kv, r);
        GOOD(kv, r = pkv_batch_begin(batch, NULL) == -EDOM ? 0 : -1);
    } else {
        assert_int_equal(r, -EDOM);
    }
    GOOD(kv, pkv_batch_wait(batch));
    assert_int_equal(pkv_seq_tokens(seq), 65);
    GOOD(kv, step(batch, k + 65 * ROW, v + 65 * ROW, q, out, lse, 0, 0));
    GOOD(kv, pkv_batch_wait(batch));
    assert_exact(kv, seq, k, v, q, 66);
    GOOD(kv, pkv_batch_close(batch));
    pkv_close(kv);
}

static void test_stale(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0), *other = attach(&daemon_, 0);
    struct pkv_model *model = open_named(kv, "unlearnt"); /* nobody has taught it */
    struct pkv_seq *seq = create(kv, model, 10, 0), *theirs;
    struct pkv_batch *batch;
    float out[QUERY], lse[Q_HEADS];
    /* The scheme learns from what is appended to another sequence of the model: what was signed is signed anew. */
    batch = batch_of(kv, seq);
    GOOD(kv, step(batch, k + 10 * ROW, v + 10 * ROW, q, out, lse, 0, 0));
    GOOD(kv, pkv_batch_wait(batch));
    (void)create(kv, model, 500, 0);
    assert_int_equal(pkv_batch_begin(batch, NULL), -ESTALE);
    assert_non_null(strstr(pkv_error(kv), "open it again"));
    GOOD(kv, pkv_batch_close(batch));
    /* Another worker destroys the sequence. */
    batch = batch_of(kv, seq);
    GOOD(kv, step(batch, k + 11 * ROW, v + 11 * ROW, q, out, lse, 0, 0));
    GOOD(other, pkv_seq_open(open_named(other, "unlearnt"), pkv_seq_handle(seq), &theirs));
    GOOD(other, pkv_seq_destroy(theirs));
    GOOD(other, pkv_ping(other, NULL));
    assert_int_equal(pkv_batch_begin(batch, NULL), -ESTALE);
    GOOD(kv, pkv_batch_close(batch));
    pkv_close(other);
    pkv_close(kv);
}

/* Streams that do not end: a bound on everything, nothing lost when they do. */
static void test_streams_that_hang(void **state)
{
    (void)state;
    struct pkv *kv = attach_for(700);
    struct pkv_seq *seq = create(kv, open_model(kv), 60, 0);
    float out[QUERY], lse[Q_HEADS];
    struct pkv_batch *batch = batch_of(kv, seq);
    faults->steps_hang = 1;
    for (uint32_t i = 60; i < 60 + PKV_BATCH_STEPS; i++)
        GOOD(kv, step(batch, k + i * ROW, v + i * ROW, q, out, lse, 0, 0));
    assert_int_equal(pkv_batch_begin(batch, NULL), -ETIMEDOUT);
    assert_int_equal(pkv_batch_wait(batch), -ETIMEDOUT);
    assert_int_equal(pkv_batch_close(batch), -ETIMEDOUT);
    assert_int_equal(append_all(seq, k, v, 1), -EBUSY);
    faults->steps_hang = 0;
    GOOD(kv, pkv_batch_wait(batch));
    assert_exact(kv, seq, k, v, q, 60 + PKV_BATCH_STEPS);
    GOOD(kv, pkv_batch_close(batch));
    pkv_close(kv);
}

/* A place that a step in flight reads is not given to another block, however long the step takes. */
static void test_places_wait_for_steps(void **state)
{
    (void)state;
    float out[QUERY], lse[Q_HEADS];
    test_daemon_stop(&daemon_);
    start_with("2M"); /* one that is full with this sequence */
    struct pkv *kv = attach_for(5000);
    struct pkv_model *model = open_model(kv);
    struct pkv_seq *seq = create(kv, model, 640, 0), *more;
    struct pkv_batch *batch = batch_of(kv, seq);
    faults->steps_hang = 1;
    GOOD(kv, step(batch, k + 640 * ROW, v + 640 * ROW, q, out, lse, 0, 0));
    more = create(kv, model, 0, 0);
    int r = 0;
    for (uint32_t i = 0; i < 10 && !r; i++) {
        r = append_all(more, k, v, 64);
        GOOD(kv, pkv_seq_close(more)); /* its places wait for the step too */
        more = create(kv, model, 0, 0);
    }
    assert_int_equal(r, -ENOSPC); /* what was dropped waits for the step */
    faults->steps_hang = 0;
    GOOD(kv, pkv_batch_wait(batch));
    GOOD(kv, append_all(create(kv, model, 0, 0), k, v, 64));
    assert_exact(kv, seq, k, v, q, 641);
    GOOD(kv, pkv_batch_close(batch));
    pkv_close(kv);
    test_daemon_stop(&daemon_);
    start_with("16M");
}

/* The device is lost under steps in flight: each call says so, nothing waits, closing frees this side. */
static void test_lost_device(void **state)
{
    (void)state;
    struct pkv *kv = attach_for(5000);
    struct pkv_seq *seq = create(kv, open_model(kv), 60, 0);
    float out[QUERY], lse[Q_HEADS];
    struct pkv_batch *batch = batch_of(kv, seq);
    faults->steps_hang = 1;
    GOOD(kv, step(batch, k + 60 * ROW, v + 60 * ROW, q, out, lse, 0, 0));
    faults->lost = 1;
    assert_int_equal(pkv_batch_wait(batch), -ENOTRECOVERABLE);
    assert_int_equal(pkv_batch_wait(batch), -ENOTRECOVERABLE);
    assert_int_equal(append_all(seq, k, v, 1), -EBUSY);
    assert_int_equal(pkv_batch_close(batch), -ENOTRECOVERABLE);
    pkv_close(kv);
    test_daemon_kill(&daemon_); /* it ends by itself too: tests/integration/test_gpu.c */
    faults->lost = faults->steps_hang = 0;
    start_with("16M");
}

/* A step that does not end holds up sequences that are to turn to their model's first state: who waits gets the bound, and the
 * loss of the device at once. */
static void test_lost_while_turning(void **state)
{
    (void)state;
    struct pkv *kv = attach_for(300), *other = attach(&daemon_, 0);
    struct pkv_model_desc desc = described("turning");
    struct pkv_model *mine, *theirs;
    GOOD(kv, pkv_model_open(kv, &desc, &mine));
    GOOD(other, pkv_model_open(other, &desc, &theirs));
    struct pkv_seq *seq = create(kv, mine, 40, 0);
    float out[QUERY], lse[Q_HEADS];
    struct pkv_batch *batch = batch_of(kv, seq);
    faults->steps_hang = 1;
    GOOD(kv, step(batch, k + 40 * ROW, v + 40 * ROW, q, out, lse, 0, 0));
    for (int i = 0; i < 8; i++) /* all that `sign` learns from */
        GOOD(other, pkv_seq_close(create(other, theirs, 600, 0)));
    assert_int_equal(pkv_model_settle(mine), -ETIMEDOUT);
    faults->lost = 1;
    assert_int_equal(pkv_model_settle(mine), -ENOTRECOVERABLE);
    assert_int_equal(pkv_batch_close(batch), -ENOTRECOVERABLE);
    pkv_close(kv), pkv_close(other);
    test_daemon_kill(&daemon_);
    faults->lost = faults->steps_hang = 0;
    start_with("16M");
}

static void test_death_of_the_daemon(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_seq *seq = create(kv, open_model(kv), 60, 0);
    float out[QUERY], lse[Q_HEADS];
    struct pkv_batch *batch = batch_of(kv, seq);
    GOOD(kv, pkv_batch_begin(batch, NULL));
    test_daemon_kill(&daemon_);
    for (uint32_t l = 0; l < LAYERS; l++) { /* the step under way can still be finished: its memory is here */
        GOOD(kv, pkv_batch_append(batch, l, k + 60 * ROW, v + 60 * ROW, NULL));
        GOOD(kv, pkv_batch_attend(batch, l, q, out, lse, NULL));
    }
    GOOD(kv, pkv_batch_end(batch, NULL));
    assert_int_equal(pkv_batch_begin(batch, NULL), -ECONNRESET);
    (void)pkv_batch_close(batch);
    pkv_close(kv);
    start_with("16M");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_blocks_leave_the_pool),
        cmocka_unit_test(test_order_of_calls),
        cmocka_unit_test(test_places_ahead),
        cmocka_unit_test(test_many_batches),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_stale),
        cmocka_unit_test(test_death_of_the_daemon),
        /* with streams that the test can hold, on the fake GPU alone */
        cmocka_unit_test(test_streams_that_hang),
        cmocka_unit_test(test_places_wait_for_steps),
        cmocka_unit_test(test_lost_device),
        cmocka_unit_test(test_lost_while_turning),
    };
    const char *backend = getenv("PIVOTKV_TEST_BACKEND");
    size_t count = sizeof(tests) / sizeof(tests[0]) - (backend && !strcmp(backend, "cuda") ? 0 : 4);
    return _cmocka_run_group_tests("batch", tests, count, start, stop);
}
