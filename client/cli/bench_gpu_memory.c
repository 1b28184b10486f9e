/* A large pool and arena: what it takes to begin and to join, and what the link carries.
 *
 *   start_64g      a daemon with an arena of 64 GiB answers
 *   attach_64g     a worker joins and has every chunk of its tenant at hand: connect, open a batch
 *   home           blocks going home to the arena, checksums included, against the pinned copy peak
 *   home_slowdown  a kernel that reads the device's memory, while they do
 *   upload         a prefill whose K and V lie in pinned memory of the CPU, against pinned copies. Copies home give way to it:
 *                  after it they go */
#include "client/cli/bench_gpu.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MEMORY_LAYERS = 32, UPLOAD_LAYERS = 8, UPLOAD_PIECES = 32 };

static void figure_start(const struct lab *x)
{
    if (bench_wanted(x->bench, "start_64g"))
        bench_add(x->bench, &(struct figure){"start_64g", "s", NULL, x->start_s, 0, x->start_s, 8, false});
}

/* The arena is pinned in the background. */
static void await_pins(const struct lab *x)
{
    double begin = bench_now();
    uint64_t chunks = bench_total(x->socket, "arena", "chunks");
    while (bench_total(x->socket, NULL, "pinned") < chunks && bench_now() - begin < 60)
        usleep(100000);
    fprintf(stderr, "the arena was pinned %.1f s after the start\n", x->start_s + bench_now() - begin);
}

/* Bytes that have gone home, once more do than before; copies give way to a prefill until a moment after its end. */
static uint64_t await_copies(const struct lab *x)
{
    uint64_t first = bench_total(x->socket, "counters", "copy_bytes"), now = first;
    for (int i = 0; i < 2000 && now == first; i++) {
        usleep(1000);
        now = bench_total(x->socket, "counters", "copy_bytes");
    }
    return now;
}

static void figure_home(const struct lab *x, const struct text *t)
{
    uint64_t first = await_copies(x), now = first, last;
    uint64_t all = (uint64_t)t->tokens / PIECE * PIECE * t->layers * ROW_BYTES;
    double begin = bench_now(), end = begin, alone = 0, beside = 0;
    if (gpu_lab_read_peak(x->lab, &beside))
        return;
    do {
        usleep(5000);
        last = now, now = bench_total(x->socket, "counters", "copy_bytes");
        end = now > last ? bench_now() : end;
    } while (now < all && bench_now() - end < 1);
    double rate = (double)(now - first) / (end - begin);
    if (gpu_lab_read_peak(x->lab, &alone))
        return;
    fprintf(stderr, "home: %.1f GB of %.1f in %.2f s\n", (double)(now - first) * 1e-9, (double)all * 1e-9, end - begin);
    if (bench_wanted(x->bench, "home"))
        bench_add(x->bench, &(struct figure){"home", "GB/s", "pinned D2H copies", rate * 1e-9, x->to_host * 1e-9,
                                             rate / x->to_host, 0.9, true});
    if (bench_wanted(x->bench, "home_slowdown"))
        bench_add(x->bench, &(struct figure){"home_slowdown", "GB/s", "alone", beside * 1e-9, alone * 1e-9, alone / beside - 1,
                                             0.15, false});
}

static void figure_attach(const struct lab *x, const struct text *t)
{
    struct pkv_options o = {.size = sizeof(o), .threads = 1, .label = "bench", .timeout_ms = 60000};
    struct text mine = {.count = 1, .layers = t->layers, .tokens = PIECE, .bits = t->bits};
    double begin = bench_now();
    if (!bench_good(NULL, pkv_connect(x->socket, &o, &mine.kv)))
        return;
    bool ok = text_model(&mine) && bench_good(mine.kv, pkv_seq_create(mine.model, PIECE, 0, "bench", &mine.seqs[0])) &&
              text_batch(&mine, 1, false, 0);
    double seconds = bench_now() - begin;
    if (ok)
        bench_add(x->bench, &(struct figure){"attach_64g", "s", NULL, seconds, 0, seconds, 2, false});
    text_close(&mine);
    pkv_close(mine.kv);
}

static void upload_from(const struct lab *x, struct pkv *kv, char *memory, uint64_t bytes)
{
    struct text t = {.kv = kv, .count = 1, .layers = UPLOAD_LAYERS, .bits = 128, .moving = true};
    uint64_t address;
    t.tokens = UPLOAD_PIECES * PIECE / x->bench->scale;
    if (gpu_device_register(x->device, memory, bytes, false, &address)) {
        bench_skip(x->bench, "upload", "memory could not be pinned");
        return;
    }
    t.source = (const char *)(uintptr_t)address, t.source_pieces = UPLOAD_PIECES;
    if (text_open(x, &t)) {
        double rate = (double)t.tokens * t.layers * ROW_BYTES / t.prefill_s;
        bench_add(x->bench, &(struct figure){"upload", "GB/s", "pinned H2D copies", rate * 1e-9, x->to_device * 1e-9,
                                             rate / x->to_device, 0.9, true});
    }
    text_close(&t);
    gpu_device_unregister(x->device, memory);
}

static void figure_upload(const struct lab *x, struct pkv *kv)
{
    uint64_t bytes = (uint64_t)UPLOAD_PIECES * PIECE * ROW_BYTES;
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        return;
    for (uint64_t i = 0; i < bytes / 2; i++)
        ((uint16_t *)(void *)memory)[i] = (uint16_t)(0x3e00u + i * 40503u % 0x200u); /* bf16 of about a half */
    upload_from(x, kv, memory, bytes);
    munmap(memory, bytes);
}

void figures_memory(const struct lab *x, struct pkv *kv)
{
    struct text t = {.kv = kv, .count = 1, .layers = MEMORY_LAYERS, .bits = 128, .moving = true};
    t.tokens = 384 * 1024 / x->bench->scale; /* 48 GiB */
    figure_start(x);
    await_pins(x);
    if (text_open(x, &t)) {
        figure_home(x, &t);
        bench_settle(x);
        if (bench_wanted(x->bench, "attach_64g"))
            figure_attach(x, &t);
    }
    text_close(&t);
    if (bench_wanted(x->bench, "upload"))
        figure_upload(x, kv);
}
