/* Signature states as the daemon keeps them: which number is taken, what is kept and for how long, and what is refused. */
#include "cachesvc/daemon.h"
#include "tests/lib/tables.h"
#include "tests/lib/test.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static struct daemon d;
static uint32_t model, worker;

static struct pkv_model_request request(void)
{
    return (struct pkv_model_request){
        .geom = {.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 64, .dtype = PKV_F16, .sig_bits = 64}, .name = "m"};
}

static int start(void **state)
{
    (void)state;
    struct core_config config = {.pool_chunks = 4, .arena_chunks = 4, .chunk_bytes = 65536, .grant_timeout_ns = 1000};
    struct pkv_model_request m = request();
    memset(&d, 0, sizeof(d));
    states_init(d.states);
    d.control = calloc(1, sizeof(*d.control));
    d.core = core_create(&config, &(struct core_hooks){test_table_alloc, test_table_free, NULL});
    assert_non_null(d.core), assert_non_null(d.control);
    assert_int_equal(core_model_add(d.core, &m, &model), PKV_ERR_OK);
    return core_worker_join(d.core, "", &worker) != PKV_ERR_OK;
}

static int stop(void **state)
{
    (void)state;
    states_close(d.states);
    core_destroy(d.core);
    free(d.control);
    return 0;
}

static int memfd(off_t bytes, int seals)
{
    int fd = memfd_create("state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_true(fd >= 0 && ftruncate(fd, bytes) == 0 && fcntl(fd, F_ADD_SEALS, seals) == 0);
    return fd;
}

/* Puts a good memfd; what was not taken is closed here. */
static enum pkv_err put(uint32_t number)
{
    int fd = memfd(1000, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE);
    enum pkv_err e = states_put(&d, model, number, &fd);
    assert_int_equal(fd == -1, e == PKV_ERR_OK);
    if (fd >= 0)
        close(fd);
    return e;
}

static uint64_t sequence(uint32_t state)
{
    uint64_t handle, table;
    struct pkv_op_create op = {.model = model, .max_tokens = 64, .state = state};
    assert_int_equal(core_seq_create(d.core, worker, &op, &handle, &table), PKV_ERR_OK);
    return handle;
}

static void test_numbers(void **state)
{
    (void)state;
    const struct pkv_model_states *published = &d.control->models[model];
    assert_null(states_find(&d, model, 0));
    assert_false(states_want(&d, model, true)); /* there is nothing yet to calibrate again */
    assert_int_equal(put(0), PKV_ERR_STATE_EXISTS);
    assert_int_equal(put(2), PKV_ERR_STATE_EXISTS);
    assert_int_equal(put(1), PKV_ERR_OK);
    assert_int_equal(put(1), PKV_ERR_STATE_EXISTS);
    assert_int_equal(put(2), PKV_ERR_STATE_EXISTS); /* nobody asked */
    assert_int_equal(published->latest, 1);
    assert_true(states_want(&d, model, true));
    assert_false(states_want(&d, model, true));
    assert_int_equal(published->wanted, 2);
    assert_true(states_want(&d, model, false)); /* the alarm cleared */
    assert_int_equal(put(2), PKV_ERR_STATE_EXISTS);
    assert_true(states_want(&d, model, true));
    assert_int_equal(put(3), PKV_ERR_STATE_EXISTS);
    assert_int_equal(put(2), PKV_ERR_OK);
    assert_int_equal(published->latest, 2);
    assert_int_equal(published->wanted, 0);
    assert_int_equal(states_find(&d, model, 0)->number, 2);
    assert_int_equal(d.counters.states_put, 2);
    assert_int_equal(d.counters.recalibrations, 1);
    assert_null(states_find(&d, PKV_MODELS_MAX, 1));
    assert_null(states_find(&d, UINT32_MAX, 0));
    assert_null(states_find(&d, model, 7));
}

static enum pkv_err put_next(void)
{
    states_want(&d, model, true);
    return put(d.states[model].latest + 1);
}

/* States that sequences are signed with stay; without a place for a new one none is asked for. */
static void test_kept_while_used(void **state)
{
    (void)state;
    sequence(0); /* will be signed with the first state */
    assert_int_equal(put(1), PKV_ERR_OK);
    uint64_t handles[STATES_KEPT];
    for (uint32_t n = 2; n <= STATES_KEPT; n++) {
        assert_int_equal(put_next(), PKV_ERR_OK);
        handles[n - 1] = sequence(n);
    }
    assert_false(states_want(&d, model, true));
    assert_int_equal(put(STATES_KEPT + 1), PKV_ERR_STATE_EXISTS);
    for (uint32_t n = 1; n <= STATES_KEPT; n++)
        assert_int_equal(states_find(&d, model, n)->number, n);
    assert_int_equal(core_seq_close(d.core, worker, handles[1]), PKV_ERR_OK);
    assert_int_equal(put_next(), PKV_ERR_OK);
    assert_null(states_find(&d, model, 2));
    assert_non_null(states_find(&d, model, 1));
    assert_non_null(states_find(&d, model, 3));
    /* Asked for while there was room, and none any more when it comes. */
    assert_int_equal(core_seq_close(d.core, worker, handles[2]), PKV_ERR_OK);
    assert_true(states_want(&d, model, true));
    sequence(3);
    assert_int_equal(put(STATES_KEPT + 2), PKV_ERR_BUSY);
}

/* The latest one stays with nobody there, for ever. */
static void test_latest_stays(void **state)
{
    (void)state;
    assert_int_equal(put(1), PKV_ERR_OK);
    core_worker_leave(d.core, worker);
    assert_int_equal(states_find(&d, model, 0)->number, 1);
    for (uint32_t n = 0; n < 20; n++)
        assert_int_equal(put_next(), PKV_ERR_OK);
    assert_int_equal(states_find(&d, model, 0)->number, 21);
}

static void test_refused_memfds(void **state)
{
    (void)state;
    static const struct {
        off_t bytes;
        int seals;
    } bad[] = {{1000, F_SEAL_SHRINK | F_SEAL_GROW},
               {1000, F_SEAL_WRITE | F_SEAL_GROW},
               {0, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE},
               {100000, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE}}; /* 1 head of 64 dimensions needs no such thing */
    for (size_t i = 0; i < PKV_ARRAY_LEN(bad); i++) {
        int fd = memfd(bad[i].bytes, bad[i].seals);
        assert_int_equal(states_put(&d, model, 1, &fd), PKV_ERR_INVALID);
        assert_true(fd >= 0);
        close(fd);
    }
    int none = -1, file = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert_int_equal(states_put(&d, model, 1, &none), PKV_ERR_INVALID);
    assert_int_equal(states_put(&d, model, 1, &file), PKV_ERR_INVALID);
    close(file);
    /* A model with a file is signed as the file says. */
    struct pkv_model_request m = request();
    m.name[0] = 'n', m.scheme = PKV_SCHEME_CODE, m.weights_digest[5] = 1;
    assert_int_equal(core_model_add(d.core, &m, &model), PKV_ERR_OK);
    assert_int_equal(put(1), PKV_ERR_INVALID);
    model = 0;
    assert_int_equal(put(1), PKV_ERR_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_numbers, start, stop),
        cmocka_unit_test_setup_teardown(test_kept_while_used, start, stop),
        cmocka_unit_test_setup_teardown(test_latest_stays, start, stop),
        cmocka_unit_test_setup_teardown(test_refused_memfds, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
