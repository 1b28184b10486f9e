/* Layers with signatures of several sizes, and some without any, as an engine has them: a model of the service for each size,
 * their layers in turn in one captured graph, replayed on a real GPU while the sequences grow. Skipped without one. */
#include "tests/integration/steps.h"

enum { SIZES = 4 };
static const uint32_t sizes[SIZES] = {0, 32, 64, 256}; /* bits; 0: attended by age */
static const uint32_t prefill[SEQS] = {3, 500, 190};

static struct test_daemon daemon_;

/* The layers of one size. */
struct part {
    struct pkv_seq *seqs[SEQS];
    struct pkv_batch *batch;
    struct arrays a;
};

static void start_daemon(const char *pool)
{
    test_daemon_start(&daemon_, (const char *const[]){"--backend", "cuda", "--pool-bytes", pool, "--arena-bytes", "256M",
                                                      "--threads", "2", NULL});
}

static int start(void **state)
{
    (void)state;
    data_make();
    start_daemon("64M");
    return 0;
}

static int stop(void **state)
{
    (void)state;
    test_daemon_stop(&daemon_);
    data_free();
    return 0;
}

static void part_open(struct pkv *kv, uint32_t bits, const struct pkv_budget *b, uint64_t cache_bytes, struct part *p)
{
    char name[16];
    snprintf(name, sizeof(name), "size %u", bits);
    struct pkv_model_desc desc = described(name);
    struct pkv_model *model = NULL;
    desc.signature = bits ? desc.signature : PKV_NONE, desc.sig_bits = bits;
    GOOD(kv, pkv_model_open(kv, &desc, &model));
    for (uint32_t s = 0; s < SEQS; s++) {
        GOOD(kv, pkv_seq_create(model, MAX_TOKENS, 0, NULL, &p->seqs[s]));
        GOOD(kv, append_all(p->seqs[s], k + (uint64_t)s * MAX_TOKENS * ROW, v + (uint64_t)s * MAX_TOKENS * ROW, prefill[s]));
    }
    struct pkv_batch_options o = {.size = sizeof(o), .cache_bytes = cache_bytes};
    GOOD(kv, pkv_batch_open(p->seqs, SEQS, b, &o, &p->batch));
    p->a = arrays_make();
}

static void part_close(struct pkv *kv, struct part *p, float *to_k, float *to_v)
{
    GOOD(kv, pkv_batch_wait(p->batch));
    for (uint32_t s = 0; s < SEQS; s++) {
        gather(s, prefill[s], STEPS, to_k, to_v);
        assert_exact(kv, p->seqs[s], to_k, to_v, q, prefill[s] + STEPS); /* every row, as append left it */
    }
    GOOD(kv, pkv_batch_close(p->batch));
    arrays_free(&p->a);
}

static cudaGraphExec_t captured(struct pkv *kv, struct part *parts, cudaStream_t stream)
{
    cudaGraph_t graph;
    cudaGraphExec_t run;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t l = 0; l < LAYERS; l++)
        for (uint32_t i = 0; i < SIZES; i++) {
            const struct arrays *a = &parts[i].a;
            GOOD(kv, pkv_batch_append(parts[i].batch, l, a->k, a->v, stream));
            GOOD(kv, pkv_batch_attend(parts[i].batch, l, a->q, a->out + l * SEQS * QUERY, a->lse + l * SEQS * Q_HEADS, stream));
        }
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&run, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    return run;
}

static void serve(const struct pkv_budget *b, uint64_t cache_bytes, bool exact)
{
    struct pkv *kv = attach(&daemon_, 0);
    struct part parts[SIZES];
    cudaStream_t stream;
    float *to_k = malloc(MAX_TOKENS * ROW * 4), *to_v = malloc(MAX_TOKENS * ROW * 4);
    for (uint32_t i = 0; i < SIZES; i++)
        part_open(kv, sizes[i], b, cache_bytes, &parts[i]);
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaGraphExec_t run = captured(kv, parts, stream);
    for (uint32_t step = 0; step < STEPS; step++) {
        for (uint32_t i = 0; i < SIZES; i++) {
            step_in(&parts[i].a, step, stream);
            GOOD(kv, pkv_batch_begin(parts[i].batch, stream));
        }
        CUDA(cudaGraphLaunch(run, stream));
        for (uint32_t i = 0; i < SIZES; i++)
            GOOD(kv, pkv_batch_end(parts[i].batch, stream));
        for (uint32_t i = 0; i < SIZES && (step % 19 == 0 || step + 1 == STEPS); i++) {
            step_out(&parts[i].a, stream);
            if (exact)
                check_exact(&parts[i].a, prefill, step, to_k, to_v);
            else
                check_same(kv, parts[i].batch, parts[i].seqs, b, &parts[i].a, step);
        }
    }
    for (uint32_t i = 0; i < SIZES; i++)
        part_close(kv, &parts[i], to_k, to_v);
    CUDA(cudaGraphExecDestroy(run));
    CUDA(cudaStreamDestroy(stream));
    free(to_k), free(to_v);
    pkv_close(kv);
}

static void test_several_sizes(void **state)
{
    (void)state;
    struct pkv_budget dense = budget(0), sparse = budget(64), wide = budget(MAX_TOKENS);
    sparse.dense_below = 145, wide.dense_below = MAX_TOKENS + 81;
    serve(&dense, 0, true);
    serve(&wide, 0, true);
    serve(&sparse, 0, false);
}

/* By age, what is attended is known: sinks, recent, and the latest of the others. */
static void test_without_signatures(void **state)
{
    (void)state;
    struct pkv *kv = attach(&daemon_, 0);
    struct pkv_budget b = budget(64);
    struct part p;
    enum { LAST = 64 + 64, ALL = 16 + LAST };
    b.dense_below = ALL + 1;
    part_open(kv, 0, &b, 0, &p);
    for (uint32_t step = 0; step < 100; step++) {
        float rows[2][ALL * ROW], *to_k = malloc(MAX_TOKENS * ROW * 4), *to_v = malloc(MAX_TOKENS * ROW * 4);
        double exact[QUERY];
        step_in(&p.a, step, NULL);
        GOOD(kv, pkv_batch_begin(p.batch, NULL));
        layers(kv, p.batch, &p.a, NULL);
        GOOD(kv, pkv_batch_end(p.batch, NULL));
        step_out(&p.a, NULL);
        for (uint32_t s = 1; s < SEQS; s++) { /* the first one is short, and dense */
            uint64_t last = prefill[s] + step + 1 - LAST;
            gather(s, prefill[s], step + 1, to_k, to_v);
            for (int i = 0; i < 2; i++) {
                memcpy(rows[i], i ? to_v : to_k, 16 * ROW * 4);
                memcpy(rows[i] + 16 * ROW, (i ? to_v : to_k) + last * ROW, LAST * ROW * 4);
            }
            test_attention(rows[0], rows[1], row_of(q, step, QUERY) + s * QUERY, ALL, Q_HEADS, KV_HEADS, DIM, exact);
            for (uint32_t l = 0; l < LAYERS; l++)
                for (uint32_t i = 0; i < QUERY; i++)
                    assert_true(fabs(p.a.host_out[(l * SEQS + s) * QUERY + i] - exact[i]) < 5e-5);
        }
        free(to_k), free(to_v);
    }
    GOOD(kv, pkv_batch_wait(p.batch));
    GOOD(kv, pkv_batch_close(p.batch));
    arrays_free(&p.a);
    pkv_close(kv);
}

static void test_several_sizes_with_an_arena(void **state)
{
    (void)state;
    test_daemon_stop(&daemon_);
    start_daemon("16M"); /* pinned rows of all sizes, and little else */
    struct pkv_budget dense = budget(0), sparse = budget(64);
    sparse.dense_below = 145;
    serve(&dense, 0, true);
    serve(&sparse, 1 << 20, false);
}

int main(void)
{
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || !count) {
        printf("1..0 # SKIP no CUDA device\n");
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_several_sizes),
        cmocka_unit_test(test_without_signatures),
        cmocka_unit_test(test_several_sizes_with_an_arena),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
