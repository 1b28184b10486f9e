/* A daemon whose pool lies on a GPU that fails, on a CPU: copies that fail, chunks that cannot be had, a device that is lost or
 * that a worker does not see, several devices. The GPU is the fake one (tests/fake).
 * usage: test_gpu [devices]   `devices`: several devices alone, the first two that $PIVOTKV_CUDA_MODULE finds */
#include "tests/integration/service.h"
#include "tests/integration/stat.h"
#include "tests/lib/faults.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/stat.h>

enum { TOKENS = 6000 }; /* three times the pool */

static struct fake_faults *faults;
static float *k, *v, *q;

static void start_with(struct test_daemon *d, const char *pool, const char *device)
{
    test_daemon_start(d, (const char *const[]){"--pool-bytes", pool, "--arena-bytes", "64M", "--threads", "2",
                                               "--grant-timeout-ms", "300", "--device", device, NULL});
}

static void start(struct test_daemon *d, const char *device)
{
    start_with(d, "4M", device);
}

static struct pkv *attach_with(const struct test_daemon *d, const char *backend, uint32_t device)
{
    struct pkv_options o = {.size = sizeof(o), .threads = 1, .label = "test", .backend = backend, .device = device};
    struct pkv *kv = NULL;
    GOOD(NULL, pkv_connect(d->socket, &o, &kv));
    return kv;
}

static int connect_as(const struct test_daemon *d, const char *tenant, const char *backend, struct pkv **ret)
{
    struct pkv_options o = {
        .size = sizeof(o), .threads = 1, .tenant = tenant, .label = "test", .backend = backend, .timeout_ms = 5000};
    return pkv_connect(d->socket, &o, ret);
}

static struct pkv *attach_as(const struct test_daemon *d, const char *tenant)
{
    struct pkv *kv = NULL;
    GOOD(NULL, connect_as(d, tenant, NULL, &kv));
    return kv;
}

static struct pkv_seq *create(struct pkv *kv)
{
    struct pkv_seq *seq = NULL;
    GOOD(kv, pkv_seq_create(open_model(kv), TOKENS, 0, NULL, &seq));
    return seq;
}

static void assert_serves_some(struct pkv *kv, uint32_t tokens)
{
    struct pkv_seq *seq = create(kv);
    GOOD(kv, append_all(seq, k, v, tokens));
    assert_exact(kv, seq, k, v, q, tokens);
    GOOD(kv, pkv_seq_close(seq));
}

static void assert_serves(struct pkv *kv)
{
    assert_serves_some(kv, TOKENS);
}

static const char *share; /* as the test was started with */

static int begin(void **state)
{
    (void)state;
    *faults = (struct fake_faults){.lost = 0};
    return share ? setenv("PIVOTKV_TEST_SHARE", share, 1) : unsetenv("PIVOTKV_TEST_SHARE");
}

static void test_a_failed_copy_is_made_again(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "");
    struct pkv *kv = attach(&d, 0);
    assert_non_null(strstr(pkv_describe(kv), "direct on cuda"));
    faults->copies_fail = 1; /* a batch of them; then all are good */
    assert_serves(kv);
    assert_int_equal(faults->copies_fail, 0);
    pkv_close(kv);
    assert_int_equal(faults->chunks, 4); /* what was imported is released */
    test_daemon_stop(&d);
    assert_int_equal(faults->chunks + faults->pins, 0);
}

static void test_copies_that_always_fail(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "");
    struct pkv *kv = attach(&d, 0);
    struct pkv_seq *seq = create(kv);
    faults->copies_fail = UINT32_MAX;
    GOOD(kv, append_all(seq, k, v, 640));
    /* Blocks that are not home stay in the pool, which fills up; nothing of what is there is lost. */
    assert_int_equal(append_all(seq, k + 640 * ROW, v + 640 * ROW, TOKENS - 640), -ENOSPC);
    GOOD(kv, pkv_seq_truncate(seq, 640));
    assert_exact(kv, seq, k, v, q, 640);
    faults->copies_fail = 0;
    GOOD(kv, pkv_seq_close(seq));
    assert_serves(kv);
    pkv_close(kv);
    test_daemon_stop(&d);
}

static void test_chunks_that_cannot_be_had(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "");
    struct pkv *kv = attach(&d, 0);
    struct pkv_seq *seq = create(kv);
    faults->refuse_import = 1;
    assert_int_equal(append_all(seq, k, v, 64), -EOPNOTSUPP);
    faults->refuse_import = 0, faults->refuse_read_only = 1;
    GOOD(kv, append_all(seq, k, v, TOKENS));
    uint32_t one = 1;
    struct pkv_budget dense = budget(0);
    float out[QUERY];
    assert_int_equal(pkv_attend(&seq, &one, 1, 0, q, &dense, out, NULL, NULL), -EOPNOTSUPP); /* rows in the arena */
    assert_non_null(strstr(pkv_error(kv), "pin"));
    faults->refuse_read_only = 0;
    assert_exact(kv, seq, k, v, q, TOKENS);
    pkv_close(kv);
    test_daemon_stop(&d);
}

/* A worker that does not see the daemon's GPU is served, unless it insists. */
static void test_a_worker_without_the_gpu(void **state)
{
    (void)state;
    struct test_daemon d;
    struct pkv *kv = NULL;
    start(&d, "");
    setenv("PIVOTKV_FAKE_DEVICES", "0", 1); /* for this process */
    struct pkv_options o = {.size = sizeof(o), .threads = 1, .backend = "cuda"};
    assert_int_equal(pkv_connect(d.socket, &o, &kv), -ENODEV);
    assert_non_null(strstr(pkv_error(NULL), "no CUDA device"));
    o.device = 1;
    assert_int_equal(pkv_connect(d.socket, &o, &kv), -ENODEV);
    kv = attach(&d, 0);
    assert_non_null(strstr(pkv_describe(kv), "served: no CUDA device"));
    assert_true(test_daemon_said(&d, "of the arena pinned"));
    uint32_t pins = faults->pins;
    assert_serves(kv);
    assert_int_equal(faults->pins, pins + 1); /* its region, for the GPU to write into */
    pkv_close(kv);
    for (int i = 0; i < 500 && faults->pins > pins; i++)
        usleep(10000);
    assert_int_equal(faults->pins, pins);
    unsetenv("PIVOTKV_FAKE_DEVICES");
    kv = attach_with(&d, "host", 0);
    assert_non_null(strstr(pkv_describe(kv), "served: the daemon's pool is not on that backend"));
    assert_serves(kv);
    pkv_close(kv);
    o = (struct pkv_options){.size = sizeof(o), .device = 7};
    assert_int_equal(pkv_connect(d.socket, &o, &kv), -ENODEV);
    setenv("PIVOTKV_FAKE_DEVICES", "2", 1); /* one that the daemon does not serve */
    o.device = 2;
    assert_int_equal(pkv_connect(d.socket, &o, &kv), -ENODEV);
    assert_non_null(strstr(pkv_error(NULL), "no access to the GPU"));
    unsetenv("PIVOTKV_FAKE_DEVICES");
    o = (struct pkv_options){.size = sizeof(o), .backend = "vulkan"};
    assert_int_equal(pkv_connect(d.socket, &o, &kv), -EOPNOTSUPP);
    test_daemon_stop(&d);
}

static void test_cuda_asked_of_a_host_daemon(void **state)
{
    (void)state;
    struct test_daemon d;
    struct pkv *kv = NULL;
    struct pkv_options o = {.size = sizeof(o), .threads = 1, .backend = "cuda"};
    setenv("PIVOTKV_TEST_BACKEND", "host", 1);
    start(&d, "");
    assert_int_equal(pkv_connect(d.socket, &o, &kv), -EPROTO);
    assert_non_null(strstr(pkv_error(NULL), "--backend"));
    kv = attach(&d, 0);
    assert_non_null(strstr(pkv_describe(kv), "direct on host"));
    pkv_close(kv);
    test_daemon_stop(&d);
    setenv("PIVOTKV_TEST_BACKEND", "cuda", 1);
}

/* In the middle of a copy home: who is served learns it from the daemon, who is direct from its own device or the daemon. */
static void test_a_lost_device(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "");
    struct pkv *direct = attach(&d, 0), *served = attach(&d, PKV_CONNECT_SERVED), *late = NULL;
    struct pkv_seq *seq = create(direct), *other = create(served);
    GOOD(direct, append_all(seq, k, v, 640));
    GOOD(served, append_all(other, k, v, 640));
    faults->lost_in_copies = 5;
    int r = 0;
    for (int i = 0; i < 80 && !r; i++)
        r = append_all(seq, k + (640 + i * 64) * ROW, v + (640 + i * 64) * ROW, 64);
    for (int i = 0; i < 200 && !(r = pkv_ping(served, NULL)); i++)
        usleep(5000);
    assert_int_equal(r, -ENOTRECOVERABLE);
    assert_non_null(strstr(pkv_error(served), "GPU met a fault"));
    r = pkv_connect(d.socket, NULL, &late);
    assert_true(r == -ENOTRECOVERABLE || r == -ECONNREFUSED || r == -ECONNRESET); /* told, or too late for that */
    assert_int_equal(append_all(seq, k, v, 64), -ENOTRECOVERABLE);
    assert_int_equal(append_all(other, k, v, 64), -ENOTRECOVERABLE);
    assert_int_equal(pkv_seq_destroy(other), -ENOTRECOVERABLE);
    assert_true(test_daemon_said(&d, "GPU lost"));
    assert_int_equal(test_daemon_ended(&d), 3);
    assert_int_equal(pkv_ping(direct, NULL), -ENOTRECOVERABLE); /* also when it is gone */
    pkv_close(direct);
    pkv_close(served);
    *faults = (struct fake_faults){.lost = 0};
    start(&d, ""); /* as a supervisor would */
    direct = attach(&d, 0);
    assert_serves(direct);
    pkv_close(direct);
    test_daemon_stop(&d);
}

/* A worker that waits for room is not left waiting for its whole bound. */
static void test_lost_while_a_grant_waits(void **state)
{
    (void)state;
    struct test_daemon d;
    test_daemon_start(
        &d, (const char *const[]){"--pool-bytes", "4M", "--arena-bytes", "64M", "--grant-timeout-ms", "600000", NULL});
    struct pkv *kv = attach(&d, 0);
    struct pkv_seq *seq = create(kv);
    faults->copy_delay_us = 20000; /* appending outruns it, and waits */
    faults->lost_in_copies = 20;
    assert_int_equal(append_all(seq, k, v, TOKENS), -ENOTRECOVERABLE);
    pkv_close(kv);
    assert_int_equal(test_daemon_ended(&d), 3);
}

static void test_several_devices(void **state)
{
    (void)state;
    struct test_daemon d;
    struct pkv *kv[2];
    struct pkv_seq *seq[2], *none;
    uint32_t one = 1;
    struct pkv_budget dense = budget(0);
    float out[QUERY];
    setenv("PIVOTKV_FAKE_DEVICES", "2", 1);
    start_with(&d, "16M", "all"); /* a real one has chunks of 2 MiB at least */
    for (uint32_t i = 0; i < 2; i++) {
        kv[i] = attach_with(&d, NULL, 1 + i);
        assert_non_null(strstr(pkv_describe(kv[i]), "direct on cuda"));
        seq[i] = create(kv[i]);
        GOOD(kv[i], append_all(seq[i], k + 64 * i, v + 64 * i, TOKENS - 64));
    }
    for (uint32_t i = 0; i < 2; i++) {
        assert_exact(kv[i], seq[i], k + 64 * i, v + 64 * i, q, TOKENS - 64);
        assert_int_equal(pkv_seq_open(open_model(kv[i]), pkv_seq_handle(seq[1 - i]), &none), -ENODEV);
    }
    struct pkv *served = attach(&d, PKV_CONNECT_SERVED), *any = attach(&d, 0);
    for (uint32_t i = 0; i < 2; i++) {
        GOOD(served, pkv_seq_open(open_model(served), pkv_seq_handle(seq[i]), &none));
        GOOD(served, pkv_attend(&none, &one, 1, 0, q, &dense, out, NULL, NULL));
    }
    assert_non_null(strstr(pkv_describe(any), "direct on cuda"));
    json_t *stat = stat_json(&d, "stat"), *gpus = json_object_get(stat, "gpus");
    assert_int_equal(json_array_size(gpus), 2);
    for (uint32_t i = 0, all = 0; i < 2; i++) {
        json_int_t workers = json_integer_value(json_object_get(json_array_get(gpus, i), "workers"));
        assert_true(workers >= 1);
        assert_int_equal(strncmp(json_string_value(json_object_get(json_array_get(gpus, i), "uuid")), "GPU-", 4), 0);
        all += (uint32_t)workers;
        assert_true(i == 0 || all == 3);
    }
    json_decref(stat);
    for (uint32_t i = 0; i < 2; i++)
        pkv_close(kv[i]);
    pkv_close(served); /* the last one that had the sequences open */
    assert_serves(any);
    served = attach(&d, PKV_CONNECT_SERVED);
    assert_serves(served);
    assert_serves(served); /* on the other device */
    pkv_close(served);
    pkv_close(any);
    test_daemon_stop(&d);
    unsetenv("PIVOTKV_FAKE_DEVICES");
}

/* A chunk that served one tenant comes to another one as fresh memory. */
static void test_tenants_share_no_chunk(void **state)
{
    (void)state;
    struct test_daemon d;
    start(&d, "");
    for (int i = 0; i < 3; i++) {
        char tenant[8] = {'t', (char)('0' + i)};
        struct pkv *kv = attach_as(&d, tenant);
        assert_serves(kv);
        pkv_close(kv);
    }
    faults->refuse_create = 1; /* where no fresh one can be had, the old one is not handed out */
    struct pkv *kv = attach_as(&d, "last");
    struct pkv_seq *seq = create(kv);
    assert_int_equal(append_all(seq, k, v, TOKENS), -ENOTRECOVERABLE);
    pkv_close(kv);
    assert_true(test_daemon_said(&d, "somebody still holds the old one"));
    assert_int_equal(test_daemon_ended(&d), 3);
}

static void assert_described(const struct pkv *kv, const char *words)
{
    if (!strstr(pkv_describe(kv), words))
        fail_msg("%s", pkv_describe(kv));
}

static void assert_stat(const struct test_daemon *d, const char *key, const char *value)
{
    json_t *stat = stat_json(d, "stat");
    assert_string_equal(json_string_value(json_object_get(stat, key)), value);
    json_decref(stat);
}

/* Where VMM cannot export, the pool is shared by cudaIpc handles: one tenant maps it, the others are served. */
static void test_cudaipc_is_for_one_tenant(void **state)
{
    (void)state;
    struct test_daemon d;
    struct pkv *none = NULL;
    setenv("PIVOTKV_TEST_SHARE", "auto", 1);
    faults->no_export = 1;
    start_with(&d, "16M", ""); /* a chunk goes to another tenant only when nobody has it mapped */
    assert_true(test_daemon_said(&d, "shared by cudaIpc handles, as VMM descriptors are not to be had"));
    assert_stat(&d, "share", "ipc");
    struct pkv *first = attach_as(&d, "first"), *early = attach_as(&d, "early");
    assert_described(first, "direct on cuda");
    assert_described(early, "direct on cuda"); /* nobody has mapped it yet */
    assert_serves_some(first, 640);
    assert_stat(&d, "mapper", "first");
    struct pkv_seq *seq = create(early);
    assert_int_equal(append_all(seq, k, v, 64), -EPERM); /* no handle is handed out, whatever was settled */
    assert_non_null(strstr(pkv_error(early), "--share ipc"));
    pkv_close(early);
    struct pkv *other = attach_as(&d, "other"), *same = attach_as(&d, "first");
    assert_described(other, "served: with cudaIpc one tenant maps the pool");
    assert_serves_some(other, 640);
    assert_described(same, "direct on cuda");
    assert_serves_some(same, 640);
    pkv_close(same);
    pkv_close(first);
    assert_int_equal(connect_as(&d, "other", "cuda", &none), -EPERM); /* also when it has left */
    assert_non_null(strstr(pkv_error(NULL), "--share ipc"));
    GOOD(NULL, connect_as(&d, "first", "cuda", &first));
    assert_serves_some(first, 640);
    pkv_close(first), pkv_close(other);
    test_daemon_stop(&d);
    assert_int_equal(faults->chunks + faults->pins, 0);
}

static void test_cudaipc_for_all_tenants(void **state)
{
    (void)state;
    struct test_daemon d;
    setenv("PIVOTKV_TEST_SHARE", "ipc", 1);
    start_with(&d, "16M", "");
    assert_true(test_daemon_said(&d, "all tenants map it"));
    struct pkv *kv[3] = {attach_as(&d, "a"), attach_as(&d, "b"), attach_as(&d, "a")}; /* twice in one process */
    struct pkv_seq *seq[3];
    for (int i = 0; i < 3; i++) {
        seq[i] = create(kv[i]);
        assert_described(kv[i], "direct on cuda");
        GOOD(kv[i], append_all(seq[i], k + 64 * i, v + 64 * i, 640));
    }
    for (int i = 0; i < 3; i++) {
        assert_exact(kv[i], seq[i], k + 64 * i, v + 64 * i, q, 640);
        pkv_close(kv[i]);
    }
    faults->refuse_import = 1; /* another PID namespace, a sandbox */
    kv[0] = attach_as(&d, "a");
    seq[0] = create(kv[0]);
    assert_int_equal(append_all(seq[0], k, v, 64), -EOPNOTSUPP);
    assert_non_null(strstr(pkv_error(kv[0]), "PID and IPC namespaces"));
    faults->refuse_import = 0;
    pkv_close(kv[0]);
    test_daemon_stop(&d);
    assert_int_equal(faults->chunks + faults->pins, 0);
}

static void test_daemons_that_cannot_start(void **state)
{
    (void)state;
    const char *const flags[] = {"--pool-bytes", "4M", "--arena-bytes", "8M", NULL};
    const char *fake = getenv("PIVOTKV_FAKE_MODULE"), *path = "/tmp/pivotkv-test-none/socket";
    mkdir("/tmp/pivotkv-test-none", 0700);
    faults->refuse_register = 1;
    assert_int_equal(test_daemon_status(path, flags), 1);
    faults->refuse_register = 0, faults->refuse_create = 1;
    assert_int_equal(test_daemon_status(path, flags), 1);
    faults->refuse_create = 0, faults->no_export = 1;
    const char *const vmm[] = {"--share", "vmm", NULL};
    assert_int_equal(test_daemon_status(path, vmm), 1);
    faults->no_ipc = 1;
    assert_int_equal(test_daemon_status(path, flags), 1);
    faults->no_export = faults->no_ipc = 0, faults->lost = 1;
    assert_int_equal(test_daemon_status(path, flags), 1);
    faults->lost = 0;
    const char *const missing[] = {"--device", "5", NULL}, *const coarse[] = {
                                                               "--chunk-bytes", "1M", "--pool-bytes", "3M", "--arena-bytes",
                                                               "512K",          NULL};
    assert_int_equal(test_daemon_status(path, missing), 1);
    assert_int_equal(test_daemon_status(path, coarse), 2);
    setenv("PIVOTKV_CUDA_MODULE", "/nonexistent/module.so", 1);
    assert_int_equal(test_daemon_status(path, flags), 1);
    setenv("PIVOTKV_CUDA_MODULE", getenv("PIVOTKV_OTHER_MODULE"), 1);
    assert_int_equal(test_daemon_status(path, flags), 1);
    setenv("PIVOTKV_TEST_BACKEND", "auto", 1); /* takes what there is */
    struct test_daemon d;
    test_daemon_start(&d, flags);
    assert_true(test_daemon_said(&d, "no CUDA backend"));
    test_daemon_stop(&d);
    setenv("PIVOTKV_TEST_BACKEND", "cuda", 1);
    setenv("PIVOTKV_CUDA_MODULE", fake, 1);
    unlink("/tmp/pivotkv-test-none/socket.lock");
    rmdir("/tmp/pivotkv-test-none");
}

int main(int argc, char **argv)
{
    static struct fake_faults none;
    bool devices = argc > 1 && !strcmp(argv[1], "devices");
    faults = devices ? &none : test_faults();
    setenv("PIVOTKV_TEST_BACKEND", "cuda", 1);
    share = getenv("PIVOTKV_TEST_SHARE") ? strdup(getenv("PIVOTKV_TEST_SHARE")) : NULL;
    k = test_floats(1, TOKENS * ROW), v = test_floats(2, TOKENS * ROW), q = test_floats(3, QUERY);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_a_failed_copy_is_made_again, begin),
        cmocka_unit_test_setup(test_copies_that_always_fail, begin),
        cmocka_unit_test_setup(test_chunks_that_cannot_be_had, begin),
        cmocka_unit_test_setup(test_a_worker_without_the_gpu, begin),
        cmocka_unit_test_setup(test_cuda_asked_of_a_host_daemon, begin),
        cmocka_unit_test_setup(test_a_lost_device, begin),
        cmocka_unit_test_setup(test_lost_while_a_grant_waits, begin),
        cmocka_unit_test_setup(test_several_devices, begin),
        cmocka_unit_test_setup(test_tenants_share_no_chunk, begin),
        cmocka_unit_test_setup(test_cudaipc_is_for_one_tenant, begin),
        cmocka_unit_test_setup(test_cudaipc_for_all_tenants, begin),
        cmocka_unit_test_setup(test_daemons_that_cannot_start, begin),
    };
    const struct CMUnitTest several[] = {cmocka_unit_test_setup(test_several_devices, begin)};
    int r = devices ? cmocka_run_group_tests(several, NULL, NULL) : cmocka_run_group_tests(tests, NULL, NULL);
    free(k), free(v), free(q), free((void *)(uintptr_t)share);
    return r;
}
