/* Validators: what is good passes, and each field that can be wrong is refused with its own error. */
#include "tests/lib/test.h"

#include "proto/check.h"

#include <math.h>
#include <string.h>

#define DATA_BYTES (1ull << 20)

static struct pkv_geom geom(void)
{
    return (struct pkv_geom){.layers = 32, .q_heads = 32, .kv_heads = 8, .head_dim = 128, .dtype = PKV_F16, .sig_bits = 128};
}

static void test_geom(void **state)
{
    (void)state;
    struct pkv_geom good = geom(), g = good;
    assert_int_equal(pkv_check_geom(&g), PKV_ERR_OK);
    g = good, g.dtype = PKV_DTYPES;
    assert_int_equal(pkv_check_geom(&g), PKV_ERR_DTYPE);
    g = good, g.head_dim = 100;
    assert_int_equal(pkv_check_geom(&g), PKV_ERR_GEOMETRY);
    g = good, g.kv_heads = 0;
    assert_int_equal(pkv_check_geom(&g), PKV_ERR_GEOMETRY);
    g = good, g.q_heads = 33;
    assert_int_equal(pkv_check_geom(&g), PKV_ERR_GEOMETRY);
    g = good, g.q_heads = 136;
    assert_int_equal(pkv_check_geom(&g), PKV_ERR_GEOMETRY);
    g = good, g.layers = PKV_LAYERS_MAX + 1;
    assert_int_equal(pkv_check_geom(&g), PKV_ERR_GEOMETRY);
    g = good, g.sig_bits = 48;
    assert_int_equal(pkv_check_geom(&g), PKV_ERR_SIG_BITS);
    g = good, g.sig_bits = 16;
    assert_int_equal(pkv_check_geom(&g), PKV_ERR_SIG_BITS);
    g = good, g.sig_bits = 0; /* no bits and no scheme: either alone is refused */
    assert_int_equal(pkv_check_geom(&g), PKV_ERR_OK);
    for (uint32_t scheme = 0; scheme < PKV_SCHEMES; scheme++) {
        bool none = scheme == PKV_SCHEME_NONE;
        assert_int_equal(pkv_check_scheme(scheme, &g), none ? PKV_ERR_OK : PKV_ERR_SIG_BITS);
        assert_int_equal(pkv_check_scheme(scheme, &good), none ? PKV_ERR_SIG_BITS : PKV_ERR_OK);
    }
    g = good, g.reserved = 1;
    assert_int_equal(pkv_check_geom(&g), PKV_ERR_RESERVED);
    g = good, g.sig_bits = 32, g.q_heads = 24;
    assert_int_equal(pkv_check_scheme(PKV_SCHEME_HASH, &g), PKV_ERR_SIG_BITS);
    assert_int_equal(pkv_check_scheme(PKV_SCHEMES, &g), PKV_ERR_SCHEME);
    assert_int_equal(pkv_check_scheme(PKV_SCHEME_SIGN, &g), PKV_ERR_OK);
}

static struct pkv_hello hello(void)
{
    struct pkv_hello h = {.magic = PKV_MAGIC,
                          .message = PKV_MSG_HELLO,
                          .version_major = PKV_VERSION_MAJOR,
                          .version_minor = PKV_VERSION_MINOR,
                          .features = PKV_FEATURES,
                          .data_bytes = 1 << 20};
    return h;
}

static void test_hello(void **state)
{
    (void)state;
    struct pkv_hello h = hello();
    assert_int_equal(pkv_check_hello(&h), PKV_ERR_OK);
    h.version_minor++;
    assert_int_equal(pkv_check_hello(&h), PKV_ERR_VERSION);
    h = hello(), h.features |= 1ull << 40, h.required = 1ull << 40;
    assert_int_equal(pkv_check_hello(&h), PKV_ERR_FEATURE);
    h = hello(), h.data_bytes = 4097;
    assert_int_equal(pkv_check_hello(&h), PKV_ERR_INVALID);
    h = hello(), memset(h.tenant, 'x', sizeof(h.tenant));
    assert_int_equal(pkv_check_hello(&h), PKV_ERR_INVALID);
    h = hello(), h.reserved = 1;
    assert_int_equal(pkv_check_hello(&h), PKV_ERR_RESERVED);
    h = hello(), h.device[3] = 1; /* of a worker that says it can use a GPU */
    assert_int_equal(pkv_check_hello(&h), h.features & PKV_FEATURE_CUDA ? PKV_ERR_OK : PKV_ERR_RESERVED);
    h.features = PKV_FEATURE_SERVED;
    assert_int_equal(pkv_check_hello(&h), PKV_ERR_RESERVED);
    h = hello(), h.magic = 0;
    assert_int_equal(pkv_check_hello(&h), PKV_ERR_INVALID);
}

static void test_welcome(void **state)
{
    (void)state;
    struct pkv_reply good = {.magic = PKV_MAGIC,
                             .message = PKV_MSG_HELLO,
                             .version_major = PKV_VERSION_MAJOR,
                             .version_minor = PKV_VERSION_MINOR,
                             .features = PKV_FEATURES,
                             .device = {7}},
                     r = good;
    assert_int_equal(pkv_check_welcome(&r, PKV_FEATURE_DIRECT), PKV_ERR_OK);
    r = good, r.version_major++;
    assert_int_equal(pkv_check_welcome(&r, 0), PKV_ERR_VERSION);
    r = good, r.features = PKV_FEATURE_SERVED;
    assert_int_equal(pkv_check_welcome(&r, PKV_FEATURE_DIRECT), PKV_ERR_FEATURE);
    r = good, r.device[0] = 0; /* a pool on a GPU that has no name */
    assert_int_equal(pkv_check_welcome(&r, 0), PKV_ERR_RESERVED);
    r = good, r.features = PKV_FEATURE_DIRECT;
    assert_int_equal(pkv_check_welcome(&r, 0), PKV_ERR_RESERVED);
    r = good, r.err = PKV_ERR_WORKERS_FULL;
    assert_int_equal(pkv_check_welcome(&r, 0), PKV_ERR_WORKERS_FULL);
    r = good, r.err = UINT32_MAX;
    assert_int_equal(pkv_check_welcome(&r, 0), PKV_ERR_INVALID);
}

static void test_model(void **state)
{
    (void)state;
    struct pkv_model_request good = {
        .magic = PKV_MAGIC, .message = PKV_MSG_MODEL, .geom = geom(), .name = "m", .rope_base = 1e5f, .rope_dims = 128};
    struct pkv_model_request m = good;
    assert_int_equal(pkv_check_model(&m), PKV_ERR_OK);
    m = good, m.rope_base = NAN;
    assert_int_equal(pkv_check_model(&m), PKV_ERR_INVALID);
    m = good, m.rope_dims = 130;
    assert_int_equal(pkv_check_model(&m), PKV_ERR_INVALID);
    m = good, m.name[0] = 0;
    assert_int_equal(pkv_check_model(&m), PKV_ERR_INVALID);
    m = good, m.scheme = 99;
    assert_int_equal(pkv_check_model(&m), PKV_ERR_SCHEME);
}

static enum pkv_err check(struct pkv_submission s)
{
    return pkv_check_submission(&s, DATA_BYTES);
}

static void test_submission_payloads(void **state)
{
    (void)state;
    struct pkv_submission s = {.op = PKV_OP_NOP};
    assert_int_equal(check(s), PKV_ERR_OK);
    s.u.nop.reserved[4] = 1;
    assert_int_equal(check(s), PKV_ERR_RESERVED);
    s = (struct pkv_submission){.op = PKV_OP_COUNT};
    assert_int_equal(check(s), PKV_ERR_UNKNOWN_OP);
    s = (struct pkv_submission){.op = PKV_OP_GRANT, .layer = PKV_LAYER_ALL};
    assert_int_equal(check(s), PKV_ERR_OK);
    s.op = PKV_OP_SEAL;
    assert_int_equal(check(s), PKV_ERR_INVALID);
    s = (struct pkv_submission){.op = PKV_OP_SEAL, .u.seal = {.first_block = UINT32_MAX, .count = 2}};
    assert_int_equal(check(s), PKV_ERR_INVALID);
    s = (struct pkv_submission){.op = PKV_OP_SEQ_CREATE, .u.create = {.max_tokens = 0}};
    assert_int_equal(check(s), PKV_ERR_INVALID);
    s.u.create.max_tokens = 64;
    assert_int_equal(check(s), PKV_ERR_OK);
    s.u.create.flags = 2;
    assert_int_equal(check(s), PKV_ERR_RESERVED);
    s = (struct pkv_submission){.op = PKV_OP_SIGNED, .u.signed_ = {.state = 1}};
    assert_int_equal(check(s), PKV_ERR_OK);
    s.u.signed_ = (struct pkv_op_signed){.state = 1, .reserved0 = 1};
    assert_int_equal(check(s), PKV_ERR_RESERVED);
    s.u.signed_ = (struct pkv_op_signed){.state = 1, .reserved = {0, 0, 0, 1}};
    assert_int_equal(check(s), PKV_ERR_RESERVED);
    s = (struct pkv_submission){.op = PKV_OP_TRUNCATE, .u.truncate = {.tokens = UINT64_MAX}};
    assert_int_equal(check(s), PKV_ERR_LENGTH);
    s = (struct pkv_submission){.op = PKV_OP_FORK, .u.fork = {.tokens = 1, .reserved = {0, 0, 1}}};
    assert_int_equal(check(s), PKV_ERR_RESERVED);
}

static void test_submission_ranges(void **state)
{
    (void)state;
    struct pkv_submission s = {.op = PKV_OP_APPEND, .u.append = {.tokens = 1, .data_off = 0, .data_bytes = DATA_BYTES}};
    assert_int_equal(check(s), PKV_ERR_OK);
    s.u.append.data_off = 64;
    assert_int_equal(check(s), PKV_ERR_RANGE);
    s.u.append.data_off = UINT64_MAX - 63;
    assert_int_equal(check(s), PKV_ERR_RANGE);
    s = (struct pkv_submission){.op = PKV_OP_SELECT, .u.select = {.data_bytes = 63}};
    assert_int_equal(check(s), PKV_ERR_RANGE);
    s.u.select.data_bytes = 64, s.u.select.out_off = 8;
    assert_int_equal(check(s), PKV_ERR_RANGE);
    s = (struct pkv_submission){.op = PKV_OP_READ, .u.read = {.count = 1, .out_bytes = DATA_BYTES + 1}};
    assert_int_equal(check(s), PKV_ERR_RANGE);
    assert_false(pkv_check_range(2, UINT64_MAX, 10));
    assert_true(pkv_check_range(10, 0, 10));
}

static void test_select(void **state)
{
    (void)state;
    struct pkv_select_args good = {.tokens = 1000, .queries = 2, .k = 128, .scale = 0.125f, .sinks = 128, .recent = 128};
    struct pkv_select_args a = good;
    assert_int_equal(pkv_check_select(&a), PKV_ERR_OK);
    a = good, a.k = 0;
    assert_int_equal(pkv_check_select(&a), PKV_ERR_BUDGET);
    a = good, a.k = 1001;
    assert_int_equal(pkv_check_select(&a), PKV_ERR_BUDGET_LENGTH);
    a = good, a.queries = 0;
    assert_int_equal(pkv_check_select(&a), PKV_ERR_SHAPE);
    a = good, a.scale = INFINITY;
    assert_int_equal(pkv_check_select(&a), PKV_ERR_INVALID);
    a = good, a.top_p = 0.9f, a.rule = PKV_RULE_SUM;
    assert_int_equal(pkv_check_select(&a), PKV_ERR_INVALID);
    a = good, a.top_p = 0.9f, a.sinks = 0, a.recent = 1;
    assert_int_equal(pkv_check_select(&a), PKV_ERR_OK);
    a.recent = 0;
    assert_int_equal(pkv_check_select(&a), PKV_ERR_INVALID);
    a = good, a.tokens = UINT64_MAX;
    assert_int_equal(pkv_check_select(&a), PKV_ERR_LENGTH);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_geom),
        cmocka_unit_test(test_hello),
        cmocka_unit_test(test_welcome),
        cmocka_unit_test(test_model),
        cmocka_unit_test(test_submission_payloads),
        cmocka_unit_test(test_submission_ranges),
        cmocka_unit_test(test_select),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
