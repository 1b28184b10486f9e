/* pivotkv stat */
#include "client/cli/cli.h"

#include <string.h>

static void tier(const json_t *stat, const char *name)
{
    const json_t *t = json_object_get(stat, name);
    char used[32], retired[32], room[32], capacity[32];
    uint64_t all = format_number(t, "capacity"), taken = format_number(t, "used"), gone = format_number(t, "retired");
    printf("%-10s %s used + %s waiting for readers + %s free = %s, %llu chunks, %s pages\n", name, format_bytes(taken, used),
           format_bytes(gone, retired), format_bytes(all - taken - gone, room), format_bytes(all, capacity),
           (unsigned long long)format_number(t, "chunks"), format_text(t, "pages"));
}

static void gpus(const json_t *stat)
{
    size_t i;
    const json_t *g, *list = json_object_get(stat, "gpus");
    json_array_foreach((json_t *)(uintptr_t)list, i, g)
    {
        printf("%-10s %s, %s, %llu workers\n", i ? "" : "gpus", format_text(g, "name"), format_text(g, "uuid"),
               (unsigned long long)format_number(g, "workers"));
    }
    if (json_array_size(list) && !strcmp(format_text(stat, "share"), "ipc"))
        printf("%-10s by cudaIpc handles: stray writes are not stopped%s%s\n", "shared",
               format_text(stat, "mapper")[0] ? "; mapped by one tenant, " : "", format_text(stat, "mapper"));
    if (json_array_size(list))
        printf("%-10s %llu of %llu chunks of the arena\n", "pinned", (unsigned long long)format_number(stat, "pinned"),
               (unsigned long long)format_number(json_object_get(stat, "arena"), "chunks"));
}

static void workers(const json_t *list)
{
    struct table t = {0};
    size_t i;
    const json_t *w;
    if (!json_array_size(list))
        return;
    table_row(&t, 8, (const char *const[]){"worker", "pid", "tenant", "label", "mode", "sequences", "attended", "of tokens"});
    json_array_foreach((json_t *)(uintptr_t)list, i, w)
    {
        char cells[5][32];
        const json_t *c = json_object_get(w, "counters");
        uint64_t seen = format_number(c, "tokens_seen"), attended = format_number(c, "tokens_attended");
        snprintf(cells[0], 32, "%llu", (unsigned long long)format_number(w, "worker"));
        snprintf(cells[1], 32, "%llu", (unsigned long long)format_number(w, "pid"));
        snprintf(cells[2], 32, "%llu", (unsigned long long)format_number(w, "sequences"));
        snprintf(cells[3], 32, "%.1f %%", seen ? 100.0 * (double)attended / (double)seen : 0.0);
        snprintf(cells[4], 32, "%llu", (unsigned long long)seen);
        table_row(&t, 8,
                  (const char *const[]){cells[0], cells[1], format_text(w, "tenant"), format_text(w, "label"),
                                        format_text(w, "mode"), cells[2], cells[3], cells[4]});
    }
    printf("\n");
    table_print(&t);
}

static void number_or_dash(const json_t *object, const char *key, char to[32])
{
    const json_t *n = json_object_get(object, key);
    if (json_is_number(n))
        snprintf(to, 32, "%.3f", json_number_value(n));
    else
        snprintf(to, 32, "-");
}

/* What the samples say of each model's selections. */
static void models(const json_t *stat)
{
    struct table t = {0};
    size_t i;
    const json_t *m, *list = json_object_get(stat, "models");
    if (!json_array_size(list))
        return;
    table_row(&t, 8, (const char *const[]){"model", "scheme", "bits", "state", "samples", "mass", "error", "alarm"});
    json_array_foreach((json_t *)(uintptr_t)list, i, m)
    {
        char cells[5][32];
        const json_t *q = json_object_get(m, "quality");
        bool alarm = json_is_true(json_object_get(q, "alarm")), again = json_is_true(json_object_get(m, "recalibrating"));
        snprintf(cells[4], 32, "%llu", (unsigned long long)format_number(m, "state"));
        snprintf(cells[0], 32, "%llu", (unsigned long long)format_number(m, "sig_bits"));
        snprintf(cells[1], 32, "%llu", (unsigned long long)format_number(q, "samples"));
        number_or_dash(q, "mass", cells[2]);
        number_or_dash(q, "error", cells[3]);
        table_row(&t, 8,
                  (const char *const[]){format_text(m, "name"), format_text(m, "scheme"), cells[0], cells[4], cells[1],
                                        cells[2], cells[3],
                                        again   ? "ALARM, calibrating again"
                                        : alarm ? "ALARM"
                                                : "quiet"});
    }
    printf("\n");
    table_print(&t);
}

/* One line: what the audit takes, and what its samples found. */
static void audit(const json_t *stat)
{
    const json_t *a = json_object_get(stat, "audit"), *t = json_object_get(stat, "totals");
    uint64_t samples = format_number(t, "samples"), call_ns = format_number(t, "attend_call_ns");
    double share = (double)format_number(a, "share_ppm") * 1e-4;
    if (share <= 0) {
        printf("%-10s off (audit-ppm 0)\n", "audit");
        return;
    }
    printf("%-10s %llu samples", "audit", (unsigned long long)samples);
    if (samples)
        printf(", mass %.3f, error %.3f", (double)format_number(t, "sample_mass_ppm") * 1e-6 / (double)samples,
               (double)format_number(t, "sample_error_ppm") * 1e-6 / (double)samples);
    printf("; takes %.2f %% of attend's time, may take %.2f %%; %llu alarms stand\n",
           call_ns ? 100.0 * (double)format_number(t, "sample_ns") / (double)call_ns : 0.0, share,
           (unsigned long long)format_number(a, "alarms"));
}

static void counters(const char *title, const json_t *object)
{
    const char *key;
    const json_t *value;
    printf("\n%s\n", title);
    json_object_foreach((json_t *)(uintptr_t)object, key, value) if (json_integer_value(value))
        printf("  %-19s %lld\n", key, (long long)json_integer_value(value));
}

int cli_stat(struct cli *cli)
{
    int code = CLI_GOOD;
    cli_no_more(cli);
    json_t *s = admin_request(cli, json_pack("{s:s}", "verb", "stat"), &code);
    if (!s)
        return code;
    if (cli->json)
        return format_json(s);
    char rss[32], heap[32];
    const json_t *memory = json_object_get(s, "memory"), *blocks = json_object_get(s, "blocks");
    printf("pivotkvd %s, pid %llu, up %llu s, %s, %s, heap by %s\n", format_text(s, "version"),
           (unsigned long long)format_number(s, "pid"), (unsigned long long)format_number(s, "uptime_s"),
           format_text(s, "backend"), format_text(s, "io"), format_text(s, "heap"));
    tier(s, "pool");
    tier(s, "arena");
    gpus(s);
    printf("%-10s %llu being written, %llu on their way home (%llu give way to a prefill), %llu home\n", "blocks",
           (unsigned long long)format_number(blocks, "granted"), (unsigned long long)format_number(blocks, "sealed"),
           (unsigned long long)format_number(blocks, "held"), (unsigned long long)format_number(blocks, "home"));
    printf("%-10s %llu\n", "sequences", (unsigned long long)format_number(s, "sequences"));
    printf("%-10s %s resident (pool and arena included), heap %s\n", "memory", format_bytes(format_number(memory, "rss"), rss),
           format_bytes(format_number(memory, "heap"), heap));
    audit(s);
    models(s);
    workers(json_object_get(s, "workers"));
    counters("daemon, since its start", json_object_get(s, "counters"));
    counters("all workers, gone ones included", json_object_get(s, "totals"));
    json_decref(s);
    return CLI_GOOD;
}
