/* Samples that the audit takes of a batch's steps, held against pkv_audit at each of the lengths that the sequence had. */
#ifndef TESTS_INTEGRATION_SAMPLES_H
#define TESTS_INTEGRATION_SAMPLES_H

#include "tests/integration/stat.h"

enum { SAMPLES_STEPS = 2000 };

struct samples {
    uint64_t count, mass_ppm, error_ppm; /* that were counted so far */
    uint32_t steps, found;
    double mass[SAMPLES_STEPS], error[SAMPLES_STEPS]; /* as pkv_audit has them, of the query of all steps */
};

static inline void samples_count(struct samples *s, const struct test_daemon *d)
{
    s->count = stat_number(d, "totals", "samples");
    s->mass_ppm = stat_number(d, "totals", "sample_mass_ppm"), s->error_ppm = stat_number(d, "totals", "sample_error_ppm");
}

/* After a step that has ended, of a batch of one sequence with one layer and one kv head. */
static inline void samples_step(struct samples *s, const struct test_daemon *d, struct pkv *kv, struct pkv_seq *seq,
                                const void *q, const struct pkv_budget *b, double tolerance)
{
    struct samples before = {.count = s->count, .mass_ppm = s->mass_ppm, .error_ppm = s->error_ppm};
    assert_true(s->steps < SAMPLES_STEPS);
    GOOD(kv, pkv_audit(seq, 1, 0, q, b, &s->mass[s->steps], &s->error[s->steps]));
    s->steps++;
    if (stat_number(d, "totals", "samples") == s->count)
        return;
    samples_count(s, d);
    assert_int_equal(s->count, before.count + 1);
    double mass = (double)(s->mass_ppm - before.mass_ppm) * 1e-6, error = (double)(s->error_ppm - before.error_ppm) * 1e-6;
    uint32_t of = 0;
    while (of < s->steps && (fabs(s->mass[of] - mass) > tolerance || fabs(s->error[of] - error) > tolerance))
        of++;
    if (of == s->steps)
        fail_msg("a sample of mass %g, error %g: of none of %u steps", mass, error, s->steps);
    s->found++;
}

#endif
