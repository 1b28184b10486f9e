/* All chunks of a tenant mapped at once, on the host and on a (fake) device: its own, no others, and given back at the end. */
#include "client/internal.h"
#include "tests/integration/service.h"
#include "tests/lib/faults.h"

static uint32_t mapped(const struct pkv *kv, uint32_t tier)
{
    uint32_t n = 0;
    for (uint32_t c = 0; c < PKV_CHUNKS_MAX; c++)
        n += kv->readable[tier][c] != 0;
    return n;
}

static struct pkv *attach_as(const struct test_daemon *d, const char *tenant)
{
    struct pkv_options o = {.size = sizeof(o), .threads = 1, .tenant = tenant};
    struct pkv *kv = NULL;
    GOOD(NULL, pkv_connect(d->socket, &o, &kv));
    return kv;
}

static struct pkv_seq *reserve(struct pkv *kv, uint32_t blocks)
{
    struct pkv_seq *seq = NULL;
    GOOD(kv, pkv_seq_create(open_model(kv), blocks * 64, 0, NULL, &seq));
    GOOD(kv, pkv_seq_reserve(seq, blocks * 64));
    return seq;
}

/* A block is 64 KiB in each of two layers: 40 blocks fill five chunks of each tier, and one with signatures. */
static void map_all(const char *backend)
{
    struct test_daemon d;
    setenv("PIVOTKV_TEST_BACKEND", backend, 1);
    test_daemon_start(&d, (const char *const[]){"--pool-bytes", "16M", "--arena-bytes", "16M", "--chunk-bytes", "1M", NULL});
    struct pkv *kv = attach_as(&d, "a"), *other = attach_as(&d, "b");
    struct pkv_seq *seq = reserve(kv, 40);
    reserve(other, 8);
    assert_int_equal(mapped(kv, PKV_TIER_POOL) + mapped(kv, PKV_TIER_ARENA), 0);
    assert_int_equal(region_map_all(kv), 0);
    assert_int_equal(mapped(kv, PKV_TIER_POOL), 6);
    assert_int_equal(mapped(kv, PKV_TIER_ARENA), 5);
    assert_int_equal(region_map_all(kv), 0); /* nothing new */
    assert_int_equal(region_map_all(other), 0);
    assert_int_equal(mapped(other, PKV_TIER_POOL), 2);
    assert_int_equal(mapped(other, PKV_TIER_ARENA), 1);
    const struct pkv_block_ref *refs = pkv_table_layer((struct pkv_table *)(uintptr_t)seq->table, 0, seq->table->blocks_max);
    for (uint32_t b = 0; b < 40; b++)
        assert_true(kv->writable[pkv_place_chunk(refs[b].rows)] &&
                    kv->readable[PKV_TIER_POOL][pkv_place_chunk(refs[b].signatures)]);
    pkv_close(kv);
    pkv_close(other);
    test_daemon_stop(&d);
}

static void test_host(void **state)
{
    (void)state;
    map_all("host");
}

static void test_device(void **state)
{
    (void)state;
    map_all("cuda");
    assert_int_equal(test_faults()->chunks + test_faults()->pins, 0);
}

int main(void)
{
    test_faults();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_host),
        cmocka_unit_test(test_device),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
