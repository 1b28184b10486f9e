/* pivotkv bench: figures with their peers taken in the same run, the machine's facts on stderr. */
#include "client/cli/bench.h"

#include "gpu/gpu.h"

#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

bool bench_wanted(const struct bench *b, const char *name)
{
    size_t n = strlen(name);
    for (const char *at = b->only; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, name, n) && (!at[n] || at[n] == ','))
            return true;
    return !b->only;
}

void bench_add(struct bench *b, const struct figure *f)
{
    bool met = f->least ? f->ratio >= f->goal : f->ratio <= f->goal;
    json_t *peer_value = f->peer ? json_real(f->peer_value) : json_null();
    json_array_append_new(b->results, json_pack("{s:s, s:f, s:s, s:s?, s:o, s:f, s:f, s:b}", "name", f->name, "value", f->value,
                                                "unit", f->unit, "peer", f->peer, "peer_value", peer_value, "ratio", f->ratio,
                                                "goal", f->goal, "met", (int)met));
}

void bench_skip(struct bench *b, const char *name, const char *why)
{
    if (!bench_wanted(b, name))
        return;
    fprintf(stderr, "%s: not taken: %s\n", name, why);
    json_array_append_new(b->results, json_pack("{s:s, s:n, s:s, s:n, s:n, s:n, s:n, s:n}", "name", name, "value", "unit", "",
                                                "peer", "peer_value", "ratio", "goal", "met"));
}

uint64_t bench_available(void)
{
    char line[128];
    unsigned long long kib = 0;
    FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof(line), f))
        if (sscanf(line, "MemAvailable: %llu", &kib) == 1)
            break;
    if (f)
        fclose(f);
    return kib * 1024;
}

static void facts(const struct bench *b)
{
    char line[256] = "", model[200] = "unknown CPU", bytes[32];
    struct utsname u;
    FILE *f = fopen("/proc/cpuinfo", "re");
    while (f && fgets(line, sizeof(line), f))
        if (sscanf(line, "model name : %199[^\n]", model) == 1)
            break;
    if (f)
        fclose(f);
    struct gpu *gpu = NULL;
    int r = gpu_open(&(struct gpu_options){.threads = b->threads}, &gpu);
    uname(&u);
    fprintf(stderr, "%s, %ld CPUs, %s available, Linux %s, %s, dense peer: %s%s\n", model, sysconf(_SC_NPROCESSORS_ONLN),
            format_bytes(bench_available(), bytes), u.release, r ? "no backend" : gpu_describe(gpu), peer_dense_name(),
            b->scale > 1 ? "; SCALED DOWN: these figures say nothing about the goals" : "");
    gpu_close(gpu);
}

/* pivotkvd: as told, else beside this program, in a build folder or installed. */
static const char *find_daemon(const char *told)
{
    static char path[4096];
    const char *const beside[] = {"../../cachesvc/pivotkvd", "pivotkvd", "../bin/pivotkvd"};
    if (!told)
        told = getenv("PIVOTKVD");
    if (told)
        return told;
    ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 64);
    char *slash = n > 0 ? (path[n] = 0, strrchr(path, '/')) : NULL;
    for (size_t i = 0; slash && i < sizeof(beside) / sizeof(beside[0]); i++) {
        strcpy(slash + 1, beside[i]);
        if (access(path, X_OK) == 0)
            return path;
    }
    return "pivotkvd";
}

static int print_table(json_t *results)
{
    struct table t = {0};
    size_t i;
    const json_t *r;
    table_row(&t, 7, (const char *const[]){"figure", "value", "peer's", "ratio", "goal", "met", "peer"});
    json_array_foreach(results, i, r)
    {
        static const char *const keys[] = {"value", "peer_value", "ratio", "goal"};
        char cells[4][64];
        for (int c = 0; c < 4; c++) {
            const json_t *n = json_object_get(r, keys[c]);
            if (json_is_number(n))
                snprintf(cells[c], 64, "%.3g%s%s", json_number_value(n), c < 2 ? " " : "", c < 2 ? format_text(r, "unit") : "");
            else
                snprintf(cells[c], 64, "-");
        }
        const json_t *met = json_object_get(r, "met");
        table_row(&t, 7,
                  (const char *const[]){format_text(r, "name"), cells[0], cells[1], cells[2], cells[3],
                                        json_is_true(met)    ? "yes"
                                        : json_is_false(met) ? "no"
                                                             : "-",
                                        format_text(r, "peer")});
    }
    table_print(&t);
    json_decref(results);
    return CLI_GOOD;
}

static uint32_t number(struct cli *cli, const char *name, uint32_t otherwise, uint32_t most)
{
    const char *text;
    if (!cli_option(cli, name, &text))
        return otherwise;
    char *end;
    unsigned long value = strtoul(text, &end, 10);
    if (*end || !value || value > most) {
        fprintf(stderr, "pivotkv: %s is 1 to %u, not %s\n", name, most, text);
        exit(CLI_USAGE);
    }
    return (uint32_t)value;
}

int cli_bench(struct cli *cli)
{
    const char *told = NULL, *only = NULL;
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    struct bench b = {.threads = number(cli, "--threads", cpus > 64 ? 64 : (uint32_t)cpus, 64),
                      .scale = number(cli, "--scale", 1, 32)};
    cli_option(cli, "--daemon", &told);
    cli_option(cli, "--only", &only);
    cli_option(cli, "--peer", &b.peer);
    b.cuda = cli->count && !strcmp(cli->arguments[0], "gpu");
    if (!b.cuda && (!cli->count || strcmp(cli->arguments[0], "host"))) {
        fprintf(stderr, "pivotkv: bench needs a group: host or gpu\n");
        return CLI_USAGE;
    }
    cli->arguments++, cli->count--;
    cli_no_more(cli);
    b.only = only, b.daemon = find_daemon(told), b.results = json_array();
    facts(&b);
    if (b.cuda) {
        bench_gpu(&b);
    } else {
        bench_kernels(&b);
        bench_service(&b);
    }
    if (!json_array_size(b.results) && b.cuda) {
        json_decref(b.results);
        return CLI_FAILED;
    }
    if (!json_array_size(b.results)) {
        fprintf(stderr, "pivotkv: no figure was taken: names are scan, attend_128k, attend_1m, served_128k, served_empty, "
                        "audit_128k, append_64k, start_8g, daemon_rss\n");
        json_decref(b.results);
        return only ? CLI_USAGE : CLI_FAILED;
    }
    return cli->json ? format_json(b.results) : print_table(b.results);
}
