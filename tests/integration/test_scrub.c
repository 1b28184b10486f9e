/* Bits that CPU memory loses: blocks at home are looked at again; what the pool still has is mended, and what it has not is
 * told to whoever asks for it, as an error. Skipped where a process may not write its child's memory. */
#include "tests/integration/stat.h"
#include "tests/lib/corrupt.h"

#include <errno.h>

/* A block is 64 tokens; token LOST is in block 46, which lies in the arena alone once the sequence is three times the pool. */
enum { TOKENS = 6000, LOST = 3000, BEFORE = 46 * 64, FITS = 640 };

static struct test_daemon daemon_;
static float *k, *v, *q, *other;

static void start(const char *rate)
{
    test_daemon_start(&daemon_, (const char *const[]){"--pool-bytes", "4M", "--arena-bytes", "64M", "--threads", "2",
                                                      "--scrub-bytes-s", rate, NULL});
}

static int numbers(void **state)
{
    (void)state;
    k = test_floats(1, TOKENS * ROW), v = test_floats(2, TOKENS * ROW), q = test_floats(3, QUERY);
    other = test_floats(4, TOKENS * ROW);
    return 0;
}

static int end(void **state)
{
    (void)state;
    free(k), free(v), free(q), free(other);
    return 0;
}

static struct pkv_seq *text(struct pkv *kv, uint32_t tokens, uint32_t flags)
{
    struct pkv_seq *seq = NULL;
    GOOD(kv, pkv_seq_create(open_model(kv), TOKENS, flags, NULL, &seq));
    GOOD(kv, append_all(seq, k, v, tokens));
    return seq;
}

/* Counters come with the turns of the loop. */
static void wait_for(const char *counter, uint64_t value)
{
    uint64_t now = 0;
    for (int i = 0; i < 300 && now < value; i++)
        now = stat_number(&daemon_, "counters", counter);
    assert_int_equal(now, value);
}

/* The row of one token, once it is at home in every layer. */
static void lose(uint32_t token)
{
    for (int i = 0; i < 300 && stat_number(&daemon_, "blocks", "sealed"); i++)
        ;
    int found = test_corrupt_arena(daemon_.pid, k + (uint64_t)token * ROW, DIM * sizeof(*k));
    if (found < 0)
        skip();
    assert_int_equal(found, LAYERS);
}

/* Another one as long goes through the pool: of the first little more than what is pinned stays there. */
static void push_out(struct pkv *kv)
{
    struct pkv_seq *seq = NULL;
    GOOD(kv, pkv_seq_create(open_model(kv), TOKENS, 0, NULL, &seq));
    GOOD(kv, append_all(seq, other, other, TOKENS));
    GOOD(kv, pkv_seq_close(seq));
}

/* The same, of a row that in one layer at least is in the arena alone: in how many. What else there was has been mended. */
static uint32_t lose_for_good(struct pkv *kv, uint32_t token)
{
    uint64_t before = stat_number(&daemon_, "counters", "blocks_damaged"), now = before;
    for (int i = 0; i < 10 && now == before; i++) {
        uint64_t failures = stat_number(&daemon_, "counters", "checksum_failures");
        push_out(kv);
        lose(token);
        wait_for("checksum_failures", failures + LAYERS);
        now = stat_number(&daemon_, "counters", "blocks_damaged");
        for (int n = 0; n < 300 && stat_number(&daemon_, "blocks", "sealed"); n++)
            ;
    }
    assert_true(now > before);
    return (uint32_t)(now - before);
}

static int attended(struct pkv_seq *seq)
{
    struct pkv_budget b = budget(100);
    float out[QUERY];
    uint32_t one = 1;
    return pkv_attend(&seq, &one, 1, LAYERS - 1, q, &b, out, NULL, NULL);
}

static void assert_told(struct pkv *kv, int r)
{
    assert_int_equal(r, -EBADMSG);
    assert_non_null(strstr(pkv_error(kv), "failed its checksum"));
}

static void test_mended_from_the_pool(void **state)
{
    (void)state;
    start("4G");
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_seq *seq = text(kv, FITS, 0);
    for (int round = 1; round <= 3; round++) {
        lose(100); /* which finds it only if it was mended */
        wait_for("blocks_mended", (uint64_t)round * LAYERS);
        assert_exact(kv, seq, k, v, q, FITS);
    }
    pkv_close(kv);
    test_daemon_stop(&daemon_);
}

static void test_told_without_the_pool(void **state)
{
    (void)state;
    start("4G");
    for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
        struct pkv *kv = attach(&daemon_, flags), *reader = attach(&daemon_, flags);
        struct pkv_seq *seq = text(kv, TOKENS, PKV_PERSISTENT), *seen, *child;
        GOOD(reader, pkv_seq_open(open_model(reader), pkv_seq_handle(seq), &seen));
        GOOD(reader, attended(seen));
        uint32_t layers = lose_for_good(kv, LOST);
        assert_told(kv, attended(seq));
        assert_told(reader, attended(seen));
        GOOD(kv, pkv_seq_truncate(seq, TOKENS - 64));
        assert_told(kv, pkv_append(seq, 0, 1, k, v));
        assert_told(kv, pkv_seq_fork(seq, BEFORE + 64, 0, &child));
        json_t *ls = stat_json(&daemon_, "ls"), *s = json_array_get(json_object_get(ls, "sequences"), 0);
        assert_int_equal(json_integer_value(json_object_get(s, "damaged")), layers);
        json_decref(ls);
        GOOD(kv, pkv_seq_fork(seq, BEFORE, 0, &child)); /* what is before it is well */
        assert_exact(kv, child, k, v, q, BEFORE);
        GOOD(kv, pkv_seq_close(child));
        GOOD(kv, pkv_seq_truncate(seq, BEFORE));
        assert_exact(kv, seq, k, v, q, BEFORE);
        GOOD(kv, append_all(seq, k + BEFORE * ROW, v + BEFORE * ROW, TOKENS - BEFORE));
        assert_exact(kv, seq, k, v, q, TOKENS);
        GOOD(reader, attended(seen));
        pkv_close(reader);
        GOOD(kv, pkv_seq_destroy(seq));
        pkv_close(kv);
    }
    assert_true(test_daemon_said(&daemon_, "are lost: their rows were in the arena alone"));
    test_daemon_stop(&daemon_);
}

/* Nobody looks by himself here: a tail that comes back from home is looked at on its way. */
static void test_a_tail_on_its_way(void **state)
{
    (void)state;
    start("0");
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_seq *seq = text(kv, TOKENS, 0), *child = NULL;
    lose(LOST);
    int r = 0;
    for (int i = 0; i < 10 && !r; i++) { /* rows that the pool still has need not come back */
        push_out(kv);
        r = pkv_seq_fork(seq, LOST + 5, 0, &child);
        if (!r)
            GOOD(kv, pkv_seq_close(child));
    }
    assert_told(kv, r);
    assert_int_equal(stat_number(&daemon_, "counters", "blocks_checked"), 0);
    assert_in_range(stat_number(&daemon_, "counters", "checksum_failures"), 1, LAYERS);
    assert_told(kv, attended(seq)); /* and now the sequence is known to be damaged */
    assert_told(kv, pkv_seq_truncate(seq, LOST + 5));
    assert_int_equal(pkv_seq_tokens(seq), BEFORE + 64); /* whole blocks have gone, the tail is as it was */
    assert_told(kv, attended(seq));
    GOOD(kv, pkv_seq_truncate(seq, BEFORE));
    assert_exact(kv, seq, k, v, q, BEFORE);
    pkv_close(kv);
    test_daemon_stop(&daemon_);
}

static void test_a_batch_is_told(void **state)
{
    (void)state;
    if (on_gpu())
        skip(); /* the arrays here are the CPU's */
    start("4G");
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_seq *seq = text(kv, TOKENS - 64, 0);
    struct pkv_budget b = budget(100);
    struct pkv_batch *batch;
    float out[QUERY];
    GOOD(kv, pkv_batch_open(&seq, 1, &b, NULL, &batch));
    GOOD(kv, pkv_batch_begin(batch, NULL));
    for (uint32_t l = 0; l < LAYERS; l++) {
        GOOD(kv, pkv_batch_append(batch, l, k, v, NULL));
        GOOD(kv, pkv_batch_attend(batch, l, q, out, NULL, NULL));
    }
    GOOD(kv, pkv_batch_end(batch, NULL));
    lose_for_good(kv, LOST);
    assert_told(kv, pkv_batch_begin(batch, NULL));
    GOOD(kv, pkv_batch_close(batch));
    pkv_close(kv);
    test_daemon_stop(&daemon_);
}

/* A model calibrates itself while one of its sequences is damaged: the others turn to it, and that one once it is cut. */
static void test_others_turn_without_it(void **state)
{
    (void)state;
    enum { PIECE = 256, QUERIES = 4096 };
    if (on_gpu())
        skip(); /* three sequences' signatures and pinned blocks do not fit into two of a GPU's chunks */
    start("4G");
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model_desc desc = described("code");
    struct pkv_model *model;
    struct pkv_seq *lost, *well;
    struct pkv_budget b = budget(100);
    uint32_t queries = PIECE;
    desc.signature = PKV_CODE;
    int r = pkv_model_open(kv, &desc, &model);
    if (r == -EOPNOTSUPP)
        skip(); /* built without LAPACK */
    GOOD(kv, r);
    GOOD(kv, pkv_seq_create(model, TOKENS, 0, NULL, &lost));
    GOOD(kv, append_all(lost, k, v, TOKENS));
    GOOD(kv, pkv_seq_create(model, TOKENS, 0, NULL, &well));
    GOOD(kv, append_all(well, other, v, FITS));
    lose_for_good(kv, LOST);
    float *many = test_floats(5, PIECE * QUERY), *out = test_floats(6, PIECE * QUERY);
    for (int n = 0; n < QUERIES; n += PIECE)
        for (uint32_t l = 0; l < LAYERS; l++)
            GOOD(kv, pkv_attend(&well, &queries, 1, l, many, &b, out, NULL, NULL));
    free(many), free(out);
    GOOD(kv, pkv_model_settle(model));
    assert_int_equal(stat_state(&daemon_, pkv_seq_handle(well)), 1);
    assert_exact(kv, well, other, v, q, FITS);
    assert_told(kv, attended(lost));
    GOOD(kv, pkv_seq_truncate(lost, BEFORE));
    assert_exact(kv, lost, k, v, q, BEFORE);
    assert_int_equal(stat_state(&daemon_, pkv_seq_handle(lost)), 1);
    pkv_close(kv);
    test_daemon_stop(&daemon_);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mended_from_the_pool),   cmocka_unit_test(test_told_without_the_pool),
        cmocka_unit_test(test_a_tail_on_its_way),      cmocka_unit_test(test_a_batch_is_told),
        cmocka_unit_test(test_others_turn_without_it),
    };
    return cmocka_run_group_tests(tests, numbers, end);
}
