/* Workers that break every rule: the daemon goes on, and a good worker beside them notices nothing. */
#include "tests/integration/raw.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/un.h>

static struct test_daemon daemon_;
static struct pkv *good;
static struct pkv_seq *good_seq;
static float *k, *q;
static uint64_t seed = 12345;

static uint32_t any(void)
{
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(seed >> 32);
}

static int start(void **state)
{
    (void)state;
    test_daemon_start(&daemon_, (const char *const[]){"--pool-bytes", "8M", "--arena-bytes", "16M", "--threads", "1",
                                                      "--log-level", "error", "--grant-timeout-ms", "200", NULL});
    good = attach(&daemon_, 0);
    GOOD(good, pkv_seq_create(open_model(good), 1000, 0, NULL, &good_seq));
    k = test_floats(1, 700 * ROW), q = test_floats(2, QUERY);
    GOOD(good, append_all(good_seq, k, k, 700));
    return 0;
}

static int stop(void **state)
{
    (void)state;
    pkv_close(good);
    free(k), free(q);
    test_daemon_stop(&daemon_);
    return 0;
}

static void all_is_well(void)
{
    GOOD(good, pkv_ping(good, NULL));
    assert_exact(good, good_seq, k, k, q, 700);
}

static uint32_t say(const void *message, size_t bytes)
{
    struct pkv_reply reply;
    int fds[4], fd = test_dial(&daemon_);
    assert_true(fd >= 0);
    uint32_t e = ask(fd, message, bytes, &reply, fds);
    for (int i = 0; i < 4; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    close(fd);
    return e;
}

static void test_bad_hellos(void **state)
{
    (void)state;
    struct pkv_hello h = hello();
    assert_int_equal(say(&h, sizeof(h)), PKV_ERR_OK);
    h.version_minor++;
    assert_int_equal(say(&h, sizeof(h)), PKV_ERR_VERSION);
    assert_int_equal(say(&h, 40), PKV_ERR_VERSION); /* another version's may be shorter, or longer */
    char longer[300] = {0};
    memcpy(longer, &h, sizeof(h));
    assert_int_equal(say(longer, sizeof(longer)), PKV_ERR_VERSION);
    h = hello();
    assert_int_equal(say(&h, 100), PKV_ERR_RESERVED);
    h.required = 1ull << 40, h.features |= h.required;
    assert_int_equal(say(&h, sizeof(h)), PKV_ERR_FEATURE);
    h = hello(), h.data_bytes = UINT64_MAX;
    assert_int_equal(say(&h, sizeof(h)), PKV_ERR_INVALID);
    h = hello(), memset(h.tenant, 'x', sizeof(h.tenant));
    assert_int_equal(say(&h, sizeof(h)), PKV_ERR_INVALID);
    h = hello(), h.magic = 1;
    assert_int_equal(say(&h, sizeof(h)), PKV_ERR_COUNT);
    assert_int_equal(say("x", 1), PKV_ERR_COUNT);
    all_is_well();
}

static void test_random_messages(void **state)
{
    (void)state;
    for (int round = 0; round < 300; round++) {
        int fd = test_dial(&daemon_), fds[4];
        struct pkv_reply reply;
        struct pkv_hello h = hello();
        uint32_t junk[50];
        assert_true(fd >= 0);
        if (round % 3)
            assert_int_equal(ask(fd, &h, sizeof(h), &reply, fds), PKV_ERR_OK);
        for (int i = 0; round % 3 && i < 4; i++)
            close(fds[i]);
        for (int m = 0; m < 5; m++) {
            for (size_t i = 0; i < sizeof(junk) / sizeof(junk[0]); i++)
                junk[i] = any() >> (any() % 32);
            if (any() % 4)
                junk[0] = PKV_MAGIC, junk[1] = 2 + any() % 5;
            if (send(fd, junk, 16 + any() % 180, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
                break;
        }
        close(fd);
    }
    all_is_well();
}

/* Random bytes everywhere, rings and indices included, while the daemon reads them. */
static void test_random_region(void **state)
{
    (void)state;
    for (int worker = 0; worker < 20; worker++) {
        struct raw r = raw_worker(&daemon_, "");
        uint32_t *words = (uint32_t *)r.region;
        for (int round = 0; round < 100; round++) {
            for (int i = 0; i < 3000; i++)
                words[any() % (r.bytes / 4)] = any() >> (any() % 32);
            for (int i = 0; i < 4000; i++)
                words[any() % (pkv_region_data_off() / 4)] = any();
            kick(&r);
        }
        raw_close(&r);
    }
    all_is_well();
}

static struct pkv_submission random_submission(const struct raw *r, const uint64_t *handles)
{
    struct pkv_submission s = {.op = (uint8_t)(any() % PKV_OP_COUNT), .layer = any() % 3 ? (uint16_t)(any() % 2) : 0xffff};
    s.seq = any() % 8 ? handles[any() % 8] : any();
    uint64_t words[5] = {0};
    for (int i = 0; i < 5; i++)
        words[i] = any() % 3 ? any() % 2000 : any() % 2 ? 0 : (uint64_t)any() << (any() % 33);
    memcpy(&s.u, words, sizeof(words));
    if (s.op == PKV_OP_SEQ_CREATE)
        s.u.create = (struct pkv_op_create){.model = r->model, .max_tokens = 1 + any() % 3000, .flags = any() % 2};
    if (s.op == PKV_OP_SELECT)
        s.u.select = (struct pkv_op_select){.data_bytes = 4096, .out_off = 8192, .out_bytes = 500000};
    if (s.op == PKV_OP_APPEND)
        s.u.append = (struct pkv_op_append){.first_token = any() % 200, .tokens = any() % 100, .data_bytes = 500000};
    if (s.op == PKV_OP_READ)
        s.u.read = (struct pkv_op_read){.first_block = any() % 4, .count = any() % 4, .out_bytes = 500000};
    if (s.op == PKV_OP_FORK)
        s.u.fork = (struct pkv_op_fork){.tokens = any() % 300};
    if (s.op == PKV_OP_GRANT || s.op == PKV_OP_TRUNCATE)
        memset(&words[1], 0, 32), memcpy(&s.u, words, sizeof(words));
    if (s.op == PKV_OP_SEAL)
        s.u.seal = (struct pkv_op_seal){.first_block = any() % 4, .count = 1 + any() % 3};
    if (s.op <= PKV_OP_SEQ_DESTROY && s.op != PKV_OP_SEQ_CREATE)
        memset(&s.u, 0, sizeof(s.u));
    return s;
}

/* Well-formed operations in senseless order over a data area and epochs that change all the time, or never end. */
static void test_random_operations(void **state)
{
    (void)state;
    uint64_t done = 0, accepted = 0;
    for (int worker = 0; worker < 6; worker++) {
        struct raw r = raw_worker(&daemon_, "");
        uint32_t tail = 0, head = 0;
        uint64_t handles[8] = {0};
        struct pkv_completion c;
        struct pkv_select_args args = {
            .tokens = 64, .queries = 1, .k = 8, .scale = 0.1f, .sinks = 4, .recent = 4, .rule = PKV_RULE_SOFTMAX};
        if (worker % 2)
            r.region->epoch[(uint32_t)worker % PKV_EPOCH_SLOTS] = 0;
        for (int i = 0; i < 3000; i++) {
            char *data = (char *)r.region + pkv_region_data_off();
            args.tokens = 1 + any() % 300, args.k = 1 + any() % 20;
            memcpy(data, &args, sizeof(args));
            r.region->epoch[worker % 2 ? 0 : any() % PKV_EPOCH_SLOTS] = any();
            for (int n = 0; n < 20; n++)
                data[64 + any() % 100000] = (char)any();
            struct pkv_submission s = random_submission(&r, handles);
            if (!pkv_sq_push(r.region, &tail, &s))
                usleep(1000);
            kick(&r);
            while (pkv_cq_pop(r.region, &head, &c)) {
                pkv_store32(&r.region->cq_head.value, head);
                done++;
                accepted += c.err == PKV_ERR_OK;
                if (c.err == PKV_ERR_OK && c.value0 >> 32)
                    handles[any() % 8] = c.value0;
            }
        }
        raw_close(&r);
    }
    assert_true(done > 3000 && accepted > 300); /* else this proves nothing */
    all_is_well();
}

/* States that nobody put, that nobody asked for, of models that are not there; samples that cannot be. */
static void test_states_and_sums(void **state)
{
    (void)state;
    struct raw r = raw_worker(&daemon_, "");
    struct pkv_reply reply;
    uint64_t handle, ignored;
    int fds[4];
    for (uint32_t i = 0; i < 200; i++) {
        const uint32_t models[] = {r.model, 63, 64, UINT32_MAX, any()}, numbers[] = {0, 2, 3, UINT32_MAX, any() | 2};
        struct pkv_state_request wish = {.magic = PKV_MAGIC,
                                         .message = i % 2 ? PKV_MSG_STATE_PUT : PKV_MSG_STATE_GET,
                                         .model = models[any() % 5],
                                         .state = numbers[any() % 5]};
        uint32_t e = ask(r.fd, &wish, sizeof(wish), &reply, fds);
        assert_true(e == PKV_ERR_NO_MODEL || e == (i % 2 ? PKV_ERR_INVALID : PKV_ERR_NO_STATE));
        assert_int_equal(fds[0], -1);
    }
    struct pkv_submission create = {.op = PKV_OP_SEQ_CREATE, .u.create = {.model = r.model, .max_tokens = 64, .state = 1}};
    assert_int_equal(answer(&r, create, &handle), PKV_ERR_NO_STATE);
    create.u.create.state = 0;
    assert_int_equal(answer(&r, create, &handle), PKV_ERR_OK);
    struct pkv_submission done = {.op = PKV_OP_SIGNED, .seq = handle, .u.signed_ = {.state = 1}};
    assert_int_equal(answer(&r, done, &ignored), PKV_ERR_NO_STATE);
    done.seq++;
    assert_int_not_equal(answer(&r, done, &ignored), PKV_ERR_OK);
    for (int round = 0; round < 4; round++) {
        for (uint32_t m = 0; m < PKV_MODELS_MAX; m++)
            r.region->quality[m] = (struct pkv_model_quality){round ? any() : UINT64_MAX, UINT64_MAX, UINT64_MAX, round % 2};
        usleep(150000); /* the daemon looks at it */
        all_is_well();
    }
    raw_close(&r);
}

/* A worker that fills its ring and reaps nothing costs the others nothing. */
static void test_worker_that_does_not_reap(void **state)
{
    (void)state;
    struct raw r = raw_worker(&daemon_, "");
    uint32_t tail = 0;
    struct pkv_submission nop = {.op = PKV_OP_NOP};
    for (int i = 0; i < 2000; i++)
        if (!pkv_sq_push(r.region, &tail, &nop))
            kick(&r);
    all_is_well();
    raw_close(&r);
}

static void test_silent_connections(void **state)
{
    (void)state;
    int fds[200], n = 0;
    for (; n < 200; n++)
        fds[n] = test_dial(&daemon_);
    all_is_well();
    while (n--)
        if (fds[n] >= 0)
            close(fds[n]);
    /* Their places are free again. */
    struct pkv *another = attach(&daemon_, 0);
    GOOD(another, pkv_ping(another, NULL));
    pkv_close(another);
}

/* The other way round: a daemon of another version, or none of ours at all. */
static void *false_daemon(void *arg)
{
    int listener = *(int *)arg, fd = accept(listener, NULL, NULL);
    struct pkv_hello h;
    struct pkv_reply reply = {.magic = PKV_MAGIC,
                              .message = PKV_MSG_HELLO,
                              .err = PKV_ERR_VERSION,
                              .version_major = PKV_VERSION_MAJOR + 1,
                              .version_minor = 7};
    if (recv(fd, &h, sizeof(h), 0) > 0 && send(fd, &reply, sizeof(reply), MSG_NOSIGNAL) < 0)
        perror("send");
    close(fd);
    return NULL;
}

static void test_daemon_of_another_version(void **state)
{
    (void)state;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/false", daemon_.folder);
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(listener, (const struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(listener, 1), 0);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, false_daemon, &listener), 0);
    struct pkv *kv;
    assert_int_equal(pkv_connect(address.sun_path, NULL, &kv), -EPROTO);
    assert_non_null(strstr(pkv_error(NULL), "version"));
    pthread_join(thread, NULL);
    close(listener);
    unlink(address.sun_path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_hellos),         cmocka_unit_test(test_random_messages),
        cmocka_unit_test(test_random_region),      cmocka_unit_test(test_random_operations),
        cmocka_unit_test(test_states_and_sums),    cmocka_unit_test(test_worker_that_does_not_reap),
        cmocka_unit_test(test_silent_connections), cmocka_unit_test(test_daemon_of_another_version),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
