/* What the memory of a device costs: chunks made and imported, an arena touched and registered, copies home, and what a kernel
 * of another process loses while they run. Prints JSON lines. Run by hand on a machine with a GPU. usage: bench_device [GiB of
 * arena] [GiB of pool]   (default 16 8) */
#include "gpu/cuda/fill.h"
#include "gpu/device.h"
#include "offload/offload.h"
#include "tests/kernels/device.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define GIB     (1ull << 30)
#define BLOCK   (256u << 10)
#define THREADS 16u
#define ROUNDS  31

static struct gpu_device *device;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void good(int r, const char *what)
{
    if (!r)
        return;
    printf("%s: %s\n", what, pkv_err_text((uint32_t)-r));
    exit(1);
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* ---- the arena ---- */

struct share {
    pthread_t thread;
    char **bases;
    uint64_t *addresses;
    uint32_t first, last;
    bool read_only;
};

static void *register_share(void *arg)
{
    struct share *s = arg;
    for (uint32_t i = s->first; i < s->last; i++)
        good(gpu_device_register(device, s->bases[i], GIB, s->read_only, &s->addresses[i]), "register");
    return NULL;
}

static double register_all(char **bases, uint64_t *addresses, uint32_t chunks, uint32_t threads, bool read_only)
{
    struct share shares[THREADS];
    double begin = now();
    for (uint32_t t = 0; t < threads; t++) {
        shares[t] = (struct share){0, bases, addresses, chunks * t / threads, chunks * (t + 1) / threads, read_only};
        pthread_create(&shares[t].thread, NULL, register_share, &shares[t]);
    }
    for (uint32_t t = 0; t < threads; t++)
        pthread_join(shares[t].thread, NULL);
    return now() - begin;
}

static double unregister_all(char **bases, uint32_t chunks)
{
    double begin = now();
    for (uint32_t i = 0; i < chunks; i++)
        gpu_device_unregister(device, bases[i]);
    return now() - begin;
}

static char *bench_arena(uint32_t chunks)
{
    struct offload_chunk *c = calloc(chunks, sizeof(*c));
    char **mine = calloc(chunks, sizeof(*mine)), **readable = calloc(chunks, sizeof(*readable));
    uint64_t *addresses = calloc(chunks, sizeof(*addresses));
    struct offload_chunk_options options = {.bytes = GIB, .best = OFFLOAD_HUGETLB, .readers_only = true, .populate = THREADS};
    double begin = now();
    for (uint32_t i = 0; i < chunks; i++) {
        good(offload_chunk_create(&options, &c[i]) ? -PKV_ERR_NO_MEMORY : 0, "arena");
        mine[i] = c[i].base;
    }
    double touched = now() - begin, one = register_all(mine, addresses, chunks, 1, false), undo = unregister_all(mine, chunks);
    double four = register_all(mine, addresses, chunks, 4, false);
    for (uint32_t i = 0; i < chunks; i++)
        readable[i] = mmap(NULL, GIB, PROT_READ, MAP_SHARED, c[i].fd, 0);
    double read_one = register_all(readable, addresses, chunks, 1, true), undo_read = unregister_all(readable, chunks);
    double read_four = register_all(readable, addresses, chunks, 4, true);
    bool same = addresses[0] == (uint64_t)(uintptr_t)readable[0];
    unregister_all(readable, chunks);
    for (uint32_t i = 0; i < chunks; i++)
        munmap(readable[i], GIB);
    printf("{\"name\": \"arena\", \"gib\": %u, \"pages\": \"%s\", \"touch_s\": %.3f, \"register_s\": %.3f, "
           "\"register_4_threads_s\": "
           "%.3f, \"unregister_s\": %.3f, \"read_only_s\": %.3f, \"read_only_4_threads_s\": %.3f, \"unregister_read_only_s\": "
           "%.3f, "
           "\"same_address\": %d}\n",
           chunks, offload_pages_name(c[0].pages), touched, one, four, undo, read_one, read_four, undo_read, same);
    fflush(stdout);
    return mine[0];
}

/* ---- the pool ---- */

static uint64_t bench_pool(uint32_t chunks)
{
    struct gpu_chunk *c = calloc(chunks, sizeof(*c)), *imported = calloc(chunks, sizeof(*imported));
    double begin = now();
    for (uint32_t i = 0; i < chunks; i++)
        good(gpu_device_chunk_create(device, GIB, GPU_SHARE_VMM, &c[i]), "pool");
    double made = now();
    for (uint32_t i = 0; i < chunks; i++)
        good(gpu_device_chunk_import(device, c[i].fd, GIB, true, &imported[i]), "import");
    double took = now();
    for (uint32_t i = 0; i < chunks; i++)
        gpu_device_chunk_release(device, &imported[i]);
    printf("{\"name\": \"pool\", \"gib\": %u, \"create_s\": %.3f, \"import_s\": %.3f, \"release_s\": %.3f}\n", chunks,
           made - begin, took - made, now() - took);
    fflush(stdout);
    for (uint32_t i = 1; i < chunks; i++)
        gpu_device_chunk_release(device, &c[i]);
    return c[0].writable;
}

/* ---- copies ---- */

/* GB/s of blocks home, `batch` in a call; scattered: no two are neighbours. */
static double copy_blocks(enum gpu_direction direction, uint64_t to, uint64_t from, uint32_t batch, bool scattered,
                          double seconds)
{
    struct gpu_copy copies[256];
    uint64_t tickets[4] = {0}, blocks = GIB / BLOCK, at = 0, calls = 0;
    double begin = now();
    for (; now() - begin < seconds; calls++) {
        for (uint32_t i = 0; i < batch; i++, at++) {
            uint64_t b = scattered ? at * 17 % blocks : at % blocks;
            copies[i] = (struct gpu_copy){to + b * BLOCK, from + b * BLOCK, BLOCK};
        }
        uint64_t *ticket = &tickets[calls % 4];
        if (*ticket)
            good(gpu_device_wait(device, *ticket, 5000000000ull), "wait");
        good(gpu_device_copy(device, direction, copies, batch, ticket), "copy");
    }
    for (uint64_t i = 0; i < 4 && i < calls; i++)
        good(gpu_device_wait(device, tickets[i], 5000000000ull), "wait");
    return (double)calls * batch * BLOCK / (now() - begin) * 1e-9;
}

static double copy_peak(void *to, const void *from)
{
    cudaStream_t stream;
    double best = 0;
    CUDA(cudaStreamCreate(&stream));
    for (int i = 0; i < 7; i++) {
        double begin = now();
        CUDA(cudaMemcpyAsync(to, from, GIB / 2, cudaMemcpyDefault, stream));
        CUDA(cudaStreamSynchronize(stream));
        double speed = (double)(GIB / 2) / (now() - begin) * 1e-9;
        best = PKV_MAX(best, speed);
    }
    CUDA(cudaStreamDestroy(stream));
    return best;
}

static void bench_copies(char *arena, uint64_t pool)
{
    void *memory = (void *)(uintptr_t)pool;
    uint64_t home = (uint64_t)(uintptr_t)arena;
    printf("{\"name\": \"peak\", \"d2h_gb_s\": %.1f, \"h2d_gb_s\": %.1f}\n", copy_peak(arena, memory),
           copy_peak(memory, arena));
    static const uint32_t batches[] = {1, 4, 16, 64};
    for (uint32_t i = 0; i < PKV_ARRAY_LEN(batches); i++)
        printf("{\"name\": \"blocks of 256 KiB\", \"batch\": %u, \"d2h_gb_s\": %.1f, \"d2h_scattered_gb_s\": %.1f, "
               "\"h2d_scattered_gb_s\": %.1f}\n",
               batches[i], copy_blocks(GPU_TO_HOST, home, pool, batches[i], false, 0.4),
               copy_blocks(GPU_TO_HOST, home, pool, batches[i], true, 0.4),
               copy_blocks(GPU_TO_DEVICE, pool, home, batches[i], true, 0.4));
    fflush(stdout);
}

/* ---- a worker's kernel beside it ---- */

static double kernel_us(const void *from, uint64_t bytes, void *to)
{
    cudaEvent_t begin, end;
    cudaStream_t stream;
    double us[ROUNDS];
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    CUDA(cudaStreamCreate(&stream));
    for (int i = -2; i < ROUNDS; i++) {
        float ms;
        CUDA(cudaEventRecord(begin, stream));
        for (int k = 0; k < 8; k++)
            good(cuda_read_launch(from, bytes, to, stream), "kernel");
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaStreamSynchronize(stream));
        CUDA(cudaEventElapsedTime(&ms, begin, end));
        us[i < 0 ? 0 : i] = ms * 1e3 / 8;
    }
    qsort(us, ROUNDS, sizeof(*us), by_size);
    return us[ROUNDS / 2];
}

/* The daemon's part, in a process of its own: says when it begins, copies until it is told to stop. */
static int mover(int in, int out)
{
    char byte;
    struct offload_chunk c;
    struct gpu_chunk pool;
    uint64_t address;
    struct offload_chunk_options options = {.bytes = GIB, .best = OFFLOAD_HUGETLB, .populate = 4};
    good(gpu_device_open(0, &device), "open");
    good(gpu_device_chunk_create(device, GIB, GPU_SHARE_VMM, &pool), "pool");
    good(offload_chunk_create(&options, &c) ? -PKV_ERR_NO_MEMORY : 0, "arena");
    good(gpu_device_register(device, c.base, GIB, false, &address), "register");
    if (write(out, "r", 1) != 1 || read(in, &byte, 1) != 1)
        return 1;
    double speed = copy_blocks(GPU_TO_HOST, (uint64_t)(uintptr_t)c.base, pool.readable, 64, true, 3);
    return write(out, &speed, sizeof(speed)) == (ssize_t)sizeof(speed) ? 0 : 1;
}

static void bench_beside(int in, int out)
{
    static const uint64_t sizes[] = {16ull << 20, 64ull << 20, 256ull << 20};
    double alone[PKV_ARRAY_LEN(sizes)], beside[PKV_ARRAY_LEN(sizes)], speed = 0;
    char byte, *from = device_take(sizes[PKV_ARRAY_LEN(sizes) - 1]), *to = device_take(256);
    if (read(in, &byte, 1) != 1)
        return;
    for (uint32_t i = 0; i < PKV_ARRAY_LEN(sizes); i++)
        alone[i] = kernel_us(from, sizes[i], to);
    if (write(out, "g", 1) != 1)
        return;
    usleep(300000);
    for (uint32_t i = 0; i < PKV_ARRAY_LEN(sizes); i++)
        beside[i] = kernel_us(from, sizes[i], to);
    if (read(in, &speed, sizeof(speed)) != (ssize_t)sizeof(speed))
        return;
    for (uint32_t i = 0; i < PKV_ARRAY_LEN(sizes); i++)
        printf(
            "{\"name\": \"kernel beside the mover\", \"mib\": %llu, \"alone_us\": %.1f, \"beside_us\": %.1f, \"slower\": %.3f, "
            "\"d2h_gb_s\": %.1f}\n",
            (unsigned long long)sizes[i] >> 20, alone[i], beside[i], beside[i] / alone[i] - 1, speed);
}

int main(int argc, char **argv)
{
    uint32_t arena = argc > 1 ? (uint32_t)atoi(argv[1]) : 16, pool = argc > 2 ? (uint32_t)atoi(argv[2]) : 8;
    int to_mover[2], from_mover[2];
    if (pipe(to_mover) || pipe(from_mover))
        return 1;
    pid_t pid = fork(); /* before the driver is initialised */
    if (pid == 0)
        return mover(to_mover[0], from_mover[1]);
    good(gpu_device_open(0, &device), "open");
    const struct gpu_device_info *i = gpu_device_about(device);
    printf("{\"name\": \"device\", \"device\": \"%s\", \"driver\": %u, \"exports\": %d, \"registers\": %d, "
           "\"registers_read_only\": %d, "
           "\"grain\": %llu, \"module\": \"%s\"}\n",
           i->name, i->driver, i->exports, i->registers, i->registers_read_only, (unsigned long long)i->grain,
           gpu_module_why());
    bench_beside(from_mover[0], to_mover[1]);
    waitpid(pid, NULL, 0);
    uint64_t memory = bench_pool(pool);
    char *home = bench_arena(arena);
    bench_copies(home, memory);
    return 0;
}
