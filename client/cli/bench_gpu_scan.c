/* How fast signatures are scanned, 1M tokens.
 *
 *   scan_1m, scan_1m_64b         what a call of 1M tokens reads beyond one of 128K, over the time that it takes longer: the
 * scan and its counts as batches have them, without the chain of waits that is in every call hamming_1m, hamming_1m_64b   the
 * same with plain Hamming distances: random projections, signs of the query, rule sum scan_1m_sync                 the scan of
 * a synchronous call, by what it says of itself */
#include "client/cli/bench_gpu.h"

enum { SHORT = 131072, LONG = 1048576 };

static uint64_t bytes_read(const struct text *t)
{
    return (uint64_t)t->tokens * KV_HEADS * t->bits / 8;
}

/* Microseconds of an attend call over `tokens`; 0: it failed. */
static double call_us(const struct lab *x, struct text t, uint32_t tokens, uint64_t *ret_bytes)
{
    t.tokens = tokens / x->bench->scale;
    t.layers = PKV_MIN(ALL_LAYERS / t.tokens, (uint32_t)LAYERS_MAX);
    bool ok = text_open(x, &t) && fill_queries(x, 1, 0) && text_batch(&t, 1, false, 0);
    double us = ok ? text_timed(x, &t, false) : 0;
    *ret_bytes = bytes_read(&t);
    text_close(&t);
    return us;
}

static void figure_growth(const struct lab *x, struct pkv *kv, const char *name, uint32_t bits, uint32_t signature, double goal)
{
    struct text t = {.kv = kv, .count = 1, .bits = bits, .signature = signature};
    uint64_t few, many;
    if (!bench_wanted(x->bench, name))
        return;
    double short_us = call_us(x, t, SHORT, &few), long_us = call_us(x, t, LONG, &many);
    fprintf(stderr, "%s: a call of %d tokens takes %.1f us, of %d %.1f\n", name, SHORT, short_us, LONG, long_us);
    if (short_us <= 0 || long_us <= short_us) {
        bench_skip(x->bench, name, "a longer text did not take longer");
        return;
    }
    double rate = (double)(many - few) / (long_us - short_us) * 1e6;
    bench_add(x->bench, &(struct figure){name, "GB/s", "the read peak", rate * 1e-9, x->read_peak * 1e-9, rate / x->read_peak,
                                         goal, true});
}

static void figure_sync(const struct lab *x, struct pkv *kv)
{
    struct text t = {.kv = kv, .count = 1, .tokens = LONG / x->bench->scale, .layers = 2, .bits = 128};
    double scan, attend, rows;
    if (bench_wanted(x->bench, "scan_1m_sync") && text_open(x, &t) && fill_queries(x, 1, 0) &&
        text_explained(x, &t, &scan, &attend, &rows)) {
        double rate = (double)bytes_read(&t) / scan * 1e9;
        bench_add(x->bench, &(struct figure){"scan_1m_sync", "GB/s", "the read peak", rate * 1e-9, x->read_peak * 1e-9,
                                             rate / x->read_peak, 0.83, true});
    }
    text_close(&t);
}

void figures_scan(const struct lab *x, struct pkv *kv)
{
    figure_growth(x, kv, "scan_1m", 128, PKV_SIGN, 0.83);
    figure_growth(x, kv, "scan_1m_64b", 64, PKV_SIGN, 0.83);
    figure_growth(x, kv, "hamming_1m", 128, PKV_LINEAR, 0.8);
    figure_growth(x, kv, "hamming_1m_64b", 64, PKV_LINEAR, 0.8);
    figure_sync(x, kv);
}
