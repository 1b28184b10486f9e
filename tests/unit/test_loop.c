/* io_uring and epoll answer alike: level-triggered, bounded, silent after unwatch. */
#include "cachesvc/loop.h"
#include "tests/lib/test.h"

#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

static void raise_event(int fd)
{
    uint64_t one = 1;
    assert_true(write(fd, &one, sizeof(one)) == sizeof(one));
}

static void lower_event(int fd)
{
    uint64_t value;
    assert_true(read(fd, &value, sizeof(value)) == sizeof(value));
}

static void use(const struct loop_verbs *io)
{
    struct loop *loop;
    uint64_t tokens[8];
    int a = eventfd(0, EFD_CLOEXEC), b = eventfd(0, EFD_CLOEXEC);
    int r = io->open(&loop);
    if (r) { /* a kernel may refuse io_uring: the daemon then takes the other one */
        print_message("%s is not to be had here\n", io->name);
        close(a), close(b);
        return;
    }
    assert_int_equal(io->watch(loop, a, 11), 0);
    assert_int_equal(io->watch(loop, b, 22), 0);
    assert_int_equal(io->wait(loop, 0, tokens, 8), 0);
    assert_int_equal(io->wait(loop, 3000000, tokens, 8), 0);
    raise_event(a);
    for (int i = 0; i < 3; i++) { /* until it is lowered */
        assert_int_equal(io->wait(loop, 1000000000, tokens, 8), 1);
        assert_int_equal(tokens[0], 11);
    }
    raise_event(b);
    int seen = 0;
    for (int i = 0; i < 10 && seen != 3; i++)
        for (int n = io->wait(loop, 1000000000, tokens, 8); n-- > 0;)
            seen |= tokens[n] == 11 ? 1 : tokens[n] == 22 ? 2 : 4;
    assert_int_equal(seen, 3);
    lower_event(a);
    io->unwatch(loop, b, 22);
    for (int i = 0; i < 5; i++) /* what was reported before may come once more, then nothing */
        r = io->wait(loop, 1000000, tokens, 8);
    assert_int_equal(r, 0);
    lower_event(b);
    /* A descriptor may be watched again under another name. */
    assert_int_equal(io->watch(loop, b, 33), 0);
    raise_event(b);
    assert_int_equal(io->wait(loop, 1000000000, tokens, 8), 1);
    assert_int_equal(tokens[0], 33);
    io->close(loop);
    close(a), close(b);
}

static void test_epoll(void **state)
{
    (void)state;
    use(&loop_epoll);
}

static void test_uring(void **state)
{
    (void)state;
    use(&loop_uring);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_epoll),
        cmocka_unit_test(test_uring),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
