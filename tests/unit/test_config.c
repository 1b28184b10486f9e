/* Settings from defaults, files and flags, in that order. What is refused, and how, tests/cli shows. */
#include "cachesvc/config.h"
#include "tests/lib/test.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct config config;

static enum config_outcome read_flags(const char *const *flags)
{
    char *argv[16] = {(char *)(uintptr_t) "pivotkvd"};
    int argc = 1;
    for (; flags[argc - 1]; argc++)
        argv[argc] = (char *)(uintptr_t)flags[argc - 1];
    return config_read(argc, argv, &config);
}

static void test_defaults(void **state)
{
    (void)state;
    assert_int_equal(read_flags((const char *const[]){NULL}), CONFIG_RUN);
    assert_string_equal(config.socket, "");
    assert_int_equal(config.pool_bytes, 1ull << 30);
    assert_int_equal(config.arena_bytes, 4ull << 30);
    assert_int_equal(config.populate, 1);
    assert_int_equal(config.home_hold_ms, 1000);
    assert_int_equal(config.home_hold_rate, 8ull << 30);
    assert_int_equal(config.audit_ppm, 5000);
    assert_int_equal(config.audit_alarm_ppm, 250000);
    assert_int_equal(config.io, CONFIG_IO_AUTO);
    assert_int_equal(config.log_level, LOG_INFO);
    assert_string_equal(config.isa, "best");
}

static void test_sizes(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t bytes;
    } sizes[] = {{"4194304", 4ull << 20}, {"4096K", 4ull << 20}, {"7M", 7ull << 20}, {"3G", 3ull << 30}, {"2T", 2ull << 40}};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        const char *const flags[] = {"--pool-bytes", sizes[i].text, "--arena-bytes=2T", NULL};
        bool fits = sizes[i].bytes >= 1ull << 30; /* chunks of an arena that large are too large for a small pool */
        assert_int_equal(read_flags(flags), fits ? CONFIG_RUN : CONFIG_WRONG);
        assert_int_equal(config.pool_bytes, sizes[i].bytes);
        assert_int_equal(config.arena_bytes, 2ull << 40);
    }
}

static void test_chunks(void **state)
{
    (void)state;
    struct config c = {.pool_bytes = 64ull << 20, .arena_bytes = 256ull << 20};
    assert_int_equal(config_chunk_bytes(&c), 2ull << 20);
    c.pool_bytes = 4ull << 20;
    assert_int_equal(config_chunk_bytes(&c), 1ull << 20);
    c.arena_bytes = 64ull << 30; /* at most 4096 chunks */
    assert_int_equal(config_chunk_bytes(&c), 16ull << 20);
    c.pool_bytes = 1ull << 40;
    assert_int_equal(config_chunk_bytes(&c), 1ull << 30);
    c.chunk_bytes = 8ull << 20;
    assert_int_equal(config_chunk_bytes(&c), 8ull << 20);
}

static void test_flags_win_over_files(void **state)
{
    (void)state;
    char path[] = "/tmp/pivotkv-config-XXXXXX";
    int fd = mkstemp(path);
    static const char text[] = "[pivotkv]\nthreads = 3\nspin-us = 7 ; a comment\nio = epoll\nsocket = /tmp/a/socket\n";
    assert_true(write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    close(fd);
    assert_int_equal(read_flags((const char *const[]){"--threads", "5", "--config", path, NULL}), CONFIG_RUN);
    unlink(path);
    assert_int_equal(config.threads, 5);
    assert_int_equal(config.spin_us, 7);
    assert_int_equal(config.io, CONFIG_IO_EPOLL);
    assert_string_equal(config.socket, "/tmp/a/socket");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_flags_win_over_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
