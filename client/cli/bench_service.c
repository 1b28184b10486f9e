/* The service through the public library, each figure on a private daemon in a folder of its own. */
#include "client/cli/bench.h"

#include "client/pivotkv.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHUNK 65536u

static struct pkv_seq *sequence(struct pkv *kv, uint32_t max_tokens)
{
    struct pkv_model_desc desc = {.size = sizeof(desc),
                                  .layers = 1,
                                  .q_heads = 32,
                                  .kv_heads = 8,
                                  .head_dim = 128,
                                  .type = PKV_TYPE_F16,
                                  .name = "bench"};
    struct pkv_model *model;
    struct pkv_seq *seq = NULL;
    if (pkv_model_open(kv, &desc, &model) || pkv_seq_create(model, max_tokens, 0, "bench", &seq))
        return NULL;
    return seq;
}

/* Both sides spin: a daemon of its own, for a spinning one takes a processor from everything else. */
static void figure_empty(struct bench *b)
{
    enum { COUNT = 20001 };
    static double us[COUNT];
    struct bench_daemon d;
    double seconds;
    struct pkv *kv = bench_daemon_start(b, &d, "64M", "64M", true, &seconds);
    if (!kv)
        return;
    for (uint32_t i = 0; i < COUNT; i++) {
        uint64_t ns = 0;
        pkv_ping(kv, &ns);
        us[i] = (double)ns * 1e-3;
    }
    double value = bench_median(us, COUNT);
    bench_add(b, &(struct figure){"served_empty", "us", NULL, value, 0, value, 5, false});
    pkv_close(kv);
    bench_daemon_stop(&d);
}

static void fill(uint16_t *to, uint64_t count)
{
    uint64_t state = 99;
    for (uint64_t i = 0; i < count; i++) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        to[i] = (uint16_t)((state >> 40 & 0x83ff) | (11 + (state >> 60 & 3)) << 10);
    }
}

static void figure_append(struct bench *b, struct pkv_seq *seq, uint32_t tokens, const uint16_t *k, const uint16_t *v)
{
    uint64_t bytes = 2ull * tokens * 8 * 128 * sizeof(*k);
    char *to = malloc(bytes);
    double copy[5], append[5];
    if (!to || pkv_append(seq, 0, 128, k, v)) /* the scheme learns before the clock starts */
        return;
    memset(to, 1, bytes);
    for (int i = 0; i < 5; i++) {
        if (pkv_seq_truncate(seq, 128) || pkv_seq_reserve(seq, tokens))
            return;
        usleep(300000); /* copies home of the round before */
        copy[i] = peer_copy(to, k, bytes / 2, b->threads) + peer_copy(to + bytes / 2, v, bytes / 2, b->threads);
        double begin = bench_now();
        if (pkv_append(seq, 0, tokens, k, v))
            return;
        append[i] = bench_now() - begin;
    }
    double ours = (double)bytes * 1e-9 / bench_median(append, 5), peer = (double)bytes * 1e-9 / bench_median(copy, 5);
    bench_add(b, &(struct figure){"append_64k", "GB/s", "memcpy of the same bytes", ours, peer, ours / peer, 0.60, true});
    free(to);
}

static void figure_served(struct bench *b, struct pkv *direct, struct pkv_seq *seq, const char *socket, const uint16_t *q)
{
    enum { ROUNDS = 11 };
    struct pkv_options o = {.size = sizeof(o), .flags = PKV_CONNECT_SERVED, .threads = b->threads};
    struct pkv_model_desc desc = {.size = sizeof(desc),
                                  .layers = 1,
                                  .q_heads = 32,
                                  .kv_heads = 8,
                                  .head_dim = 128,
                                  .type = PKV_TYPE_F16,
                                  .name = "bench"};
    struct pkv_budget budget = {.size = sizeof(budget), .k = 2048, .sinks = 128, .recent = 128};
    struct pkv *served;
    struct pkv_model *model;
    struct pkv_seq *seqs[2] = {seq};
    static float out[2][32 * 128];
    double seconds[2][ROUNDS];
    uint32_t one = 1;
    pkv_ping(direct, NULL);
    if (pkv_connect(socket, &o, &served) || pkv_model_open(served, &desc, &model) ||
        pkv_seq_open(model, pkv_seq_handle(seq), &seqs[1]))
        return;
    for (int i = 0; i < ROUNDS; i++)
        for (int way = 0; way < 2; way++) {
            double begin = bench_now();
            if (pkv_attend(&seqs[way], &one, 1, 0, q, &budget, out[way], NULL, NULL))
                return;
            seconds[way][i] = bench_now() - begin;
        }
    double d = bench_median(seconds[0], ROUNDS), s = bench_median(seconds[1], ROUNDS);
    if (memcmp(out[0], out[1], sizeof(out[0])))
        fprintf(stderr, "pivotkv: direct and served disagree\n");
    bench_add(b, &(struct figure){"served_128k", "ms", "direct", s * 1e3, d * 1e3, s / d, 1.5, false});
    pkv_close(served);
}

/* What the online audit takes of attend's time with its default settings, over a few samples. */
static void figure_audit(struct bench *b, struct pkv_seq *seq, const char *socket, const uint16_t *q)
{
    struct pkv_budget budget = {.size = sizeof(budget), .k = 2048, .sinks = 128, .recent = 128};
    static float out[32 * 128];
    uint32_t one = 1;
    double begin = bench_now();
    while (bench_now() - begin < 30 && bench_total(socket, "totals", "samples") < 4)
        for (int i = 0; i < 200; i++)
            if (pkv_attend(&seq, &one, 1, 0, q, &budget, out, NULL, NULL))
                return;
    uint64_t samples = bench_total(socket, "totals", "samples");
    if (!samples) {
        bench_skip(b, "audit_128k", "no sample was complete after 30 s");
        return;
    }
    double call_ms = (double)bench_total(socket, "totals", "attend_call_ns") * 1e-6,
           taken = (double)bench_total(socket, "totals", "sample_ns") * 1e-6;
    fprintf(stderr, "audit_128k: %llu samples of %.1f ms beside %.0f ms of attend\n", (unsigned long long)samples,
            taken / (double)samples, call_ms);
    bench_add(b, &(struct figure){"audit_128k", "ms", "attend", taken, call_ms, taken / call_ms, 0.01, false});
}

static void figures_of_one_daemon(struct bench *b)
{
    struct bench_daemon d;
    double seconds;
    uint32_t tokens = CHUNK / b->scale;
    uint64_t count = (uint64_t)tokens * 8 * 128;
    uint16_t *k = malloc(count * sizeof(*k)), *v = malloc(count * sizeof(*v));
    struct pkv *kv = k && v ? bench_daemon_start(b, &d, "1G", "1G", false, &seconds) : NULL;
    struct pkv_seq *seq = kv ? sequence(kv, 3 * CHUNK) : NULL;
    if (seq) {
        fill(k, count), fill(v, count);
        if (bench_wanted(b, "append_64k"))
            figure_append(b, seq, tokens, k, v);
        bool long_text = bench_wanted(b, "served_128k") || bench_wanted(b, "audit_128k");
        long_text = long_text && pkv_seq_truncate(seq, 0) == 0 && pkv_append(seq, 0, tokens, k, v) == 0 &&
                    pkv_append(seq, 0, tokens, k, v) == 0;
        if (long_text && bench_wanted(b, "served_128k"))
            figure_served(b, kv, seq, d.socket, k);
        if (long_text && bench_wanted(b, "audit_128k"))
            figure_audit(b, seq, d.socket, k);
    }
    if (kv) {
        pkv_close(kv);
        bench_daemon_stop(&d);
    }
    free(k), free(v);
}

/* Resident bytes of everything but the chunks of pool and arena, whose memfd is called "pivotkv". */
static uint64_t resident_beyond(pid_t pid)
{
    char path[64], line[512];
    unsigned long long kib, total = 0;
    bool chunk = false;
    snprintf(path, sizeof(path), "/proc/%d/smaps", (int)pid);
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof(line), f)) {
        if (sscanf(line, "Rss: %llu", &kib) == 1)
            total += chunk ? 0 : kib;
        else if (strchr(line, '-') && strchr(line, ':') > strchr(line, '-')) /* the head of a mapping */
            chunk = strstr(line, "/memfd:pivotkv (");
    }
    if (f)
        fclose(f);
    return total * 1024;
}

static void figures_of_a_large_arena(struct bench *b)
{
    uint64_t pool = 256ull << 20, arena = (8ull << 30) / b->scale;
    char arena_text[32];
    struct bench_daemon d;
    double seconds;
    snprintf(arena_text, sizeof(arena_text), "%llu", (unsigned long long)arena);
    if (bench_available() < pool + arena + (1ull << 30)) {
        bench_skip(b, "start_8g", "not enough memory for an arena of 8 GiB");
        bench_skip(b, "daemon_rss", "not enough memory for an arena of 8 GiB");
        return;
    }
    struct pkv *kv = bench_daemon_start(b, &d, "256M", arena_text, false, &seconds);
    if (!kv)
        return;
    if (bench_wanted(b, "start_8g"))
        bench_add(b, &(struct figure){"start_8g", "s", NULL, seconds, 0, seconds, 5, false});
    struct pkv_seq *seq = sequence(kv, CHUNK);
    uint16_t *k = calloc((uint64_t)4096 * 8 * 128, sizeof(*k));
    for (int i = 0; seq && k && i < 8; i++) /* a daemon at work, not a fresh one */
        if (pkv_append(seq, 0, 4096, k, k))
            break;
    double beyond = (double)resident_beyond(d.pid) / (1 << 20);
    double allowed = 64 + 0.005 * (double)(pool + arena) / (1 << 20);
    if (bench_wanted(b, "daemon_rss"))
        bench_add(b, &(struct figure){"daemon_rss", "MiB", "64 MiB + 0.5 % of pool and arena", beyond, allowed, beyond, allowed,
                                      false});
    free(k);
    pkv_close(kv);
    bench_daemon_stop(&d);
}

void bench_service(struct bench *b)
{
    if (bench_wanted(b, "served_empty"))
        figure_empty(b);
    if (bench_wanted(b, "append_64k") || bench_wanted(b, "served_128k") || bench_wanted(b, "audit_128k"))
        figures_of_one_daemon(b);
    if (bench_wanted(b, "start_8g") || bench_wanted(b, "daemon_rss"))
        figures_of_a_large_arena(b);
}
