/* The online audit end to end: samples equal pkv_audit, find a planted bad selection and nothing in a good one, hold while
 * sequences are cut under them, and are what `pivotkv stat` shows. */
#include "tests/integration/samples.h"
#include "tests/integration/stat.h"

#include <errno.h>

/* One layer and one kv head: every sample of the same query is the same number. */
enum { ONE = DIM, TOKENS = 1500 };

static struct test_daemon daemon_;

static int start(void **state)
{
    (void)state;
    test_daemon_start(&daemon_, (const char *const[]){"--pool-bytes", "16M", "--arena-bytes", "64M", "--threads", "1",
                                                      "--audit-ppm", "1000000", "--audit-alarm-ppm", "200000", NULL});
    return 0;
}

static int stop(void **state)
{
    (void)state;
    test_daemon_stop(&daemon_);
    return 0;
}

static struct pkv_seq *open_heads(struct pkv *kv, const char *name, uint32_t bits, uint32_t kv_heads, struct pkv_model **ret)
{
    struct pkv_model_desc desc = {.size = sizeof(desc),
                                  .layers = 1,
                                  .q_heads = 2,
                                  .kv_heads = kv_heads,
                                  .head_dim = DIM,
                                  .type = PKV_TYPE_F32,
                                  .sig_bits = bits,
                                  .name = name};
    struct pkv_seq *seq = NULL;
    GOOD(kv, pkv_model_open(kv, &desc, ret));
    GOOD(kv, pkv_seq_create(*ret, 4000, 0, name, &seq));
    return seq;
}

static struct pkv_seq *open_one(struct pkv *kv, const char *name, uint32_t bits, struct pkv_model **ret)
{
    return open_heads(kv, name, bits, 1, ret);
}

static uint64_t total(const char *name)
{
    return stat_number(&daemon_, "totals", name);
}

/* Attends until the totals have `more` further samples. */
static void attend_until(struct pkv *kv, struct pkv_seq *seq, const float *q, const struct pkv_budget *b, uint64_t more)
{
    static float out[2 * ONE];
    uint32_t one = 1;
    uint64_t goal = total("samples") + more;
    for (int round = 0; round < 2000; round++) {
        for (int i = 0; i < 200; i++)
            GOOD(kv, pkv_attend(&seq, &one, 1, 0, q, b, out, NULL, NULL));
        if (total("samples") >= goal)
            return;
    }
    fail_msg("no %llu samples after 400000 calls", (unsigned long long)more);
}

/* Waits until the daemon has looked at what was counted, and the alarm is as it should be. */
static struct stat_quality settled(const char *name, uint64_t samples, bool alarm)
{
    struct stat_quality q = stat_quality(&daemon_, name);
    for (int i = 0; i < 100 && (q.samples < samples || q.alarm != alarm); i++, q = stat_quality(&daemon_, name))
        usleep(100000);
    return q;
}

/* Keys of which one stands out for a query that looks at it: a selection must find it. */
static void good_text(float *k, float *v, float *q)
{
    float *x = test_floats(31, TOKENS * ONE), *y = test_floats(32, TOKENS * ONE);
    memcpy(k, x, TOKENS * ONE * sizeof(*k)), memcpy(v, y, TOKENS * ONE * sizeof(*v));
    for (int d = 0; d < ONE; d++)
        q[d] = q[ONE + d] = 3 * k[700 * ONE + d];
    free(x), free(y);
}

/* What counts is one channel of 64; what fills the signatures is the noise of the others, that the query does not look at. */
static void bad_text(float *k, float *v, float *q)
{
    good_text(k, v, q);
    for (int t = 0; t < TOKENS; t++)
        for (int d = 0; d < ONE; d++)
            k[t * ONE + d] *= d == 5 ? 1.0f : 20.0f;
    memset(q, 0, 2 * ONE * sizeof(*q));
    q[5] = q[ONE + 5] = 24;
}

static void test_samples_equal_audits(void **state)
{
    (void)state;
    static float k[TOKENS * ONE], v[TOKENS * ONE], q[2 * ONE];
    bad_text(k, v, q);
    for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
        struct pkv *kv = attach(&daemon_, flags);
        struct pkv_model *model;
        struct pkv_seq *seq = open_one(kv, "equal", 64, &model);
        struct pkv_budget b = budget(100);
        double mass, error;
        GOOD(kv, pkv_append(seq, 0, TOKENS, k, v));
        GOOD(kv, pkv_audit(seq, 1, 0, q, &b, &mass, &error));
        assert_true(mass > 0 && mass < 0.999 && error > 0.01);
        uint64_t samples = total("samples"), mass_sum = total("sample_mass_ppm"), error_sum = total("sample_error_ppm");
        attend_until(kv, seq, q, &b, 5);
        pkv_close(kv);
        samples = total("samples") - samples;
        assert_true(samples >= 5 && total("sample_ns") > 0 && total("attend_call_ns") > 0);
        assert_int_equal(total("sample_mass_ppm") - mass_sum, samples * (uint64_t)(mass * 1e6));
        assert_int_equal(total("sample_error_ppm") - error_sum, samples * (uint64_t)(error * 1e6));
    }
    struct stat_quality all = settled("equal", 10, false);
    assert_true(all.samples >= 10);
}

/* Whether the daemon has said `words`. */
static bool said(const char *words)
{
    char line[1024];
    bool found = false;
    FILE *f = fopen(daemon_.log, "r");
    assert_non_null(f);
    while (fgets(line, sizeof(line), f))
        found |= strstr(line, words) != NULL;
    fclose(f);
    return found;
}

/* Two kv heads, one selected well and one badly: each sample is of one of them, and whole. */
static void test_heads(void **state)
{
    (void)state;
    static float k[2][TOKENS * ONE], v[2][TOKENS * ONE], q[2][2 * ONE], keys[2 * TOKENS * ONE], values[2 * TOKENS * ONE];
    good_text(k[0], v[0], q[0]), bad_text(k[1], v[1], q[1]);
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < 2; h++) {
            memcpy(&keys[(2 * t + h) * ONE], &k[h][t * ONE], ONE * sizeof(float));
            memcpy(&values[(2 * t + h) * ONE], &v[h][t * ONE], ONE * sizeof(float));
        }
    memcpy(q[0] + ONE, q[1], ONE * sizeof(float));
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model *model;
    struct pkv_seq *seq = open_heads(kv, "heads", 64, 2, &model);
    struct pkv_budget b = budget(100);
    double mass, error;
    GOOD(kv, pkv_append(seq, 0, TOKENS, keys, values));
    GOOD(kv, pkv_audit(seq, 1, 0, q[0], &b, &mass, &error));
    uint64_t samples = total("samples"), sum = total("sample_error_ppm"), good = total("sample_error_to_1");
    attend_until(kv, seq, q[0], &b, 24);
    samples = total("samples") - samples, sum = total("sample_error_ppm") - sum, good = total("sample_error_to_1") - good;
    assert_true(good > 0 && good < samples);
    double bad = (double)sum * 1e-6 / (double)(samples - good);
    print_message("# %llu of %llu samples are of the good head; the other's error is %.4f\n", (unsigned long long)good,
                  (unsigned long long)samples, bad);
    assert_true(bad > 1.98 * error && bad < 2.02 * error); /* the mean is of both heads */
    pkv_close(kv);
}

static void test_alarm(void **state)
{
    (void)state;
    static float k[TOKENS * ONE], v[TOKENS * ONE], q[2 * ONE];
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model *model;
    struct pkv_seq *seq = open_one(kv, "alarm", 32, &model), *other;
    struct pkv_budget b = budget(32);
    good_text(k, v, q);
    GOOD(kv, pkv_append(seq, 0, TOKENS, k, v));
    attend_until(kv, seq, q, &b, 60);
    struct stat_quality quiet = settled("alarm", 60, false);
    assert_true(quiet.samples >= 60 && !quiet.alarm && quiet.error < 0.05);
    uint64_t alarms = total("samples_dropped"); /* none were */
    assert_int_equal(alarms, 0);
    GOOD(kv, pkv_seq_create(model, 4000, 0, "bad", &other));
    bad_text(k, v, q);
    GOOD(kv, pkv_append(other, 0, TOKENS, k, v));
    attend_until(kv, other, q, &b, 200);
    struct stat_quality loud = settled("alarm", 260, true);
    assert_true(loud.alarm && loud.error > 0.2);
    assert_true(said("model alarm: the selection's mean error is") && !said("again, below"));
    good_text(k, v, q);
    attend_until(kv, seq, q, &b, 300);
    struct stat_quality again = settled("alarm", 560, false);
    assert_true(!again.alarm && again.error < 0.16 && said("again, below"));
    json_t *o = stat_json(&daemon_, "stat"), *c = json_object_get(o, "counters");
    assert_int_equal(json_integer_value(json_object_get(c, "quality_alarms")), 1);
    assert_int_equal(json_integer_value(json_object_get(c, "quality_cleared")), 1);
    assert_int_equal(json_integer_value(json_object_get(json_object_get(o, "audit"), "alarms")), 0);
    json_decref(o);
    pkv_close(kv);
}

static void close_seq(struct pkv *kv, struct pkv_seq *seq)
{
    GOOD(kv, pkv_seq_close(seq));
}

/* A budget that misses one token: a sample over anything else than what was attended shows as a large error. */
static void test_cut_under_a_sample(void **state)
{
    (void)state;
    static float k[TOKENS * ONE], v[TOKENS * ONE], q[2 * ONE], out[2 * ONE];
    struct pkv *kv = attach(&daemon_, 0), *reader = attach(&daemon_, 0);
    struct pkv_model *model, *theirs;
    struct pkv_seq *seq = open_one(kv, "cut", 128, &model), *seen;
    struct pkv_budget b = budget(TOKENS - 300);
    uint32_t one = 1;
    uint64_t bad = total("sample_error_beyond") + total("sample_error_to_50") + total("sample_error_to_20");
    uint64_t dropped = total("samples_dropped");
    good_text(k, v, q);
    close_seq(reader, open_one(reader, "cut", 128, &theirs));
    GOOD(kv, pkv_append(seq, 0, TOKENS, k, v));
    GOOD(kv, pkv_ping(kv, NULL)); /* seals that were posted are done */
    GOOD(reader, pkv_seq_open(theirs, pkv_seq_handle(seq), &seen));
    for (int round = 0; round < 60; round++) {
        for (int i = 0; i < 3 + round % 5; i++) {
            GOOD(kv, pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL));
            GOOD(reader, pkv_attend(&seen, &one, 1, 0, q, &b, out, NULL, NULL));
        }
        GOOD(kv, pkv_seq_truncate(seq, 64));
        GOOD(kv,
             pkv_append(seq, 0, TOKENS - 64, round % 2 ? k + 64 * ONE : v + 64 * ONE, round % 2 ? v + 64 * ONE : k + 64 * ONE));
        GOOD(kv, pkv_ping(kv, NULL));
    }
    uint64_t gone = total("samples_dropped") - dropped;
    print_message("# %llu samples given up\n", (unsigned long long)gone);
    assert_true(gone >= 20);
    assert_int_equal(total("sample_error_beyond") + total("sample_error_to_50") + total("sample_error_to_20"), bad);
    /* A sequence that is closed in the middle of a sample. */
    for (int i = 0; i < 3; i++)
        GOOD(kv, pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL));
    GOOD(kv, pkv_seq_destroy(seq));
    GOOD(kv, pkv_seq_create(model, 4000, 0, NULL, &seq));
    GOOD(kv, pkv_append(seq, 0, TOKENS, k, v));
    attend_until(kv, seq, q, &b, 3);
    assert_int_equal(pkv_attend(&seen, &one, 1, 0, q, &b, out, NULL, NULL), -ESTALE);
    pkv_close(reader), pkv_close(kv);
}

/* Calls that fail in any way a sampled call can fail in leave nothing behind. */
static void test_refused_calls(void **state)
{
    (void)state;
    static float k[TOKENS * ONE], q[2 * ONE], out[2 * ONE];
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model *model;
    struct pkv_seq *seq = open_one(kv, "refused", 64, &model);
    struct pkv_budget b = budget(32);
    float *x = test_floats(5, TOKENS * ONE);
    memcpy(k, x, sizeof(k)), memcpy(q, x, sizeof(q));
    free(x);
    GOOD(kv, pkv_append(seq, 0, TOKENS, k, k));
    for (uint32_t n = 0; n < 100; n++) {
        const uint32_t queries[] = {0, TOKENS + 1, UINT32_MAX, 1, 1};
        struct pkv_seq *seqs[] = {seq};
        uint32_t layer = n % 5 == 3 ? 1 : n % 5 == 4 ? UINT32_MAX : 0;
        assert_true(pkv_attend(seqs, &queries[n % 5], 1, layer, q, &b, out, NULL, NULL) < 0);
        assert_true(pkv_attend(seqs, &queries[3], 0, 0, q, &b, out, NULL, NULL) < 0);
    }
    attend_until(kv, seq, q, &b, 3);
    pkv_close(kv);
}

/* Steps of a batch: each sample is what pkv_audit says of the sequence at one of its lengths, also after a cut. */
static void test_batches(void **state)
{
    (void)state;
    static float k[TOKENS * ONE], v[TOKENS * ONE], q[2 * ONE], out[2 * ONE];
    static struct samples samples;
    float *more = test_floats(77, SAMPLES_STEPS * ONE);
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model *model;
    struct pkv_seq *seq = open_one(kv, "batches", 64, &model);
    struct pkv_budget b = budget(100);
    struct pkv_batch *batch;
    bad_text(k, v, q);
    GOOD(kv, pkv_append(seq, 0, TOKENS, k, v));
    GOOD(kv, pkv_batch_open(&seq, 1, &b, NULL, &batch));
    samples_count(&samples, &daemon_);
    for (uint32_t cut = 0, used = 0; cut < 3; cut++) {
        samples.steps = samples.found = 0;
        while (samples.found < 3) {
            const float *row = more + (uint64_t)used++ * ONE;
            assert_true(used < SAMPLES_STEPS);
            GOOD(kv, pkv_batch_begin(batch, NULL));
            GOOD(kv, pkv_batch_append(batch, 0, row, row, NULL));
            GOOD(kv, pkv_batch_attend(batch, 0, q, out, NULL, NULL));
            GOOD(kv, pkv_batch_end(batch, NULL));
            GOOD(kv, pkv_batch_wait(batch));
            samples_step(&samples, &daemon_, kv, seq, q, &b, 2e-6);
        }
        GOOD(kv, pkv_seq_truncate(seq, TOKENS)); /* what is kept by now is of no account */
        samples_count(&samples, &daemon_);
    }
    assert_true(total("attend_call_ns") > 0);
    GOOD(kv, pkv_batch_close(batch));
    free(more);
    pkv_close(kv);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_alarm),         cmocka_unit_test(test_samples_equal_audits),
        cmocka_unit_test(test_heads),         cmocka_unit_test(test_cut_under_a_sample),
        cmocka_unit_test(test_refused_calls), cmocka_unit_test(test_batches),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
