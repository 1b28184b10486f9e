/* One row per setting. Sizes take K, M, G, T (powers of 1024). */
#include "cachesvc/config.h"

#include "proto/limits.h"

#include <errno.h>
#include <ini.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum kind { KIND_TEXT, KIND_BYTES, KIND_NUMBER, KIND_CHOICE };

struct row {
    const char *name, *value;
    enum kind kind;
    size_t offset, room;        /* room: of a text */
    uint64_t low, high;         /* of a number */
    const char *const *choices; /* NULL-terminated */
    const char *help;
};

static const char *const io_choices[] = {"auto", "uring", "epoll", NULL};
static const char *const yes_choices[] = {"no", "yes", NULL};
static const char *const log_choices[] = {"error", "warn", "info", "debug", NULL};
static const char *const backend_choices[] = {"host", "cuda", "auto", NULL};
static const char *const share_choices[] = {"auto", "vmm", "ipc", NULL};
static const char *const isa_choices[] = {"best", "c", "avx2", "avx512", NULL};

#define AT(member)   offsetof(struct config, member)
#define TEXT(member) AT(member), sizeof(((struct config *)0)->member)
static const struct row rows[] = {
    {"socket", "", KIND_TEXT, TEXT(socket), 0, 0, NULL,
     "where workers attach; default $XDG_RUNTIME_DIR/pivotkv/socket, else /tmp/pivotkv-UID/socket"},
    {"pool-bytes", "1G", KIND_BYTES, AT(pool_bytes), 0, 2 * PKV_CHUNK_BYTES_MIN, 1ull << 44, NULL,
     "memory for signatures and hot blocks"},
    {"arena-bytes", "4G", KIND_BYTES, AT(arena_bytes), 0, PKV_CHUNK_BYTES_MIN, 1ull << 44, NULL,
     "CPU memory that is every block's home"},
    {"chunk-bytes", "0", KIND_BYTES, AT(chunk_bytes), 0, 0, PKV_CHUNK_BYTES_MAX, NULL,
     "pool and arena are shared in pieces of this size, a power of two; 0: chosen"},
    {"threads", "0", KIND_NUMBER, AT(threads), 0, 0, 64, NULL, "for served selects and for copies; 0: one per CPU"},
    {"spin-us", "50", KIND_NUMBER, AT(spin_us), 0, 0, 1000000, NULL, "look for work this long before sleeping"},
    {"grant-timeout-ms", "5000", KIND_NUMBER, AT(grant_timeout_ms), 0, 1, 600000, NULL,
     "an append waits at most this long for room in the pool"},
    {"home-hold-ms", "1000", KIND_NUMBER, AT(home_hold_ms), 0, 0, 600000, NULL,
     "on a GPU: copies home give way to a fast prefill for at most this long; 0: to none"},
    {"home-hold-rate", "8G", KIND_BYTES, AT(home_hold_rate), 0, 1, 1ull << 44, NULL,
     "bytes a second of full blocks above which a prefill is fast"},
    {"scrub-bytes-s", "64M", KIND_BYTES, AT(scrub_bytes_s), 0, 0, 1ull << 40, NULL,
     "bytes of the arena a second whose checksums are looked at again; 0: none"},
    {"audit-ppm", "5000", KIND_NUMBER, AT(audit_ppm), 0, 0, 1000000, NULL,
     "share of attend's time, in millionths, that sampled exact attention may take; 0: none"},
    {"audit-alarm-ppm", "250000", KIND_NUMBER, AT(audit_alarm_ppm), 0, 0, 10000000, NULL,
     "mean relative error of attention, in millionths, above which a model's alarm is raised; 0: never"},
    {"recalibrate-s", "600", KIND_NUMBER, AT(recalibrate_s), 0, 0, 31536000, NULL,
     "seconds between two calibrations of a model whose alarm stands, at least; 0: it is never calibrated again"},
    {"backend", "host", KIND_CHOICE, TEXT(backend), 0, 0, backend_choices,
     "where the pool lies and served selects run: CPU, GPU, or GPU if there is one"},
    {"device", "", KIND_TEXT, TEXT(device), 0, 0, NULL,
     "GPUs of the pool: numbers or UUIDs with commas between, or all; default: the first that can be used"},
    {"share", "auto", KIND_CHOICE, AT(share), 0, 0, 0, share_choices,
     "how GPU memory reaches workers: VMM descriptors, cudaIpc handles; auto: the former, else the latter for one tenant"},
    {"isa", "best", KIND_CHOICE, TEXT(isa), 0, 0, isa_choices, "instruction set of the host backend"},
    {"populate", "yes", KIND_CHOICE, AT(populate), 0, 0, 0, yes_choices,
     "take all memory at the start, so that a lack of it shows then"},
    {"io", "auto", KIND_CHOICE, AT(io), 0, 0, 0, io_choices, "auto takes io_uring, and epoll where the kernel refuses it"},
    {"log-level", "info", KIND_CHOICE, AT(log_level), 0, 0, 0, log_choices, "how much to say"},
};

static const struct row *row_find(const char *name)
{
    for (size_t i = 0; i < PKV_ARRAY_LEN(rows); i++)
        if (!strcmp(rows[i].name, name))
            return &rows[i];
    return NULL;
}

static bool number(const char *value, bool suffix, uint64_t *ret)
{
    char *end;
    errno = 0;
    unsigned long long n = strtoull(value, &end, 10);
    if (errno || end == value || value[0] < '0' || value[0] > '9')
        return false;
    static const char suffixes[] = "KMGT";
    const char *at = *end && suffix ? strchr(suffixes, *end) : NULL;
    unsigned shift = at ? 10 * (unsigned)(at - suffixes + 1) : 0;
    end += at != NULL;
    if (*end || n > UINT64_MAX >> shift)
        return false;
    *ret = (uint64_t)n << shift;
    return true;
}

static bool choose(const struct row *row, const char *value, struct config *c)
{
    for (uint64_t i = 0; row->choices[i]; i++) {
        if (strcmp(row->choices[i], value))
            continue;
        if (row->room)
            snprintf((char *)c + row->offset, row->room, "%s", value);
        else
            *(uint64_t *)(void *)((char *)c + row->offset) = i;
        return true;
    }
    return false;
}

/* False with the cause on stderr. */
static bool set(const struct row *row, const char *value, const char *where, struct config *c)
{
    uint64_t n = 0;
    switch (row->kind) {
    case KIND_TEXT:
        if (strlen(value) < row->room) {
            snprintf((char *)c + row->offset, row->room, "%s", value);
            return true;
        }
        fprintf(stderr, "pivotkvd: %s: %s is longer than %zu bytes\n", where, row->name, row->room - 1);
        return false;
    case KIND_CHOICE:
        if (choose(row, value, c))
            return true;
        fprintf(stderr, "pivotkvd: %s: %s=%s: use one of", where, row->name, value);
        for (uint64_t i = 0; row->choices[i]; i++)
            fprintf(stderr, " %s", row->choices[i]);
        fprintf(stderr, "\n");
        return false;
    default:
        if (number(value, row->kind == KIND_BYTES, &n) && n >= row->low && n <= row->high) {
            *(uint64_t *)(void *)((char *)c + row->offset) = n;
            return true;
        }
        fprintf(stderr, "pivotkvd: %s: %s=%s: use a number from %llu to %llu%s\n", where, row->name, value,
                (unsigned long long)row->low, (unsigned long long)row->high,
                row->kind == KIND_BYTES ? ", with K, M, G or T if you like" : "");
        return false;
    }
}

struct file {
    const char *path;
    struct config *config;
    bool good;
};

static int on_key(void *context, const char *section, const char *name, const char *value)
{
    struct file *f = context;
    const struct row *row = strcmp(section, "pivotkv") ? NULL : row_find(name);
    if (!row)
        fprintf(stderr, "pivotkvd: %s: [%s] %s is not a setting: see pivotkvd --help; they stand in section [pivotkv]\n",
                f->path, section, name);
    f->good = f->good && row && set(row, value, f->path, f->config);
    return 1;
}

static bool read_file(const char *path, struct config *c)
{
    struct file f = {path, c, true};
    int line = ini_parse(path, on_key, &f);
    if (line < 0)
        fprintf(stderr, "pivotkvd: %s: %s\n", path, strerror(errno));
    else if (line > 0)
        fprintf(stderr, "pivotkvd: %s:%d: not \"name = value\"\n", path, line);
    return line == 0 && f.good;
}

void config_help(FILE *to)
{
    fprintf(to, "usage: pivotkvd [--config FILE] [--NAME VALUE]...\n\nThe daemon of pivotkv. A configuration file has the same "
                "names in a section [pivotkv]; flags win.\n\n");
    for (size_t i = 0; i < PKV_ARRAY_LEN(rows); i++) {
        fprintf(to, "  --%-18s %s", rows[i].name, rows[i].help);
        for (size_t n = 0; rows[i].choices && rows[i].choices[n]; n++)
            fprintf(to, "%s%s", n ? ", " : ": ", rows[i].choices[n]);
        fprintf(to, "%s%s%s\n", rows[i].value[0] ? " [" : "", rows[i].value, rows[i].value[0] ? "]" : "");
    }
    fprintf(to, "  --%-18s %s\n  --%-18s %s\n", "help", "this text", "version", "the version");
}

/* The value of argv[*i], from "--name=value" or the next argument; NULL with the cause on stderr. */
static const char *value_of(int argc, char **argv, int *i)
{
    const char *equals = strchr(argv[*i], '=');
    if (equals)
        return equals + 1;
    if (*i + 1 < argc)
        return argv[++*i];
    fprintf(stderr, "pivotkvd: %s needs a value\n", argv[*i]);
    return NULL;
}

static bool is_flag(const char *argument, const char *name)
{
    size_t n = strlen(name);
    return !strncmp(argument, "--", 2) && !strncmp(argument + 2, name, n) && (!argument[2 + n] || argument[2 + n] == '=');
}

static bool read_flags(int argc, char **argv, bool config_files, struct config *c)
{
    for (int i = 1; i < argc; i++) {
        const struct row *row = NULL;
        for (size_t r = 0; r < PKV_ARRAY_LEN(rows) && !row; r++)
            row = is_flag(argv[i], rows[r].name) ? &rows[r] : NULL;
        bool file = is_flag(argv[i], "config");
        if (!row && !file) {
            fprintf(stderr, "pivotkvd: %s is not a flag: see pivotkvd --help\n", argv[i]);
            return false;
        }
        const char *value = value_of(argc, argv, &i);
        if (!value)
            return false;
        if (file == config_files && !(file ? read_file(value, c) : set(row, value, "command line", c)))
            return false;
    }
    return true;
}

enum config_outcome config_read(int argc, char **argv, struct config *ret)
{
    memset(ret, 0, sizeof(*ret));
    for (size_t i = 0; i < PKV_ARRAY_LEN(rows); i++)
        if (!set(&rows[i], rows[i].value, "default", ret))
            return CONFIG_WRONG;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) {
            config_help(stdout);
            return CONFIG_DONE;
        }
        if (!strcmp(argv[i], "--version")) {
            printf("pivotkvd %s\n", PKV_VERSION);
            return CONFIG_DONE;
        }
    }
    if (!read_flags(argc, argv, true, ret) || !read_flags(argc, argv, false, ret))
        return CONFIG_WRONG;
    uint64_t chunk = ret->chunk_bytes;
    if (chunk && (chunk < PKV_CHUNK_BYTES_MIN || chunk & (chunk - 1))) {
        fprintf(stderr, "pivotkvd: chunk-bytes must be a power of two of at least 1M\n");
        return CONFIG_WRONG;
    }
    chunk = config_chunk_bytes(ret);
    if (ret->pool_bytes / chunk > PKV_CHUNKS_MAX || ret->arena_bytes / chunk > PKV_CHUNKS_MAX || ret->pool_bytes < chunk ||
        ret->arena_bytes < chunk) {
        fprintf(stderr, "pivotkvd: pool and arena must hold 1 to %u chunks: change chunk-bytes\n", PKV_CHUNKS_MAX);
        return CONFIG_WRONG;
    }
    return CONFIG_RUN;
}

/* About 32 chunks in the pool: rows and signatures of a few models and tenants find room without sharing one. */
uint64_t config_chunk_bytes(const struct config *c)
{
    uint64_t chunk = PKV_CHUNK_BYTES_MIN;
    if (c->chunk_bytes)
        return c->chunk_bytes;
    while (chunk < PKV_CHUNK_BYTES_MAX && (chunk * 32 < c->pool_bytes || chunk * PKV_CHUNKS_MAX < c->arena_bytes))
        chunk *= 2;
    return chunk;
}
