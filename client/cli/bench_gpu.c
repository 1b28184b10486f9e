/* pivotkv bench gpu: the product's own path - a daemon with a pool on the GPU, a worker's batches in replayed graphs - for a
 * Llama-3.1-8B layer (32 q / 8 kv heads x 128, bf16), k = 2048 beside 128 sinks and 128 recent. Graphs rotate over layers, so
 * that the cache of the device does not hold what is read; medians of replays; ceilings of the same run.
 *
 *   attend_8k .. attend_1m, _64b   one attend call, everything in the pool; `sign`, 128 bits, or 64
 *   attend_32k_code, _128k_code    the same with `code`, whose weights are maps of the queries
 *   batch_64x32k                   64 sequences of 32K tokens
 *   append_64                      one token for each of 64 sequences
 *   prefill, prefill_host          append in calls of 4096 tokens, two layers, bytes moved; the host's part of a step
 *   prefill_64k, _host             the same of 64K tokens in 32 layers
 *   arena_1m, _80, _90, _trace     K and V in the arena; without a row cache, and with one that finds as many of a hundred
 *                                  rows, or as many as of a real model's selections (tests/quality/locality.py)
 *   arena_rows, arena_rows_near    rows out of the arena in a synchronous call, against a plain gather; neighbours
 *   dense_arena                    exact attention streamed out of the arena, against the copy peak
 * and the figures of bench_gpu_scan.c, bench_gpu_cost.c and bench_gpu_memory.c. The peer of the attend figures is full
 * attention: by --peer (a script that prints lines of {"batch", "tokens", "us": {..}}), else the time in which the device can
 * read K and V at its peak. */
#include "client/cli/bench_gpu.h"

#include <stdlib.h>
#include <string.h>

#define CACHE_BYTES (24ull << 20) /* of rows: three selections */
#define TRACE_RATE  0.89          /* Gemma 3's three global layers, three texts of 32K tokens: 0.78 to 0.98, mean 0.893 */

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

/* ---- figures ---- */

static void figure_attend(const struct lab *x, struct text *t, const char *name, double goal)
{
    const char *peer_name;
    double peer = peer_us(x, t->count, t->tokens, &peer_name);
    bool ok = fill_queries(x, t->count, 0) && text_batch(t, 1, false, 0);
    double us = ok ? text_timed(x, t, false) : 0;
    if (us > 0)
        bench_add(x->bench, &(struct figure){name, "us", peer_name, us, peer, peer / us, goal, true});
    (void)text_batch_close(t);
}

static void figure_append(const struct lab *x, struct text *t)
{
    double us = bench_wanted(x->bench, "append_64") && text_batch(t, 1, false, 0) ? text_timed(x, t, true) : 0;
    if (us > 0)
        bench_add(x->bench, &(struct figure){"append_64", "us", NULL, us, 0, us, 10, false});
    (void)text_batch_close(t);
}

struct length {
    const char *name;
    uint32_t tokens, bits, count;
    double goal;
    uint32_t signature;
};

static void figure_layers(const struct lab *x, struct pkv *kv)
{
    struct text t = {.kv = kv, .count = 1, .layers = 32, .bits = 128, .tokens = 65536 / x->bench->scale};
    if (bench_wanted(x->bench, "prefill_64k") && text_open(x, &t))
        figure_prefill(x, &t, "prefill_64k", "prefill_64k_host");
    text_close(&t);
}

static void figures_resident(const struct lab *x, struct pkv *kv)
{
    static const struct length lengths[] = {
        {"attend_8k", 8192, 128, 1, 0.95, PKV_SIGN},         {"attend_16k", 16384, 128, 1, 0.95, PKV_SIGN},
        {"attend_32k", 32768, 128, 1, 3, PKV_SIGN},          {"attend_128k", 131072, 128, 1, 6.5, PKV_SIGN},
        {"attend_512k", 524288, 128, 1, 12, PKV_SIGN},       {"attend_1m", 1048576, 128, 1, 18, PKV_SIGN},
        {"attend_128k_64b", 131072, 64, 1, 10, PKV_SIGN},    {"attend_1m_64b", 1048576, 64, 1, 30, PKV_SIGN},
        {"batch_64x32k", 32768, 128, 64, 3, PKV_SIGN},       {"attend_32k_code", 32768, 128, 1, 3, PKV_CODE},
        {"attend_128k_code", 131072, 128, 1, 6.5, PKV_CODE},
    };
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        const struct length *l = &lengths[i];
        struct text t = {
            .kv = kv, .count = l->count, .tokens = l->tokens / x->bench->scale, .bits = l->bits, .signature = l->signature};
        uint64_t each = (uint64_t)t.tokens * t.count;
        bool append = l->count == SEQS_MAX && bench_wanted(x->bench, "append_64");
        if (!bench_wanted(x->bench, l->name) && !append)
            continue;
        t.layers = ALL_LAYERS / each > LAYERS_MAX ? LAYERS_MAX : ALL_LAYERS / each ? (uint32_t)(ALL_LAYERS / each) : 1;
        if (text_open(x, &t)) {
            if (l->tokens == 1048576 && l->bits == 64) /* the second text: memory has been touched and mapped */
                figure_prefill(x, &t, "prefill", "prefill_host");
            figure_attend(x, &t, l->name, l->goal);
            if (append)
                figure_append(x, &t);
        }
        text_close(&t);
    }
    figure_layers(x, kv);
    figures_adversarial(x, kv);
    figures_scan(x, kv);
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
        if (!bench_good(t->kv, pkv_attend(t->seqs, &one, 1, 0, q, &dense, out, NULL, &e)))
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
        ok = ok && bench_good(t->kv, pkv_batch_attend(t->batch, 0, (char *)x->q + i * (uint64_t)Q_HEADS * DIM * 2, x->out,
                                                      x->lse, gpu_lab_stream(x->lab)));
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
    bool ok = text_batch(t, 1, false, CACHE_BYTES) && graphs_capture(x, t, graphs);
    for (uint32_t i = 0; i < WARM + ROUNDS && ok; i++) {
        ok = i != WARM || bench_good(t->kv, pkv_batch_rows(t->batch, &before[0], &before[1]));
        ok = ok && bench_good(t->kv, pkv_batch_begin(t->batch, stream)) &&
             bench_good(t->kv, pkv_batch_append(t->batch, 0, x->k, x->v, stream)) && gpu_lab_wait(x->lab) == 0 &&
             gpu_lab_replay(x->lab, graphs[i % CALLS], &us[i < WARM ? 0 : i - WARM]) == 0 &&
             bench_good(t->kv, pkv_batch_end(t->batch, stream));
    }
    ok = ok && bench_good(t->kv, pkv_batch_rows(t->batch, &after[0], &after[1]));
    for (uint32_t i = 0; i < CALLS; i++)
        if (graphs[i])
            gpu_lab_graph_free(x->lab, graphs[i]);
    ok = text_batch_close(t) && ok;
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

/* Rows that a synchronous call fetches, against a plain gather of as many lone rows out of as much memory. */
static void figure_rows(const struct lab *x, struct text *t, const char *name, double goal)
{
    static double plain; /* of the run */
    double scan, attend, rows;
    if (!bench_wanted(x->bench, name) || !fill_queries(x, 1, 0.05f) || !text_explained(x, t, &scan, &attend, &rows))
        return;
    if (plain == 0 && gpu_lab_gather(x->lab, (uint64_t)t->tokens * ROW_BYTES, (uint32_t)rows, 2 * DIM * 2, 1, &plain)) {
        bench_skip(x->bench, name, "no pinned memory for a plain gather");
        return;
    }
    double rate = rows * 2 * DIM * 2 / attend * 1e9;
    bench_add(x->bench, &(struct figure){name, "GB/s", "a plain gather of lone rows", rate * 1e-9, plain * 1e-9, rate / plain,
                                         goal, true});
}

static void figure_arena(const struct lab *x, struct text *t)
{
    double us = fill_queries(x, 1, 0) && text_batch(t, 1, false, 0) ? text_timed(x, t, false) : 0;
    double stream = (double)t->tokens * ROW_BYTES / x->to_device * 1e6;
    if (us > 0)
        bench_add(x->bench,
                  &(struct figure){"arena_1m", "us", "streaming K and V at the copy peak", us, stream, stream / us, 1, true});
    (void)text_batch_close(t);
}

static void figures_arena(const struct lab *x, struct pkv *kv)
{
    struct text t = {.kv = kv, .count = 1, .tokens = 1048576 / x->bench->scale, .layers = 1, .bits = 128}, near = t;
    if (text_open(x, &t)) {
        if (bench_wanted(x->bench, "arena_1m"))
            figure_arena(x, &t);
        figure_cached(x, &t, "arena_1m_80", NULL, 0.8, 1);
        figure_cached(x, &t, "arena_1m_trace", NULL, TRACE_RATE, 1);
        figure_cached(x, &t, "arena_1m_90", "arena_1m_90_stream", 0.9, 5);
        figure_rows(x, &t, "arena_rows", 0.9);
        if (bench_wanted(x->bench, "dense_arena"))
            figure_dense_arena(x, &t);
    }
    text_close(&t);
    near.keys = x->near, near.keys_piece = near.tokens / PIECE / 2;
    if (bench_wanted(x->bench, "arena_rows_near") && text_open(x, &near))
        figure_rows(x, &near, "arena_rows_near", 1);
    text_close(&near);
}

/* ---- the run ---- */

/* Keys for the worst cases, made here of what the device holds. */
static int special_keys(struct lab *x)
{
    enum { ROW = KV_HEADS * DIM };
    static uint16_t q[Q_HEADS * DIM];
    uint64_t bytes = (uint64_t)PIECE * ROW * 2;
    uint16_t *k = malloc(bytes), *equal = malloc(bytes);
    int r = k && equal ? gpu_lab_fill(x->lab, x->q, Q_HEADS * DIM, 77, 0, 0) : -PKV_ERR_NO_MEMORY; /* fill_queries' middle */
    r = r ? r : gpu_lab_wait(x->lab);
    r = r ? r : gpu_device_copy_now(x->device, GPU_TO_HOST, (uintptr_t)q, (uintptr_t)x->q, sizeof(q));
    r = r ? r : gpu_device_copy_now(x->device, GPU_TO_HOST, (uintptr_t)k, (uintptr_t)x->k, bytes);
    for (uint32_t t = 0; t < PIECE && !r; t++)
        memcpy(equal + (uint64_t)t * ROW, k, ROW * 2);
    for (uint32_t t = 0; t < K && !r; t++)
        for (uint32_t h = 0; h < KV_HEADS; h++)
            memcpy(k + (uint64_t)t * ROW + h * DIM, q + h * (Q_HEADS / KV_HEADS) * DIM, DIM * 2);
    r = r ? r : gpu_device_copy_now(x->device, GPU_TO_DEVICE, (uintptr_t)x->near, (uintptr_t)k, bytes);
    r = r ? r : gpu_device_copy_now(x->device, GPU_TO_DEVICE, (uintptr_t)x->equal, (uintptr_t)equal, bytes);
    free(k), free(equal);
    return r;
}

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
    r = r ? r : gpu_lab_take(x->lab, kv * 2, &x->equal);
    r = r ? r : gpu_lab_take(x->lab, kv * 2, &x->near);
    r = r ? r : special_keys(x);
    r = r ? r : gpu_lab_read_peak(x->lab, &x->read_peak);
    r = r ? r : gpu_lab_copy_peak(x->lab, true, false, &x->to_device);
    r = r ? r : gpu_lab_copy_peak(x->lab, true, true, &x->to_device_beside);
    return r ? r : gpu_lab_copy_peak(x->lab, false, false, &x->to_host);
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
    fprintf(stderr, "%s; read %.0f GB/s, copies to it %.1f, from it %.1f GB/s; to it while others come from it %.1f\n",
            gpu_device_about(x->device)->name, x->read_peak * 1e-9, x->to_device * 1e-9, x->to_host * 1e-9,
            x->to_device_beside * 1e-9);
    return 0;
}

void with_daemon(struct lab *x, const char *pool, const char *arena, const char *audit,
                 void (*figures)(const struct lab *x, struct pkv *kv))
{
    struct bench_daemon d;
    x->bench->audit = audit;
    struct pkv *kv = bench_daemon_start(x->bench, &d, pool, arena, false, &x->start_s);
    if (!kv)
        return;
    x->socket = d.socket;
    fprintf(stderr, "a daemon with a pool of %s and an arena of %s began in %.1f s\n", pool, arena, x->start_s);
    figures(x, kv);
    pkv_close(kv);
    bench_daemon_stop(&d);
}

/* Whether a figure of a group is wanted. */
static bool any(const struct bench *b, const char *const *names)
{
    while (*names && !bench_wanted(b, *names))
        names++;
    return *names;
}

void bench_gpu(struct bench *b)
{
    static const char *const arena[] = {"arena_1m",    "arena_1m_80", "arena_1m_trace",  "arena_1m_90",
                                        "dense_arena", "arena_rows",  "arena_rows_near", NULL};
    static const char *const memory[] = {"start_64g", "attach_64g", "home", "home_slowdown", "upload", NULL};
    struct lab x = {.bench = b};
    if (lab_open(&x) == 0) {
        read_peers(&x);
        with_daemon(&x, "12G", "10G", "0", figures_resident); /* of 32 layers one would pay for the audit: its own figure */
        figures_audit(&x);
        if (any(b, arena))
            with_daemon(&x, "1G", "6G", "0", figures_arena);
        if (any(b, memory))
            with_daemon(&x, b->scale > 1 ? "8G" : "56G", b->scale > 1 ? "8G" : "64G", "0", figures_memory);
    }
    json_decref(x.peers);
    gpu_lab_close(x.lab);
    gpu_device_close(x.device);
}
