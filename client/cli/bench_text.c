/* Sequences to measure with: opened, filled, attended to in graphs. */
#include "client/cli/bench_gpu.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool bench_good(struct pkv *kv, int r)
{
    if (r)
        fprintf(stderr, "pivotkv: %s\n", pkv_error(kv));
    return !r;
}

bool text_batch(struct text *t, uint32_t queries, bool dense, uint64_t cache_bytes)
{
    struct pkv_budget budget = {.size = sizeof(budget), .k = K, .sinks = SINKS, .recent = RECENT, .dense = dense};
    struct pkv_batch_options o = {.size = sizeof(o), .queries = queries, .cache_bytes = cache_bytes};
    budget.dense_below = 16385;
    budget.rule = t->signature == PKV_LINEAR ? PKV_SUM : PKV_SOFTMAX_SUM;
    return bench_good(t->kv, pkv_batch_open(t->seqs, t->count, &budget, &o, &t->batch));
}

bool text_batch_close(struct text *t)
{
    bool ok = !t->batch || bench_good(t->kv, pkv_batch_close(t->batch));
    t->batch = NULL;
    return ok;
}

double text_moved(const struct text *t)
{
    return (double)t->tokens * t->count * t->layers * (2.0 * ROW_BYTES + KV_HEADS * t->bits / 8.0);
}

static bool piece(const struct lab *x, struct text *t, uint32_t number)
{
    uint64_t half = (uint64_t)PIECE * ROW_BYTES / 2;
    void *stream = gpu_lab_stream(x->lab);
    const char *source = t->source ? t->source + number % t->source_pieces * 2 * half : NULL;
    const void *k = source ? source : x->k, *v = source ? source + half : x->v;
    if (t->keys && (t->keys_piece == EVERY_PIECE || t->keys_piece == number))
        k = t->keys;
    double begin = bench_now();
    bool ok = bench_good(t->kv, pkv_batch_begin(t->batch, stream));
    double begun = bench_now();
    for (uint32_t l = 0; l < t->layers && ok; l++)
        ok = bench_good(t->kv, pkv_batch_append(t->batch, l, k, v, stream));
    double called = bench_now();
    ok = ok && bench_good(t->kv, pkv_batch_end(t->batch, stream));
    t->begin_s += begun - begin, t->calls_s += called - begun, t->end_s += bench_now() - called;
    return ok;
}

static bool prefill(const struct lab *x, struct text *t)
{
    uint32_t each = PIECE / t->count;
    bool ok = text_batch(t, each, false, 0);
    double begin = bench_now();
    for (uint32_t done = 0; done < t->tokens && ok; done += each)
        ok = piece(x, t, done / each);
    ok = ok && bench_good(t->kv, pkv_batch_wait(t->batch));
    t->prefill_s = bench_now() - begin;
    return text_batch_close(t) && ok;
}

void bench_settle(const struct lab *x)
{
    uint64_t sealed = 1;
    for (int i = 0; i < 4000 && sealed; i++) {
        usleep(10000);
        sealed = bench_total(x->socket, "blocks", "sealed");
    }
}

bool text_model(struct text *t)
{
    static const char *const names[] = {[PKV_SIGN] = "sign", [PKV_CODE] = "code", [PKV_LINEAR] = "linear"};
    int file = t->signature == PKV_SIGN ? -1 : bench_weights(t->signature, t->layers, t->bits);
    char name[64], path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
    snprintf(name, sizeof(name), "bench %u x %u %s", t->layers, t->bits, names[t->signature]);
    struct pkv_model_desc desc = {.size = sizeof(desc),
                                  .layers = t->layers,
                                  .q_heads = Q_HEADS,
                                  .kv_heads = KV_HEADS,
                                  .head_dim = DIM,
                                  .type = PKV_TYPE_BF16,
                                  .signature = t->signature,
                                  .sig_bits = t->bits,
                                  .weights = t->signature == PKV_SIGN ? NULL : path,
                                  .name = name};
    bool ok = bench_good(t->kv, pkv_model_open(t->kv, &desc, &t->model));
    if (file >= 0)
        close(file);
    return ok;
}

bool text_open(const struct lab *x, struct text *t)
{
    bool ok = text_model(t);
    for (uint32_t s = 0; s < t->count && ok; s++)
        ok = bench_good(t->kv, pkv_seq_create(t->model, t->tokens + PIECE, 0, "bench", &t->seqs[s]));
    ok = ok && prefill(x, t);
    if (!t->moving)
        bench_settle(x);
    return ok;
}

void text_close(struct text *t)
{
    (void)text_batch_close(t);
    for (uint32_t s = 0; s < t->count; s++)
        if (t->seqs[s])
            (void)bench_good(t->kv, pkv_seq_close(t->seqs[s]));
    if (t->model)
        (void)bench_good(t->kv, pkv_model_close(t->model));
}

bool fill_queries(const struct lab *x, uint32_t count, float noise)
{
    uint64_t each = (uint64_t)count * Q_HEADS * DIM;
    int r = 0;
    for (uint32_t i = 0; i < CALLS && !r; i++)
        r = gpu_lab_fill(x->lab, (char *)x->q + i * each * 2, each, noise > 0 ? 77 : 100 + i, 200 + i, noise);
    return !r && gpu_lab_wait(x->lab) == 0;
}

void *text_graph(const struct lab *x, struct text *t, bool append, uint32_t *calls)
{
    uint64_t q_bytes = (uint64_t)t->count * Q_HEADS * DIM * 2;
    void *stream = gpu_lab_stream(x->lab), *graph = NULL;
    *calls = (*calls + t->layers - 1) / t->layers * t->layers;
    bool ok = gpu_lab_capture(x->lab) == 0;
    for (uint32_t i = 0; i < *calls && ok; i++)
        ok = bench_good(t->kv, append ? pkv_batch_append(t->batch, i % t->layers, x->k, x->v, stream)
                                      : pkv_batch_attend(t->batch, i % t->layers, (char *)x->q + i % CALLS * q_bytes, x->out,
                                                         x->lse, stream));
    ok = gpu_lab_captured(x->lab, &graph) == 0 && ok;
    if (!ok && graph)
        gpu_lab_graph_free(x->lab, graph);
    return ok ? graph : NULL;
}

double text_timed(const struct lab *x, struct text *t, bool append)
{
    uint32_t calls = CALLS;
    void *stream = gpu_lab_stream(x->lab), *graph = NULL;
    double us[ROUNDS] = {0};
    bool ok = bench_good(t->kv, pkv_batch_begin(t->batch, stream));
    graph = ok ? text_graph(x, t, append, &calls) : NULL;
    for (int i = -3; i < ROUNDS && graph && ok; i++)
        ok = gpu_lab_replay(x->lab, graph, &us[i < 0 ? 0 : i]) == 0;
    ok = ok && graph;
    if (graph)
        gpu_lab_graph_free(x->lab, graph);
    ok = bench_good(t->kv, pkv_batch_cancel(t->batch, stream)) && ok;
    return ok ? bench_median(us, ROUNDS) / calls : 0;
}

bool text_explained(const struct lab *x, struct text *t, double *ret_scan_ns, double *ret_attend_ns, double *ret_rows)
{
    enum { TIMES = 9 };
    struct pkv_budget b = {.size = sizeof(b), .k = K, .sinks = SINKS, .recent = RECENT};
    static uint16_t q[Q_HEADS * DIM];
    static float out[Q_HEADS * DIM];
    double scan[TIMES], attend[TIMES];
    uint32_t one = 1;
    if (gpu_device_copy_now(x->device, GPU_TO_HOST, (uintptr_t)q, (uintptr_t)x->q, sizeof(q)))
        return false;
    for (int i = -1; i < TIMES; i++) {
        struct pkv_explain e = {0};
        if (!bench_good(t->kv, pkv_attend(t->seqs, &one, 1, i < 0 ? 0 : (uint32_t)i % t->layers, q, &b, out, NULL, &e)))
            return false;
        scan[i < 0 ? 0 : i] = (double)e.scan_ns, attend[i < 0 ? 0 : i] = (double)e.attend_ns, *ret_rows = (double)e.rows_arena;
    }
    *ret_scan_ns = bench_median(scan, TIMES), *ret_attend_ns = bench_median(attend, TIMES);
    return true;
}
