/* Several processes on one GPU, as daemon and workers are: the maker of a chunk copies it home without end; a worker writes
 * where it may only read, another is killed in the middle of a kernel, then the maker in the middle of a copy. Each fault stays
 * with whom it belongs to. Needs a GPU; 77 without one.
 * usage: check_sharing [ipc]   `ipc`: the chunk is shared by a cudaIpc handle. Then no write is stray, and after the maker's
 * death the memory must not be used: what the driver makes of it is told, and not judged.
 *
 * This process touches no device: it forks the others, passes descriptors, kills, and looks at how they end. */
#include "gpu/device.h"
#include "tests/kernels/stray.h"
#include "tests/lib/pass.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHUNK   (64ull << 20)
#define HALF    (CHUNK / 2) /* the first half is the workers' to write, the second stays as it was made */
#define WAIT_NS 5000000000ull

/* What the maker tells the others, in memory that all share. */
struct board {
    uint32_t ready, rounds, bad, lost; /* atomic: chunk made; copies home that ended; whose bytes were wrong; device lost */
};
static struct board *board;
static enum gpu_share share = GPU_SHARE_VMM;

static void fail(const char *what)
{
    fprintf(stderr, "pid %d: %s\n", (int)getpid(), what);
    _exit(1);
}

static void must(int r, const char *what)
{
    if (r)
        fail(r < 0 ? pkv_err_text((uint32_t)-r) : what);
}

static uint32_t get(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static void pattern(uint32_t *to)
{
    for (uint64_t i = 0; i < HALF / 4; i++)
        to[i] = (uint32_t)(i * 2654435761u);
}

/* ---- the processes ---- */

static void maker(int socket)
{
    struct gpu_device *device;
    struct gpu_chunk c;
    uint64_t address;
    uint32_t *home = aligned_alloc(4096, HALF), *right = malloc(HALF);
    must(gpu_device_open(0, &device), "open");
    must(gpu_device_chunk_create(device, CHUNK, share, &c), "create");
    pattern(right);
    memcpy(home, right, HALF);
    must(gpu_device_register(device, home, HALF, false, &address), "register");
    must(gpu_device_copy_now(device, GPU_TO_DEVICE, c.writable + HALF, (uint64_t)(uintptr_t)home, HALF), "fill");
    if (!test_send_fd(socket, c.fd))
        fail("the descriptor could not be sent");
    __atomic_store_n(&board->ready, 1, __ATOMIC_RELEASE);
    for (;;) {
        memset(home, 0x5a, HALF);
        int r = gpu_device_copy_now(device, GPU_TO_HOST, (uint64_t)(uintptr_t)home, c.readable + HALF, HALF);
        __atomic_fetch_add(&board->bad, !r && memcmp(home, right, HALF) != 0, __ATOMIC_ACQ_REL);
        __atomic_store_n(&board->lost, r != 0 || gpu_device_lost(device), __ATOMIC_RELEASE);
        __atomic_fetch_add(&board->rounds, 1, __ATOMIC_ACQ_REL);
    }
}

static struct gpu_device *join(int fd, bool writable, struct gpu_chunk *ret)
{
    struct gpu_device *device;
    must(gpu_device_open(0, &device), "open");
    must(gpu_device_chunk_import(device, fd, CHUNK, writable, ret), "import");
    return device;
}

/* Its own context ends, and it knows. */
static void strayer(int fd)
{
    struct gpu_chunk c;
    uint32_t word = 0;
    struct gpu_device *device = join(fd, false, &c);
    must(gpu_device_copy_now(device, GPU_TO_HOST, (uint64_t)(uintptr_t)&word, c.readable + HALF + 4, 4), "read");
    if (word != 2654435761u)
        fail("the worker does not see what the maker wrote");
    if (!stray_write(c.readable + HALF, 7))
        fail("a write through a read-only mapping went through");
    if (gpu_device_copy_now(device, GPU_TO_HOST, (uint64_t)(uintptr_t)&word, c.readable, 4) != -PKV_ERR_GPU_LOST ||
        !gpu_device_lost(device))
        fail("the device is not reported lost after a fault");
    _exit(0);
}

static void writer(int fd)
{
    struct gpu_chunk c;
    uint32_t word = 0;
    struct gpu_device *device = join(fd, true, &c);
    must(stray_write(c.writable, 42), "a write through a writable mapping");
    must(gpu_device_copy_now(device, GPU_TO_HOST, (uint64_t)(uintptr_t)&word, c.readable, 4), "read");
    if (word != 42)
        fail("the readable mapping does not show what was written through the writable one");
    _exit(0);
}

static void busy(int fd)
{
    struct gpu_chunk c;
    struct gpu_device *device = join(fd, true, &c);
    must(stray_busy(c.writable, HALF / 4, 30), "start the kernel");
    (void)device;
    kill(getpid(), SIGSTOP); /* tells that the kernel runs */
    pause();
}

/* Reads on after the maker is gone. */
static void survivor(int fd, int socket)
{
    struct gpu_chunk c;
    char byte = 0;
    uint32_t *right = malloc(HALF), *home = malloc(HALF);
    struct gpu_device *device = join(fd, false, &c);
    pattern(right);
    if (write(socket, &byte, 1) != 1 || read(socket, &byte, 1) != 1)
        fail("no word from the test");
    int r = gpu_device_copy_now(device, GPU_TO_HOST, (uint64_t)(uintptr_t)home, c.readable + HALF, HALF);
    if (share == GPU_SHARE_IPC) {
        printf("note: with the maker gone a reader gets: %s, %s bytes\n", pkv_err_text((uint32_t)-r),
               memcmp(home, right, HALF) ? "other" : "the same");
        fflush(stdout);
        _exit(0);
    }
    must(r, "read on");
    if (memcmp(home, right, HALF))
        fail("the chunk is not what it was");
    _exit(0);
}

/* ---- the test ---- */

static int status_of(pid_t pid)
{
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return status;
}

/* The maker goes on, and its bytes are right. */
static void assert_maker_well(const char *after)
{
    uint32_t before = get(&board->rounds);
    for (int i = 0; i < 2000 && get(&board->rounds) < before + 3; i++)
        usleep(5000);
    if (get(&board->rounds) < before + 3 || get(&board->bad) || get(&board->lost)) {
        printf("FAILED: after %s the maker is not well: %u rounds, %u bad, lost %u\n", after, get(&board->rounds) - before,
               get(&board->bad), get(&board->lost));
        exit(1);
    }
    printf("ok: %s\n", after);
}

static void assert_good(pid_t pid, const char *what)
{
    int status = status_of(pid);
    if (!WIFEXITED(status) || WEXITSTATUS(status)) {
        printf("FAILED: %s ended with %#x\n", what, (unsigned)status);
        exit(1);
    }
}

static pid_t spawn(void (*run)(int), int argument)
{
    pid_t pid = fork();
    if (pid == 0)
        run(argument);
    return pid;
}

static void run_all(int fd, pid_t maker_pid)
{
    int status, pair[2];
    char byte = 0;
    assert_maker_well("the start");
    assert_good(spawn(writer, fd), "the writer");
    assert_maker_well("a worker's writes where it may");
    if (share == GPU_SHARE_VMM) {
        assert_good(spawn(strayer, fd), "the strayer");
        assert_maker_well("a worker's stray write");
    }
    pid_t pid = spawn(busy, fd);
    if (waitpid(pid, &status, WUNTRACED) != pid || !WIFSTOPPED(status)) {
        printf("FAILED: the busy worker ended with %#x\n", (unsigned)status);
        exit(1);
    }
    kill(pid, SIGKILL);
    status_of(pid);
    assert_maker_well("a worker killed in its kernel");
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
        exit(1);
    pid = fork();
    if (pid == 0)
        survivor(fd, pair[1]);
    if (read(pair[0], &byte, 1) != 1)
        exit(1);
    kill(maker_pid, SIGKILL); /* most likely in a copy: it does nothing else */
    status_of(maker_pid);
    if (write(pair[0], &byte, 1) != 1)
        exit(1);
    assert_good(pid, "a reader after the maker's death");
    printf("ok: the maker killed in its copies\n");
}

int main(int argc, char **argv)
{
    int pair[2];
    setvbuf(stdout, NULL, _IONBF, 0); /* several processes write, and some are killed */
    share = argc > 1 && !strcmp(argv[1], "ipc") ? GPU_SHARE_IPC : GPU_SHARE_VMM;
    pid_t probe = fork(); /* the driver must not be initialised here */
    if (probe == 0) {
        uint32_t count;
        _exit(gpu_device_count(&count) ? 77 : 0);
    }
    if (WEXITSTATUS(status_of(probe)) == 77) {
        printf("no CUDA device: nothing was checked\n");
        return 77;
    }
    board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (board == MAP_FAILED || socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
        return 1;
    pid_t pid = spawn(maker, pair[1]);
    close(pair[1]);
    int fd = test_receive_fd(pair[0]);
    if (fd < 0)
        return 1;
    run_all(fd, pid);
    return 0;
}
