/* The online audit's arithmetic: what samples cost, what they say, and when an alarm rises and falls. */
#include "cachesvc/quality.h"
#include "client/audit.h"
#include "tests/lib/test.h"

#include <string.h>

/* A worker of `calls` calls of `call_ns`; a block costs `block_ns`, and every 50th slice 40 times as much. */
struct run {
    uint64_t calls, call_ns, block_ns, overhead_ns;
    uint32_t ppm, sample_blocks;
    /* results */
    uint64_t spent, samples, slices, largest;
};

static void run(struct run *r)
{
    struct audit_purse p = {0};
    uint32_t left = r->sample_blocks;
    for (uint64_t i = 0; i < r->calls; i++) {
        audit_earn(&p, r->call_ns, r->ppm);
        uint32_t n = audit_slice(&p, r->call_ns, left);
        assert_true(n <= left);
        if (!n)
            continue;
        uint64_t ns = (n * r->block_ns + r->overhead_ns) * (++r->slices % 50 ? 1 : 40);
        audit_spend(&p, ns, n);
        r->spent += ns;
        r->largest = r->slices % 50 ? PKV_MAX(r->largest, ns) : r->largest;
        left -= n;
        r->samples += !left;
        left = left ? left : r->sample_blocks;
    }
}

/* Whatever a block costs, all of it stays within the share, and most of the share is used. */
static void test_share_holds(void **state)
{
    (void)state;
    static const struct run runs[] = {
        {200000, 4000000, 8000, 2000, 5000, 2048, 0, 0, 0, 0},     /* 128K tokens */
        {200000, 20000000, 8000, 2000, 5000, 16384, 0, 0, 0, 0},   /* 1M tokens */
        {1000000, 100000, 4000, 5000, 10000, 20, 0, 0, 0, 0},      /* short sequences */
        {200000, 4000000, 400000, 100000, 5000, 2048, 0, 0, 0, 0}, /* blocks that come over the border */
    };
    for (size_t i = 0; i < PKV_ARRAY_LEN(runs); i++) {
        struct run r = runs[i];
        run(&r);
        double total = (double)r.calls * (double)r.call_ns, share = (double)r.ppm * 1e-6;
        print_message("# run %zu: %.2f %% of %.2f %%, %llu samples\n", i, 100 * (double)r.spent / total, 100 * share,
                      (unsigned long long)r.samples);
        /* At the end at most one slow slice is owed. */
        double slow = 40.0 * (double)(r.block_ns * r.sample_blocks + r.overhead_ns);
        assert_true((double)r.spent <= share * total + slow);
        assert_true((double)r.spent > 0.5 * share * total && r.samples >= 2);
    }
}

/* A call never pays for more than its own eighth, or the smallest slice. */
static void test_no_long_stall(void **state)
{
    (void)state;
    struct run r = {200000, 4000000, 8000, 0, 1000000, 16384, 0, 0, 0, 0};
    run(&r);
    assert_true(r.largest <= r.call_ns / AUDIT_SLICE_SHARE);
    r = (struct run){100000, 50000, 8000, 0, 1000000, 16384, 0, 0, 0, 0};
    run(&r);
    assert_true(r.largest == AUDIT_SLICE_MIN * r.block_ns);
}

/* Nothing saved up in a long idle time comes at once; nothing is taken without a share. */
static void test_credit(void **state)
{
    (void)state;
    struct audit_purse p = {0};
    audit_earn(&p, 3600000000000ull, 10000);
    assert_true(p.credit_ns <= AUDIT_CREDIT_MAX_NS);
    p = (struct audit_purse){0};
    for (int i = 0; i < 1000; i++)
        audit_earn(&p, 1000000000, 0);
    assert_int_equal(audit_slice(&p, 1000000000, 100), 0);
    /* A block that costs more than can be saved up is taken all the same, and paid back. */
    p = (struct audit_purse){.credit_ns = AUDIT_CREDIT_MAX_NS, .block_ns = 1e9};
    assert_int_equal(audit_slice(&p, 1, 100), AUDIT_SLICE_MIN);
    audit_spend(&p, 16000000000ull, 16);
    assert_int_equal(audit_slice(&p, 1000000000, 100), 0);
    assert_int_equal(audit_slice(&(struct audit_purse){.credit_ns = 1e6, .block_ns = 1e3}, 1000000000, 3), 3);
}

static void test_measures(void **state)
{
    (void)state;
    const float exact[] = {3, 4, 0, 0}, off[] = {3, 4, 0.5f, 0}, zero[4] = {0};
    assert_true(audit_error(exact, exact, 4) == 0 && audit_error(zero, zero, 4) == 0);
    assert_true(fabs(audit_error(off, exact, 4) - 0.1) < 1e-7 && fabs(audit_error(zero, exact, 4) - 1) < 1e-7);
    assert_true(fabs(audit_mass(logf(0.25f), 0) - 0.25) < 1e-7 && audit_mass(0.001f, 0) == 1);
    static const double errors[] = {0, .01, .0100001, .02, .05, .06, .1, .2, .5, .51, 1000, INFINITY};
    static const uint32_t buckets[] = {0, 0, 1, 1, 2, 3, 3, 4, 5, 6, 6, 6};
    for (size_t i = 0; i < PKV_ARRAY_LEN(errors); i++)
        assert_int_equal(audit_bucket(errors[i]), buckets[i]);
    /* The counters of the histogram follow each other, one more than there are bounds. */
    assert_int_equal(offsetof(struct pkv_worker_counters, sample_error_to_1) + 6 * sizeof(uint64_t),
                     offsetof(struct pkv_worker_counters, sample_error_beyond));
}

static enum quality_event add(struct quality *q, uint64_t samples, double error)
{
    struct pkv_model_quality more = {
        .samples = samples, .mass_ppm = samples * 900000, .error_ppm = (uint64_t)((double)samples * error * 1e6)};
    return quality_add(q, &more, 200000);
}

static void test_alarm(void **state)
{
    (void)state;
    struct quality q = {0};
    /* Too few samples say nothing, however bad. */
    assert_int_equal(add(&q, QUALITY_SAMPLES - 1, 0.9), QUALITY_NOTHING);
    assert_false(q.alarm);
    assert_int_equal(add(&q, 1, 0.9), QUALITY_RAISED);
    assert_true(q.alarm && fabs(q.error - 0.9) < 1e-6 && fabs(q.mass - 0.9) < 1e-6);
    assert_int_equal(add(&q, 1, 0.9), QUALITY_NOTHING); /* once */
    /* It clears below 80 % of the limit, not at the limit. */
    for (int i = 0; i < 1000; i++)
        assert_int_equal(add(&q, 1, 0.17), QUALITY_NOTHING);
    assert_true(q.alarm && fabs(q.error - 0.17) < 1e-3);
    int cleared = 0;
    for (int i = 0; i < 1000; i++)
        cleared += add(&q, 1, 0.1) == QUALITY_CLEARED;
    assert_int_equal(cleared, 1);
    /* And does not rise again between the two. */
    for (int i = 0; i < 1000; i++)
        assert_int_equal(add(&q, 1, 0.19), QUALITY_NOTHING);
    assert_false(q.alarm);
    assert_int_equal(add(&q, 500, 0.21), QUALITY_RAISED);
}

/* A batch moves the mean as its samples one by one would. */
static void test_batches(void **state)
{
    (void)state;
    struct quality one = {0}, batch = {0};
    for (int i = 0; i < 60; i++)
        add(&one, 1, 0.1);
    add(&batch, 60, 0.1);
    for (int i = 0; i < 40; i++)
        add(&one, 1, 0.15);
    for (int i = 0; i < 4; i++)
        add(&batch, 10, 0.15);
    assert_int_equal(one.samples, batch.samples);
    assert_true(fabs(one.error - batch.error) < 2e-3 && one.error > 0.1 && one.error < 0.15);
}

/* What a worker can write into its region. */
static void test_hostile_sums(void **state)
{
    (void)state;
    struct quality q = {0};
    struct pkv_model_quality most = {UINT64_MAX, UINT64_MAX, UINT64_MAX, 0}, few = {1, UINT64_MAX, UINT64_MAX, 0};
    quality_add(&q, &most, 200000);
    quality_add(&q, &most, 200000);
    quality_add(&q, &few, 200000);
    assert_true(q.samples == UINT64_MAX && q.mass <= 1 && q.mass >= 0);
    assert_true(q.error >= 0 && q.error <= QUALITY_ERROR_MAX_PPM * 1e-6);
    struct pkv_model_quality none = {0, 5, 5, 0};
    struct quality before = q;
    assert_int_equal(quality_add(&q, &none, 200000), QUALITY_NOTHING);
    assert_memory_equal(&q, &before, sizeof(q));
    /* Without a limit there is no alarm, and one that stands goes. */
    q = (struct quality){0};
    assert_int_equal(quality_add(&q, &few, 0), QUALITY_NOTHING);
    add(&q, 100, 0.5);
    quality_reset(&q);
    assert_true(q.alarm && !q.samples);
    assert_int_equal(add(&q, QUALITY_SAMPLES - 1, 0.1), QUALITY_NOTHING); /* a few good ones are no proof */
    assert_int_equal(add(&q, 1, 0.1), QUALITY_CLEARED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_share_holds),  cmocka_unit_test(test_no_long_stall), cmocka_unit_test(test_credit),
        cmocka_unit_test(test_measures),     cmocka_unit_test(test_alarm),         cmocka_unit_test(test_batches),
        cmocka_unit_test(test_hostile_sums),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
