/* pivotkv: the operator's command line. */
#include "client/cli/cli.h"

#include "client/pivotkv.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

struct verb {
    const char *name;
    int (*run)(struct cli *cli);
    const char *arguments, *help;
};
static const struct verb verbs[] = {
    {"stat", cli_stat, "", "the daemon, its memory, its workers and counters"},
    {"ls", cli_ls, "", "the sequences"},
    {"inspect", cli_inspect, "SEQ", "one sequence, layer by layer; SEQ as ls shows it"},
    {"doctor", cli_doctor, "", "whether this machine suits pivotkv, and what to do"},
    {"bench", cli_bench, "host | gpu",
     "measures kernels and service; --only NAME,..., --scale N, --threads N, --daemon PATH, --peer SCRIPT (gpu)"},
};
#define VERBS (sizeof(verbs) / sizeof(verbs[0]))

static void help(FILE *to)
{
    fprintf(to, "usage: pivotkv VERB [ARGUMENTS] [--socket PATH] [--format text|json] [--timeout-ms N]\n\n");
    for (size_t i = 0; i < VERBS; i++)
        fprintf(to, "  %-8s %-5s %s\n", verbs[i].name, verbs[i].arguments, verbs[i].help);
    fprintf(
        to,
        "\nPATH is the daemon's socket; default $PIVOTKV_SOCKET, $XDG_RUNTIME_DIR/pivotkv/socket, /tmp/pivotkv-UID/socket.\n"
        "Exit codes: 0 good, 1 failed, 2 wrong usage, 3 no daemon answers.\n");
}

static void usage(const char *what, const char *argument)
{
    fprintf(stderr, "pivotkv: %s%s: see pivotkv --help\n", what, argument);
    exit(CLI_USAGE);
}

bool cli_option(struct cli *c, const char *name, const char **ret)
{
    size_t n = strlen(name);
    for (int i = 0; i < c->count; i++) {
        const char *a = c->arguments[i];
        bool equals = !strncmp(a, name, n) && a[n] == '=';
        if (!equals && strcmp(a, name))
            continue;
        int taken = equals ? 1 : 2;
        if (i + taken > c->count)
            usage("a value is missing after ", name);
        *ret = equals ? a + n + 1 : c->arguments[i + 1];
        for (int rest = i; rest + taken < c->count; rest++)
            c->arguments[rest] = c->arguments[rest + taken];
        c->count -= taken;
        return true;
    }
    return false;
}

void cli_no_more(const struct cli *c)
{
    if (c->count)
        usage("not understood: ", c->arguments[0]);
}

static void common_options(struct cli *c)
{
    const char *value;
    if (cli_option(c, "--socket", &value))
        c->socket = value;
    if (cli_option(c, "--format", &value)) {
        c->json = !strcmp(value, "json");
        if (!c->json && strcmp(value, "text"))
            usage("--format is text or json, not ", value);
    }
    if (cli_option(c, "--timeout-ms", &value)) {
        c->timeout_ms = atoi(value);
        if (c->timeout_ms < 1 || c->timeout_ms > 600000)
            usage("--timeout-ms is 1 to 600000, not ", value);
    }
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_DFL); /* into a closed pipe: end quietly */
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            help(stdout);
            return CLI_GOOD;
        }
        if (!strcmp(argv[i], "--version")) {
            printf("pivotkv %s\n", pkv_version());
            return CLI_GOOD;
        }
    }
    struct cli cli = {.timeout_ms = 2000, .arguments = argv + 1, .count = argc - 1};
    common_options(&cli);
    if (!cli.count)
        usage("a verb is missing", "");
    const char *name = *cli.arguments++;
    cli.count--;
    for (size_t i = 0; i < VERBS; i++)
        if (!strcmp(verbs[i].name, name))
            return verbs[i].run(&cli);
    usage("no such verb: ", name);
}
