/* kill -9, of workers in every phase and of the daemon: the others are not touched, what the dead held is free, and nobody
 * waits for ever. */
#include "tests/integration/service.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { TOKENS = 600 };
static float *k, *v, *q;

static int numbers(void **state)
{
    (void)state;
    k = test_floats(1, 3000 * ROW), v = test_floats(2, 3000 * ROW), q = test_floats(3, QUERY);
    return 0;
}

static int end(void **state)
{
    (void)state;
    free(k), free(v), free(q);
    return 0;
}

static void start(struct test_daemon *d)
{
    test_daemon_start(d, (const char *const[]){"--pool-bytes", "8M", "--arena-bytes", "32M", "--threads", "1",
                                               "--grant-timeout-ms", "2000", NULL});
}

/* What a worker is doing when it dies. Each goes on until it is killed. */
static void phase_attached(struct pkv *kv, struct pkv_seq *seq)
{
    (void)kv, (void)seq;
    pause();
}

static void phase_granted(struct pkv *kv, struct pkv_seq *seq)
{
    (void)kv;
    pkv_seq_reserve(seq, 1000);
    pause();
}

static void phase_half_a_block(struct pkv *kv, struct pkv_seq *seq)
{
    (void)kv;
    append_all(seq, k, v, 90);
    pause();
}

static void phase_appending(struct pkv *kv, struct pkv_seq *seq)
{
    (void)kv;
    for (;;) {
        append_all(seq, k, v, 300);
        pkv_seq_truncate(seq, 77);
    }
}

static void phase_waiting_for_a_grant(struct pkv *kv, struct pkv_seq *seq)
{
    (void)kv;
    for (;;)
        pkv_seq_reserve(seq, 30000); /* more than the pool */
}

static void phase_forking(struct pkv *kv, struct pkv_seq *seq)
{
    (void)kv;
    struct pkv_seq *child;
    append_all(seq, k, v, 300);
    for (;;)
        if (pkv_seq_fork(seq, 290, 0, &child) == 0)
            pkv_seq_close(child);
}

static void phase_attending(struct pkv *kv, struct pkv_seq *seq)
{
    (void)kv;
    float out[QUERY];
    uint32_t one = 1;
    struct pkv_budget b = budget(50);
    append_all(seq, k, v, 500);
    for (;;)
        pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL);
}

static void phase_pinging(struct pkv *kv, struct pkv_seq *seq)
{
    (void)seq;
    for (;;)
        pkv_ping(kv, NULL);
}

static pid_t worker_in(const struct test_daemon *d, void (*phase)(struct pkv *, struct pkv_seq *), uint32_t flags)
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct pkv_options o = {.size = sizeof(o), .flags = flags, .threads = 1, .label = "victim"};
    struct pkv *kv;
    struct pkv_seq *seq;
    if (pkv_connect(d->socket, &o, &kv) == 0 && pkv_seq_create(open_model(kv), 40000, 0, NULL, &seq) == 0)
        phase(kv, seq);
    _exit(1);
}

static void test_workers_die_in_every_phase(void **state)
{
    (void)state;
    static void (*const phases[])(struct pkv *, struct pkv_seq *) = {
        phase_attached, phase_granted,   phase_half_a_block, phase_appending, phase_waiting_for_a_grant,
        phase_forking,  phase_attending, phase_pinging};
    struct test_daemon d;
    start(&d);
    struct pkv *kv = attach(&d, 0);
    struct pkv_seq *seq, *large;
    struct pkv_model *model = open_model(kv);
    GOOD(kv, pkv_seq_create(model, 4000, 0, NULL, &seq));
    GOOD(kv, append_all(seq, k, v, TOKENS));
    for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
        for (size_t p = 0; p < sizeof(phases) / sizeof(phases[0]); p++) {
            pid_t pid = worker_in(&d, phases[p], flags);
            usleep(60000 + 7000 * (unsigned)p);
            assert_int_equal(kill(pid, SIGKILL), 0);
            int status;
            waitpid(pid, &status, 0);
            assert_true(WIFSIGNALED(status)); /* it was in its phase, not gone by itself */
            assert_exact(kv, seq, k, v, q, TOKENS);
            /* Nearly the whole pool can be had: nothing of the dead worker's is left. */
            GOOD(kv, pkv_seq_create(model, 4000, 0, NULL, &large));
            GOOD(kv, pkv_seq_reserve(large, 2500));
            GOOD(kv, pkv_seq_close(large));
        }
    }
    pkv_close(kv);
    test_daemon_stop(&d);
}

static void test_the_daemon_dies(void **state)
{
    (void)state;
    for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
        struct test_daemon d;
        start(&d);
        struct pkv *kv = attach(&d, flags);
        struct pkv_seq *seq, *child;
        struct pkv_budget b = budget(50);
        float out[QUERY];
        uint32_t one = 1;
        GOOD(kv, pkv_seq_create(open_model(kv), 4000, 0, NULL, &seq));
        GOOD(kv, append_all(seq, k, v, TOKENS));
        test_daemon_kill(&d);
        /* Not a timeout: the loss is noticed. */
        assert_int_equal(pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL), -ECONNRESET);
        assert_non_null(strstr(pkv_error(kv), "daemon is gone"));
        assert_int_equal(append_all(seq, k, v, 1), -ECONNRESET);
        assert_int_equal(pkv_ping(kv, NULL), -ECONNRESET);
        assert_int_equal(pkv_seq_fork(seq, 10, 0, &child), -ECONNRESET);
        pkv_close(kv);
        struct pkv *again;
        assert_int_equal(pkv_connect(d.socket, NULL, &again), -ECONNREFUSED);
        assert_non_null(strstr(pkv_error(NULL), "start pivotkvd"));
    }
}

static void *kill_soon(void *arg)
{
    usleep(150000);
    kill(((const struct test_daemon *)arg)->pid, SIGKILL);
    return NULL;
}

static void test_the_daemon_dies_under_a_call(void **state)
{
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        struct test_daemon d;
        pthread_t killer;
        start(&d);
        struct pkv *kv = attach(&d, PKV_CONNECT_SERVED);
        struct pkv_seq *seq;
        struct pkv_budget b = budget(50);
        float out[QUERY];
        uint32_t one = 1;
        GOOD(kv, pkv_seq_create(open_model(kv), 40000, 0, NULL, &seq));
        GOOD(kv, append_all(seq, k, v, TOKENS));
        assert_int_equal(pthread_create(&killer, NULL, kill_soon, &d), 0);
        int r = 0;
        while (!r || r == -ENOSPC)
            r = kind == 0   ? pkv_ping(kv, NULL)
                : kind == 1 ? pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL)
                            : pkv_seq_reserve(seq, 30000);
        assert_int_equal(r, -ECONNRESET);
        pthread_join(killer, NULL);
        pkv_close(kv);
        test_daemon_kill(&d);
    }
}

/* A daemon that stands still: calls end with their bound, and what it answers late confuses nobody. */
static void test_the_daemon_stands_still(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d);
    pkv_close(attach(&d, 0)); /* it is ready: with a GPU that takes longer than the bound here */
    struct pkv_options o = {.size = sizeof(o), .threads = 1, .timeout_ms = 200};
    struct pkv *kv;
    struct pkv_seq *seq;
    GOOD(NULL, pkv_connect(d.socket, &o, &kv));
    GOOD(kv, pkv_seq_create(open_model(kv), 4000, 0, NULL, &seq));
    GOOD(kv, append_all(seq, k, v, 100));
    kill(d.pid, SIGSTOP);
    assert_int_equal(pkv_ping(kv, NULL), -ETIMEDOUT);
    assert_int_equal(pkv_seq_reserve(seq, 100), -ETIMEDOUT);
    kill(d.pid, SIGCONT);
    GOOD(kv, append_all(seq, k + 100 * ROW, v + 100 * ROW, 300));
    assert_exact(kv, seq, k, v, q, 400);
    pkv_close(kv);
    test_daemon_stop(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_workers_die_in_every_phase),
        cmocka_unit_test(test_the_daemon_dies),
        cmocka_unit_test(test_the_daemon_dies_under_a_call),
        cmocka_unit_test(test_the_daemon_stands_still),
    };
    return cmocka_run_group_tests(tests, numbers, end);
}
