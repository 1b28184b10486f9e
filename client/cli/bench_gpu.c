/* pivotkv bench gpu: the product's own path - a daemon with a pool on the GPU, a worker's batches in replayed graphs - for a
 * Llama-3.1-8B layer (32 q / 8 kv heads x 128, bf16), k = 2048 beside 128 sinks and 128 recent. Graphs rotate over layers, so
 * that the cache of the device does not hold what is read; medians of replays; ceilings of the same run.
 *
 *   attend_8k .. attend_1m, _64b   one attend call, everything in the pool; 128-bit signatures, or 64
 *   batch_64x32k                   64 sequences of 32K tokens
 *   append_64                      one token for each of 64 sequences
 *   prefill                        append in calls of 4096 tokens, bytes moved
 *   arena_1m, _80, _90             K and V in the arena; without a row cache, and with one that finds as many of a hundred rows
 *   dense_arena                    exact attention streamed out of the arena, against the copy peak
 * The peer of the attend figures is full attention: by --peer (a script that prints lines of {"batch", "tokens", "us": {..}}),
 * else the time in which the device can read K and V at its peak. */
#include "client/cli/bench.h"

#include "gpu/lab.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { Q_HEADS = 32, KV_HEADS = 8, DIM = 128, K = 2048, PIECE = 4096, ROUNDS = 21, CALLS = 8, LAYERS_MAX = 8, SEQS_MAX = 64 };

#define ROW_BYTES  (2ull * KV_HEADS * DIM * 2) /* of a token and layer */
#define ALL_LAYERS (2u << 20)                  /* tokens of all layers together, at most */

struct lab {
    struct bench *bench;
    struct gpu_device *device;
    struct gpu_lab *lab;
    const char *socket;                   /* of the daemon at hand */
    double read_peak, to_device, to_host; /* bytes a second */
    void *k, *v, *q, *out, *lse;
    json_t *peers;
};

/* Sequences on a daemon, filled. */
struct text {
    struct pkv *kv;
    struct pkv_seq *seqs[SEQS_MAX];
    struct pkv_model *model;
    struct pkv_batch *batch;
    uint32_t count, layers, tokens;
    double prefill_s;
};

static bool good(struct pkv *kv, int r)
{
    if (r)
        fprintf(stderr, "pivotkv: %s\n", pkv_error(kv));
    return !r;
}

/* ---- peers ---- */

static void read_peers(struct lab *x)
{
    char command[4300], line[512];
    x->peers = json_array();
    if (!x->bench->peer)
        return;
    snprintf(command, sizeof(command), "python3 '%s'", x->bench->peer);
    FILE *f = popen(command, "re");
    while (f && fgets(line, sizeof(line), f)) {
        json_t *one = json_loads(line, 0, NULL);
        if (one)
            json_array_append_new(x->peers, one);
        else
            fprintf(stderr, "peer: %s", line);
    }
    if (!f || pclose(f))
        fprintf(stderr, "pivotkv: the comparator did not run to its end: %s\n", command);
}

/* Microseconds of full attention; *ret_name who says so. */
static double peer_us(const struct lab *x, uint32_t batch, uint32_t tokens, const char **ret_name)
{
    double best = (double)batch * tokens * ROW_BYTES / x->read_peak * 1e6;
    size_t i;
    json_t *one, *us;
    const char *name;
    bool found = false;
    *ret_name = "reading K and V at the read peak";
    json_array_foreach(x->peers, i, one)
    {
        if (format_number(one, "batch") != batch || format_number(one, "tokens") != tokens)
            continue;
        json_object_foreach(json_object_get(one, "us"), name, us)
        {
            double value = json_number_value(us);
            best = found ? (value < best ? value : best) : value;
            found = true;
        }
        *ret_name = "full attention, torch's fastest";
    }
    return best;
}

/* ---- text ---- */

static bool batch_open(struct text *t, uint32_t queries, bool dense, uint64_t cache_bytes)
{
    struct pkv_budget budget = {.size = sizeof(budget), .k = K, .sinks = 128, .recent = 128, .dense = dense};
    struct pkv_batch_options o = {.size = sizeof(o), .queries = queries, .cache_bytes = cache_bytes};
    budget.dense_below = 16385;
    return good(t->kv, pkv_batch_open(t->seqs, t->count, &budget, &o, &t->batch));
}

static bool batch_close(struct text *t)
{
    bool ok = good(t->kv, pkv_batch_close(t->batch));
    t->batch = NULL;
    return ok;
}

/* Tokens in pieces, the same random rows again and again, all sequences in one batch. */
static bool prefill(const struct lab *x, struct text *t)
{
    uint32_t piece = PIECE / t->count;
    void *stream = gpu_lab_stream(x->lab);
    bool ok = batch_open(t, piece, false, 0);
    double begin = bench_now();
    for (uint32_t done = 0; done < t->tokens && ok; done += piece) {
        ok = good(t->kv, pkv_batch_begin(t->batch, stream));
        for (uint32_t l = 0; l < t->layers && ok; l++)
            ok = good(t->kv, pkv_batch_append(t->batch, l, x->k, x->v, stream));
        ok = ok && good(t->kv, pkv_batch_end(t->batch, stream));
    }
    ok = ok && good(t->kv, pkv_batch_wait(t->batch));
    t->prefill_s = bench_now() - begin;
    return t->batch && batch_close(t) && ok;
}

/* Until the daemon has copied home what was sealed: its copies would be measured too. */
static void settle(const struct lab *x)
{
    uint64_t before = UINT64_MAX, now = 0;
    for (int i = 0; i < 200 && now != before; i++) {
        before = now;
        usleep(200000);
        now = bench_total(x->socket, "counters", "copy_bytes");
    }
}

static bool text_open(const struct lab *x, struct text *t, uint32_t bits)
{
    char name[32];
    snprintf(name, sizeof(name), "bench %u x %u", t->layers, bits);
    struct pkv_model_desc desc = {.size = sizeof(desc),
                                  .layers = t->layers,
                                  .q_heads = Q_HEADS,
                                  .kv_heads = KV_HEADS,
                                  .head_dim = DIM,
                                  .type = PKV_TYPE_BF16,
                                  .sig_bits = bits,
                                  .name = name};
    bool ok = good(t->kv, pkv_model_open(t->kv, &desc, &t->model));
    for (uint32_t s = 0; s < t->count && ok; s++)
        ok = good(t->kv, pkv_seq_create(t->model, t->tokens + PIECE, 0, "bench", &t->seqs[s]));
    ok = ok && prefill(x, t);
    settle(x);
    return ok;
}

static void text_close(struct text *t)
{
    if (t->batch)
        (void)batch_close(t);
    for (uint32_t s = 0; s < t->count; s++)
        if (t->seqs[s])
            (void)good(t->kv, pkv_seq_close(t->seqs[s]));
    if (t->model)
        (void)good(t->kv, pkv_model_close(t->model));
}

/* Median microseconds of a call, in a graph of CALLS calls or more over the layers; every call with queries of its own. */
static double timed(const struct lab *x, struct text *t, bool append)
{
    uint32_t calls = (CALLS + t->layers - 1) / t->layers * t->layers;
    uint64_t q_bytes = (uint64_t)t->count * Q_HEADS * DIM * 2;
    void *stream = gpu_lab_stream(x->lab), *graph = NULL;
    double us[ROUNDS] = {0};
    bool ok = good(t->kv, pkv_batch_begin(t->batch, stream)) && gpu_lab_capture(x->lab) == 0;
    for (uint32_t i = 0; i < calls && ok; i++)
        ok =
            good(t->kv, append ? pkv_batch_append(t->batch, i % t->layers, x->k, x->v, stream)
                               : pkv_batch_attend(t->batch, i % t->layers, (char *)x->q + i * q_bytes, x->out, x->lse, stream));
    ok = gpu_lab_captured(x->lab, &graph) == 0 && ok;
    for (int i = -3; i < ROUNDS && ok; i++)
        ok = gpu_lab_replay(x->lab, graph, &us[i < 0 ? 0 : i]) == 0;
    if (graph)
        gpu_lab_graph_free(x->lab, graph);
    ok = good(t->kv, pkv_batch_cancel(t->batch, stream)) && ok;
    return ok ? bench_median(us, ROUNDS) / calls : 0;
}

/* ---- figures ---- */

static bool fill_queries(const struct lab *x, uint32_t count, float noise)
{
    uint64_t each = (uint64_t)count * Q_HEADS * DIM;
    int r = 0;
    for (uint32_t i = 0; i < CALLS && !r; i++)
        r = gpu_lab_fill(x->lab, (char *)x->q + i * each * 2, each, noise > 0 ? 77 : 100 + i, 200 + i, noise);
    return !r && gpu_lab_wait(x->lab) == 0;
}

static void figure_attend(const struct lab *x, struct text *t, const char *name, double goal)
{
    const char *peer_name;
    double peer = peer_us(x, t->count, t->tokens, &peer_name);
    bool ok = fill_queries(x, t->count, 0) && batch_open(t, 1, false, 0);
    double us = ok ? timed(x, t, false) : 0;
    if (us > 0)
        bench_add(x->bench, &(struct figure){name, "us", peer_name, us, peer, peer / us, goal, true});
    if (t->batch)
        (void)batch_close(t);
}

static void figure_append(const struct lab *x, struct text *t)
{
    double us = bench_wanted(x->bench, "append_64") && batch_open(t, 1, false, 0) ? timed(x, t, true) : 0;
    if (us > 0)
        bench_add(x->bench, &(struct figure){"append_64", "us", NULL, us, 0, us, 10, false});
    if (t->batch)
        (void)batch_close(t);
}

struct length {
    const char *name;
    uint32_t tokens, bits, count;
    double goal;
};

static void figures_resident(const struct lab *x, struct pkv *kv)
{
    static const struct length lengths[] = {
        {"attend_8k", 8192, 128, 1, 0.95},      {"attend_16k", 16384, 128, 1, 0.95},   {"attend_32k", 32768, 128, 1, 3},
        {"attend_128k", 131072, 128, 1, 6.5},   {"attend_512k", 524288, 128, 1, 12},   {"attend_1m", 1048576, 128, 1, 18},
        {"attend_128k_64b", 131072, 64, 1, 10}, {"attend_1m_64b", 1048576, 64, 1, 30}, {"batch_64x32k", 32768, 128, 64, 3},
    };
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        const struct length *l = &lengths[i];
        struct text t = {.kv = kv, .count = l->count, .tokens = l->tokens / x->bench->scale};
        uint64_t each = (uint64_t)t.tokens * t.count;
        bool append = l->count == SEQS_MAX && bench_wanted(x->bench, "append_64");
        if (!bench_wanted(x->bench, l->name) && !append)
            continue;
        t.layers = ALL_LAYERS / each > LAYERS_MAX ? LAYERS_MAX : ALL_LAYERS / each ? (uint32_t)(ALL_LAYERS / each) : 1;
        if (text_open(x, &t, l->bits)) {
            double moved = (double)each * t.layers * (2.0 * ROW_BYTES + KV_HEADS * l->bits / 8.0) / t.prefill_s;
            if (l->tokens == 1048576 && l->bits == 64) /* the second text: memory has been touched and mapped */
                bench_add(x->bench, &(struct figure){"prefill", "GB/s", "the read peak", moved * 1e-9, x->read_peak * 1e-9,
                                                     moved / x->read_peak, 0.6, true});
            figure_attend(x, &t, l->name, l->goal);
            if (append)
                figure_append(x, &t);
        }
        text_close(&t);
    }
}

static void figure_dense_arena(const struct lab *x, struct text *t)
{
    struct pkv_budget dense = {.size = sizeof(dense), .dense = 1};
    static uint16_t q[Q_HEADS * DIM];
    static float out[Q_HEADS * DIM];
    double seconds[5];
    struct pkv_explain e = {0};
    uint32_t one = 1;
    for (int i = 0; i < 5; i++) {
        double begin = bench_now();
        if (!good(t->kv, pkv_attend(t->seqs, &one, 1, 0, q, &dense, out, NULL, &e)))
            return;
        seconds[i] = bench_now() - begin;
    }
    double rate = (double)e.rows_arena / KV_HEADS * ROW_BYTES / bench_median(seconds, 5);
    bench_add(x->bench, &(struct figure){"dense_arena", "GB/s", "pinned H2D copies", rate * 1e-9, x->to_device * 1e-9,
                                         rate / x->to_device, 0.9, true});
}

/* A graph of one call, for each of the queries; the batch's own memory is in it. */
static bool graphs_capture(const struct lab *x, struct text *t, void **graphs)
{
    bool ok = true;
    for (uint32_t i = 0; i < CALLS && ok; i++) {
        ok = gpu_lab_capture(x->lab) == 0;
        ok = ok && good(t->kv, pkv_batch_attend(t->batch, 0, (char *)x->q + i * (uint64_t)Q_HEADS * DIM * 2, x->out, x->lse,
                                                gpu_lab_stream(x->lab)));
        ok = gpu_lab_captured(x->lab, &graphs[i]) == 0 && ok;
    }
    return ok;
}

/* Steps of decoding that take the queries in turn: share of the rows in the arena that were found in the cache once it was
 * warm, and *ret_us of a call, by itself in its graph. Negative: it failed. */
static double hit_rate(const struct lab *x, struct text *t, double *ret_us)
{
    enum { WARM = 2 * CALLS };
    uint64_t before[2] = {0, 0}, after[2];
    double us[ROUNDS];
    void *graphs[CALLS] = {0}, *stream = gpu_lab_stream(x->lab);
    bool ok = batch_open(t, 1, false, 24ull << 20) && graphs_capture(x, t, graphs);
    for (uint32_t i = 0; i < WARM + ROUNDS && ok; i++) {
        ok = i != WARM || good(t->kv, pkv_batch_rows(t->batch, &before[0], &before[1]));
        ok = ok && good(t->kv, pkv_batch_begin(t->batch, stream)) &&
             good(t->kv, pkv_batch_append(t->batch, 0, x->k, x->v, stream)) && gpu_lab_wait(x->lab) == 0 &&
             gpu_lab_replay(x->lab, graphs[i % CALLS], &us[i < WARM ? 0 : i - WARM]) == 0 &&
             good(t->kv, pkv_batch_end(t->batch, stream));
    }
    ok = ok && good(t->kv, pkv_batch_rows(t->batch, &after[0], &after[1]));
    for (uint32_t i = 0; i < CALLS; i++)
        if (graphs[i])
            gpu_lab_graph_free(x->lab, graphs[i]);
    if (t->batch)
        ok = batch_close(t) && ok;
    *ret_us = ok ? bench_median(us, ROUNDS) : 0;
    double hits = ok ? (double)(after[0] - before[0]) : 0, misses = ok ? (double)(after[1] - before[1]) : 0;
    return ok ? hits / (hits + misses > 0 ? hits + misses : 1) : -1;
}

/* Queries that drift around one: their selections overlap, and the cache holds little more than one of them. The wider the
 * drift, the fewer hits: it is chosen so that they are `wanted`. */
static void figure_cached(const struct lab *x, struct text *t, const char *name, const char *stream_name, double wanted,
                          double goal)
{
    const char *peer_name;
    double peer = peer_us(x, 1, t->tokens, &peer_name), us = 0, rate = 0, low = 0, high = 2;
    bool ok = bench_wanted(x->bench, name);
    for (int i = 0; i < 10 && ok && (rate < wanted - 0.005 || rate > wanted + 0.005); i++) {
        double noise = (low + high) / 2;
        ok = fill_queries(x, 1, (float)noise);
        rate = ok ? hit_rate(x, t, &us) : -1;
        ok = rate >= 0;
        *(rate > wanted ? &low : &high) = noise;
    }
    if (!ok)
        return;
    fprintf(stderr, "%s: %.1f %% of the rows in the arena were found in the cache\n", name, 100 * rate);
    if (rate < wanted - 0.03 || rate > wanted + 0.03) {
        bench_skip(x->bench, name, "no drift of the queries gave that hit rate");
        return;
    }
    double stream = (double)t->tokens * ROW_BYTES / x->to_device * 1e6;
    bench_add(x->bench, &(struct figure){name, "us", peer_name, us, peer, peer / us, goal, true});
    if (stream_name)
        bench_add(x->bench, &(struct figure){stream_name, "us", "streaming K and V at the copy peak", us, stream, stream / us,
                                             300, true});
}

static void figures_arena(const struct lab *x, struct pkv *kv)
{
    struct text t = {.kv = kv, .count = 1, .tokens = 1048576 / x->bench->scale, .layers = 1};
    if (text_open(x, &t, 128)) {
        double us = fill_queries(x, 1, 0) && batch_open(&t, 1, false, 0) ? timed(x, &t, false) : 0;
        double stream = (double)t.tokens * ROW_BYTES / x->to_device * 1e6;
        if (us > 0)
            bench_add(x->bench, &(struct figure){"arena_1m", "us", "streaming K and V at the copy peak", us, stream,
                                                 stream / us, 1, true});
        if (t.batch)
            (void)batch_close(&t);
        figure_cached(x, &t, "arena_1m_80", NULL, 0.8, 1);
        figure_cached(x, &t, "arena_1m_90", "arena_1m_90_stream", 0.9, 5);
        if (bench_wanted(x->bench, "dense_arena"))
            figure_dense_arena(x, &t);
    }
    text_close(&t);
}

/* ---- the run ---- */

static int lab_fill_all(struct lab *x)
{
    uint64_t kv = (uint64_t)PIECE * KV_HEADS * DIM, q = (uint64_t)CALLS * SEQS_MAX * Q_HEADS * DIM;
    int r = gpu_lab_take(x->lab, kv * 2, &x->k);
    r = r ? r : gpu_lab_take(x->lab, kv * 2, &x->v);
    r = r ? r : gpu_lab_take(x->lab, q * 2, &x->q);
    r = r ? r : gpu_lab_take(x->lab, q * 4, &x->out);
    r = r ? r : gpu_lab_take(x->lab, q / DIM * 4, &x->lse);
    r = r ? r : gpu_lab_fill(x->lab, x->k, kv, 1, 0, 0);
    r = r ? r : gpu_lab_fill(x->lab, x->v, kv, 2, 0, 0);
    r = r ? r : gpu_lab_read_peak(x->lab, &x->read_peak);
    r = r ? r : gpu_lab_copy_peak(x->lab, true, &x->to_device);
    return r ? r : gpu_lab_copy_peak(x->lab, false, &x->to_host);
}

static int lab_open(struct lab *x)
{
    int r = gpu_device_open(0, &x->device); /* the first that this process sees, which is where the daemon begins too */
    r = r ? r : gpu_lab_open(x->device, &x->lab);
    r = r ? r : lab_fill_all(x);
    if (r) {
        fprintf(stderr, "pivotkv: no GPU to measure: %s (%s)\n", pkv_err_text((uint32_t)-r), gpu_module_why());
        return r;
    }
    fprintf(stderr, "%s; read %.0f GB/s, copies to it %.1f, from it %.1f GB/s\n", gpu_device_about(x->device)->name,
            x->read_peak * 1e-9, x->to_device * 1e-9, x->to_host * 1e-9);
    return 0;
}

static void with_daemon(struct lab *x, const char *pool, const char *arena,
                        void (*figures)(const struct lab *x, struct pkv *kv))
{
    struct bench_daemon d;
    double seconds;
    struct pkv *kv = bench_daemon_start(x->bench, &d, pool, arena, false, &seconds);
    if (!kv)
        return;
    x->socket = d.socket;
    fprintf(stderr, "a daemon with a pool of %s and an arena of %s began in %.1f s\n", pool, arena, seconds);
    figures(x, kv);
    pkv_close(kv);
    bench_daemon_stop(&d);
}

void bench_gpu(struct bench *b)
{
    struct lab x = {.bench = b};
    if (lab_open(&x) == 0) {
        read_peers(&x);
        with_daemon(&x, "12G", "10G", figures_resident);
        if (bench_wanted(b, "arena_1m") || bench_wanted(b, "arena_1m_80") || bench_wanted(b, "arena_1m_90") ||
            bench_wanted(b, "dense_arena"))
            with_daemon(&x, "1G", "6G", figures_arena);
    }
    json_decref(x.peers);
    gpu_lab_close(x.lab);
    gpu_device_close(x.device);
}
