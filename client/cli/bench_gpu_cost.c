/* What the worst inputs cost, and what the audit does.
 *
 *   equal_128k, equal_1m   all keys are one: every score is the threshold's; against random keys in the same run
 *   near_128k, near_1m     the rows that are selected are neighbours
 *   audit_64k              a step of decoding, 32 layers, with the default audit, against one without */
#include "client/cli/bench_gpu.h"

enum { AUDIT_LAYERS = 32, AUDIT_STEPS = 50, AUDIT_WARM = 5, AUDIT_ROUNDS = 21 }; /* rounds of so many steps */

/* Microseconds of an attend call over a text whose keys are `keys` in piece `piece`; 0: it failed. */
static double attend_over(const struct lab *x, struct pkv *kv, uint32_t tokens, const void *keys, uint32_t piece)
{
    struct text t = {.kv = kv, .count = 1, .tokens = tokens, .bits = 128, .keys = keys, .keys_piece = piece};
    t.layers = PKV_MIN(ALL_LAYERS / tokens, (uint32_t)LAYERS_MAX);
    bool ok = text_open(x, &t) && fill_queries(x, 1, 0.05f) && text_batch(&t, 1, false, 0);
    double us = ok ? text_timed(x, &t, false) : 0;
    text_close(&t);
    return us;
}

static void figure(const struct lab *x, const char *name, double us, double random)
{
    if (us > 0)
        bench_add(x->bench, &(struct figure){name, "us", "random keys", us, random, us / random, 1.3, false});
}

void figures_adversarial(const struct lab *x, struct pkv *kv)
{
    static const struct {
        const char *equal, *near;
        uint32_t tokens;
    } lengths[] = {{"equal_128k", "near_128k", 131072}, {"equal_1m", "near_1m", 1048576}};
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        uint32_t tokens = lengths[i].tokens / x->bench->scale;
        bool equal = bench_wanted(x->bench, lengths[i].equal), near = bench_wanted(x->bench, lengths[i].near);
        double random = equal || near ? attend_over(x, kv, tokens, NULL, 0) : 0;
        if (random > 0 && equal)
            figure(x, lengths[i].equal, attend_over(x, kv, tokens, x->equal, EVERY_PIECE), random);
        if (random > 0 && near)
            figure(x, lengths[i].near, attend_over(x, kv, tokens, x->near, tokens / PIECE / 2), random);
    }
}

void figure_prefill(const struct lab *x, const struct text *t, const char *name, const char *host_name)
{
    double moved = text_moved(t) / t->prefill_s, steps = (double)t->tokens * t->count / PIECE;
    double host = (t->begin_s + t->calls_s + t->end_s) / steps * 1e6, whole = t->prefill_s / steps * 1e6;
    fprintf(stderr,
            "%s: a step of %d tokens and %u layers takes %.1f us; the host %.1f in begin, %.1f in append, %.1f in end\n", name,
            PIECE, t->layers, whole, t->begin_s / steps * 1e6, t->calls_s / steps * 1e6, t->end_s / steps * 1e6);
    bench_add(x->bench, &(struct figure){name, "GB/s", "the read peak", moved * 1e-9, x->read_peak * 1e-9, moved / x->read_peak,
                                         0.6, true});
    bench_add(x->bench, &(struct figure){host_name, "us", "the whole step", host, whole, host / whole, 1, false});
}

/* ---- the audit ---- */

static double step_us; /* of the daemon at hand */

static void *step_graph(const struct lab *x, const struct text *t)
{
    void *stream = gpu_lab_stream(x->lab), *graph = NULL;
    bool ok = gpu_lab_capture(x->lab) == 0;
    for (uint32_t l = 0; l < t->layers && ok; l++)
        ok = bench_good(t->kv, pkv_batch_append(t->batch, l, x->k, x->v, stream)) &&
             bench_good(t->kv, pkv_batch_attend(t->batch, l, x->q, x->out, x->lse, stream));
    ok = gpu_lab_captured(x->lab, &graph) == 0 && ok;
    if (!ok && graph)
        gpu_lab_graph_free(x->lab, graph);
    return ok ? graph : NULL;
}

static void steps(const struct lab *x, struct pkv *kv)
{
    struct text t = {.kv = kv, .count = 1, .tokens = 65536 / x->bench->scale, .bits = 128, .layers = AUDIT_LAYERS};
    bool ok = text_open(x, &t) && fill_queries(x, 1, 0.3f) && text_batch(&t, 1, false, 0);
    void *graph = ok ? step_graph(x, &t) : NULL, *stream = gpu_lab_stream(x->lab);
    double us[AUDIT_ROUNDS] = {0}, begin = 0, ignored;
    ok = graph != NULL;
    for (int i = 0; i < (AUDIT_WARM + AUDIT_ROUNDS) * AUDIT_STEPS && ok; i++) {
        begin = i % AUDIT_STEPS ? begin : bench_now();
        ok = bench_good(kv, pkv_batch_begin(t.batch, stream)) && gpu_lab_replay(x->lab, graph, &ignored) == 0 &&
             bench_good(kv, pkv_batch_end(t.batch, stream));
        if (i / AUDIT_STEPS >= AUDIT_WARM && i % AUDIT_STEPS == AUDIT_STEPS - 1)
            us[i / AUDIT_STEPS - AUDIT_WARM] = (bench_now() - begin) / AUDIT_STEPS * 1e6;
    }
    step_us = ok ? bench_median(us, AUDIT_ROUNDS) : 0;
    if (graph)
        gpu_lab_graph_free(x->lab, graph);
    fprintf(stderr, "steps of %.1f us; %llu samples; the audit took %.3f of %.1f ms of attending\n", step_us,
            (unsigned long long)bench_total(x->socket, "totals", "samples"),
            (double)bench_total(x->socket, "totals", "sample_ns") * 1e-6,
            (double)bench_total(x->socket, "totals", "attend_call_ns") * 1e-6);
    text_close(&t);
}

void figures_audit(struct lab *x)
{
    if (!bench_wanted(x->bench, "audit_64k"))
        return;
    with_daemon(x, "12G", "10G", "0", steps);
    double without = step_us;
    with_daemon(x, "12G", "10G", "5000", steps);
    double with = step_us;
    with_daemon(x, "12G", "10G", "0", steps); /* as far apart as these two are, the figure is not to be trusted */
    double again = step_us, mean = (without + again) / 2;
    if (without > 0 && with > 0 && again > 0)
        bench_add(x->bench, &(struct figure){"audit_64k", "us", "a step without audit", with, mean, with / mean, 1.01, false});
}
