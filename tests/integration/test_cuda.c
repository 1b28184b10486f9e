/* What only a real GPU shows: batches on device memory in a stream, captured once and replayed while sequences grow over block
 * borders (the class of bug where a graph replays yesterday's table), against exact attention; a worker killed in the middle of
 * its kernels; a daemon killed in the middle of its copies. Skipped without a GPU.
 * usage: test_cuda [--victim SOCKET]   the worker that is killed */
#include "tests/integration/samples.h"
#include "tests/integration/steps.h"

#include <errno.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

static struct test_daemon daemon_;
static const char *self;

static void start_daemon(const char *pool, const char *arena)
{
    test_daemon_start(&daemon_, (const char *const[]){"--backend", "cuda", "--pool-bytes", pool, "--arena-bytes", arena,
                                                      "--threads", "2", NULL});
}

static int start(void **state)
{
    (void)state;
    data_make();
    start_daemon("64M", "256M");
    return 0;
}

static int stop(void **state)
{
    (void)state;
    test_daemon_stop(&daemon_);
    data_free();
    return 0;
}

static void replay(const struct pkv_budget *b, uint64_t cache_bytes, bool exact)
{
    static const uint32_t prefill[SEQS] = {3, 500, 190};
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model *model = open_model(kv);
    struct pkv_seq *seqs[SEQS];
    struct pkv_batch *batch;
    struct arrays a = arrays_make();
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t run;
    float *to_k = malloc(MAX_TOKENS * ROW * 4), *to_v = malloc(MAX_TOKENS * ROW * 4);
    for (uint32_t s = 0; s < SEQS; s++) {
        GOOD(kv, pkv_seq_create(model, MAX_TOKENS, 0, NULL, &seqs[s]));
        GOOD(kv, append_all(seqs[s], k + (uint64_t)s * MAX_TOKENS * ROW, v + (uint64_t)s * MAX_TOKENS * ROW, prefill[s]));
    }
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    GOOD(kv, pkv_batch_open(seqs, SEQS, b,
                            &(struct pkv_batch_options){.size = sizeof(struct pkv_batch_options), .cache_bytes = cache_bytes},
                            &batch));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    layers(kv, batch, &a, stream);
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&run, graph, 0));
    for (uint32_t i = 0; i < STEPS; i++) {
        step_in(&a, i, stream);
        GOOD(kv, pkv_batch_begin(batch, stream));
        if (i % 7 == 3) /* now and then without the graph */
            layers(kv, batch, &a, stream);
        else
            CUDA(cudaGraphLaunch(run, stream));
        GOOD(kv, pkv_batch_end(batch, stream));
        if (i % 9 && i + 1 < STEPS)
            continue;
        step_out(&a, stream);
        if (exact)
            check_exact(&a, prefill, i, to_k, to_v);
        else
            check_same(kv, batch, seqs, b, &a, i);
    }
    GOOD(kv, pkv_batch_wait(batch));
    for (uint32_t s = 0; s < SEQS; s++) {
        gather(s, prefill[s], STEPS, to_k, to_v);
        assert_exact(kv, seqs[s], to_k, to_v, q, prefill[s] + STEPS); /* every row, as append left it */
    }
    GOOD(kv, pkv_batch_close(batch));
    CUDA(cudaGraphExecDestroy(run));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    arrays_free(&a);
    free(to_k), free(to_v);
    pkv_close(kv);
}

static void test_replayed_graphs(void **state)
{
    (void)state;
    struct pkv_budget dense = budget(0), sparse = budget(64), wide = budget(MAX_TOKENS);
    sparse.dense_below = 145, wide.dense_below = MAX_TOKENS + 81;
    replay(&dense, 0, true);
    replay(&wide, 0, true);
    replay(&sparse, 0, false);
    sparse.rule = PKV_SUM;
    replay(&sparse, 0, false);
    sparse.rule = PKV_MAX_SCORE;
    replay(&sparse, 0, false);
}

/* What the audit keeps of calls in a replayed graph. */
static void test_samples_of_replayed_graphs(void **state)
{
    (void)state;
    enum { TOKENS = 900, CALLS = 200 }; /* one call in 32 keeps */
    static struct samples samples;
    test_daemon_stop(&daemon_);
    test_daemon_start(&daemon_, (const char *const[]){"--backend", "cuda", "--pool-bytes", "64M", "--arena-bytes", "64M",
                                                      "--audit-ppm", "1000000", NULL});
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model_desc desc = described("samples");
    struct pkv_model *model;
    struct pkv_seq *seq;
    struct pkv_budget b = budget(100);
    struct pkv_batch *batch;
    struct arrays a = arrays_make();
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t run;
    desc.layers = desc.kv_heads = 1, desc.q_heads = 4;
    GOOD(kv, pkv_model_open(kv, &desc, &model));
    GOOD(kv, pkv_seq_create(model, MAX_TOKENS, 0, NULL, &seq));
    GOOD(kv, pkv_append(seq, 0, TOKENS, k, v));
    GOOD(kv, pkv_batch_open(&seq, 1, &b, NULL, &batch));
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA(cudaMemcpy(a.q, q, QUERY * 4, cudaMemcpyHostToDevice));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    GOOD(kv, pkv_batch_append(batch, 0, a.k, a.v, stream));
    for (uint32_t i = 0; i < CALLS; i++)
        GOOD(kv, pkv_batch_attend(batch, 0, a.q, a.out, NULL, stream));
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&run, graph, 0));
    samples_count(&samples, &daemon_);
    for (uint32_t i = 0; i < MAX_TOKENS - TOKENS && samples.found < 10; i++) {
        CUDA(cudaMemcpyAsync(a.k, row_of(k, i, DIM), DIM * 4, cudaMemcpyHostToDevice, stream));
        CUDA(cudaMemcpyAsync(a.v, row_of(v, i, DIM), DIM * 4, cudaMemcpyHostToDevice, stream));
        GOOD(kv, pkv_batch_begin(batch, stream));
        CUDA(cudaGraphLaunch(run, stream));
        GOOD(kv, pkv_batch_end(batch, stream));
        GOOD(kv, pkv_batch_wait(batch));
        samples_step(&samples, &daemon_, kv, seq, q, &b, 1e-4);
    }
    print_message("# %u samples of %u steps\n", samples.found, samples.steps);
    assert_int_equal(samples.found, 10);
    GOOD(kv, pkv_batch_close(batch));
    CUDA(cudaGraphExecDestroy(run));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    arrays_free(&a);
    pkv_close(kv);
    test_daemon_stop(&daemon_);
    start_daemon("64M", "256M");
}

/* A pool that is too small: rows are read from the arena and the row cache while blocks leave. */
static void test_replayed_graphs_with_an_arena(void **state)
{
    (void)state;
    test_daemon_stop(&daemon_);
    start_daemon("4M", "256M");
    struct pkv_budget dense = budget(0), sparse = budget(64);
    sparse.dense_below = 145;
    replay(&dense, 0, true);
    replay(&sparse, 0, false);
    replay(&sparse, 1 << 20, false);
    test_daemon_stop(&daemon_);
    start_daemon("64M", "256M");
}

/* So many query tokens of so long a sequence that an attend call becomes several (gpu/cuda/batch.c). */
static void test_many_queries(void **state)
{
    (void)state;
    enum { QUERIES = 600, BEFORE = 500, LONGEST = 1 << 20 };
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_seq *seq;
    struct pkv_budget b = budget(64);
    struct pkv_batch_options o = {.size = sizeof(o), .queries = QUERIES};
    struct pkv_batch *batch;
    float *in, *out, *host = malloc(QUERIES * QUERY * 4), *expected = malloc(QUERIES * QUERY * 4);
    uint32_t queries = QUERIES;
    CUDA(cudaMalloc((void **)&in, QUERIES * (2 * ROW + QUERY) * 4));
    CUDA(cudaMalloc((void **)&out, QUERIES * QUERY * 4));
    CUDA(cudaMemcpy(in, k + BEFORE * ROW, QUERIES * ROW * 4, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(in + QUERIES * ROW, v + BEFORE * ROW, QUERIES * ROW * 4, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(in + 2 * QUERIES * ROW, q, QUERIES * QUERY * 4, cudaMemcpyHostToDevice));
    GOOD(kv, pkv_seq_create(open_model(kv), LONGEST, 0, NULL, &seq));
    GOOD(kv, append_all(seq, k, v, BEFORE));
    GOOD(kv, pkv_batch_open(&seq, 1, &b, &o, &batch));
    GOOD(kv, pkv_batch_begin(batch, NULL));
    for (uint32_t l = 0; l < LAYERS; l++) {
        GOOD(kv, pkv_batch_append(batch, l, in, in + QUERIES * ROW, NULL));
        GOOD(kv, pkv_batch_attend(batch, l, in + 2 * QUERIES * ROW, out, NULL, NULL));
    }
    GOOD(kv, pkv_batch_end(batch, NULL));
    GOOD(kv, pkv_batch_wait(batch));
    CUDA(cudaMemcpy(host, out, QUERIES * QUERY * 4, cudaMemcpyDeviceToHost));
    GOOD(kv, pkv_attend(&seq, &queries, 1, LAYERS - 1, q, &b, expected, NULL, NULL));
    assert_alike(expected, host, QUERIES * QUERY);
    GOOD(kv, pkv_batch_close(batch));
    cudaFree(in), cudaFree(out), free(host), free(expected);
    pkv_close(kv);
}

static void test_not_finite(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_seq *seqs[SEQS];
    struct pkv_budget b = budget(0);
    struct pkv_batch *batch;
    struct arrays good = arrays_make(), bad = arrays_make();
    float infinite[SEQS * ROW];
    struct pkv_model *model = open_model(kv);
    for (uint32_t s = 0; s < SEQS; s++) {
        GOOD(kv, pkv_seq_create(model, MAX_TOKENS, 0, NULL, &seqs[s]));
        GOOD(kv, append_all(seqs[s], k, v, 64));
    }
    GOOD(kv, pkv_batch_open(seqs, SEQS, &b, NULL, &batch));
    memcpy(infinite, k, sizeof(infinite));
    infinite[ROW + 5] = INFINITY;
    CUDA(cudaMemset(good.q, 0, SEQS * QUERY * 4));
    CUDA(cudaMemset(bad.q, 0, SEQS * QUERY * 4));
    for (int i = 0; i < 2; i++)
        CUDA(cudaMemcpy(i ? good.v : bad.v, v, sizeof(infinite), cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(good.k, k, sizeof(infinite), cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(bad.k, infinite, sizeof(infinite), cudaMemcpyHostToDevice));
    int r = 0;
    for (int i = 0; i < 4 && !r; i++) { /* a good step, a bad one, and more until somebody notices */
        r = pkv_batch_begin(batch, NULL);
        if (r)
            break;
        layers(kv, batch, i == 1 ? &bad : &good, NULL);
        GOOD(kv, pkv_batch_end(batch, NULL));
    }
    r = r ? r : pkv_batch_wait(batch);
    assert_int_equal(r, -EDOM);
    for (uint32_t s = 0; s < SEQS; s++)
        assert_int_equal(pkv_seq_tokens(seqs[s]), 65);
    GOOD(kv, pkv_batch_wait(batch));
    GOOD(kv, pkv_batch_close(batch));
    arrays_free(&good), arrays_free(&bad);
    pkv_close(kv);
}

/* ---- deaths ---- */

/* Steps without end, several in flight. */
static void victim(const char *socket)
{
    struct pkv_options o = {.size = sizeof(o), .threads = 1, .label = "victim"};
    struct pkv *kv = NULL;
    struct pkv_seq *seqs[SEQS];
    struct pkv_batch *batch;
    struct pkv_budget b = budget(64);
    b.dense_below = 145;
    k = test_floats(21, MAX_TOKENS * ROW), v = test_floats(22, MAX_TOKENS * ROW);
    GOOD(NULL, pkv_connect(socket, &o, &kv));
    struct pkv_model *model = open_model(kv);
    struct arrays a = arrays_make();
    for (uint32_t s = 0; s < SEQS; s++) {
        GOOD(kv, pkv_seq_create(model, 100000, 0, NULL, &seqs[s]));
        GOOD(kv, append_all(seqs[s], k, v, 1000));
    }
    CUDA(cudaMemset(a.k, 0, SEQS * ROW * 4));
    CUDA(cudaMemset(a.v, 0, SEQS * ROW * 4));
    CUDA(cudaMemset(a.q, 0, SEQS * QUERY * 4));
    GOOD(kv, pkv_batch_open(seqs, SEQS, &b, NULL, &batch));
    for (;;) {
        GOOD(kv, pkv_batch_begin(batch, NULL));
        for (int i = 0; i < 20; i++)
            layers(kv, batch, &a, NULL);
        GOOD(kv, pkv_batch_end(batch, NULL));
        (void)!write(STDOUT_FILENO, ".", 1);
    }
}

static void test_worker_killed_in_its_kernels(void **state)
{
    (void)state;
    for (int round = 0; round < 3; round++) {
        int ends[2];
        char dots[20];
        assert_int_equal(pipe(ends), 0);
        pid_t pid = fork();
        if (pid == 0) {
            dup2(ends[1], STDOUT_FILENO);
            execl(self, self, "--victim", daemon_.socket, (char *)NULL);
            _exit(127);
        }
        close(ends[1]);
        for (size_t n = 0; n < sizeof(dots);) { /* it is at work */
            ssize_t more = read(ends[0], dots, sizeof(dots) - n);
            assert_true(more > 0);
            n += (size_t)more;
        }
        kill(pid, SIGKILL);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        close(ends[0]);
        struct pkv *kv = attach(&daemon_, 0);
        struct pkv_seq *seq;
        GOOD(kv, pkv_seq_create(open_model(kv), MAX_TOKENS, 0, NULL, &seq));
        GOOD(kv, append_all(seq, k, v, 900));
        assert_exact(kv, seq, k, v, q, 900);
        pkv_close(kv);
    }
}

static void test_daemon_killed_in_its_copies(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_model *model = open_model(kv);
    struct pkv_seq *seqs[8];
    for (int s = 0; s < 8; s++) {
        GOOD(kv, pkv_seq_create(model, MAX_TOKENS, 0, NULL, &seqs[s]));
        GOOD(kv, append_all(seqs[s], k, v, 1100)); /* blocks are on their way home */
    }
    test_daemon_kill(&daemon_);
    struct timespec begin, now;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    int r = 0;
    do {
        r = append_all(seqs[0], k, v, 1);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (!r && now.tv_sec - begin.tv_sec < 5);
    assert_int_equal(r, -ECONNRESET);
    pkv_close(kv);
    start_daemon("64M", "256M");
    kv = attach(&daemon_, 0);
    GOOD(kv, pkv_seq_create(open_model(kv), MAX_TOKENS, 0, NULL, &seqs[0]));
    GOOD(kv, append_all(seqs[0], k, v, 900));
    assert_exact(kv, seqs[0], k, v, q, 900);
    pkv_close(kv);
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "--victim"))
        victim(argv[2]);
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || !count) {
        printf("1..0 # SKIP no CUDA device\n");
        return 0;
    }
    self = argv[0];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_replayed_graphs),
        cmocka_unit_test(test_replayed_graphs_with_an_arena),
        cmocka_unit_test(test_samples_of_replayed_graphs),
        cmocka_unit_test(test_many_queries),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_worker_killed_in_its_kernels),
        cmocka_unit_test(test_daemon_killed_in_its_copies),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
