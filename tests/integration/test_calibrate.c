/* Calibration beside the serving path: who solves, who waits, what is selected meanwhile, and what becomes of it when it fails.
 * LAPACK's dsyevd is the test's: it says which thread calls it, holds solves up, and makes them fail. */
#include "tests/integration/stat.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sys/syscall.h>

enum { TOKENS = 4120, SHORT = 272, PIECE = 256, EARLY = 1024, CONTEXT = 8192, K = 100, MAX = 16 + 64 + K };
enum { SLICE = (16 << 20) / (KV_HEADS * DIM * DIM) }; /* tokens that a call signs again (turn.c) */

static struct test_daemon daemon_;
static float *keys, *other_keys, *values, *queries;

/* ---- LAPACK ---- */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool held, fails;
    int calls, here /* of them by the test's own thread */, waiting;
    pthread_t self;
} lapack = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

__attribute__((visibility("default"))) void dsyevd_(const char *jobz, const char *uplo, const int *n, double *a, const int *lda,
                                                    double *w, double *work, const int *lwork, int *iwork, const int *liwork,
                                                    int *info);

void dsyevd_(const char *jobz, const char *uplo, const int *n, double *a, const int *lda, double *w, double *work,
             const int *lwork, int *iwork, const int *liwork, int *info)
{
    static void (*real)(const char *, const char *, const int *, double *, const int *, double *, double *, const int *, int *,
                        const int *, int *);
    pthread_mutex_lock(&lapack.lock);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "dsyevd_");
    lapack.calls++, lapack.here += pthread_equal(pthread_self(), lapack.self) != 0;
    lapack.waiting++;
    pthread_cond_broadcast(&lapack.changed);
    while (lapack.held)
        pthread_cond_wait(&lapack.changed, &lapack.lock);
    lapack.waiting--;
    bool fails = lapack.fails;
    pthread_mutex_unlock(&lapack.lock);
    if (fails)
        *info = 1;
    else
        real(jobz, uplo, n, a, lda, w, work, lwork, iwork, liwork, info);
}

static void hold(bool held)
{
    pthread_mutex_lock(&lapack.lock);
    lapack.held = held;
    pthread_cond_broadcast(&lapack.changed);
    pthread_mutex_unlock(&lapack.lock);
}

static void fail_solves(bool fails)
{
    pthread_mutex_lock(&lapack.lock);
    lapack.fails = fails;
    pthread_mutex_unlock(&lapack.lock);
}

static int calls(void)
{
    pthread_mutex_lock(&lapack.lock);
    int n = lapack.calls;
    pthread_mutex_unlock(&lapack.lock);
    return n;
}

/* Until `threads` solves are held up. */
static void await_solves(int threads)
{
    pthread_mutex_lock(&lapack.lock);
    while (lapack.waiting < threads)
        pthread_cond_wait(&lapack.changed, &lapack.lock);
    pthread_mutex_unlock(&lapack.lock);
}

/* ---- the rest of the scene ---- */

static int start(void **state)
{
    (void)state;
    lapack.self = pthread_self();
    test_daemon_start(&daemon_, (const char *const[]){"--pool-bytes", "64M", "--arena-bytes", "256M", "--threads", "1", NULL});
    values = test_floats(51, (uint64_t)TOKENS * ROW), other_keys = test_floats(54, (uint64_t)TOKENS * ROW);
    keys = test_floats(52, (uint64_t)TOKENS * ROW), queries = test_floats(53, (uint64_t)TOKENS * QUERY);
    for (uint64_t i = 0; i < (uint64_t)TOKENS * ROW; i++)
        keys[i] *= i % DIM < DIM / 2 ? 2.0f : 0.1f, other_keys[i] *= i % DIM < DIM / 2 ? 2.0f : 0.1f;
    for (uint64_t i = 0; i < (uint64_t)TOKENS * QUERY; i++)
        queries[i] *= i % DIM < DIM / 2 ? 2.0f : 0.1f;
    return 0;
}

static int stop(void **state)
{
    (void)state;
    free(keys), free(other_keys), free(values), free(queries);
    test_daemon_stop(&daemon_);
    return 0;
}

/* A worker with one sequence of a model. */
struct worker {
    struct pkv *kv;
    struct pkv_model *model;
    struct pkv_seq *seq;
};

static struct pkv_seq *create(const struct worker *w)
{
    struct pkv_seq *seq;
    GOOD(w->kv, pkv_seq_create(w->model, CONTEXT, 0, "calibrate", &seq));
    return seq;
}

static struct worker worker(const char *name, uint32_t flags, uint32_t timeout_ms)
{
    struct pkv_options o = {.size = sizeof(o), .flags = flags, .threads = 1, .label = "test", .timeout_ms = timeout_ms};
    struct pkv_model_desc desc = described(name);
    struct worker w = {0};
    desc.signature = PKV_CODE;
    GOOD(NULL, pkv_connect(daemon_.socket, &o, &w.kv));
    int r = pkv_model_open(w.kv, &desc, &w.model);
    if (r == -EOPNOTSUPP)
        skip(); /* built without LAPACK */
    GOOD(w.kv, r);
    w.seq = create(&w);
    return w;
}

static void attend(const struct worker *w, struct pkv_seq *seq, uint32_t tokens)
{
    static float out[PIECE * QUERY];
    struct pkv_budget b = budget(K);
    for (uint32_t done = 0, n; done < tokens; done += n) {
        n = tokens - done < PIECE ? tokens - done : PIECE;
        for (uint32_t l = 0; l < LAYERS; l++)
            GOOD(w->kv, pkv_attend(&seq, &n, 1, l, queries + (uint64_t)done * QUERY, &b, out, NULL, NULL));
    }
}

/* Enough of both to solve for good; the thread begins with the last layer's keys. Queries come while the sequence is short,
 * which is cheaper. */
static void teach(const struct worker *w, struct pkv_seq *seq)
{
    GOOD(w->kv, append_all(seq, keys, values, SHORT));
    attend(w, seq, TOKENS / PIECE * PIECE);
    GOOD(w->kv, append_all(seq, keys + SHORT * ROW, values + SHORT * ROW, TOKENS - SHORT));
}

struct selection {
    uint32_t index[KV_HEADS * MAX], count[KV_HEADS];
    uint16_t score[KV_HEADS * MAX];
};

static struct selection selection(const struct worker *w, struct pkv_seq *seq)
{
    struct selection s = {0};
    struct pkv_budget b = budget(K);
    GOOD(w->kv, pkv_select(seq, 1, 1, queries, &b, s.index, s.count, s.score, NULL));
    return s;
}

static bool same(const struct selection *a, const struct selection *b)
{
    return !memcmp(a, b, sizeof(*a));
}

static uint64_t state_of(const struct pkv_seq *seq)
{
    return stat_state(&daemon_, pkv_seq_handle(seq));
}

/* What a worker selects that takes the model's first state over. */
static struct selection wanted(const char *name)
{
    struct worker w = worker(name, 0, 0);
    assert_int_equal(state_of(w.seq), 1);
    GOOD(w.kv, append_all(w.seq, keys, values, TOKENS));
    struct selection s = selection(&w, w.seq);
    pkv_close(w.kv);
    return s;
}

/* ---- */

/* A solve that does not end holds up nothing but who asks for it, and that with a bound. No call of ours solves. */
static void test_held_up(void **state)
{
    (void)state;
    struct worker w = worker("held", 0, 2000);
    int before = calls();
    hold(true);
    teach(&w, w.seq);
    await_solves(1);
    struct selection old = selection(&w, w.seq), now;
    for (uint32_t t = 0; t < 50; t++) {
        GOOD(w.kv, append_all(w.seq, keys, values, 1));
        attend(&w, w.seq, 1);
    }
    struct pkv_seq *more = create(&w);
    GOOD(w.kv, append_all(more, keys, values, TOKENS));
    GOOD(w.kv, pkv_seq_truncate(w.seq, TOKENS));
    now = selection(&w, w.seq);
    assert_true(same(&old, &now) && state_of(w.seq) == 0);
    assert_int_equal(pkv_model_settle(w.model), -ETIMEDOUT);
    hold(false);
    GOOD(w.kv, pkv_model_settle(w.model));
    assert_true(state_of(w.seq) == 1 && state_of(more) == 1);
    now = selection(&w, w.seq);
    struct selection want = wanted("held"), second = selection(&w, more);
    assert_true(!same(&old, &want) && same(&now, &want) && same(&second, &want));
    assert_true(calls() - before >= 2 * LAYERS * KV_HEADS && lapack.here == 0);
    pkv_close(w.kv);
}

/* Calls that come when it is solved sign again a slice each, and select by the old signatures or by the new ones, never by
 * both.
 */
static void turn_by_slices(const char *name, uint32_t flags)
{
    struct worker w = worker(name, flags, 0);
    hold(true);
    teach(&w, w.seq);
    struct selection old = selection(&w, w.seq), now;
    hold(false);
    struct selection want;
    for (bool solved = false; !solved; usleep(1000)) { /* another worker sees when */
        struct stat_quality q = stat_quality(&daemon_, name);
        now = selection(&w, w.seq);
        solved = q.state == 1;
    }
    want = wanted(name);
    assert_false(same(&old, &want));
    struct pkv_seq *child;
    GOOD(w.kv, pkv_seq_fork(w.seq, TOKENS, 0, &child));
    int slices = 0, news = 0;
    for (; slices < 100 && state_of(w.seq) == 0; slices++) {
        now = selection(&w, w.seq);
        assert_true(same(&now, &old) || same(&now, &want));
        bool turned = same(&now, &want);
        assert_true(turned || !news); /* and never back */
        news += turned;
        now = selection(&w, child);
        assert_true(same(&now, &want) || (same(&now, &old) && !turned));
    }
    print_message("# %s: %d x 2 calls of a slice, %d of them with the new signatures\n", name, slices, news);
    assert_in_range(slices, getenv("PIVOTKV_TEST_BACKEND") ? 0 : LAYERS * TOKENS / SLICE / 2 - 1,
                    20); /* a device: a layer a call */
    now = selection(&w, child);
    assert_true(same(&now, &want) && state_of(child) == 1);
    pkv_close(w.kv);
}

static void test_slices(void **state)
{
    (void)state;
    turn_by_slices("slices", 0);
    turn_by_slices("slices, served", PKV_CONNECT_SERVED);
}

/* What is cut off and written anew while its layer turns is signed as it is now. */
static void test_change_while_turning(void **state)
{
    (void)state;
    struct worker w = worker("changes", 0, 0), fresh;
    hold(true);
    teach(&w, w.seq);
    hold(false);
    while (stat_quality(&daemon_, "changes").state != 1)
        (void)selection(&w, w.seq);
    enum { CUT = 1000 };
    GOOD(w.kv, pkv_seq_truncate(w.seq, CUT));
    GOOD(w.kv, append_all(w.seq, other_keys, values, TOKENS - CUT));
    (void)selection(&w, w.seq);
    GOOD(w.kv, pkv_seq_truncate(w.seq, CUT + 100));
    GOOD(w.kv, append_all(w.seq, other_keys + 100 * ROW, values + 100 * ROW, TOKENS - CUT - 100));
    GOOD(w.kv, pkv_model_settle(w.model));
    fresh = worker("changes", 0, 0);
    GOOD(fresh.kv, append_all(fresh.seq, keys, values, CUT));
    GOOD(fresh.kv, append_all(fresh.seq, other_keys, values, TOKENS - CUT));
    struct selection got = selection(&w, w.seq), want = selection(&fresh, fresh.seq);
    assert_true(same(&got, &want));
    pkv_close(w.kv), pkv_close(fresh.kv);
}

/* From early on its own sequences are better off, though the model has no state yet. */
static void test_early(void **state)
{
    (void)state;
    struct worker w = worker("early", 0, 0);
    struct pkv_budget b = budget(K);
    double mass, before, after;
    int solves = calls();
    GOOD(w.kv, append_all(w.seq, keys, values, EARLY));
    GOOD(w.kv, pkv_audit(w.seq, 10, 1, queries, &b, &mass, &before));
    attend(&w, w.seq, EARLY);
    GOOD(w.kv, pkv_model_settle(w.model));
    GOOD(w.kv, pkv_audit(w.seq, 10, 1, queries, &b, &mass, &after));
    print_message("# error %.3f as `sign`, %.3f calibrated on %d tokens\n", before, after, EARLY);
    assert_true(after < 0.7 * before && state_of(w.seq) == 0);
    assert_int_equal(calls() - solves, 2 * LAYERS * KV_HEADS);
    struct pkv_seq *next = create(&w);
    teach(&w, next);
    GOOD(w.kv, pkv_model_settle(w.model));
    assert_true(state_of(w.seq) == 1 && state_of(next) == 1);
    assert_int_equal(calls() - solves, 4 * LAYERS * KV_HEADS);
    GOOD(w.kv, pkv_seq_truncate(w.seq, 0));
    GOOD(w.kv, append_all(w.seq, keys, values, TOKENS));
    struct selection got = selection(&w, next), want = selection(&w, w.seq);
    assert_true(same(&got, &want));
    pkv_close(w.kv);
}

/* The first tokens are still being solved when there are enough for good: these are solved next, and used. */
static void test_early_overtaken(void **state)
{
    (void)state;
    struct worker w = worker("overtaken", 0, 0);
    int solves = calls();
    hold(true);
    GOOD(w.kv, append_all(w.seq, keys, values, EARLY));
    attend(&w, w.seq, EARLY);
    await_solves(1);
    struct pkv_seq *next = create(&w);
    teach(&w, next);
    assert_int_equal(calls() - solves, 1);
    hold(false);
    GOOD(w.kv, pkv_model_settle(w.model));
    assert_true(state_of(w.seq) == 1 && state_of(next) == 1);
    assert_int_equal(calls() - solves, 4 * LAYERS * KV_HEADS);
    pkv_close(w.kv);
}

/* Two workers solve at the same time; the second to be done takes over what the first has put. */
static void test_race(void **state)
{
    (void)state;
    struct worker a = worker("race", 0, 0), b = worker("race", PKV_CONNECT_SERVED, 0);
    struct pkv_seq *second = create(&a);
    hold(true);
    struct pkv_seq *both[] = {a.seq, second};
    for (int i = 0; i < 2; i++) { /* both teach */
        GOOD(a.kv, append_all(both[i], keys, values, SHORT));
        attend(&a, both[i], TOKENS / PIECE * PIECE / 2);
    }
    for (int i = 0; i < 2; i++)
        GOOD(a.kv, append_all(both[i], keys + SHORT * ROW, values + SHORT * ROW, TOKENS - SHORT));
    teach(&b, b.seq);
    await_solves(2);
    hold(false);
    GOOD(a.kv, pkv_model_settle(a.model));
    GOOD(b.kv, pkv_model_settle(b.model));
    GOOD(a.kv, pkv_model_settle(a.model));
    assert_true(state_of(a.seq) == 1 && state_of(second) == 1 && state_of(b.seq) == 1);
    struct selection want = wanted("race"), of[] = {selection(&a, a.seq), selection(&a, second), selection(&b, b.seq)};
    for (int i = 0; i < 3; i++)
        assert_true(same(&of[i], &want));
    pkv_close(a.kv), pkv_close(b.kv);
}

/* What cannot be solved leaves the model to `sign`, without another try here; another worker may do better. */
static void test_fails(void **state)
{
    (void)state;
    struct worker w = worker("fails", 0, 0), other;
    fail_solves(true);
    teach(&w, w.seq);
    GOOD(w.kv, pkv_model_settle(w.model));
    struct selection old = selection(&w, w.seq), now;
    int before = calls();
    attend(&w, w.seq, EARLY);
    GOOD(w.kv, append_all(w.seq, keys, values, EARLY));
    GOOD(w.kv, pkv_model_settle(w.model));
    GOOD(w.kv, pkv_seq_truncate(w.seq, TOKENS));
    now = selection(&w, w.seq);
    assert_true(same(&old, &now) && state_of(w.seq) == 0 && calls() == before);
    fail_solves(false);
    other = worker("fails", 0, 0);
    teach(&other, other.seq);
    GOOD(other.kv, pkv_model_settle(other.model));
    assert_int_equal(state_of(other.seq), 1);
    GOOD(w.kv, pkv_model_settle(w.model));
    struct selection want = wanted("fails");
    now = selection(&w, w.seq);
    assert_true(same(&now, &want) && state_of(w.seq) == 1);
    pkv_close(w.kv), pkv_close(other.kv);
}

/* Lets the solve go once the test's thread waits in pkv_close. */
static void *release_when_waiting(void *argument)
{
    char path[64], line[256], *at = NULL;
    snprintf(path, sizeof(path), "/proc/self/task/%d/stat", *(const int *)argument);
    for (char status = 'R'; status != 'S'; usleep(1000)) {
        FILE *f = fopen(path, "r");
        at = f && fgets(line, sizeof(line), f) ? strrchr(line, ')') : NULL;
        status = at ? at[2] : 'S';
        if (f)
            fclose(f);
    }
    hold(false);
    return NULL;
}

/* A worker that leaves does not wait for the whole of a solve, and leaves nothing behind. */
static void test_leaves(void **state)
{
    (void)state;
    struct worker w = worker("leaves", 0, 0);
    int self = (int)syscall(SYS_gettid), before = calls();
    pthread_t releaser;
    hold(true);
    teach(&w, w.seq);
    await_solves(1);
    assert_int_equal(pthread_create(&releaser, NULL, release_when_waiting, &self), 0);
    pkv_close(w.kv);
    pthread_join(releaser, NULL);
    assert_in_range(calls() - before, 1, 2 * KV_HEADS); /* a layer of two */
    w = worker("leaves", 0, 0);
    assert_int_equal(state_of(w.seq), 0);
    teach(&w, w.seq);
    GOOD(w.kv, pkv_model_settle(w.model));
    assert_int_equal(state_of(w.seq), 1);
    pkv_close(w.kv);
}

static int step(struct pkv_batch *batch)
{
    static float out[QUERY];
    int r = pkv_batch_begin(batch, NULL);
    for (uint32_t l = 0; l < LAYERS && !r; l++) {
        r = pkv_batch_append(batch, l, keys, values, NULL);
        r = r ? r : pkv_batch_attend(batch, l, queries, out, NULL, NULL);
    }
    return r ? r : pkv_batch_end(batch, NULL);
}

/* A batch waits for a solve when it is opened, with a bound; one that was opened before is to be opened again after it. */
static void test_batch(void **state)
{
    (void)state;
    if (on_gpu())
        skip(); /* our arrays are the CPU's */
    struct worker w = worker("batch", 0, 2000);
    struct pkv_budget b = budget(K);
    struct pkv_batch *batch;
    hold(true);
    teach(&w, w.seq);
    await_solves(1);
    GOOD(w.kv, pkv_batch_open(&w.seq, 1, &b, NULL, &batch));
    for (int i = 0; i < 3; i++)
        GOOD(w.kv, step(batch));
    assert_int_equal(state_of(w.seq), 0);
    hold(false);
    int r = 0;
    for (int i = 0; i < 500 && !r; i++, usleep(2000)) {
        r = step(batch);
        assert_true(!r || r == -ESTALE);
    }
    assert_int_equal(r, -ESTALE);
    assert_int_equal(step(batch), -ESTALE);
    GOOD(w.kv, pkv_batch_close(batch));
    GOOD(w.kv, pkv_batch_open(&w.seq, 1, &b, NULL, &batch));
    assert_int_equal(state_of(w.seq), 1);
    GOOD(w.kv, step(batch));
    GOOD(w.kv, pkv_batch_close(batch));
    GOOD(w.kv, pkv_seq_truncate(w.seq, TOKENS));
    struct selection want = wanted("batch"), now = selection(&w, w.seq);
    assert_true(same(&now, &want));
    pkv_close(w.kv);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_held_up), cmocka_unit_test(test_slices),          cmocka_unit_test(test_change_while_turning),
        cmocka_unit_test(test_early),   cmocka_unit_test(test_early_overtaken), cmocka_unit_test(test_race),
        cmocka_unit_test(test_fails),   cmocka_unit_test(test_leaves),          cmocka_unit_test(test_batch),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
