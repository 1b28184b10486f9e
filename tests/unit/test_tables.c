/* Block tables: zeroed, apart, reused, joined again when freed, and not writable by those who get the descriptor. */
#include "cachesvc/tables.h"
#include "tests/lib/test.h"

#include <string.h>
#include <sys/mman.h>

static struct tables tables;

static void test_alloc_and_free(void **state)
{
    (void)state;
    tables_init(&tables);
    uint64_t at[4], again;
    struct pkv_table *t[4];
    for (int i = 0; i < 4; i++) {
        t[i] = tables_alloc(&tables, 3, 5000, &at[i]);
        assert_non_null(t[i]);
        assert_int_equal(at[i], 8192u * (unsigned)i); /* whole pages, one after the other */
        memset(t[i], 0xab, 5000);
    }
    /* A hole in the middle is reused, and holds nothing of its former owner. */
    tables_free(&tables, 3, at[1], 5000);
    assert_int_equal(t[1]->seq, 0);
    struct pkv_table *reused = tables_alloc(&tables, 3, 8000, &again);
    assert_ptr_equal(reused, t[1]);
    for (uint32_t i = sizeof(*reused); i < 5000; i++)
        assert_int_equal(((const char *)reused)[i], 0);
    /* Freed in any order, the holes become one again. */
    tables_free(&tables, 3, at[0], 5000);
    tables_free(&tables, 3, at[2], 5000);
    tables_free(&tables, 3, at[3], 5000);
    tables_free(&tables, 3, at[1], 8000);
    assert_int_equal(tables.tenants[3].count, 1);
    assert_int_equal(tables.tenants[3].holes[0].bytes, PKV_TABLE_BYTES);
    assert_null(tables_alloc(&tables, 3, PKV_TABLE_BYTES + 1, &again));
    assert_int_equal(tables.tenants[4].fd, -1); /* a tenant that came not costs nothing */
    tables_destroy(&tables);
}

static void test_readers_cannot_write(void **state)
{
    (void)state;
    tables_init(&tables);
    uint64_t at;
    struct pkv_table *t = tables_alloc(&tables, 0, 4096, &at);
    int fd = tables_fd(&tables, 0);
    assert_true(fd >= 0);
    assert_true(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
    struct pkv_table *seen = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, (off_t)at);
    assert_true(seen != MAP_FAILED);
    t->tokens = 77;
    assert_int_equal(seen->tokens, 77);
    munmap(seen, 4096);
    tables_destroy(&tables);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_alloc_and_free),
        cmocka_unit_test(test_readers_cannot_write),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
