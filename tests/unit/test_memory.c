/* Pool and arena as the daemon has them, and what a chunk that changes its tenant leaves behind. */
#include "cachesvc/memory.h"
#include "tests/lib/test.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

static void test_chunks(void **state)
{
    (void)state;
    struct memory m;
    assert_int_equal(memory_create(&m, 1 << 20, 3 << 20, 5 << 20, 1), 0);
    assert_int_equal(m.count[PKV_TIER_POOL], 3);
    assert_int_equal(m.count[PKV_TIER_ARENA], 5);
    assert_non_null(memory_pages(&m, PKV_TIER_POOL));
    struct gpu_space space = memory_space(&m);
    assert_true(space.base[PKV_TIER_ARENA][4] == (uint64_t)(uintptr_t)m.chunks[PKV_TIER_ARENA][4].base);
    assert_int_equal(space.base[PKV_TIER_ARENA][5], 0);
    /* Workers write the pool; nobody else writes the arena. */
    void *pool = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, m.chunks[PKV_TIER_POOL][0].fd, 0);
    assert_true(pool != MAP_FAILED);
    munmap(pool, 4096);
    assert_true(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, m.chunks[PKV_TIER_ARENA][0].fd, 0) == MAP_FAILED);
    memory_destroy(&m);
}

static void test_reset(void **state)
{
    (void)state;
    struct memory m;
    assert_int_equal(memory_create(&m, 1 << 20, 1 << 20, 1 << 20, 0), 0);
    struct offload_chunk *c = &m.chunks[PKV_TIER_POOL][0];
    memset(c->base, 0x5a, c->bytes);
    char *old = mmap(NULL, 4096, PROT_READ, MAP_SHARED, c->fd, 0); /* as the former tenant's worker might hold it */
    assert_int_equal(memory_reset(&m, PKV_TIER_POOL, 0), 0);
    for (uint32_t i = 0; i < c->bytes; i++)
        assert_int_equal(((const char *)c->base)[i], 0);
    memset(c->base, 0x77, c->bytes);
    assert_int_equal(old[0], 0x5a); /* and it sees nothing of the new one's */
    assert_true(m.bases[PKV_TIER_POOL][0] == (uint64_t)(uintptr_t)c->base);
    munmap(old, 4096);
    memory_destroy(&m);
}

static void test_too_much(void **state)
{
    (void)state;
    struct memory m;
    assert_int_equal(memory_create(&m, 1ull << 30, 1ull << 30, 1ull << 42, 1), -ENOMEM);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_reset),
        cmocka_unit_test(test_too_much),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
