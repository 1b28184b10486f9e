/* Schemes with weights from a file, against their definitions in double precision. */
#include "gpu/scheme.h"
#include "tests/lib/tensors.h"
#include "tests/lib/test.h"
#include "tests/lib/text.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LAYERS = 2, Q = 4, KV = 2, GROUP = Q / KV, DIM = 64, BITS = 64, TOKENS = 64 };

static const struct pkv_geom geom = {
    .layers = LAYERS, .q_heads = Q, .kv_heads = KV, .head_dim = DIM, .dtype = PKV_F32, .sig_bits = BITS};

struct signed_block {
    uint32_t words[KV * TOKENS * BITS / 32];
    float rows[KV * TOKENS * 2 * DIM];
    int8_t weights[Q * BITS];
    float scales[Q];
};

static uint32_t bit(const struct signed_block *b, uint32_t head, uint32_t token, uint32_t n)
{
    return b->words[pkv_geom_sig_index(&geom, head, token, n / 32)] >> n % 32 & 1;
}

/* Plain C, tokens cut in pieces, queries one by one: the same bits. */
static void alike_in_pieces(const struct gpu_scheme *scheme, const struct signed_block *b)
{
    enum { QUERIES = 21 };
    static struct signed_block other;
    static int8_t weights[2][QUERIES * Q * BITS];
    static float scales[2][QUERIES * Q];
    float *q = test_floats(77, QUERIES * Q * DIM);
    struct gpu *gpu[2] = {NULL, NULL};
    assert_int_equal(gpu_open(&(struct gpu_options){.threads = 1}, &gpu[0]), 0);
    assert_int_equal(gpu_open(&(struct gpu_options){.threads = 1, .isa = "c"}, &gpu[1]), 0);
    uint64_t bases[2] = {(uint64_t)(uintptr_t)b->rows, (uint64_t)(uintptr_t)other.words};
    struct pkv_block_ref ref = {pkv_place(PKV_TIER_POOL, 0, 0, 1), pkv_place(PKV_TIER_POOL, 1, 0, 1)};
    struct gpu_sign_args sign = {
        .geom = &geom, .space = {{NULL, bases, NULL}}, .scheme = scheme, .layer = 1, .blocks = &ref, .tokens = 1};
    for (uint32_t n = 1; sign.first_token < TOKENS; n = n * 2 % 31, sign.first_token += sign.tokens) {
        sign.tokens = (uint32_t)PKV_MIN(n, TOKENS - sign.first_token);
        assert_int_equal(gpu_sign(gpu[1], &sign), 0);
    }
    assert_memory_equal(other.words, b->words, sizeof(b->words));
    for (uint32_t i = 0; i <= QUERIES; i++) { /* all, then each */
        uint32_t at = i ? i - 1 : 0;
        struct gpu_weights_args weigh = {.geom = &geom,
                                         .scheme = scheme,
                                         .layer = 1,
                                         .queries = i ? 1 : QUERIES,
                                         .q = q + at * Q * DIM,
                                         .ret_weights = weights[i > 0] + at * Q * BITS,
                                         .ret_scales = scales[i > 0] + at * Q};
        assert_int_equal(gpu_weights(gpu[i > 0], &weigh), 0);
    }
    assert_memory_equal(weights[0], weights[1], sizeof(weights[0]));
    assert_memory_equal(scales[0], scales[1], sizeof(scales[0]));
    gpu_close(gpu[0]), gpu_close(gpu[1]);
    free(q);
}

/* Signs 64 tokens of layer 1 and weighs one query. */
static void use_open(const struct gpu_scheme *scheme, const float *k, const float *q, struct signed_block *b)
{
    struct gpu *gpu = NULL;
    assert_int_equal(gpu_open(&(struct gpu_options){.threads = 1}, &gpu), 0);
    uint64_t bases[2] = {(uint64_t)(uintptr_t)b->rows, (uint64_t)(uintptr_t)b->words};
    struct pkv_block_ref ref = {pkv_place(PKV_TIER_POOL, 0, 0, 1), pkv_place(PKV_TIER_POOL, 1, 0, 1)};
    struct gpu_space space = {{NULL, bases, NULL}};
    struct gpu_append_args append = {.geom = &geom, .space = space, .blocks = &ref, .tokens = TOKENS, .k = k, .v = k};
    struct gpu_sign_args sign = {.geom = &geom, .space = space, .scheme = scheme, .layer = 1, .blocks = &ref, .tokens = TOKENS};
    struct gpu_weights_args weigh = {
        .geom = &geom, .scheme = scheme, .layer = 1, .queries = 1, .q = q, .ret_weights = b->weights, .ret_scales = b->scales};
    assert_int_equal(gpu_append(gpu, &append), 0);
    assert_int_equal(gpu_sign(gpu, &sign), 0);
    assert_int_equal(gpu_weights(gpu, &weigh), 0);
    gpu_close(gpu);
    alike_in_pieces(scheme, b);
}

/* Opens the scheme from the file (which goes) and uses it. */
static int use(uint32_t kind, char *path, const float *k, const float *q, struct signed_block *b)
{
    struct gpu_scheme *scheme = NULL;
    uint8_t digest[PKV_DIGEST_BYTES];
    int r = gpu_scheme_open(kind, &geom, path, &scheme, digest);
    unlink(path), free(path);
    if (r)
        return r;
    assert_true(gpu_scheme_settled(scheme));
    assert_false(
        gpu_scheme_observe(scheme, &(struct gpu_observation){.layer = 1, .tokens = TOKENS, .context = TOKENS, .k = k}));
    use_open(scheme, k, q, b);
    gpu_scheme_close(scheme);
    return 0;
}

static double product(const float *w, const float *x, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += (double)w[i] * x[i];
    return sum;
}

/* A bit may differ from its definition only where the number is within rounding of zero. */
static void assert_bit(uint32_t got, double value)
{
    if (fabs(value) > 1e-4)
        assert_int_equal(got, value > 0);
}

static struct signed_block block;

static void test_linear(void **state)
{
    (void)state;
    float *w = test_floats(1, LAYERS * KV * BITS * DIM), *mean = test_floats(2, LAYERS * KV * DIM);
    float *k = test_floats(3, TOKENS * KV * DIM), *q = test_floats(4, Q * DIM);
    struct test_tensor tensors[] = {{"k.weight", 4, {LAYERS, KV, BITS, DIM}, w}, {"k.mean", 3, {LAYERS, KV, DIM}, mean}};
    for (int signs = 0; signs < 2; signs++) {
        char *path = test_tensors(signs ? "\"query\":\"sign\"" : "\"query\":\"value\"", tensors, 2);
        assert_int_equal(use(PKV_SCHEME_LINEAR, path, k, q, &block), 0);
        for (uint32_t h = 0; h < KV; h++)
            for (uint32_t t = 0; t < TOKENS; t++)
                for (uint32_t n = 0; n < BITS; n++) {
                    float c[DIM];
                    for (uint32_t d = 0; d < DIM; d++)
                        c[d] = k[(t * KV + h) * DIM + d] - mean[(KV + h) * DIM + d];
                    assert_bit(bit(&block, h, t, n), product(w + ((KV + h) * BITS + n) * DIM, c, DIM));
                }
        for (uint32_t h = 0; h < Q; h++) {
            double most = 0;
            for (uint32_t n = 0; n < BITS; n++)
                most = fmax(most, fabs(product(w + ((KV + h / GROUP) * BITS + n) * DIM, q + h * DIM, DIM)));
            for (uint32_t n = 0; n < BITS; n++) {
                double value = product(w + ((KV + h / GROUP) * BITS + n) * DIM, q + h * DIM, DIM);
                if (signs && fabs(value) > 1e-4)
                    assert_int_equal(block.weights[h * BITS + n], value > 0 ? 1 : -1);
                else if (!signs)
                    assert_true(fabs(block.weights[h * BITS + n] - value * 127 / most) < 0.51);
            }
        }
    }
    /* Weights of +-1 order tokens as the plain Hamming distance to the query's own signature does. */
    for (uint32_t t = 0; t < TOKENS; t++) {
        int score = 0, ones = 0, distance = 0;
        for (uint32_t n = 0; n < BITS; n++) {
            uint32_t b = bit(&block, 0, t, n), own = block.weights[n] > 0;
            score += b ? block.weights[n] : 0;
            distance += b != own;
            ones += (int)own;
        }
        assert_int_equal(distance, ones - score);
    }
    free(w), free(mean), free(k), free(q);
}

static void mlp(const float *w0, const float *b0, const float *w1, uint32_t at, uint32_t hidden, uint32_t bits, const float *x,
                double *out)
{
    float h[64];
    for (uint32_t i = 0; i < hidden; i++) {
        double v = product(w0 + ((uint64_t)at * hidden + i) * DIM, x, DIM) + b0[at * hidden + i];
        h[i] = (float)(v / (1 + exp(-v)));
    }
    for (uint32_t i = 0; i < bits; i++)
        out[i] = product(w1 + ((uint64_t)at * bits + i) * hidden, h, hidden);
}

static void test_hash(void **state)
{
    (void)state;
    enum { HIDDEN = 48, EACH = BITS / GROUP };
    float *w0 = test_floats(5, LAYERS * Q * HIDDEN * DIM), *b0 = test_floats(6, LAYERS * Q * HIDDEN);
    float *w1 = test_floats(7, LAYERS * Q * EACH * HIDDEN);
    float *k = test_floats(8, TOKENS * KV * DIM), *q = test_floats(9, Q * DIM);
    struct test_tensor tensors[] = {
        {"k.0.weight", 4, {LAYERS, Q, HIDDEN, DIM}, w0},  {"k.0.bias", 3, {LAYERS, Q, HIDDEN}, b0},
        {"k.1.weight", 4, {LAYERS, Q, EACH, HIDDEN}, w1}, {"q.0.weight", 4, {LAYERS, Q, HIDDEN, DIM}, w0},
        {"q.0.bias", 3, {LAYERS, Q, HIDDEN}, b0},         {"q.1.weight", 4, {LAYERS, Q, EACH, HIDDEN}, w1}};
    assert_int_equal(use(PKV_SCHEME_HASH, test_tensors(NULL, tensors, 6), k, q, &block), 0);
    for (uint32_t t = 0; t < TOKENS; t++)
        for (uint32_t h = 0; h < Q; h++) {
            double out[EACH];
            mlp(w0, b0, w1, Q + h, HIDDEN, EACH, k + (t * KV + h / GROUP) * DIM, out);
            for (uint32_t n = 0; n < EACH; n++)
                assert_bit(bit(&block, h / GROUP, t, h % GROUP * EACH + n), out[n]);
        }
    for (uint32_t h = 0; h < Q; h++) {
        double out[EACH];
        mlp(w0, b0, w1, Q + h, HIDDEN, EACH, q + h * DIM, out);
        for (uint32_t n = 0; n < BITS; n++)
            if (n / EACH != h % GROUP)
                assert_int_equal(block.weights[h * BITS + n], 0);
            else if (fabs(out[n % EACH]) > 1e-4)
                assert_int_equal(block.weights[h * BITS + n], out[n % EACH] > 0 ? 1 : -1);
    }
    tensors[5].shape[2] = EACH / 2; /* half the bits: the file does not fit */
    assert_int_equal(use(PKV_SCHEME_HASH, test_tensors(NULL, tensors, 6), k, q, &block), -PKV_ERR_FILE_FIT);
    assert_int_equal(use(PKV_SCHEME_HASH, test_tensors(NULL, tensors, 3), k, q, &block), -PKV_ERR_FILE_FIT);
    free(w0), free(b0), free(w1), free(k), free(q);
}

/* `code` with the identity as its transform: two bits each of 32 dimensions. Its scores estimate q . k. */
static void test_code(void **state)
{
    (void)state;
    enum { DIMS = 32 };
    static float w[LAYERS * KV * DIMS * DIM], low[LAYERS * KV * DIMS], step[LAYERS * KV * DIMS], bits[LAYERS * KV * DIMS];
    for (uint32_t i = 0; i < LAYERS * KV * DIMS; i++) {
        w[i * DIM + i % DIMS] = 1;
        low[i] = -1.96f, step[i] = 0.98f, bits[i] = 2;
    }
    float *k = test_floats(10, TOKENS * KV * DIM), *q = test_floats(11, Q * DIM);
    struct test_tensor tensors[] = {{"k.weight", 4, {LAYERS, KV, DIMS, DIM}, w},
                                    {"q.weight", 4, {LAYERS, KV, DIMS, DIM}, w},
                                    {"k.low", 3, {LAYERS, KV, DIMS}, low},
                                    {"k.step", 3, {LAYERS, KV, DIMS}, step},
                                    {"k.bits", 3, {LAYERS, KV, DIMS}, bits}};
    assert_int_equal(use(PKV_SCHEME_CODE, test_tensors(NULL, tensors, 5), k, q, &block), 0);
    double xy = 0, xx = 0, yy = 0, mx = 0, my = 0;
    for (uint32_t t = 0; t < TOKENS; t++) {
        double score = 0, exact = 0;
        for (uint32_t i = 0; i < DIMS; i++) {
            float value = k[(t * KV + 1) * DIM + i];
            double level = fmin(3, fmax(0, floor((value + 1.96f) / 0.98f)));
            assert_int_equal(bit(&block, 1, t, 2 * i) + 2 * bit(&block, 1, t, 2 * i + 1), level);
            exact += (double)q[3 * DIM + i] * value;
        }
        for (uint32_t n = 0; n < BITS; n++)
            score += (int)bit(&block, 1, t, n) * block.weights[3 * BITS + n] * (double)block.scales[3];
        exact *= log2(exp(1)) / sqrt(DIM);
        mx += score / TOKENS, my += exact / TOKENS, xy += score * exact, xx += score * score, yy += exact * exact;
    }
    double covariance = xy - TOKENS * mx * my, spread = xx - TOKENS * mx * mx, exact = yy - TOKENS * my * my;
    assert_true(covariance / sqrt(spread * exact) > 0.9);
    assert_true(covariance / exact > 0.75 && covariance / exact < 1.25); /* and its scale is right */
    bits[5] = 3;                                                         /* 65 bits in one head */
    assert_int_equal(use(PKV_SCHEME_CODE, test_tensors(NULL, tensors, 5), k, q, &block), -PKV_ERR_FILE_FIT);
    bits[5] = 2, step[3] = 0;
    assert_int_equal(use(PKV_SCHEME_CODE, test_tensors(NULL, tensors, 5), k, q, &block), -PKV_ERR_FILE_FIT);
    free(k), free(q);
}

static void test_refusals(void **state)
{
    (void)state;
    struct gpu_scheme *scheme;
    uint8_t digest[PKV_DIGEST_BYTES];
    float w[4] = {0};
    struct test_tensor small = {"k.weight", 4, {1, 1, 2, 2}, w};
    assert_int_equal(gpu_scheme_open(PKV_SCHEME_LINEAR, &geom, NULL, &scheme, digest), -PKV_ERR_FILE_NEEDED);
    assert_int_equal(gpu_scheme_open(PKV_SCHEME_HASH, &geom, "/nonexistent", &scheme, digest), -PKV_ERR_FILE_OPEN);
    assert_int_equal(gpu_scheme_open(99, &geom, NULL, &scheme, digest), -PKV_ERR_SCHEME);
    for (uint32_t kind = PKV_SCHEME_SIGN; kind <= PKV_SCHEME_HASH; kind++) {
        char *path = test_tensors("\"unit\":\"-1\"", &small, 1);
        assert_int_equal(gpu_scheme_open(kind, &geom, path, &scheme, digest), -PKV_ERR_FILE_FIT);
        unlink(path), free(path);
    }
}

/* `sign` from a file does what the same numbers do when they are learnt. */
static void test_sign(void **state)
{
    (void)state;
    static struct signed_block learnt;
    float *k = test_floats(12, 200 * KV * DIM), *q = test_floats(13, Q * DIM);
    struct gpu_scheme *s = NULL;
    uint8_t digest[PKV_DIGEST_BYTES];
    assert_int_equal(gpu_scheme_open(PKV_SCHEME_SIGN, &geom, NULL, &s, digest), 0);
    for (uint32_t l = 0; l < LAYERS; l++) {
        struct gpu_observation o = {.layer = l, .tokens = 200, .context = 200, .k = k};
        assert_true(gpu_scheme_observe(s, &o));
    }
    struct test_tensor tensors[] = {{"k.mean", 3, {LAYERS, KV, DIM}, s->mean},
                                    {"k.deviation", 3, {LAYERS, KV, BITS}, s->deviation}};
    use_open(s, k, q, &learnt);
    assert_int_equal(use(PKV_SCHEME_SIGN, test_tensors(NULL, tensors, 2), k, q, &block), 0);
    assert_memory_equal(block.words, learnt.words, sizeof(block.words));
    assert_memory_equal(block.weights, learnt.weights, sizeof(block.weights));
    assert_memory_equal(block.scales, learnt.scales, sizeof(block.scales));
    tensors[0].name = "mean";
    assert_int_equal(use(PKV_SCHEME_SIGN, test_tensors(NULL, tensors, 2), k, q, &block), -PKV_ERR_FILE_FIT);
    tensors[0].name = "k.mean", s->deviation[7] = -1;
    assert_int_equal(use(PKV_SCHEME_SIGN, test_tensors(NULL, tensors, 2), k, q, &block), -PKV_ERR_FILE_FIT);
    gpu_scheme_close(s);
    free(k), free(q);
}

/* What a file says of itself must be what the model says; each disagreement has its sentence. */
static void test_metadata(void **state)
{
    (void)state;
    static const struct {
        const char *meta, *sentence;
        int result;
    } cases[] = {
        {"\"scheme\":\"linear\",\"layers\":\"2\",\"q_heads\":\"4\",\"kv_heads\":\"2\",\"head_dim\":\"64\",\"bits\":\"64\"",
         "no error", 0},
        {"\"scheme\":\"hash\"", "another signature scheme", -PKV_ERR_FILE_SCHEME},
        {"\"scheme\":\"\"", "another signature scheme", -PKV_ERR_FILE_SCHEME},
        {"\"layers\":\"3\"", "other layers", -PKV_ERR_FILE_GEOMETRY},
        {"\"q_heads\":\"8\"", "heads", -PKV_ERR_FILE_GEOMETRY},
        {"\"kv_heads\":\"4\"", "heads", -PKV_ERR_FILE_GEOMETRY},
        {"\"head_dim\":\"128\"", "head_dim", -PKV_ERR_FILE_GEOMETRY},
        {"\"head_dim\":\"64x\"", "head_dim", -PKV_ERR_FILE_GEOMETRY},
        {"\"bits\":\"128\"", "another size", -PKV_ERR_FILE_BITS},
        {"\"query\":\"both\"", "lacks a tensor", -PKV_ERR_FILE_FIT},
        {"\"unit\":\"x\"", "lacks a tensor", -PKV_ERR_FILE_FIT}};
    float *w = test_floats(14, LAYERS * KV * BITS * DIM), *k = test_floats(15, TOKENS * KV * DIM);
    struct test_tensor tensor = {"k.weight", 4, {LAYERS, KV, BITS, DIM}, w};
    for (uint32_t i = 0; i < PKV_ARRAY_LEN(cases); i++) {
        int r = use(PKV_SCHEME_LINEAR, test_tensors(cases[i].meta, &tensor, 1), k, k, &block);
        assert_int_equal(r, cases[i].result);
        assert_non_null(strstr(pkv_err_text((uint32_t)-r), cases[i].sentence));
    }
    free(w), free(k);
}

/* The vector form of SiLU is near the library's, the same in all instruction sets, and finite where it should be. */
static void test_silu(void **state)
{
    (void)state;
    enum { COUNT = 4096 };
    static const char *const isas[] = {"c", "avx2", "avx512"};
    float *x = test_floats(3, COUNT), first[COUNT], to[COUNT];
    for (uint32_t i = 0; i < COUNT; i++)
        x[i] *= i < 16 ? 1e6f : i < 2048 ? 5 : 60;
    x[16] = 0, x[17] = -0.0f, x[18] = 3e38f, x[19] = -3e38f;
    for (uint32_t n = 0; n < PKV_ARRAY_LEN(isas); n++) {
        const struct gpu_kernels *kernels = gpu_kernels_choose(isas[n]);
        memcpy(to, x, sizeof(to));
        if (kernels)
            kernels->silu(to, COUNT);
        if (!n)
            memcpy(first, to, sizeof(to));
        for (uint32_t i = 0; i < COUNT && kernels; i++) {
            double exact = x[i] / (1 + exp(-(double)x[i]));
            assert_true(fabs(to[i] - exact) <= 1e-6 * fabs(exact) + 1e-30);
        }
        if (kernels)
            assert_memory_equal(first, to, sizeof(to));
    }
    free(x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear), cmocka_unit_test(test_hash),     cmocka_unit_test(test_code),
        cmocka_unit_test(test_sign),   cmocka_unit_test(test_metadata), cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_silu),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
