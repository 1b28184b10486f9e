/* Chunks shared by cudaIpc handles: what can go wrong with a handle that cannot with a descriptor of VMM (gpu/ipc.h). Runs on
 * whatever module $PIVOTKV_CUDA_MODULE names; the fake one is as strict as the oldest driver.
 *
 * Another process makes the chunks. It is forked before this one opens the device, and does what it is told by a byte. */
#include "gpu/device.h"
#include "tests/lib/faults.h"
#include "tests/lib/pass.h"
#include "tests/lib/test.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHUNK (4ull << 20)
#define SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#define TOKEN 104u
enum { AT_VERSION = 8, AT_RESERVED = 12, AT_BYTES = 16, AT_UUID = 24, AT_HANDLE = 40 };

static struct gpu_device *device;
static struct fake_faults *faults; /* NULL: a real device */
static int maker_socket;
static pid_t maker_pid;

/* ---- the maker ---- */

enum { MAKE = 'm', FREE = 'f', DIE = 'd' };

static void maker(int socket)
{
    struct gpu_chunk c;
    uint64_t word = 0x1234567890abcdefull;
    char byte;
    while (read(socket, &byte, 1) == 1) {
        if (byte == DIE)
            kill(getpid(), SIGKILL);
        if (byte == FREE) {
            gpu_device_chunk_release(device, &c);
            if (write(socket, &byte, 1) != 1)
                _exit(1);
            continue;
        }
        if ((!device && gpu_device_open(0, &device)) || gpu_device_chunk_create(device, CHUNK, GPU_SHARE_IPC, &c) ||
            gpu_device_copy_now(device, GPU_TO_DEVICE, c.writable + CHUNK - 8, (uint64_t)(uintptr_t)&word, 8) ||
            !test_send_fd(socket, c.fd))
            _exit(2);
    }
    _exit(0);
}

static void fork_maker(void)
{
    int sockets[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets))
        exit(1);
    maker_pid = fork();
    if (maker_pid == 0) {
        close(sockets[0]);
        maker(sockets[1]);
    }
    close(sockets[1]);
    maker_socket = sockets[0];
}

static void tell(char byte)
{
    assert_int_equal(write(maker_socket, &byte, 1), 1);
    if (byte == FREE)
        assert_int_equal(read(maker_socket, &byte, 1), 1);
}

static int made(void)
{
    tell(MAKE);
    int fd = test_receive_fd(maker_socket);
    assert_true(fd >= 0);
    return fd;
}

static void maker_dies(void)
{
    int status;
    tell(DIE);
    assert_int_equal(waitpid(maker_pid, &status, 0), maker_pid);
    assert_true(WIFSIGNALED(status));
}

/* ---- this process ---- */

static uint64_t read_word(uint64_t address)
{
    uint64_t word = 0;
    assert_int_equal(gpu_device_copy_now(device, GPU_TO_HOST, (uint64_t)(uintptr_t)&word, address, 8), 0);
    return word;
}

static void write_word(uint64_t address, uint64_t word)
{
    assert_int_equal(gpu_device_copy_now(device, GPU_TO_DEVICE, address, (uint64_t)(uintptr_t)&word, 8), 0);
}

static struct gpu_chunk imported(int fd)
{
    struct gpu_chunk c;
    assert_int_equal(gpu_device_chunk_import(device, fd, CHUNK, true, &c), 0);
    assert_true(c.readable && c.fd == -1 && c.bytes == CHUNK);
    return c;
}

static void test_another_process(void **state)
{
    (void)state;
    int fd = made();
    struct gpu_chunk c = imported(fd), reader;
    assert_true(read_word(c.readable + CHUNK - 8) == 0x1234567890abcdefull);
    assert_true(read_word(c.readable) == 0); /* zeroed when it was made */
    assert_int_equal(gpu_device_chunk_import(device, fd, CHUNK, false, &reader), 0);
    assert_true(!reader.writable && reader.readable);
    gpu_device_chunk_release(device, &reader);
    gpu_device_chunk_release(device, &c);
    close(fd);
    tell(FREE);
}

/* Two connections of one process: the driver is asked once, and the chunk stays until both have left. */
static void test_opened_twice(void **state)
{
    (void)state;
    int fd = made();
    for (int first = 0; first < 2; first++) { /* closed in either order, and opened again */
        struct gpu_chunk c[2] = {imported(fd), imported(fd)};
        write_word(c[0].writable, 7 + (uint64_t)first);
        assert_true(read_word(c[1].readable) == 7 + (uint64_t)first);
        gpu_device_chunk_release(device, &c[first]);
        assert_true(read_word(c[1 - first].readable) == 7 + (uint64_t)first);
        gpu_device_chunk_release(device, &c[1 - first]);
    }
    close(fd);
    tell(FREE);
}

/* Two devices opened for one GPU, as two connections have them. */
static void test_opened_by_two_devices(void **state)
{
    (void)state;
    struct gpu_device *other;
    struct gpu_chunk b;
    int fd = made();
    assert_int_equal(gpu_device_open(0, &other), 0);
    struct gpu_chunk a = imported(fd);
    assert_int_equal(gpu_device_chunk_import(other, fd, CHUNK, true, &b), 0);
    gpu_device_chunk_release(device, &a);
    uint64_t word = 0;
    assert_int_equal(gpu_device_copy_now(other, GPU_TO_HOST, (uint64_t)(uintptr_t)&word, b.readable + CHUNK - 8, 8), 0);
    assert_true(word == 0x1234567890abcdefull);
    gpu_device_chunk_release(other, &b);
    gpu_device_close(other);
    close(fd);
    tell(FREE);
}

static void test_the_maker_itself(void **state)
{
    (void)state;
    for (int first = 0; first < 2; first++) {
        struct gpu_chunk c[2];
        assert_int_equal(gpu_device_chunk_create(device, CHUNK, GPU_SHARE_IPC, &c[0]), 0);
        int fd = dup(c[0].fd);
        c[1] = imported(fd);
        assert_true(c[1].readable == c[0].readable);
        write_word(c[0].writable, 5);
        gpu_device_chunk_release(device, &c[first]);
        assert_true(read_word(c[1 - first].readable) == 5);
        gpu_device_chunk_release(device, &c[1 - first]);
        assert_true(gpu_device_chunk_import(device, fd, CHUNK, true, &c[0]) < 0); /* what it names is freed */
        assert_false(gpu_device_lost(device));
        close(fd);
    }
}

/* ---- tokens ---- */

static int forged(const char bytes[TOKEN], int seals)
{
    int fd = memfd_create("forged", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_true(fd >= 0 && write(fd, bytes, TOKEN) == TOKEN);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

static void assert_refused(const char bytes[TOKEN], int seals, uint64_t chunk, int r)
{
    struct gpu_chunk c;
    int fd = forged(bytes, seals);
    assert_int_equal(gpu_device_chunk_import(device, fd, chunk, false, &c), r);
    assert_false(gpu_device_lost(device));
    close(fd);
}

static void test_tokens(void **state)
{
    (void)state;
    static const int changed[] = {AT_VERSION, AT_RESERVED, AT_BYTES};
    struct gpu_chunk c;
    char good[TOKEN], bad[TOKEN];
    int fd = made();
    assert_int_equal(pread(fd, good, TOKEN, 0), TOKEN);
    assert_int_equal(fcntl(fd, F_GET_SEALS) & SEALS, SEALS);
    assert_int_equal(pwrite(fd, good, 1, 0), -1); /* its holder cannot change it for others */
    for (size_t i = 0; i < sizeof(changed) / sizeof(changed[0]); i++) {
        memcpy(bad, good, TOKEN);
        bad[changed[i]] ^= 4;
        assert_refused(bad, SEALS, CHUNK, -PKV_ERR_INVALID);
    }
    assert_refused(good, F_SEAL_SHRINK | F_SEAL_GROW, CHUNK, -PKV_ERR_INVALID);
    assert_refused(good, SEALS, CHUNK / 2, -PKV_ERR_INVALID);
    memcpy(bad, good, TOKEN);
    bad[AT_UUID] ^= 1; /* of a GPU that this is not */
    assert_refused(bad, SEALS, CHUNK, -PKV_ERR_GPU_DEVICE);
    if (faults) { /* what a real driver makes of numbers is its own affair */
        memcpy(bad, good, TOKEN);
        bad[AT_HANDLE + 8] ^= 1;
        assert_refused(bad, SEALS, CHUNK, -PKV_ERR_GPU_IPC);
    }
    int again = forged(good, SEALS); /* and a handle is no capability: this one opens */
    c = imported(again);
    gpu_device_chunk_release(device, &c);
    close(again), close(fd);
    tell(FREE);
}

/* ---- ends ---- */

static void test_freed_by_its_maker(void **state)
{
    (void)state;
    struct gpu_chunk c;
    int fd = made();
    c = imported(fd);
    gpu_device_chunk_release(device, &c);
    tell(FREE);
    assert_true(gpu_device_chunk_import(device, fd, CHUNK, false, &c) < 0);
    assert_false(gpu_device_lost(device));
    close(fd);
}

/* Who has it mapped lets go of it, and others come too late. */
static void test_the_maker_is_gone(void **state)
{
    (void)state;
    struct gpu_chunk c, late;
    int fd = made(), other = made();
    c = imported(fd);
    maker_dies();
    assert_int_equal(gpu_device_chunk_import(device, other, CHUNK, false, &late), -PKV_ERR_GPU_IPC);
    gpu_device_chunk_release(device, &c);
    assert_int_equal(gpu_device_chunk_import(device, fd, CHUNK, false, &late), -PKV_ERR_GPU_IPC);
    assert_false(gpu_device_lost(device));
    close(fd), close(other);
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, GPU_SHARE_IPC, &c), 0); /* this process goes on */
    gpu_device_chunk_release(device, &c);
}

/* ---- faults, of the fake device alone ---- */

static void test_refusals(void **state)
{
    (void)state;
    struct gpu_chunk c, none;
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, GPU_SHARE_IPC, &c), 0);
    faults->refuse_create = 1;
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, GPU_SHARE_IPC, &none), -PKV_ERR_GPU_MEMORY);
    faults->refuse_create = 0, faults->lost = 1;
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, GPU_SHARE_IPC, &none), -PKV_ERR_GPU_LOST);
    assert_int_equal(gpu_device_chunk_import(device, c.fd, CHUNK, false, &none), -PKV_ERR_GPU_LOST);
    gpu_device_chunk_release(device, &c); /* counted down all the same */
    faults->lost = 0, faults->no_ipc = 1;
    gpu_device_close(device);
    assert_int_equal(gpu_device_open(0, &device), 0);
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, GPU_SHARE_IPC, &none), -PKV_ERR_GPU_EXPORT);
    faults->no_ipc = 0, faults->no_export = 1;
    gpu_device_close(device);
    assert_int_equal(gpu_device_open(0, &device), 0);
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, GPU_SHARE_VMM, &none), -PKV_ERR_GPU_EXPORT);
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, GPU_SHARE_IPC, &c), 0);
    gpu_device_chunk_release(device, &c);
    faults->no_export = 0;
}

static int setup(void **state)
{
    (void)state;
    return gpu_device_open(0, &device);
}

static int teardown(void **state)
{
    (void)state;
    gpu_device_close(device);
    return 0;
}

int main(void)
{
    const char *module = getenv("PIVOTKV_CUDA_MODULE"), *fake = getenv("PIVOTKV_FAKE_MODULE");
    if (module && fake && !strcmp(module, fake))
        faults = test_faults();
    fork_maker(); /* a driver that is initialised does not survive a fork */
    struct gpu_device_info info;
    int r = gpu_device_probe(0, &info);
    if (r || !info.exports_ipc) {
        printf("%s (%s): nothing was checked\n", r ? pkv_err_text((uint32_t)-r) : "no cudaIpc", gpu_module_why());
        return 77;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_another_process),
        cmocka_unit_test(test_opened_twice),
        cmocka_unit_test(test_opened_by_two_devices),
        cmocka_unit_test(test_the_maker_itself),
        cmocka_unit_test(test_tokens),
        cmocka_unit_test(test_freed_by_its_maker),
        cmocka_unit_test(test_the_maker_is_gone),
        cmocka_unit_test(test_refusals),
    };
    size_t all = sizeof(tests) / sizeof(tests[0]);
    return _cmocka_run_group_tests("ipc", tests, faults ? all : all - 1, setup, teardown);
}
