/* Chunks that others can map but not resize, copies that know what they copied. */
#include "tests/lib/test.h"

#include "offload/offload.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static struct offload_chunk create(bool readers_only, uint32_t populate)
{
    struct offload_chunk_options o = {.bytes = 4u << 20, .readers_only = readers_only, .populate = populate};
    struct offload_chunk c;
    assert_int_equal(offload_chunk_create(&o, &c), 0);
    return c;
}

static void test_chunk_is_shared(void **state)
{
    (void)state;
    for (uint32_t threads = 0; threads < 4; threads++) {
        struct offload_chunk c = create(false, threads);
        assert_true(c.pages < OFFLOAD_PAGES);
        char *other = mmap(NULL, c.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, c.fd, 0);
        assert_ptr_not_equal(other, MAP_FAILED);
        for (uint64_t at = 0; at < c.bytes; at += 4096)
            assert_int_equal(other[at], 0);
        ((char *)c.base)[12345] = 42;
        assert_int_equal(other[12345], 42);
        munmap(other, c.bytes);
        offload_chunk_destroy(&c);
        assert_int_equal(c.fd, -1);
        offload_chunk_destroy(&c); /* twice does no harm */
    }
}

static void test_chunk_keeps_its_size(void **state)
{
    (void)state;
    struct offload_chunk c = create(false, 1);
    assert_int_equal(ftruncate(c.fd, 4096), -1);
    assert_int_equal(ftruncate(c.fd, (off_t)c.bytes * 2), -1);
    assert_int_equal(fcntl(c.fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
    offload_chunk_destroy(&c);
}

static void test_readers_cannot_write(void **state)
{
    (void)state;
    struct offload_chunk c = create(true, 1);
    assert_ptr_equal(mmap(NULL, c.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, c.fd, 0), MAP_FAILED);
    const char *reader = mmap(NULL, c.bytes, PROT_READ, MAP_SHARED, c.fd, 0);
    assert_ptr_not_equal((const void *)reader, MAP_FAILED);
    ((char *)c.base)[99] = 7; /* its owner still writes */
    assert_int_equal(reader[99], 7);
    munmap((void *)(uintptr_t)reader, c.bytes);
    offload_chunk_destroy(&c);
}

static uint64_t taken(const struct offload_chunk *c)
{
    struct stat st;
    assert_int_equal(fstat(c->fd, &st), 0);
    return (uint64_t)st.st_blocks * 512;
}

static void test_reserve_takes_the_memory_at_once(void **state)
{
    (void)state;
    struct offload_chunk_options o = {.bytes = 4u << 20, .readers_only = true, .best = OFFLOAD_SMALL};
    struct offload_chunk c;
    assert_int_equal(offload_chunk_create(&o, &c), 0);
    assert_int_equal(taken(&c), 0);
    offload_chunk_destroy(&c);
    o.reserve = true;
    assert_int_equal(offload_chunk_create(&o, &c), 0);
    assert_true(taken(&c) >= c.bytes);
    for (uint64_t at = 0; at < c.bytes; at += 4096) /* never what another left there */
        assert_int_equal(((char *)c.base)[at], 0);
    offload_chunk_destroy(&c);
    o.bytes = 1ull << 50;
    assert_int_equal(offload_chunk_create(&o, &c), -ENOMEM);
}

static int open_fds(void)
{
    int count = 0;
    for (int fd = 0; fd < 256; fd++)
        count += fcntl(fd, F_GETFD) != -1;
    return count;
}

static void test_bad_sizes_leave_nothing(void **state)
{
    (void)state;
    struct offload_chunk c = {.fd = -7};
    int before = open_fds();
    struct offload_chunk_options o = {.bytes = 0};
    assert_int_equal(offload_chunk_create(&o, &c), -EINVAL);
    o.bytes = 5000;
    assert_int_equal(offload_chunk_create(&o, &c), -EINVAL);
    o.bytes = 1ull << 50, o.populate = 1; /* more than any machine: refused before it takes what others need */
    assert_int_equal(offload_chunk_create(&o, &c), -ENOMEM);
    assert_int_equal(c.fd, -7);
    assert_int_equal(open_fds(), before);
}

static void test_copy_and_checksum(void **state)
{
    (void)state;
    static const uint64_t sizes[] = {1, 63, 4096, 65535, 65536, 65537, 300000};
    unsigned char *from = malloc(300000), *to = malloc(300000);
    assert_non_null(from);
    assert_non_null(to);
    for (uint32_t i = 0; i < 300000; i++)
        from[i] = (unsigned char)(i * 2654435761u >> 13);
    for (size_t s = 0; s < PKV_ARRAY_LEN(sizes); s++) {
        memset(to, 0, 300000);
        uint64_t checksum = offload_copy(to, from, sizes[s]);
        assert_memory_equal(to, from, sizes[s]);
        assert_int_equal(offload_verify(to, sizes[s], checksum), 0);
        for (uint64_t at = 0; at < sizes[s]; at += 1 + sizes[s] / 5) {
            to[at] ^= 1; /* one flipped bit is seen */
            assert_int_equal(offload_verify(to, sizes[s], checksum), -EBADMSG);
            to[at] ^= 1;
        }
    }
    free(from);
    free(to);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunk_is_shared),      cmocka_unit_test(test_chunk_keeps_its_size),
        cmocka_unit_test(test_readers_cannot_write),
        cmocka_unit_test(test_reserve_takes_the_memory_at_once), cmocka_unit_test(test_bad_sizes_leave_nothing),
        cmocka_unit_test(test_copy_and_checksum),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
