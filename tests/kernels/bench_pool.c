/* A daemon with a pool on a GPU, by the clock: its start, the arena's pinning, a worker's attach with every chunk mapped,
 * blocks going home, and what a kernel of the worker loses meanwhile. Starts $PIVOTKVD. Prints JSON lines. Run by hand. usage:
 * bench_pool [GiB of pool] [GiB of arena]   (default 8 8) */
#include "client/internal.h"
#include "gpu/cuda/fill.h"
#include "tests/integration/stat.h"
#include "tests/kernels/device.h"

#include <dirent.h>
#include <time.h>

#define GIB    (1ull << 30)
#define ROUNDS 31
#define BYTES  (256ull << 20) /* that the worker's kernel reads */

static double now(void)
{
    return (double)clock_ns() * 1e-9;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double kernel_us(const void *from, void *to)
{
    static cudaStream_t stream;
    cudaEvent_t begin, end;
    double us[ROUNDS];
    if (!stream)
        CUDA(cudaStreamCreate(&stream));
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    for (int i = -2; i < ROUNDS; i++) {
        float ms;
        CUDA(cudaEventRecord(begin, stream));
        if (cuda_read_launch(from, BYTES, to, stream))
            exit(1);
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaStreamSynchronize(stream));
        CUDA(cudaEventElapsedTime(&ms, begin, end));
        us[i < 0 ? 0 : i] = ms * 1e3;
    }
    qsort(us, ROUNDS, sizeof(*us), by_size);
    return us[ROUNDS / 2];
}

static void show_log(const struct test_daemon *d)
{
    char line[512];
    FILE *f = fopen(d->log, "r");
    while (f && fgets(line, sizeof(line), f))
        fputs(line, stdout);
    if (f)
        fclose(f);
}

static struct pkv *connect_to(const struct test_daemon *d)
{
    struct pkv_options o = {.size = sizeof(o), .backend = "cuda", .label = "bench", .timeout_ms = 120000, .threads = 1};
    struct pkv *kv = NULL;
    if (pkv_connect(d->socket, &o, &kv)) {
        printf("%s\n", pkv_error(NULL));
        show_log(d);
        exit(1);
    }
    return kv;
}

/* A Llama-3.1-8B cache that takes nearly all of pool and arena; nothing is written. */
static struct pkv_seq *fill(struct pkv *kv, uint64_t pool, uint64_t arena, uint64_t *ret_blocks)
{
    struct pkv_model_desc desc = {.size = sizeof(desc),
                                  .layers = 32,
                                  .q_heads = 32,
                                  .kv_heads = 8,
                                  .head_dim = 128,
                                  .type = PKV_TYPE_BF16,
                                  .name = "bench"};
    struct pkv_model *model;
    struct pkv_seq *seq;
    uint64_t block = 256 << 10, blocks = PKV_MIN(pool * 15 / 16, arena) * GIB / block / 32 * 15 / 16;
    GOOD(kv, pkv_model_open(kv, &desc, &model));
    GOOD(kv, pkv_seq_create(model, (uint32_t)(blocks * PKV_BLOCK_TOKENS), 0, "bench", &seq));
    GOOD(kv, pkv_seq_reserve(seq, (uint32_t)(blocks * PKV_BLOCK_TOKENS)));
    *ret_blocks = blocks;
    return seq;
}

static void seal_all(struct pkv *kv, const struct pkv_seq *seq, uint64_t blocks)
{
    for (uint16_t l = 0; l < 32; l++) {
        struct pkv_submission s = {.op = PKV_OP_SEAL, .layer = l, .seq = pkv_seq_handle(seq)};
        s.u.seal = (struct pkv_op_seal){.first_block = 0, .count = (uint32_t)blocks};
        if (ring_call(kv, &s, NULL))
            exit(1);
    }
}

/* What each of the daemon's threads has computed so far, in seconds. */
static void show_threads(const struct test_daemon *d)
{
    char path[320], name[64];
    snprintf(path, sizeof(path), "/proc/%d/task", (int)d->pid);
    DIR *tasks = opendir(path);
    for (struct dirent *e = tasks ? readdir(tasks) : NULL; e; e = readdir(tasks)) {
        unsigned long user = 0, system = 0;
        snprintf(path, sizeof(path), "/proc/%d/task/%s/stat", (int)d->pid, e->d_name);
        FILE *f = fopen(path, "r");
        if (f && fscanf(f, "%*d (%63[^)]) %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", name, &user, &system) == 3 &&
            user + system > 10)
            printf("{\"name\": \"thread\", \"thread\": \"%s\", \"user_s\": %.2f, \"system_s\": %.2f}\n", name,
                   (double)user / 100, (double)system / 100);
        if (f)
            fclose(f);
    }
    if (tasks)
        closedir(tasks);
}

static void bench_home(const struct test_daemon *d, struct pkv *kv, const struct pkv_seq *seq, uint64_t blocks)
{
    char *from = device_take(BYTES), *to = device_take(256);
    double alone = kernel_us(from, to), beside = 0, begin = now(), last;
    seal_all(kv, seq, blocks);
    uint64_t all = blocks * 32, home = 0, first = 0;
    double first_at = 0;
    while (home < all && now() - begin < 60) {
        if (!beside && home) /* once, in the middle of it */
            beside = kernel_us(from, to);
        home = stat_number(d, "blocks", "home");
        last = now();
        if (!first && home)
            first = home, first_at = last;
    }
    last = now();
    double whole = (double)home * (256 << 10) / (last - begin) * 1e-9;
    double steady = (double)(home - first) * (256 << 10) / PKV_MAX(last - first_at, 1e-9) * 1e-9;
    printf(
        "{\"name\": \"home\", \"gib\": %.1f, \"gb_s\": %.1f, \"gb_s_after_the_first_look\": %.1f, \"kernel_alone_us\": %.1f, "
        "\"kernel_beside_us\": %.1f, \"slower\": %.3f}\n",
        (double)home * (256 << 10) / (double)GIB, whole, steady, alone, beside, beside / alone - 1);
}

int main(int argc, char **argv)
{
    uint64_t pool = argc > 1 ? (uint64_t)atoi(argv[1]) : 8, arena = argc > 2 ? (uint64_t)atoi(argv[2]) : 8, blocks;
    char pool_text[32], arena_text[32];
    struct test_daemon d;
    snprintf(pool_text, sizeof(pool_text), "%lluG", (unsigned long long)pool);
    snprintf(arena_text, sizeof(arena_text), "%lluG", (unsigned long long)arena);
    setenv("PIVOTKV_TEST_BACKEND", "cuda", 1);
    double begin = now();
    test_daemon_start(&d, (const char *const[]){"--pool-bytes", pool_text, "--arena-bytes", arena_text, NULL});
    struct pkv *first = connect_to(&d);
    double ready = now();
    while (!test_daemon_said(&d, "arena pinned in") && now() - begin < 120)
        ;
    double pinned = now();
    struct pkv_seq *seq = fill(first, pool, arena, &blocks);
    double filled = now();
    struct pkv *second = connect_to(&d);
    double connected = now();
    int r = region_map_all(second);
    double mapped = now();
    if (r)
        printf("map: %s\n", pkv_err_text((uint32_t)-r));
    printf("{\"name\": \"start\", \"pool_gib\": %llu, \"arena_gib\": %llu, \"pages\": \"%s\", \"ready_s\": %.3f, \"pinned_s\": "
           "%.3f, "
           "\"reserve_s\": %.3f, \"connect_s\": %.3f, \"map_all_s\": %.3f}\n",
           (unsigned long long)pool, (unsigned long long)arena, test_daemon_said(&d, "(hugetlb)") ? "hugetlb" : "thp or 4k",
           ready - begin, pinned - begin, filled - pinned, connected - filled, mapped - connected);
    fflush(stdout);
    pkv_close(second);
    show_threads(&d);
    bench_home(&d, first, seq, blocks);
    show_threads(&d);
    pkv_close(first);
    show_log(&d);
    test_daemon_stop(&d);
    return 0;
}
