/* The kernels through gpu's door, over memory of our own: one layer, 32 q heads, 8 kv heads x 128, 16 bit, 128-bit signatures.
 */
#include "client/cli/bench.h"

#include "gpu/gpu.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ROUNDS 7

struct text {
    struct pkv_geom geom;
    struct gpu *gpu;
    struct gpu_scheme *scheme;
    uint64_t bases[2];
    char *rows, *signatures;
    uint64_t row_bytes, sig_bytes;
    struct pkv_block_ref *refs;
    uint16_t *q;
    float *out;
};

static uint64_t random_next(uint64_t *state)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return *state ^ *state >> 31;
}

static void *take(uint64_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    (void)madvise(p, bytes, MADV_HUGEPAGE); /* as a daemon on a well-kept machine has them */
    return p;
}

/* Numbers between -1 and 1 as 16-bit floats: sign and fraction are random, the exponent is one of four. */
static uint16_t random_half(uint64_t *state)
{
    uint64_t r = random_next(state);
    return (uint16_t)((r & 0x83ff) | (11 + (r >> 20 & 3)) << 10);
}

static void fill(struct text *t, uint32_t blocks)
{
    enum { PATTERN = 1 << 20 };
    static uint16_t pattern[PATTERN];
    uint64_t state = 7, step = 1 << 18;
    for (uint32_t i = 0; i < PATTERN; i++)
        pattern[i] = random_half(&state);
    for (uint64_t at = 0; at < t->row_bytes; at += step)
        memcpy(t->rows + at, pattern + random_next(&state) % (PATTERN - step / 2), step);
    for (uint64_t at = 0; at < t->sig_bytes; at += 8) {
        uint64_t bits = random_next(&state);
        memcpy(t->signatures + at, &bits, 8);
    }
    for (uint32_t b = 0; b < blocks; b++)
        t->refs[b] = (struct pkv_block_ref){pkv_place(PKV_TIER_POOL, 0, b, 1), pkv_place(PKV_TIER_POOL, 1, b, 1)};
    for (uint32_t i = 0; i < 32 * 128; i++)
        t->q[i] = random_half(&state);
}

static void text_free(struct text *t)
{
    if (t->rows)
        munmap(t->rows, t->row_bytes);
    if (t->signatures)
        munmap(t->signatures, t->sig_bytes);
    free(t->refs), free(t->q), free(t->out);
    gpu_scheme_close(t->scheme);
    gpu_close(t->gpu);
}

static bool text_make(const struct bench *b, uint32_t tokens, struct text *t)
{
    *t = (struct text){.geom = {.layers = 1, .q_heads = 32, .kv_heads = 8, .head_dim = 128, .dtype = PKV_F16, .sig_bits = 128}};
    uint8_t digest[PKV_DIGEST_BYTES];
    uint32_t blocks = pkv_tokens_blocks(tokens);
    t->row_bytes = blocks * pkv_geom_block_bytes(&t->geom), t->sig_bytes = blocks * pkv_geom_sig_block_bytes(&t->geom);
    t->rows = take(t->row_bytes), t->signatures = take(t->sig_bytes);
    t->refs = malloc(blocks * sizeof(*t->refs));
    t->q = malloc(32 * 128 * sizeof(*t->q)), t->out = malloc(32 * 128 * sizeof(*t->out));
    if (!t->rows || !t->signatures || !t->refs || !t->q || !t->out ||
        gpu_open(&(struct gpu_options){.threads = b->threads}, &t->gpu) ||
        gpu_scheme_open(PKV_SCHEME_SIGN, &t->geom, NULL, &t->scheme, digest)) {
        text_free(t);
        return false;
    }
    t->bases[0] = (uint64_t)(uintptr_t)t->rows, t->bases[1] = (uint64_t)(uintptr_t)t->signatures;
    fill(t, blocks);
    return true;
}

/* Seconds of one attend; with explain, what its stages took. */
static double attend(struct text *t, uint32_t tokens, bool dense, struct gpu_explain *explain)
{
    struct gpu_view view = {.blocks = t->refs, .tokens = tokens, .queries = 1};
    struct gpu_attend_args args = {.geom = &t->geom,
                                   .space = {{NULL, t->bases, NULL}},
                                   .policy = {.k = 2048, .sinks = 128, .recent = 128, .dense_below = dense ? UINT32_MAX : 0},
                                   .scheme = t->scheme,
                                   .seqs = 1,
                                   .views = &view,
                                   .q = t->q,
                                   .out = t->out,
                                   .explain = explain};
    double begin = bench_now();
    int r = gpu_attend(t->gpu, &args);
    return r ? -1 : bench_now() - begin;
}

static void figure_scan(struct bench *b, struct text *t, uint32_t tokens)
{
    double sum = 1e9, scan = 1e9;
    for (int i = 0; i < ROUNDS; i++) {
        struct gpu_explain e = {0};
        double seconds = peer_sum(t->signatures, t->sig_bytes, b->threads);
        sum = seconds < sum ? seconds : sum;
        attend(t, tokens, false, &e);
        seconds = (double)e.scan_ns * 1e-9 / b->threads; /* scan_ns adds up the threads' time */
        scan = seconds < scan ? seconds : scan;
    }
    double bytes = (double)t->sig_bytes * 1e-9;
    bench_add(
        b, &(struct figure){"scan", "GB/s", "plain sum of the same bytes", bytes / scan, bytes / sum, sum / scan, 0.70, true});
}

static void figure_attend(struct bench *b, struct text *t, const char *name, uint32_t tokens, double goal)
{
    double sparse = 1e9, dense = 1e9, library = peer_dense(tokens, 32, 8, 128, b->threads);
    for (int i = 0; i < ROUNDS; i++) {
        double seconds = attend(t, tokens, false, NULL);
        sparse = seconds < sparse ? seconds : sparse;
        if (i < 3) {
            seconds = attend(t, tokens, true, NULL);
            dense = seconds < dense ? seconds : dense;
        }
    }
    bool ours = library < 0 || dense < library;
    double peer = ours ? dense : library;
    bench_add(b, &(struct figure){name, "ms", ours ? "pivotkv's own dense" : peer_dense_name(), sparse * 1e3, peer * 1e3,
                                  peer / sparse, goal, true});
}

void bench_kernels(struct bench *b)
{
    bool scan = bench_wanted(b, "scan"), small = bench_wanted(b, "attend_128k"), large = bench_wanted(b, "attend_1m");
    uint32_t million = (1u << 20) / b->scale, part = (1u << 17) / b->scale, tokens = scan || large ? million : part;
    struct text t;
    if (!scan && !small && !large)
        return;
    if (bench_available() < 4300ull * tokens + (3ull << 30) || !text_make(b, tokens, &t)) {
        const char *names[] = {"scan", "attend_128k", "attend_1m"};
        for (int i = 0; i < 3; i++)
            if (bench_wanted(b, names[i]))
                bench_skip(b, names[i], "not enough memory: 8 GiB must be available");
        return;
    }
    if (scan)
        figure_scan(b, &t, tokens);
    if (small)
        figure_attend(b, &t, "attend_128k", part, 5);
    if (large)
        figure_attend(b, &t, "attend_1m", million, 20);
    text_free(&t);
}
