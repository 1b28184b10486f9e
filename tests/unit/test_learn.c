/* `code` that calibrates itself: what it solves, what it shares, and what it refuses to take over. */
#include "gpu/scheme.h"
#include "tests/lib/test.h"
#include "tests/lib/text.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, Q = 4, KV = 2, DIM = 64, BITS = 64, TOKENS = 4100, SKIPPED = 16 };

static const struct pkv_geom geom = {
    .layers = LAYERS, .q_heads = Q, .kv_heads = KV, .head_dim = DIM, .dtype = PKV_F32, .sig_bits = BITS};

/* Gaussian vectors whose channels have a falling spread and share directions: something to find. */
static float *vectors(uint64_t seed, uint64_t count, float fall)
{
    float *x = test_floats(seed, count * DIM), *to = malloc(count * DIM * sizeof(*to));
    assert_non_null(to);
    for (uint64_t i = 0; i < count; i++)
        for (uint32_t d = 0; d < DIM; d++)
            to[i * DIM + d] = x[i * DIM + d] * powf(fall, (float)d) + 0.5f * x[i * DIM + (d * 7 + 3) % DIM] + 0.3f;
    free(x);
    return to;
}

static struct gpu_scheme *open_scheme(uint32_t kind)
{
    struct gpu_scheme *s = NULL;
    uint8_t digest[PKV_DIGEST_BYTES];
    if (gpu_scheme_open(kind, &geom, NULL, &s, digest) == -PKV_ERR_LAPACK)
        skip();
    assert_non_null(s);
    return s;
}

/* A `code` that gathers. */
static struct gpu_scheme *open_learner(float base)
{
    struct gpu_scheme *s = open_scheme(PKV_SCHEME_CODE);
    assert_int_equal(gpu_scheme_gather(s, base, DIM, false), 0);
    return s;
}

static void show_in(struct gpu_scheme *s, uint64_t context, uint32_t layer, uint64_t first, uint32_t tokens, const float *k,
                    const float *q)
{
    struct gpu_observation o = {.layer = layer, .tokens = tokens, .first_token = first, .context = context, .k = k, .q = q};
    gpu_scheme_observe(s, &o);
}

static void show(struct gpu_scheme *s, uint32_t layer, uint64_t first, uint32_t tokens, const float *k, const float *q)
{
    show_in(s, 32768, layer, first, tokens, k, q);
}

static struct gpu_scheme *calibrated(const float *k, const float *q)
{
    struct gpu_scheme *s = open_learner(0);
    for (uint32_t l = 0; l < LAYERS; l++) {
        show(s, l, 0, TOKENS, k, NULL);
        assert_false(gpu_scheme_gathered(s, l, 1));
        show(s, l, 0, TOKENS, NULL, q);
        assert_true(gpu_scheme_gathered(s, l, GPU_LEARN_TOKENS));
        assert_int_not_equal(s->learnt[l], SCHEME_SOLVED);
    }
    assert_false(gpu_scheme_settled(s));
    assert_int_equal(gpu_scheme_solve(s, true, NULL), 0);
    assert_true(gpu_scheme_settled(s) && !s->moments); /* they are large, and nothing needs them any more */
    return s;
}

/* (A (k - mean)) . (B q) is q . (k - mean), and every head spends its bits. */
static void test_maps(void **state)
{
    (void)state;
    float *k = vectors(1, (uint64_t)TOKENS * KV, 0.95f), *q = vectors(2, (uint64_t)TOKENS * Q, 0.9f);
    struct gpu_scheme *s = calibrated(k, q);
    for (uint64_t at = 0; at < LAYERS * KV; at++) {
        uint32_t bits = 0;
        for (uint32_t i = 0; i < DIM; i++) {
            assert_true(s->bits[at * DIM + i] <= SCHEME_BITS_MAX && s->step[at * DIM + i] > 0);
            assert_true(!i || s->bits[at * DIM + i] <= s->bits[at * DIM + i - 1]);
            bits += s->bits[at * DIM + i];
        }
        assert_int_equal(bits, BITS);
        for (uint32_t n = 0; n < 50; n++) {
            const float *x = k + (n * KV + at % KV) * DIM, *y = q + n * Q * DIM, *mean = s->mean + at * DIM;
            double exact = 0, mapped = 0, size = 0;
            for (uint32_t d = 0; d < DIM; d++)
                exact += ((double)x[d] - mean[d]) * y[d], size += fabs(((double)x[d] - mean[d]) * y[d]);
            for (uint32_t i = 0; i < DIM; i++) {
                double a = 0, b = 0;
                for (uint32_t d = 0; d < DIM; d++) {
                    a += s->k[0].weight[(at * DIM + i) * DIM + d] * ((double)x[d] - mean[d]);
                    b += s->q[0].weight[(at * DIM + i) * DIM + d] * (double)y[d];
                }
                mapped += a * b;
            }
            assert_true(fabs(exact - mapped) < 1e-4 * size);
        }
    }
    gpu_scheme_close(s);
    free(k), free(q);
}

/* Correlation over tokens of the estimated and the exact score of one query, averaged over queries. */
static double agreement(const struct gpu_scheme *s, const float *k, const float *q)
{
    double total = 0;
    for (uint32_t n = 0; n < 20; n++) {
        const float *y = q + (uint64_t)n * Q * DIM;
        float weights[BITS], unit;
        double sx = 0, sy = 0, sxx = 0, syy = 0, sxy = 0;
        s->verbs->weigh(s, &gpu_kernels_c, 0, 0, y, 1, 0.125f, weights, &unit);
        for (uint32_t t = 100; t < 1100; t++) {
            uint32_t words[BITS / 32];
            double exact = 0, estimate = 0;
            s->verbs->sign(s, &gpu_kernels_c, 0, 0, k + (uint64_t)t * KV * DIM, 1, words);
            for (uint32_t d = 0; d < DIM; d++)
                exact += (double)k[(uint64_t)t * KV * DIM + d] * y[d];
            for (uint32_t b = 0; b < BITS; b++)
                estimate += (words[b / 32] >> b % 32 & 1) * (double)weights[b];
            sx += exact, sy += estimate, sxx += exact * exact, syy += estimate * estimate, sxy += exact * estimate;
        }
        total += (1000 * sxy - sx * sy) / sqrt((1000 * sxx - sx * sx) * (1000 * syy - sy * sy)) / 20;
    }
    return total;
}

static void test_better_than_sign(void **state)
{
    (void)state;
    float *k = vectors(3, (uint64_t)TOKENS * KV, 0.95f), *q = vectors(4, (uint64_t)TOKENS * Q, 0.9f);
    struct gpu_scheme *code = calibrated(k, q), *sign = open_scheme(PKV_SCHEME_SIGN);
    show(sign, 0, 0, TOKENS, k, NULL);
    double ours = agreement(code, k, q), theirs = agreement(sign, k, q);
    print_message("# correlation with the exact scores at one bit a dimension: code %.3f, sign %.3f\n", ours, theirs);
    assert_true(ours > 0.9 && 1 - ours < 0.5 * (1 - theirs));
    gpu_scheme_close(code), gpu_scheme_close(sign);
    free(k), free(q);
}

static void assert_sign_alike(const struct gpu_scheme *x, const struct gpu_scheme *y, const float *k)
{
    for (uint32_t t = 0; t < 100; t++) {
        uint32_t a[2], b[2];
        x->verbs->sign(x, &gpu_kernels_c, 1, 1, k + (uint64_t)t * DIM, 1, a);
        y->verbs->sign(y, &gpu_kernels_c, 1, 1, k + (uint64_t)t * DIM, 1, b);
        assert_memory_equal(a, b, sizeof(a));
    }
}

/* Until a layer is solved it signs as `sign` does. */
static void test_sign_meanwhile(void **state)
{
    (void)state;
    float *k = vectors(5, (uint64_t)TOKENS * KV, 0.95f);
    struct gpu_scheme *code = open_scheme(PKV_SCHEME_CODE), *sign = open_scheme(PKV_SCHEME_SIGN);
    show(code, 1, 0, 600, k, NULL);
    show(sign, 1, 0, 600, k, NULL);
    assert_sign_alike(code, sign, k);
    gpu_scheme_close(code), gpu_scheme_close(sign);
    free(k);
}

static void assert_same_state(const struct gpu_scheme *x, const struct gpu_scheme *y)
{
    uint64_t bytes = gpu_scheme_state_bytes(x);
    char *a = malloc(bytes), *b = malloc(bytes);
    assert_non_null(a), assert_non_null(b);
    gpu_scheme_state_export(x, a), gpu_scheme_state_export(y, b);
    assert_memory_equal(a, b, bytes);
    free(a), free(b);
}

/* What each layer had gathered when it was copied is solved, whatever has come since; nothing is gathered beyond the end. */
static void test_early(void **state)
{
    (void)state;
    float *k = vectors(9, (uint64_t)TOKENS * KV, 0.95f), *q = vectors(10, (uint64_t)TOKENS * Q, 0.9f);
    struct gpu_scheme *whole = open_learner(1e5f), *early = open_learner(1e5f), *alone = open_learner(1e5f);
    struct gpu_scheme *end = open_learner(1e5f);
    for (uint32_t l = 0; l < LAYERS; l++) {
        show(whole, l, 0, 900, k, q);
        assert_false(gpu_scheme_gathered(whole, l, GPU_LEARN_EARLY));
        show(whole, l, 900, 124, k + 900 * KV * DIM, q + 900 * Q * DIM);
        assert_true(gpu_scheme_gathered(whole, l, GPU_LEARN_EARLY));
        gpu_scheme_gathered_copy(whole, l, early);
        for (uint32_t at = 1024; at < TOKENS; at += 128)
            show(whole, l, at, PKV_MIN(128u, TOKENS - at), k + (uint64_t)at * KV * DIM, q + (uint64_t)at * Q * DIM);
        show(alone, l, 0, 900, k, q), show(alone, l, 900, 124, k + 900 * KV * DIM, q + 900 * Q * DIM);
        show(end, l, 0, 900, k, q), show(end, l, 900, 124, k + 900 * KV * DIM, q + 900 * Q * DIM);
        for (uint32_t at = 1024; at < 4096; at += 128)
            show(end, l, at, 128, k + (uint64_t)at * KV * DIM, q + (uint64_t)at * Q * DIM);
    }
    assert_int_equal(whole->moments->k_tokens[0], 4080);
    struct gpu_scheme *all[] = {whole, early, alone, end};
    for (int i = 0; i < 4; i++)
        assert_int_equal(gpu_scheme_solve(all[i], true, NULL), 0);
    assert_same_state(early, alone), assert_same_state(whole, end);
    assert_memory_not_equal(early->k[0].weight, whole->k[0].weight, sizeof(float) * DIM * DIM);
    for (int i = 0; i < 4; i++)
        gpu_scheme_close(all[i]);
    free(k), free(q);
}

/* At a quarter of a bit a dimension a direction that queries rarely take is told from the others all the same. Keys vary alike
 * in all channels; queries live in the first quarter of them, but for one in 50, which looks along the last channels. */
static void test_few_bits(void **state)
{
    (void)state;
    enum { WIDE = 128, RARE = 120 };
    const struct pkv_geom wide = {.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = WIDE, .dtype = PKV_F32, .sig_bits = 32};
    float *k = test_floats(13, (uint64_t)TOKENS * WIDE), *q = test_floats(14, (uint64_t)TOKENS * WIDE);
    for (uint64_t i = 0; i < (uint64_t)TOKENS * WIDE; i++) {
        bool rare = i / WIDE % 50 == 0, channel = rare ? i % WIDE >= RARE : i % WIDE < WIDE / 4;
        q[i] = channel ? q[i] : 0;
        k[i] *= i % WIDE >= RARE ? 2 : 1;
    }
    struct gpu_scheme *s = NULL;
    uint8_t digest[PKV_DIGEST_BYTES];
    if (gpu_scheme_open(PKV_SCHEME_CODE, &wide, NULL, &s, digest) == -PKV_ERR_LAPACK)
        skip();
    assert_int_equal(gpu_scheme_gather(s, 0, WIDE, false), 0);
    show(s, 0, 0, TOKENS, k, NULL), show(s, 0, 0, TOKENS, NULL, q);
    assert_int_equal(gpu_scheme_solve(s, true, NULL), 0);
    double rare = 0, all = 0;
    for (uint32_t i = 0; i < WIDE; i++)
        for (uint32_t d = 0; d < WIDE; d++) {
            double share = s->bits[i] * (double)s->k[0].weight[i * WIDE + d] * s->q[0].weight[i * WIDE + d];
            all += share, rare += d >= RARE ? share : 0;
        }
    print_message("# of 32 bits, %.1f go to the rare directions\n", rare);
    assert_true(fabs(all - 32) < 0.01 && rare > 4);
    gpu_scheme_close(s);
    free(k), free(q);
}

/* Vectors of `heads` heads at positions from `first` on; half-split pairs. */
static float *with_rope(const float *x, uint64_t first, uint32_t tokens, uint32_t heads)
{
    float *to = malloc((uint64_t)tokens * heads * DIM * sizeof(*to));
    assert_non_null(to);
    for (uint64_t i = 0; i < (uint64_t)tokens * heads; i++)
        for (uint32_t j = 0; j < DIM / 2; j++) {
            double angle = (double)(first + i / heads) * pow(1e5, -2.0 * j / DIM), c = cos(angle), s = sin(angle);
            float a = x[i * DIM + j], b = x[i * DIM + j + DIM / 2];
            to[i * DIM + j] = (float)(a * c - b * s), to[i * DIM + j + DIM / 2] = (float)(a * s + b * c);
        }
    return to;
}

/* Relative distance of the keys' moments that two schemes gathered from the same vectors at other positions. */
static double moment_distance(const float *x, uint64_t first, uint64_t other, float base)
{
    enum { SEEN = 1500 };
    struct gpu_scheme *s[2];
    double difference = 0, size = 0;
    for (int i = 0; i < 2; i++) {
        float *k = with_rope(x, i ? other : first, SEEN, KV);
        s[i] = open_learner(base);
        show(s[i], 0, i ? other : first, SEEN, k, NULL);
        free(k);
    }
    for (uint32_t i = 0; i < DIM * DIM; i++) {
        double a = s[0]->moments->k[i], b = s[1]->moments->k[i];
        difference += (a - b) * (a - b), size += a * a;
    }
    gpu_scheme_close(s[0]), gpu_scheme_close(s[1]);
    return sqrt(difference / size);
}

/* Positions do not matter once keys are turned to random ones; they do where they are not. */
static void test_positions(void **state)
{
    (void)state;
    float *x = vectors(6, 1500 * KV, 0.97f);
    for (uint32_t i = 0; i < 1500 * KV; i++)
        x[i * DIM + DIM / 2 - 2] += 4, x[i * DIM + DIM / 2 - 3] += 4; /* strong in slow pairs: a prefix sees one side of it */
    double turned = moment_distance(x, SKIPPED, 60000, 1e5f), as_they_are = moment_distance(x, SKIPPED, 60000, 0);
    print_message("# moments of a prefix and of far tokens differ by %.3f turned, %.3f as they are\n", turned, as_they_are);
    assert_true(turned < 0.15 && as_they_are > 2 * turned);
    free(x);
}

/* A sequence four times as long as the one that calibrated finds its tokens too. */
static void test_growth(void **state)
{
    (void)state;
    enum { SLOW = DIM / 2 - 8 }; /* a pair that the first context turns by a tenth of a circle, the other by half of one */
    float *x = vectors(11, (uint64_t)TOKENS * KV, 0.97f), *y = vectors(12, (uint64_t)TOKENS * Q, 0.97f);
    for (uint32_t i = 0; i < TOKENS * KV; i++)
        x[i * DIM + SLOW] += 16;
    for (uint32_t i = 0; i < TOKENS * Q; i++)
        y[i * DIM + SLOW] += 16;
    float *k = with_rope(x, 0, TOKENS, KV), *q = with_rope(y, 0, TOKENS, Q);
    struct gpu_scheme *s = open_learner(1e5f);
    show_in(s, 4096, 0, 0, TOKENS, k, q), show_in(s, 4096, 1, 0, TOKENS, k, q);
    assert_int_equal(gpu_scheme_solve(s, true, NULL), 0);
    float *far_k = calloc((uint64_t)TOKENS * KV * DIM, sizeof(float)), *far_q = with_rope(y, 16384, 20, Q);
    assert_non_null(far_k);
    for (uint32_t t = 0; t < 1100; t++) { /* spread over the long context */
        float *at = with_rope(x + (uint64_t)t * KV * DIM, (uint64_t)t * 15, 1, KV);
        memcpy(far_k + (uint64_t)t * KV * DIM, at, KV * DIM * sizeof(float));
        free(at);
    }
    double within = agreement(s, k, q), beyond = agreement(s, far_k, far_q);
    print_message("# correlation with the exact scores: %.3f within the context, %.3f in one four times as long\n", within,
                  beyond);
    assert_true(within > 0.9 && beyond > 0.9);
    gpu_scheme_close(s);
    free(x), free(y), free(k), free(q), free(far_k), free(far_q);
}

static void test_state(void **state)
{
    (void)state;
    float *k = vectors(7, (uint64_t)TOKENS * KV, 0.95f), *q = vectors(8, (uint64_t)TOKENS * Q, 0.9f);
    struct gpu_scheme *s = calibrated(k, q), *other = open_scheme(PKV_SCHEME_CODE);
    uint64_t bytes = gpu_scheme_state_bytes(s);
    char *good = malloc(bytes), *bad = malloc(bytes);
    assert_non_null(good), assert_non_null(bad);
    gpu_scheme_state_export(s, good);
    uint64_t bits_at = bytes - PKV_ALIGN_UP((uint64_t)LAYERS * KV * DIM, 8u), learnt_at = 8 + sizeof(geom) + 8;
    memcpy(bad, good, bytes);
    bad[bits_at] = SCHEME_BITS_MAX + 1;
    assert_int_equal(gpu_scheme_state_import(other, bad, bytes), -PKV_ERR_FILE_FIT);
    bad[bits_at] = good[bits_at], bad[bits_at + 1] = (char)(good[bits_at + 1] ? 0 : 1); /* too few, too many */
    assert_int_equal(gpu_scheme_state_import(other, bad, bytes), -PKV_ERR_FILE_FIT);
    memcpy(bad, good, bytes), bad[learnt_at] = 0;
    assert_int_equal(gpu_scheme_state_import(other, bad, bytes), -PKV_ERR_FILE_FIT);
    memcpy(bad, good, bytes), memset(bad + learnt_at + 8, 0xff, 4); /* a mean that is NaN */
    assert_int_equal(gpu_scheme_state_import(other, bad, bytes), -PKV_ERR_FILE_FIT);
    assert_int_equal(gpu_scheme_state_import(other, good, bytes - 8), -PKV_ERR_FILE_FIT);
    assert_false(gpu_scheme_settled(other));
    assert_int_equal(gpu_scheme_state_import(other, good, bytes), 0);
    assert_true(gpu_scheme_settled(other));
    assert_sign_alike(s, other, k);
    gpu_scheme_close(s), gpu_scheme_close(other);
    free(k), free(q), free(good), free(bad);
}

/* Numbers that nothing can be solved from: what is not finite is not taken in; zeros, or too few tokens, cannot be solved. */
static void test_nothing_to_solve(void **state)
{
    (void)state;
    float *zero = calloc((uint64_t)TOKENS * Q * DIM, sizeof(*zero));
    assert_non_null(zero);
    for (uint32_t tokens = 1000; tokens <= TOKENS; tokens += TOKENS - 1000) {
        struct gpu_scheme *s = open_learner(0);
        zero[5] = NAN;
        show(s, 0, 0, tokens, zero, zero);
        assert_int_equal(s->moments->k_tokens[0], 0);
        zero[5] = 0;
        for (uint32_t l = 0; l < LAYERS; l++)
            show(s, l, 0, tokens, zero, zero);
        assert_int_equal(gpu_scheme_solve(s, false, NULL), -PKV_ERR_NOT_FINITE);
        assert_true(!s->moments && s->learnt[0] == 1);
        gpu_scheme_close(s);
    }
    struct gpu_scheme *sign = open_scheme(PKV_SCHEME_SIGN);
    assert_int_equal(gpu_scheme_gather(sign, 0, DIM, false), -PKV_ERR_UNSUPPORTED);
    gpu_scheme_close(sign);
    free(zero);
}

/* One layer that cannot be solved is left to `sign`, unless all must be; whoever takes that state over has settled too. */
static void test_one_layer_cannot(void **state)
{
    (void)state;
    float *k = vectors(9, (uint64_t)TOKENS * KV, 0.95f), *q = vectors(10, (uint64_t)TOKENS * Q, 0.9f);
    float *zero = calloc((uint64_t)TOKENS * Q * DIM, sizeof(*zero));
    assert_non_null(zero);
    for (int all = 0; all < 2; all++) {
        struct gpu_scheme *s = open_learner(0), *other = open_scheme(PKV_SCHEME_CODE);
        show(s, 0, 0, TOKENS, k, q), show(s, 1, 0, TOKENS, k, zero);
        assert_int_equal(gpu_scheme_solve(s, all, NULL), all ? -PKV_ERR_NOT_FINITE : 0);
        assert_true(s->learnt[0] == SCHEME_SOLVED && s->learnt[1] == 1);
        uint64_t bytes = gpu_scheme_state_bytes(s);
        void *kept = malloc(bytes);
        assert_non_null(kept);
        gpu_scheme_state_export(s, kept);
        assert_int_equal(gpu_scheme_state_import(other, kept, bytes), 0);
        assert_true(gpu_scheme_settled(other));
        assert_sign_alike(s, other, k);
        gpu_scheme_close(s), gpu_scheme_close(other);
        free(kept);
    }
    bool stop = true;
    struct gpu_scheme *s = open_learner(0);
    show(s, 0, 0, TOKENS, k, q), show(s, 1, 0, TOKENS, k, q);
    assert_int_equal(gpu_scheme_solve(s, true, &stop), -PKV_ERR_BUSY);
    assert_true(!s->moments && s->learnt[0] == 1);
    gpu_scheme_close(s);
    free(k), free(q), free(zero);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_maps),
        cmocka_unit_test(test_better_than_sign),
        cmocka_unit_test(test_sign_meanwhile),
        cmocka_unit_test(test_positions),
        cmocka_unit_test(test_state),
        cmocka_unit_test(test_nothing_to_solve),
        cmocka_unit_test(test_one_layer_cannot),
        cmocka_unit_test(test_early),
        cmocka_unit_test(test_growth),
        cmocka_unit_test(test_few_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
