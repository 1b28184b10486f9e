/* Signature states: shared by all workers, kept when they leave, never mixed; and calibrated again when quality drifts. */
#include "tests/integration/stat.h"

#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { TOKENS = 4120, TAUGHT = 4096 /* of them, by their queries */, CONTEXT = 8192, K = 100, MAX = 16 + 64 + K };

static struct test_daemon daemon_;
/* Two texts whose keys and queries live in other channels. */
static float *keys[2], *values, *queries[2];

static int start(void **state)
{
    (void)state;
    test_daemon_start(&daemon_,
                      (const char *const[]){"--pool-bytes", "64M", "--arena-bytes", "256M", "--threads", "1", "--audit-ppm",
                                            "1000000", "--audit-alarm-ppm", "150000", "--recalibrate-s", "1", NULL});
    values = test_floats(41, (uint64_t)TOKENS * ROW);
    for (int text = 0; text < 2; text++) {
        keys[text] = test_floats(42 + (uint64_t)text, (uint64_t)TOKENS * ROW);
        queries[text] = test_floats(44 + (uint64_t)text, (uint64_t)TOKENS * QUERY);
        for (uint64_t i = 0; i < (uint64_t)TOKENS * ROW; i++)
            keys[text][i] *= (i % DIM < DIM / 2) == (text == 0) ? 2.0f : 0.05f;
        for (uint64_t i = 0; i < (uint64_t)TOKENS * QUERY; i++)
            queries[text][i] *= (i % DIM < DIM / 2) == (text == 0) ? 2.0f : 0.05f;
    }
    return 0;
}

static int stop(void **state)
{
    (void)state;
    for (int text = 0; text < 2; text++)
        free(keys[text]), free(queries[text]);
    free(values);
    test_daemon_stop(&daemon_);
    return 0;
}

/* A `code` that calibrates itself; skips where the library cannot. */
static struct pkv_model *open_code(struct pkv *kv, const char *name)
{
    struct pkv_model_desc desc = described(name);
    desc.signature = PKV_CODE;
    struct pkv_model *model = NULL;
    int r = pkv_model_open(kv, &desc, &model);
    if (r == -EOPNOTSUPP)
        skip(); /* built without LAPACK */
    GOOD(kv, r);
    return model;
}

static struct pkv_seq *create(struct pkv *kv, struct pkv_model *model, uint32_t flags)
{
    struct pkv_seq *seq;
    GOOD(kv, pkv_seq_create(model, CONTEXT, flags, "states", &seq));
    return seq;
}

static void append(struct pkv *kv, struct pkv_seq *seq, int text, uint32_t first, uint32_t tokens)
{
    GOOD(kv, append_all(seq, keys[text] + (uint64_t)first * ROW, values + (uint64_t)first * ROW, tokens));
}

/* Attends with the last `tokens` tokens' queries in all layers: what calibrates, after as many keys. */
static void attend(struct pkv *kv, struct pkv_seq *seq, int text, uint32_t first, uint32_t tokens)
{
    static float out[TAUGHT * QUERY];
    struct pkv_budget b = budget(K);
    for (uint32_t l = 0; l < LAYERS; l++)
        GOOD(kv, pkv_attend(&seq, &tokens, 1, l, queries[text] + (uint64_t)first * QUERY, &b, out, NULL, NULL));
}

static void calibrate(struct pkv *kv, struct pkv_model *model, struct pkv_seq *seq, int text)
{
    append(kv, seq, text, 0, TOKENS);
    attend(kv, seq, text, TOKENS - TAUGHT, TAUGHT);
    GOOD(kv, pkv_model_settle(model));
}

struct selection {
    uint32_t index[KV_HEADS * MAX], count[KV_HEADS];
    uint16_t score[KV_HEADS * MAX];
};

static struct selection selection(struct pkv *kv, struct pkv_seq *seq, int text)
{
    struct selection s = {0};
    struct pkv_budget b = budget(K);
    GOOD(kv, pkv_select(seq, 1, 1, queries[text], &b, s.index, s.count, s.score, NULL));
    return s;
}

static void assert_same(const struct selection *a, const struct selection *b)
{
    assert_memory_equal(a->index, b->index, sizeof(a->index));
    assert_memory_equal(a->score, b->score, sizeof(a->score));
}

static uint64_t state_of(const struct pkv_seq *seq)
{
    return stat_state(&daemon_, pkv_seq_handle(seq));
}

/* A model keeps its calibration when all its workers have left: the next one's sequences have it from the first token. */
static void test_kept(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model *model = open_code(kv, "kept");
    struct pkv_seq *seq = create(kv, model, 0);
    assert_int_equal(state_of(seq), 0);
    calibrate(kv, model, seq, 0);
    assert_int_equal(state_of(seq), 1);
    struct selection first = selection(kv, seq, 0);
    struct pkv_seq *next = create(kv, model, 0);
    assert_int_equal(state_of(next), 1);
    pkv_close(kv);
    assert_int_equal(stat_quality(&daemon_, "kept").state, 1);
    for (uint32_t flags = 0; flags <= PKV_CONNECT_SERVED; flags++) {
        kv = attach(&daemon_, flags);
        seq = create(kv, open_code(kv, "kept"), 0);
        assert_int_equal(state_of(seq), 1);
        append(kv, seq, 0, 0, TOKENS);
        struct selection again = selection(kv, seq, 0);
        assert_same(&first, &again);
        pkv_close(kv);
    }
}

/* Sequences that others wrote before there was a state: their writers, their readers and their heirs all come to the same. */
static void test_before_the_first(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0), *other = attach(&daemon_, PKV_CONNECT_SERVED), *reader = attach(&daemon_, 0);
    struct pkv_model *mine = open_code(kv, "before"), *their = open_code(other, "before");
    struct pkv_seq *seq = create(kv, mine, 0), *theirs = create(other, their, 0), *seen;
    struct pkv *gone = attach(&daemon_, 0);
    struct pkv_seq *left = create(gone, open_code(gone, "before"), PKV_PERSISTENT), *child;
    uint64_t handle = pkv_seq_handle(left);
    append(gone, left, 0, 0, TOKENS / 64 * 64);
    pkv_close(gone);
    append(other, theirs, 0, 0, TOKENS / 64 * 64);
    GOOD(other, pkv_ping(other, NULL));
    GOOD(reader, pkv_seq_open(open_code(reader, "before"), pkv_seq_handle(theirs), &seen));
    GOOD(reader, pkv_seq_fork(seen, 1024, 0, &child));
    (void)selection(reader, seen, 0); /* a guess, but rows that are there */
    calibrate(kv, mine, seq, 0);
    GOOD(kv, pkv_seq_truncate(seq, TOKENS / 64 * 64));
    struct selection want = selection(kv, seq, 0), got;
    assert_int_equal(state_of(theirs), 0);
    GOOD(other, pkv_model_settle(their));
    got = selection(other, theirs, 0);
    assert_same(&want, &got);
    assert_int_equal(state_of(theirs), 1);
    got = selection(reader, seen, 0);
    assert_same(&want, &got);
    append(reader, child, 0, 1024, TOKENS / 64 * 64 - 1024);
    got = selection(reader, child, 0);
    assert_same(&want, &got);
    assert_int_equal(state_of(child), 1);
    GOOD(reader, pkv_seq_open(open_code(reader, "before"), handle, &left));
    got = selection(reader, left, 0);
    assert_same(&want, &got);
    GOOD(reader, pkv_seq_destroy(left));
    pkv_close(kv), pkv_close(other), pkv_close(reader);
}

/* Forked before its first use, what another worker wrote in its own way is signed as this worker's. */
static void test_forked_before_use(void **state)
{
    (void)state;
    enum { N = 1024 };
    struct pkv *gone = attach(&daemon_, 0), *kv = attach(&daemon_, 0);
    struct pkv_model *theirs = open_code(gone, "prefix"), *mine = open_code(kv, "prefix");
    struct pkv_seq *left = create(gone, theirs, PKV_PERSISTENT), *own = create(kv, mine, 0), *child;
    uint64_t handle = pkv_seq_handle(left);
    append(gone, create(gone, theirs, 0), 1, 0, N); /* so that it has learnt other means */
    append(gone, left, 0, 0, N);
    pkv_close(gone);
    append(kv, own, 0, 0, N);
    GOOD(kv, pkv_seq_open(mine, handle, &left));
    GOOD(kv, pkv_seq_fork(left, N, 0, &child));
    struct selection want = selection(kv, own, 0), got = selection(kv, child, 0);
    assert_same(&want, &got);
    GOOD(kv, pkv_seq_destroy(left));
    pkv_close(kv);
}

/* A sequence that another worker destroyed is no hindrance to what its former neighbours learn. */
static void test_destroyed_while_learning(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0), *other = attach(&daemon_, 0);
    struct pkv_model *mine = open_code(kv, "neighbours");
    struct pkv_seq *first = create(kv, mine, PKV_PERSISTENT), *last = create(kv, mine, PKV_PERSISTENT), *middle, *seen;
    append(kv, first, 0, 0, 16), append(kv, last, 0, 0, 16);
    middle = create(kv, mine, 0);
    GOOD(other, pkv_seq_open(open_code(other, "neighbours"), pkv_seq_handle(first), &seen));
    GOOD(other, pkv_seq_destroy(seen));
    append(kv, middle, 0, 0, 1024);
    append(kv, last, 0, 16, 1024 - 16);
    struct selection want = selection(kv, middle, 0), got = selection(kv, last, 0);
    assert_same(&want, &got);
    assert_int_equal(pkv_append(first, 0, 1, keys[0], values), -ESTALE);
    GOOD(kv, pkv_seq_destroy(last));
    pkv_close(kv), pkv_close(other);
}

/* Feeds the second text until the daemon has what it asked for. */
static void feed(struct pkv *kv, struct pkv_seq *seq)
{
    for (int i = 0; i < 200 && stat_quality(&daemon_, "drift").state < 2; i++) {
        append(kv, seq, 1, (uint32_t)(i % 8) * 256, 256);
        attend(kv, seq, 1, (uint32_t)(i % 8) * 256, 256);
        GOOD(kv, pkv_seq_truncate(seq, 1024));
        usleep(20000);
    }
}

static double error_of(struct pkv *kv, struct pkv_seq *seq, int text)
{
    struct pkv_budget b = budget(K);
    double mass, error;
    GOOD(kv, pkv_audit(seq, 50, 1, queries[text], &b, &mass, &error));
    return error;
}

/* Sequences of several states in one call. */
static void together(struct pkv *kv, struct pkv_seq *old, struct pkv_seq *fresh)
{
    static float out[2 * QUERY], one[2 * QUERY];
    struct pkv_seq *both[] = {old, fresh};
    struct pkv_budget b = budget(K);
    float q2[2 * QUERY];
    uint32_t ones[] = {1, 1};
    memcpy(q2, queries[0], QUERY * sizeof(float)), memcpy(q2 + QUERY, queries[1], QUERY * sizeof(float));
    GOOD(kv, pkv_attend(both, ones, 2, 1, q2, &b, out, NULL, NULL));
    for (int i = 0; i < 2; i++)
        GOOD(kv, pkv_attend(&both[i], ones, 1, 1, q2 + i * QUERY, &b, one + i * QUERY, NULL, NULL));
    assert_memory_equal(out, one, sizeof(out));
}

static void read_by_others(struct pkv *kv, struct pkv_seq *seq, int text, struct pkv *reader)
{
    struct selection want = selection(kv, seq, text), got;
    struct pkv_seq *seen;
    GOOD(reader, pkv_seq_open(open_code(reader, "drift"), pkv_seq_handle(seq), &seen));
    got = selection(reader, seen, text);
    assert_same(&want, &got);
    assert_int_equal(pkv_seq_recalibrate(seen), -EACCES);
}

/* An old one can be signed again if nobody shares it; then it selects as a new one does. */
static void sign_anew(struct pkv *kv, struct pkv_seq *drifted, struct pkv_seq *shared, struct pkv_seq *fresh)
{
    GOOD(kv, pkv_seq_truncate(drifted, 0));
    append(kv, drifted, 1, 0, TOKENS / 64 * 64);
    assert_int_equal(state_of(drifted), 1);
    struct selection want = selection(kv, fresh, 1), got = selection(kv, drifted, 1);
    assert_memory_not_equal(got.index, want.index, sizeof(want.index));
    assert_int_equal(pkv_seq_recalibrate(shared), -EBUSY);
    assert_int_equal(state_of(shared), 1);
    GOOD(kv, pkv_seq_recalibrate(drifted));
    assert_int_equal(state_of(drifted), 2);
    got = selection(kv, drifted, 1);
    assert_same(&want, &got);
    GOOD(kv, pkv_seq_recalibrate(drifted)); /* it is: nothing to do */
}

static void test_recalibration(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0), *reader = attach(&daemon_, 0), *served = attach(&daemon_, PKV_CONNECT_SERVED);
    struct pkv_model *model = open_code(kv, "drift");
    struct pkv_seq *old = create(kv, model, 0), *drifted, *child;
    calibrate(kv, model, old, 0);
    assert_int_equal(state_of(old), 1);
    struct selection before = selection(kv, old, 0), after;
    /* The text changes; the error of new sequences rises until workers are asked to calibrate again, and do. */
    drifted = create(kv, model, 0);
    append(kv, drifted, 1, 0, TOKENS);
    double bad = error_of(kv, drifted, 1);
    GOOD(kv, pkv_seq_truncate(drifted, 1024));
    feed(kv, drifted);
    struct stat_quality q = stat_quality(&daemon_, "drift");
    assert_int_equal(q.state, 2);
    assert_false(q.recalibrating);
    assert_int_equal(stat_number(&daemon_, "counters", "recalibrations"), 1);
    /* Sequences that are there keep their signatures, their forks too; new ones are better off. */
    assert_int_equal(state_of(old), 1);
    after = selection(kv, old, 0);
    assert_same(&before, &after);
    struct pkv_seq *fresh = create(kv, model, 0);
    assert_int_equal(state_of(fresh), 2);
    append(kv, fresh, 1, 0, TOKENS);
    double good = error_of(kv, fresh, 1);
    print_message("# error on the second text: %.3f calibrated on the first, %.3f on itself\n", bad, good);
    assert_true(good < 0.7 * bad);
    GOOD(kv, pkv_seq_fork(old, 2048, 0, &child));
    assert_int_equal(state_of(child), 1);
    append(kv, child, 0, 2048, TOKENS - 2048);
    after = selection(kv, child, 0);
    assert_same(&before, &after);
    together(kv, old, fresh);
    GOOD(kv, pkv_seq_truncate(fresh, TOKENS / 64 * 64));
    GOOD(kv, pkv_seq_truncate(old, TOKENS / 64 * 64));
    read_by_others(kv, old, 0, reader), read_by_others(kv, fresh, 1, reader);
    read_by_others(kv, old, 0, served), read_by_others(kv, fresh, 1, served);
    sign_anew(kv, drifted, old, fresh);
    pkv_close(kv), pkv_close(reader), pkv_close(served);
}

/* Writes a persistent sequence without a state, and has it signed again once it is told that there is one. Until it is killed.
 */
static void victim(const char *name, int to_parent, int from_parent)
{
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_seq *seq = create(kv, open_code(kv, name), PKV_PERSISTENT);
    append(kv, seq, 0, 0, TOKENS / 64 * 64);
    GOOD(kv, pkv_ping(kv, NULL));
    uint64_t handle = pkv_seq_handle(seq);
    char go;
    if (write(to_parent, &handle, sizeof(handle)) != sizeof(handle) || read(from_parent, &go, 1) != 1)
        _exit(1);
    for (;;)
        (void)selection(kv, seq, 0);
}

/* Opens a dead worker's sequence, as its writer. */
static struct pkv_seq *inherit(struct pkv *kv, struct pkv_model *model, uint64_t handle)
{
    struct pkv_seq *seq = NULL;
    for (int i = 0; i < 100; i++) {
        GOOD(kv, pkv_seq_open(model, handle, &seq));
        int r = pkv_seq_recalibrate(seq);
        if (r != -EACCES) { /* the daemon knows of the death */
            GOOD(kv, r);
            return seq;
        }
        GOOD(kv, pkv_seq_close(seq));
        usleep(50000);
    }
    fail_msg("the dead worker's sequence cannot be written");
    return NULL;
}

/* Killed anywhere while it signs a sequence again: the next writer signs all of it, and nothing is mixed. */
static void test_death_while_signing(void **state)
{
    (void)state;
    struct pkv *probe = attach(&daemon_, 0);
    (void)open_code(probe, "probe"); /* skips here, not in a child */
    pkv_close(probe);
    for (unsigned round = 0; round < 4; round++) {
        char name[16];
        int up[2], down[2], status;
        uint64_t handle = 0;
        snprintf(name, sizeof(name), "dying %u", round);
        assert_true(pipe(up) == 0 && pipe(down) == 0);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            victim(name, up[1], down[0]);
        }
        assert_int_equal(read(up[0], &handle, sizeof(handle)), sizeof(handle));
        struct pkv *kv = attach(&daemon_, 0);
        struct pkv_model *model = open_code(kv, name);
        struct pkv_seq *mine = create(kv, model, 0);
        calibrate(kv, model, mine, 0);
        GOOD(kv, pkv_seq_truncate(mine, TOKENS / 64 * 64));
        assert_int_equal(write(down[1], "g", 1), 1);
        usleep(round * 4000);
        assert_int_equal(kill(pid, SIGKILL), 0);
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status));
        struct pkv_seq *seq = inherit(kv, model, handle);
        assert_int_equal(state_of(seq), 1);
        struct selection want = selection(kv, mine, 0), got = selection(kv, seq, 0);
        assert_same(&want, &got);
        GOOD(kv, pkv_seq_destroy(seq));
        pkv_close(kv);
        close(up[0]), close(up[1]), close(down[0]), close(down[1]);
    }
}

/* What a caller gets that asks for nothing: a `code` with one bit per head dimension. */
static void test_defaults(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model_desc desc;
    struct pkv_model *model;
    memset(&desc, 0xff, sizeof(desc));
    pkv_model_defaults(&desc);
    desc.layers = LAYERS, desc.q_heads = Q_HEADS, desc.kv_heads = KV_HEADS, desc.head_dim = 96, desc.name = "defaults";
    GOOD(kv, pkv_model_open(kv, &desc, &model));
    if (desc.signature != PKV_CODE)
        skip(); /* built without LAPACK */
    json_t *o = stat_json(&daemon_, "stat"), *m, *found = NULL;
    size_t i;
    json_array_foreach(json_object_get(o, "models"), i, m)
    {
        if (!strcmp(json_string_value(json_object_get(m, "name")), "defaults"))
            found = m;
    }
    assert_non_null(found);
    assert_string_equal(json_string_value(json_object_get(found, "scheme")), "code");
    assert_int_equal(json_integer_value(json_object_get(found, "sig_bits")), 96);
    json_decref(o);
    pkv_close(kv);
}

/* A worker that leaves in the middle of a calibration leaves nothing behind that others wait for. */
static void test_leaving_while_calibrating(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0), *next = attach(&daemon_, 0);
    struct pkv_model *their = open_code(next, "leaving");
    struct pkv_seq *seq = create(kv, open_code(kv, "leaving"), 0), *theirs = create(next, their, 0);
    append(kv, seq, 0, 0, TOKENS);
    attend(kv, seq, 0, 0, 1000); /* not enough */
    pkv_close(kv);
    assert_int_equal(state_of(theirs), 0);
    calibrate(next, their, theirs, 0);
    assert_int_equal(state_of(theirs), 1);
    pkv_close(next);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kept),
        cmocka_unit_test(test_before_the_first),
        cmocka_unit_test(test_forked_before_use),
        cmocka_unit_test(test_destroyed_while_learning),
        cmocka_unit_test(test_recalibration),
        cmocka_unit_test(test_leaving_while_calibrating),
        cmocka_unit_test(test_death_while_signing),
        cmocka_unit_test(test_defaults),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
