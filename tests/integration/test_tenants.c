/* Chunks that go from one tenant to another: nothing of the former one is seen, and nothing of the new one is lost. */
#include "tests/integration/raw.h"
#include "tests/integration/stat.h"

enum { ROUNDS = 6, TOKENS = 3000, BLOCK = 64 };

static struct test_daemon daemon_;
static float *k, *v, *q;

static int start(void **state)
{
    (void)state;
    k = test_floats(1, TOKENS * ROW), v = test_floats(2, TOKENS * ROW), q = test_floats(3, QUERY);
    test_daemon_start(&daemon_, (const char *const[]){"--pool-bytes", "8M", "--arena-bytes", "8M", "--chunk-bytes", "2M",
                                                      "--threads", "1", NULL});
    return 0;
}

static int stop(void **state)
{
    (void)state;
    test_daemon_stop(&daemon_);
    free(k), free(v), free(q);
    return 0;
}

/* Takes most chunks of the pool, and leaves them full of its rows. */
static void fill_as(const char *tenant, uint32_t flags)
{
    struct pkv_options o = {.size = sizeof(o), .flags = flags, .threads = 1, .tenant = tenant};
    struct pkv *kv = NULL;
    struct pkv_seq *seq = NULL;
    GOOD(NULL, pkv_connect(daemon_.socket, &o, &kv));
    GOOD(kv, pkv_seq_create(open_model(kv), TOKENS, 0, NULL, &seq));
    GOOD(kv, append_all(seq, k, v, TOKENS));
    assert_exact(kv, seq, k, v, q, TOKENS);
    pkv_close(kv);
}

static void test_by_the_library(void **state)
{
    (void)state;
    for (int i = 0; i < ROUNDS; i++)
        fill_as(i % 3 == 0 ? "a" : i % 3 == 1 ? "b" : "c", i % 2 ? PKV_CONNECT_SERVED : 0);
}

/* Whoever closed is gone, and its places are free: no grant waits. */
static void wait_for_quiet(void)
{
    bool quiet = false;
    for (int i = 0; i < 200 && !quiet; i++) {
        json_t *stat = stat_json(&daemon_, "stat"), *pool = json_object_get(stat, "pool");
        quiet = !json_array_size(json_object_get(stat, "workers")) && !json_integer_value(json_object_get(pool, "used")) &&
                !json_integer_value(json_object_get(pool, "retired"));
        json_decref(stat);
    }
    assert_true(quiet);
}

/* Grant, append and read in one go, as the protocol allows: the daemon takes them in one turn, in which it also makes fresh
 * memory of a chunk that was another's. */
static void append_and_read(struct raw *r, uint64_t handle, uint32_t block)
{
    struct pkv_served_append at = pkv_served_append(&r->geom, BLOCK, 0);
    uint64_t block_bytes = pkv_geom_block_bytes(&r->geom), out = PKV_ALIGN_UP(at.bytes, 4096), ignored;
    char *data = (char *)r->region + pkv_region_data_off();
    memset(data + at.k, 1 + (int)block, at.v - at.k); /* no NaN, never zero */
    memset(data + at.v, 1 + (int)block, at.v - at.k);
    memset(data + out, 0, block_bytes);
    const struct pkv_submission s[] = {
        {.op = PKV_OP_GRANT, .seq = handle, .u.grant = {.tokens = (block + 1ull) * BLOCK}},
        {.op = PKV_OP_APPEND,
         .seq = handle,
         .u.append = {.first_token = (uint64_t)block * BLOCK, .tokens = BLOCK, .data_bytes = at.bytes}},
        {.op = PKV_OP_READ,
         .seq = handle,
         .u.read = {.first_block = block, .count = 1, .out_off = out, .out_bytes = block_bytes}},
    };
    usleep(2000); /* it sleeps by now, and wakes up to all of them */
    for (size_t i = 0; i < sizeof(s) / sizeof(s[0]); i++)
        assert_true(pkv_sq_push(r->region, &r->tail, &s[i]));
    kick(r);
    for (size_t i = 0; i < sizeof(s) / sizeof(s[0]); i++) {
        enum pkv_err e = reap(r, &ignored);
        if (e != PKV_ERR_OK)
            fail_msg("operation %zu of block %u: %s", i, block, pkv_err_text(e));
    }
    for (uint64_t i = 0; i < block_bytes; i++)
        assert_int_equal(data[out + i], 1 + block);
}

static void test_without_waiting(void **state)
{
    (void)state;
    for (int i = 0; i < ROUNDS; i++) {
        fill_as("a", 0);
        wait_for_quiet();
        struct raw r = raw_worker(&daemon_, "b");
        struct pkv_submission create = {.op = PKV_OP_SEQ_CREATE, .u.create = {.model = r.model, .max_tokens = 70 * BLOCK}};
        uint64_t handle;
        assert_int_equal(answer(&r, create, &handle), PKV_ERR_OK);
        for (uint32_t block = 0; block < 70; block++) /* more than a chunk holds */
            append_and_read(&r, handle, block);
        raw_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_by_the_library),
        cmocka_unit_test(test_without_waiting),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
