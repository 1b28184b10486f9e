/* Wrong input, each with its own errno and sentence; nothing is lost, the daemon goes on. */
#include "tests/integration/service.h"

#include <errno.h>
#include <math.h>

static struct test_daemon daemon_;
static struct pkv *kv;
static struct pkv_seq *seq;
static float *k, *v, *q;

static int start(void **state)
{
    (void)state;
    test_daemon_start(&daemon_, (const char *const[]){"--pool-bytes", "8M", "--arena-bytes", "32M", "--threads", "1", NULL});
    kv = attach(&daemon_, 0);
    GOOD(kv, pkv_seq_create(open_model(kv), 600, 0, NULL, &seq));
    k = test_floats(1, 700 * ROW), v = test_floats(2, 700 * ROW), q = test_floats(3, 8 * QUERY);
    GOOD(kv, append_all(seq, k, v, 300));
    return 0;
}

static int stop(void **state)
{
    (void)state;
    assert_exact(kv, seq, k, v, q, 300); /* after all of it */
    pkv_close(kv);
    free(k), free(v), free(q);
    test_daemon_stop(&daemon_);
    return 0;
}

#define REFUSED(call, number, word)                                                \
    do {                                                                           \
        int refused_r = (call);                                                    \
        if (refused_r != -(number) || !strstr(pkv_error(kv), word))                \
            fail_msg("%d: %s: %d, %s", __LINE__, #call, refused_r, pkv_error(kv)); \
    } while (0)

static void test_models(void **state)
{
    (void)state;
    struct pkv_model *m;
    const struct pkv_model_desc good = described("test");
    struct pkv_model_desc d = good;
    GOOD(kv, pkv_model_open(kv, &d, &m));
    GOOD(kv, pkv_model_close(m));
    d.layers = 3;
    REFUSED(pkv_model_open(kv, &d, &m), ENOTUNIQ, "another name");
    d = good, d.name = "other", d.head_dim = 80;
    REFUSED(pkv_model_open(kv, &d, &m), EINVAL, "head_dim");
    d = good, d.name = "other", d.q_heads = 5;
    REFUSED(pkv_model_open(kv, &d, &m), EINVAL, "geometry");
    d = good, d.name = "other", d.type = 9;
    REFUSED(pkv_model_open(kv, &d, &m), EINVAL, "dtype");
    d = good, d.name = "other", d.signature = 9;
    REFUSED(pkv_model_open(kv, &d, &m), EINVAL, "scheme");
    d = good, d.name = "other", d.sig_bits = 48;
    REFUSED(pkv_model_open(kv, &d, &m), EINVAL, "multiple of 32");
    d = good, d.name = "other", d.signature = PKV_LINEAR, d.weights = "/nonexistent/file";
    REFUSED(pkv_model_open(kv, &d, &m), ENOENT, "weights file");
    d = good, d.name = "other", d.signature = PKV_LINEAR, d.weights = "/proc/self/maps";
    REFUSED(pkv_model_open(kv, &d, &m), EBADMSG, "safetensors");
    d = good, d.name = "";
    REFUSED(pkv_model_open(kv, &d, &m), EINVAL, "pivotkv.h");
    d = good, d.size = 7;
    REFUSED(pkv_model_open(kv, &d, &m), EINVAL, "pivotkv.h");
    d = good, d.name = "large", d.kv_heads = d.q_heads = 128, d.head_dim = 256; /* a block of 16 MiB */
    GOOD(kv, pkv_model_open(kv, &d, &m));
    struct pkv_seq *none;
    REFUSED(pkv_seq_create(m, 100, 0, NULL, &none), E2BIG, "chunk");
    GOOD(kv, pkv_model_close(m));
}

static void test_lengths(void **state)
{
    (void)state;
    struct pkv_seq *none;
    struct pkv_model *m = open_model(kv);
    REFUSED(pkv_append(seq, 0, 301, k, v), EOVERFLOW, "max_tokens");
    REFUSED(pkv_append(seq, 0, UINT32_MAX, k, v), EOVERFLOW, "max_tokens");
    REFUSED(pkv_append(seq, 0, 0, k, v), EINVAL, "number of tokens");
    REFUSED(pkv_append(seq, LAYERS, 1, k, v), EINVAL, "out of its range");
    REFUSED(pkv_seq_reserve(seq, 301), EOVERFLOW, "max_tokens");
    REFUSED(pkv_seq_truncate(seq, 301), EOVERFLOW, "max_tokens");
    REFUSED(pkv_seq_create(m, 0, 0, NULL, &none), EINVAL, "out of its range");
    REFUSED(pkv_seq_create(m, UINT32_MAX, 0, NULL, &none), EOVERFLOW, "max_tokens");
    REFUSED(pkv_seq_create(m, 100, 99, NULL, &none), EINVAL, "out of its range");
    REFUSED(pkv_seq_open(m, 7 | 9ull << 32, &none), ESTALE, "gone");
    REFUSED(pkv_seq_open(m, 0, &none), ENOENT, "no such sequence");
    REFUSED(pkv_seq_open(m, UINT64_MAX, &none), ENOENT, "no such sequence");
    REFUSED(pkv_seq_open(m, pkv_seq_handle(seq), &none), EALREADY, "open already");
    GOOD(kv, append_all(seq, k, v, 1)); /* the one that has it goes on */
    GOOD(kv, pkv_seq_truncate(seq, 300));
    REFUSED(pkv_model_close(seq ? m : NULL), 0, "");
}

static void test_numbers(void **state)
{
    (void)state;
    float bad[ROW], out[QUERY];
    const float evil[] = {NAN, INFINITY, -INFINITY};
    struct pkv_budget b = budget(50);
    uint32_t one = 1;
    for (int i = 0; i < 3; i++) {
        memcpy(bad, k, sizeof(bad));
        bad[ROW - 1] = evil[i];
        REFUSED(pkv_append(seq, 0, 1, bad, v), EDOM, "NaN");
        REFUSED(pkv_append(seq, 0, 1, k, bad), EDOM, "NaN");
        float query[QUERY];
        memcpy(query, q, sizeof(query));
        query[7] = evil[i];
        REFUSED(pkv_attend(&seq, &one, 1, 0, query, &b, out, NULL, NULL), EDOM, "NaN");
    }
}

static void test_budgets(void **state)
{
    (void)state;
    static float out[8 * QUERY];
    uint32_t one = 1, none = 0, many = 301;
    struct pkv_budget b = budget(50);
    b.k = 0, b.dense = 0;
    REFUSED(pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL), EINVAL, "k must be");
    b = budget(65537);
    REFUSED(pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL), EINVAL, "k must be");
    b = budget(301);
    REFUSED(pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL), ERANGE, "above the sequence's length");
    b = budget(50);
    REFUSED(pkv_attend(&seq, &none, 1, 0, q, &b, out, NULL, NULL), EINVAL, "queries");
    REFUSED(pkv_attend(&seq, &many, 1, 0, q, &b, out, NULL, NULL), EINVAL, "queries");
    REFUSED(pkv_attend(&seq, &one, 1, LAYERS, q, &b, out, NULL, NULL), EINVAL, "out of its range");
    b.size = 3;
    REFUSED(pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL), EINVAL, "out of its range");
    b = budget(50), b.rule = 7;
    REFUSED(pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL), EINVAL, "out of its range");
    b = budget(50), b.top_p = 1.5f;
    REFUSED(pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL), EINVAL, "out of its range");
    b = budget(50), b.sinks = 5000;
    REFUSED(pkv_attend(&seq, &one, 1, 0, q, &b, out, NULL, NULL), EINVAL, "number of tokens");
}

static void test_connections(void **state)
{
    (void)state;
    struct pkv *other;
    struct pkv_options o = {.size = 5};
    assert_int_equal(pkv_connect(daemon_.socket, &o, &other), -EINVAL);
    o = (struct pkv_options){.size = sizeof(o), .tenant = "a name of more than thirty-one bytes"};
    assert_int_equal(pkv_connect(daemon_.socket, &o, &other), -EINVAL);
    o = (struct pkv_options){.size = sizeof(o), .isa = "z80"};
    assert_int_equal(pkv_connect(daemon_.socket, &o, &other), -EOPNOTSUPP);
    o = (struct pkv_options){.size = sizeof(o), .data_bytes = 5};
    assert_int_equal(pkv_connect(daemon_.socket, &o, &other), -EINVAL);
    assert_int_equal(pkv_connect("/nonexistent/socket", NULL, &other), -ECONNREFUSED);
    char path[200];
    memset(path, 'x', sizeof(path) - 1), path[sizeof(path) - 1] = 0;
    assert_int_equal(pkv_connect(path, NULL, &other), -ENAMETOOLONG);
    if (geteuid() == 0) { /* only root can make another user's socket */
        char link[100];
        snprintf(link, sizeof(link), "%s/theirs", daemon_.folder);
        FILE *f = fopen(link, "w");
        assert_non_null(f);
        fclose(f);
        assert_int_equal(chown(link, 12345, 12345), 0);
        assert_int_equal(pkv_connect(link, NULL, &other), -EPERM);
        unlink(link);
    }
}

/* As many workers and sequences as there may be, and one more. */
static void test_too_many(void **state)
{
    (void)state;
    struct pkv *all[70];
    int n = 0, r = 0;
    struct pkv_options o = {.size = sizeof(o), .threads = 1, .data_bytes = 1 << 20};
    while (n < 70 && (r = pkv_connect(daemon_.socket, &o, &all[n])) == 0)
        n++;
    assert_int_equal(n, 63); /* and ours */
    assert_int_equal(r, -EUSERS);
    assert_non_null(strstr(pkv_error(NULL), "too many workers"));
    while (n--)
        pkv_close(all[n]);
    struct pkv_model *m = open_model(kv);
    struct pkv_seq *last = NULL;
    for (n = 0, r = 0; n < 5000 && !r; n += !r)
        r = pkv_seq_create(m, 64, 0, NULL, &last);
    assert_int_equal(n, 4095);
    REFUSED(r, EMFILE, "too many sequences");
    GOOD(kv, pkv_seq_close(last));
    GOOD(kv, pkv_seq_create(m, 64, 0, NULL, &last));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_models),  cmocka_unit_test(test_lengths),     cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_budgets), cmocka_unit_test(test_connections), cmocka_unit_test(test_too_many),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
