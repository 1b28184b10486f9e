/* The memory of a device against its contract (gpu/device.h): chunks, other processes, copies, tickets, registered memory. Runs
 * on whatever module $PIVOTKV_CUDA_MODULE names: on a CPU the fake one, whose faults are tried too.
 * usage: check_device [ipc]   `ipc`: chunks shared by cudaIpc handles; what is special about these is in check_ipc.c */
#include "gpu/device.h"
#include "tests/lib/faults.h"
#include "tests/lib/pass.h"
#include "tests/lib/test.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

enum { SECOND = 1000000000 };
#define CHUNK (4ull << 20)

static struct gpu_device *device;
static enum gpu_share share = GPU_SHARE_VMM;
static struct fake_faults *faults; /* NULL: a real device */

static int setup(void **state)
{
    (void)state;
    assert_int_equal(gpu_device_open(0, &device), 0);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    gpu_device_close(device);
    return 0;
}

static char *bytes_of(uint64_t count, uint32_t seed)
{
    char *b = malloc(count);
    assert_non_null(b);
    for (uint64_t i = 0; i < count; i++)
        b[i] = (char)((i * 2654435761u + seed) >> 7);
    return b;
}

static void put(const struct gpu_chunk *c, const char *bytes)
{
    assert_int_equal(gpu_device_copy_now(device, GPU_TO_DEVICE, c->writable, (uint64_t)(uintptr_t)bytes, c->bytes), 0);
}

static void assert_holds(uint64_t address, const char *bytes, uint64_t count)
{
    char *back = bytes_of(count, 99);
    assert_int_equal(gpu_device_copy_now(device, GPU_TO_HOST, (uint64_t)(uintptr_t)back, address, count), 0);
    assert_memory_equal(back, bytes, count);
    free(back);
}

static void test_about(void **state)
{
    (void)state;
    uint32_t count = 0, ordinal = 99;
    const struct gpu_device_info *i = gpu_device_about(device);
    struct gpu_device_info none;
    assert_int_equal(gpu_device_count(&count), 0);
    assert_true(count >= 1);
    assert_true(i->name[0] && i->bytes && i->grain && CHUNK % i->grain == 0);
    assert_int_equal(gpu_device_find(i->uuid, &ordinal), 0);
    assert_int_equal(ordinal, 0);
    assert_int_equal(gpu_device_find((const uint8_t[PKV_UUID_BYTES]){1, 2, 3}, &ordinal), -PKV_ERR_GPU_DEVICE);
    assert_int_equal(gpu_device_probe(count, &none), -PKV_ERR_GPU_DEVICE);
    assert_int_equal(gpu_device_open(count, &(struct gpu_device *){NULL}), -PKV_ERR_GPU_DEVICE);
}

static void test_chunk_is_zeroed_and_copied(void **state)
{
    (void)state;
    char *zeroes = calloc(1, CHUNK), *bytes = bytes_of(CHUNK, 1);
    struct gpu_chunk c;
    for (int round = 0; round < 3; round++) { /* what was written before is gone */
        assert_int_equal(gpu_device_chunk_create(device, CHUNK, share, &c), 0);
        assert_true(c.fd >= 0 && c.bytes == CHUNK && c.readable && c.writable);
        assert_holds(c.readable, zeroes, CHUNK);
        put(&c, bytes);
        assert_holds(c.readable, bytes, CHUNK);
        gpu_device_chunk_release(device, &c);
        assert_int_equal(c.fd, -1);
        gpu_device_chunk_release(device, &c); /* of nothing */
    }
    assert_int_equal(gpu_device_chunk_create(device, 0, share, &c), -PKV_ERR_INVALID);
    assert_int_equal(gpu_device_chunk_create(device, gpu_device_about(device)->grain + 1, share, &c), -PKV_ERR_INVALID);
    assert_int_equal(gpu_device_chunk_create(device, 1ull << 50, share, &c), -PKV_ERR_GPU_MEMORY);
    assert_false(gpu_device_lost(device));
    free(zeroes), free(bytes);
}

static void test_import_sees_and_writes(void **state)
{
    (void)state;
    char *bytes = bytes_of(CHUNK, 2), *others = bytes_of(CHUNK, 3);
    struct gpu_chunk c, reader, writer;
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, share, &c), 0);
    put(&c, bytes);
    assert_int_equal(gpu_device_chunk_import(device, c.fd, CHUNK, false, &reader), 0);
    assert_int_equal(gpu_device_chunk_import(device, c.fd, CHUNK, true, &writer), 0);
    assert_true(!reader.writable && writer.writable && reader.fd == -1);
    assert_true((writer.readable == writer.writable) == (share == GPU_SHARE_IPC));
    assert_holds(reader.readable, bytes, CHUNK);
    put(&writer, others);
    assert_holds(reader.readable, others, CHUNK);
    assert_holds(c.readable, others, CHUNK);
    gpu_device_chunk_release(device, &c); /* the memory lives until the last one of the process has gone */
    assert_holds(reader.readable, others, CHUNK);
    gpu_device_chunk_release(device, &reader);
    gpu_device_chunk_release(device, &writer);
    assert_int_equal(gpu_device_chunk_import(device, -1, CHUNK, false, &reader), -PKV_ERR_INVALID);
    free(bytes), free(others);
}

static void test_wrong_descriptor(void **state)
{
    (void)state;
    struct gpu_chunk c;
    if (faults)
        return; /* any file is a chunk to the fake */
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    assert_true(gpu_device_chunk_import(device, fd, CHUNK, false, &c) < 0);
    assert_false(gpu_device_lost(device));
    close(fd);
}

/* An arena chunk as a worker has it: sealed by its maker, mapped for reading alone. */
static void test_registered_memory(void **state)
{
    (void)state;
    int fd = memfd_create("check", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_true(fd >= 0 && ftruncate(fd, (off_t)CHUNK) == 0);
    char *mine = mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), *bytes = bytes_of(CHUNK, 4);
    assert_true(mine != MAP_FAILED);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE), 0);
    char *readable = mmap(NULL, CHUNK, PROT_READ, MAP_SHARED, fd, 0);
    assert_true(readable != MAP_FAILED);
    uint64_t address = 0, read_only = 0;
    struct gpu_chunk c;
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, share, &c), 0);
    put(&c, bytes);
    assert_int_equal(gpu_device_register(device, mine, CHUNK, false, &address), 0);
    assert_int_equal(gpu_device_register(device, readable, CHUNK, true, &read_only), 0);
    assert_true(address && read_only);
    assert_int_equal(gpu_device_copy_now(device, GPU_TO_HOST, (uint64_t)(uintptr_t)mine, c.readable, CHUNK), 0);
    assert_memory_equal(readable, bytes, CHUNK);
    uint64_t ticket;
    assert_int_equal(gpu_device_zero(device, c.writable, CHUNK, &ticket), 0);
    assert_int_equal(gpu_device_wait(device, ticket, 5ull * SECOND), 0);
    assert_int_equal(gpu_device_copy_now(device, GPU_TO_DEVICE, c.writable, (uint64_t)(uintptr_t)readable, CHUNK), 0);
    assert_holds(c.readable, bytes, CHUNK);
    gpu_device_unregister(device, readable);
    gpu_device_unregister(device, mine);
    gpu_device_chunk_release(device, &c);
    munmap(readable, CHUNK), munmap(mine, CHUNK);
    close(fd);
    free(bytes);
}

/* Many pieces in one call, some of them neighbours, none in order: each byte goes where it should. */
static void test_batches(void **state)
{
    (void)state;
    enum { PIECES = 64, PIECE = 16384 };
    char *bytes = bytes_of((uint64_t)PIECES * PIECE, 5), *back = calloc(PIECES, PIECE);
    struct gpu_chunk a, b;
    struct gpu_copy copies[PIECES];
    uint64_t ticket;
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, share, &a), 0);
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, share, &b), 0);
    for (uint32_t i = 0; i < PIECES; i++) {
        uint32_t at = i < PIECES / 2 ? i : PIECES - 1 - (i - PIECES / 2);
        copies[i] =
            (struct gpu_copy){a.writable + (uint64_t)at * PIECE, (uint64_t)(uintptr_t)bytes + (uint64_t)at * PIECE, PIECE};
    }
    assert_int_equal(gpu_device_copy(device, GPU_TO_DEVICE, copies, PIECES, &ticket), 0);
    assert_int_equal(gpu_device_wait(device, ticket, 5ull * SECOND), 0);
    assert_int_equal(gpu_device_poll(device, ticket), 1);
    for (uint32_t i = 0; i < PIECES; i++)
        copies[i] = (struct gpu_copy){b.writable + (uint64_t)i * PIECE, a.readable + (uint64_t)(PIECES - 1 - i) * PIECE, PIECE};
    assert_int_equal(gpu_device_copy(device, GPU_ON_DEVICE, copies, PIECES, &ticket), 0);
    assert_int_equal(gpu_device_wait(device, ticket, 5ull * SECOND), 0);
    for (uint32_t i = 0; i < PIECES; i++)
        copies[i] = (struct gpu_copy){(uint64_t)(uintptr_t)back + (uint64_t)(PIECES - 1 - i) * PIECE,
                                      b.readable + (uint64_t)i * PIECE, PIECE};
    assert_int_equal(gpu_device_copy(device, GPU_TO_HOST, copies, PIECES, &ticket), 0);
    assert_int_equal(gpu_device_wait(device, ticket, 5ull * SECOND), 0);
    assert_memory_equal(back, bytes, (uint64_t)PIECES * PIECE);
    gpu_device_chunk_release(device, &a);
    gpu_device_chunk_release(device, &b);
    free(bytes), free(back);
}

/* More calls than tickets: the ring says so and loses none. */
static void test_tickets(void **state)
{
    (void)state;
    struct gpu_chunk c;
    uint64_t ticket = 0, last = 0;
    uint32_t full = 0;
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, share, &c), 0);
    for (uint32_t i = 0; i < 5 * GPU_TICKETS; i++) {
        struct gpu_copy copy = {c.writable + CHUNK / 2, c.readable, CHUNK / 2};
        int r;
        while ((r = gpu_device_copy(device, GPU_ON_DEVICE, &copy, 1, &ticket)) == -PKV_ERR_RING_FULL) {
            full++;
            assert_int_equal(gpu_device_wait(device, last, 5ull * SECOND), 0);
        }
        assert_int_equal(r, 0);
        assert_true(ticket > last);
        last = ticket;
    }
    assert_int_equal(gpu_device_wait(device, last, 5ull * SECOND), 0);
    assert_int_equal(gpu_device_poll(device, last - 4 * GPU_TICKETS), 1);
    assert_int_equal(gpu_device_poll(device, last + 1), -PKV_ERR_INVALID);
    assert_int_equal(gpu_device_poll(device, 0), -PKV_ERR_INVALID);
    gpu_device_chunk_release(device, &c);
    (void)full;
}

/* ---- another process ---- */

/* The maker of a chunk: sends it, waits to be told, dies without a word. Runs in a process of its own, before the device is
 * open in the test's. */
static void maker(int socket)
{
    struct gpu_chunk c;
    char byte, *bytes = bytes_of(CHUNK, 6);
    if (gpu_device_open(0, &device) || gpu_device_chunk_create(device, CHUNK, share, &c))
        _exit(1);
    put(&c, bytes);
    if (!test_send_fd(socket, c.fd))
        _exit(3);
    if (read(socket, &byte, 1) != 1)
        _exit(2);
    kill(getpid(), SIGKILL);
}

static pid_t maker_pid;
static int maker_socket;

/* Of VMM, that is; by cudaIpc it is used as long as the maker lives. */
static void test_memory_outlives_its_maker(void **state)
{
    (void)state;
    int status, fd = test_receive_fd(maker_socket);
    char *bytes = bytes_of(CHUNK, 6);
    struct gpu_chunk c;
    assert_true(fd >= 0);
    assert_int_equal(gpu_device_chunk_import(device, fd, CHUNK, false, &c), 0);
    assert_holds(c.readable, bytes, CHUNK);
    assert_int_equal(write(maker_socket, "x", 1), 1);
    assert_int_equal(waitpid(maker_pid, &status, 0), maker_pid);
    assert_true(WIFSIGNALED(status));
    if (share == GPU_SHARE_VMM)
        assert_holds(c.readable, bytes, CHUNK);
    gpu_device_chunk_release(device, &c);
    close(fd);
    free(bytes);
}

/* ---- faults, of the fake device alone ---- */

static void test_refusals(void **state)
{
    (void)state;
    struct gpu_chunk c;
    uint64_t address, ticket;
    char memory[64];
    struct gpu_copy copy = {(uint64_t)(uintptr_t)memory, (uint64_t)(uintptr_t)memory, 0};
    faults->refuse_create = faults->refuse_register = faults->copies_fail = 1;
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, share, &c), -PKV_ERR_GPU_MEMORY);
    assert_int_equal(gpu_device_register(device, memory, sizeof(memory), false, &address), -PKV_ERR_GPU_REGISTER);
    assert_int_equal(gpu_device_copy(device, GPU_TO_HOST, &copy, 1, &ticket), -PKV_ERR_SYSTEM);
    assert_int_equal(gpu_device_copy(device, GPU_TO_HOST, &copy, 0, &ticket), -PKV_ERR_INVALID);
    assert_int_equal(gpu_device_copy(device, GPU_TO_HOST, &copy, 1, &ticket), 0); /* only one was to fail */
    assert_int_equal(gpu_device_wait(device, ticket, 5ull * SECOND), 0);
    faults->refuse_create = faults->refuse_register = 0;
    assert_false(gpu_device_lost(device));
}

static void test_waits_are_bounded(void **state)
{
    (void)state;
    char memory[64] = "from", to[64] = "";
    struct gpu_copy copy = {(uint64_t)(uintptr_t)to, (uint64_t)(uintptr_t)memory, sizeof(memory)};
    uint64_t ticket;
    faults->copies_hang = 1;
    assert_int_equal(gpu_device_copy(device, GPU_TO_HOST, &copy, 1, &ticket), 0);
    assert_int_equal(gpu_device_poll(device, ticket), 0);
    assert_int_equal(gpu_device_wait(device, ticket, SECOND / 20), -PKV_ERR_TIMEOUT);
    faults->copies_hang = 0;
    assert_int_equal(gpu_device_wait(device, ticket, 5ull * SECOND), 0);
    assert_string_equal(to, "from");
}

static void test_lost_is_for_good(void **state)
{
    (void)state;
    char from[64] = "from", to[64] = "";
    struct gpu_copy copy = {(uint64_t)(uintptr_t)to, (uint64_t)(uintptr_t)from, sizeof(from)};
    struct gpu_chunk c;
    uint64_t ticket, address;
    faults->lost_in_copies = 1;
    assert_int_equal(gpu_device_copy(device, GPU_TO_HOST, &copy, 1, &ticket), 0);
    assert_int_equal(gpu_device_wait(device, ticket, 5ull * SECOND), -PKV_ERR_GPU_LOST);
    assert_true(gpu_device_lost(device));
    assert_int_equal(gpu_device_copy(device, GPU_TO_HOST, &copy, 1, &ticket), -PKV_ERR_GPU_LOST);
    assert_int_equal(gpu_device_chunk_create(device, CHUNK, share, &c), -PKV_ERR_GPU_LOST);
    assert_int_equal(gpu_device_register(device, from, sizeof(from), true, &address), -PKV_ERR_GPU_LOST);
    assert_int_equal(gpu_device_zero(device, 0, 0, &ticket), -PKV_ERR_GPU_LOST);
    faults->lost = 0;
}

static pid_t fork_maker(void)
{
    int sockets[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets))
        exit(1);
    pid_t pid = fork();
    if (pid == 0)
        maker(sockets[1]);
    close(sockets[1]);
    maker_socket = sockets[0];
    return pid;
}

int main(int argc, char **argv)
{
    share = argc > 1 && !strcmp(argv[1], "ipc") ? GPU_SHARE_IPC : GPU_SHARE_VMM;
    const char *module = getenv("PIVOTKV_CUDA_MODULE"), *fake = getenv("PIVOTKV_FAKE_MODULE");
    if (module && fake && !strcmp(module, fake))
        faults = test_faults();
    maker_pid = fork_maker(); /* a driver that is initialised does not survive a fork */
    uint32_t count;
    int r = gpu_device_count(&count);
    if (r) {
        fprintf(stderr, "%s (%s): nothing was checked\n", pkv_err_text((uint32_t)-r), gpu_module_why());
        return 77;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_memory_outlives_its_maker, setup, teardown),
        cmocka_unit_test_setup_teardown(test_about, setup, teardown),
        cmocka_unit_test_setup_teardown(test_chunk_is_zeroed_and_copied, setup, teardown),
        cmocka_unit_test_setup_teardown(test_import_sees_and_writes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wrong_descriptor, setup, teardown),
        cmocka_unit_test_setup_teardown(test_registered_memory, setup, teardown),
        cmocka_unit_test_setup_teardown(test_batches, setup, teardown),
        cmocka_unit_test_setup_teardown(test_tickets, setup, teardown),
        cmocka_unit_test_setup_teardown(test_refusals, setup, teardown),
        cmocka_unit_test_setup_teardown(test_waits_are_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(test_lost_is_for_good, setup, teardown),
    };
    size_t all = sizeof(tests) / sizeof(tests[0]);
    r = _cmocka_run_group_tests("device", tests, faults ? all : all - 3, NULL, NULL);
    if (faults) {
        printf("# alive at the end: %u chunks, %u pins\n", faults->chunks, faults->pins);
        r = r ? r : faults->pins != 0;
    }
    return r;
}
