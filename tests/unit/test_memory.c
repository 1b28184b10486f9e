/* Pool and arena as the daemon has them, on the CPU and on (fake) devices, and what a chunk that changes its tenant leaves
 * behind. */
#include "cachesvc/memory.h"
#include "tests/lib/faults.h"
#include "tests/lib/test.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB (1ull << 20)

static const struct devices none;
static struct devices devices;
static struct fake_faults *faults;

static int create(struct memory *m, const struct devices *on, uint64_t pool, uint64_t arena, uint32_t populate)
{
    struct memory_options o = {MIB, pool, arena, populate, on};
    return memory_create(m, &o);
}

static void test_chunks(void **state)
{
    (void)state;
    struct memory m;
    assert_int_equal(create(&m, &none, 3 * MIB, 5 * MIB, 1), 0);
    assert_int_equal(m.count[PKV_TIER_POOL], 3);
    assert_int_equal(m.count[PKV_TIER_ARENA], 5);
    assert_non_null(memory_pages(&m, PKV_TIER_POOL));
    struct gpu_space space = memory_space(&m);
    assert_true(space.base[PKV_TIER_ARENA][4] == (uint64_t)(uintptr_t)m.chunks[PKV_TIER_ARENA][4].base);
    assert_int_equal(space.base[PKV_TIER_ARENA][5], 0);
    /* Workers write the pool; nobody else writes the arena. */
    void *pool = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd(&m, PKV_TIER_POOL, 0), 0);
    assert_true(pool != MAP_FAILED);
    munmap(pool, 4096);
    assert_true(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd(&m, PKV_TIER_ARENA, 0), 0) == MAP_FAILED);
    memory_destroy(&m);
}

static void test_reset(void **state)
{
    (void)state;
    struct memory m;
    assert_int_equal(create(&m, &none, MIB, MIB, 0), 0);
    struct offload_chunk *c = &m.chunks[PKV_TIER_POOL][0];
    memset(c->base, 0x5a, c->bytes);
    char *old = mmap(NULL, 4096, PROT_READ, MAP_SHARED, c->fd, 0); /* as the former tenant's worker might hold it */
    assert_int_equal(memory_reset(&m, PKV_TIER_POOL, 0), 0);
    for (uint32_t i = 0; i < c->bytes; i++)
        assert_int_equal(((const char *)c->base)[i], 0);
    memset(c->base, 0x77, c->bytes);
    assert_int_equal(old[0], 0x5a); /* and it sees nothing of the new one's */
    assert_true(m.bases[PKV_TIER_POOL][0] == (uint64_t)(uintptr_t)c->base);
    munmap(old, 4096);
    memory_destroy(&m);
}

static void test_too_much(void **state)
{
    (void)state;
    struct memory m;
    struct memory_options o = {1ull << 30, 1ull << 30, 1ull << 42, 1, &none};
    assert_int_equal(memory_create(&m, &o), -ENOMEM);
}

/* ---- on devices ---- */

static void wait_until_pinned(const struct memory *m)
{
    for (int i = 0; i < 3000 && __atomic_load_n(&m->pins.done, __ATOMIC_ACQUIRE) < m->pins.count; i++)
        usleep(1000);
    assert_int_equal(m->pins.done, m->count[PKV_TIER_ARENA]);
}

static void test_pool_on_devices(void **state)
{
    (void)state;
    struct memory m;
    assert_int_equal(create(&m, &devices, 5 * MIB, 4 * MIB, 2), 0);
    assert_string_equal(memory_pages(&m, PKV_TIER_POOL), "gpu");
    assert_int_equal(m.count[PKV_TIER_POOL], 5);
    uint64_t first = pkv_place(PKV_TIER_POOL, 2, 0, 1), second = pkv_place(PKV_TIER_POOL, 3, 0, 1);
    assert_ptr_equal(memory_device(&m, first), devices.device[0]);
    assert_ptr_equal(memory_device(&m, second), devices.device[1]);
    assert_null(memory_device(&m, pkv_place(PKV_TIER_ARENA, 2, 0, 1)));
    wait_until_pinned(&m);
    assert_int_equal(faults->pins, 4);
    assert_int_equal(faults->chunks, 5);
    memory_destroy(&m);
    assert_int_equal(faults->pins, 0);
    assert_int_equal(faults->chunks, 0);
}

static bool same_file(int a, int b)
{
    struct stat x, y;
    assert_int_equal(fstat(a, &x), 0);
    assert_int_equal(fstat(b, &y), 0);
    return x.st_ino == y.st_ino && x.st_dev == y.st_dev;
}

static void test_reset_on_devices(void **state)
{
    (void)state;
    struct memory m;
    assert_int_equal(create(&m, &devices, 2 * MIB, 3 * MIB, 1), 0);
    wait_until_pinned(&m);
    int kept = dup(memory_fd(&m, PKV_TIER_POOL, 1)); /* as the former tenant's worker might have */
    char *old = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, kept, 0);
    memset(old, 0x5a, MIB);
    assert_int_equal(memory_reset(&m, PKV_TIER_POOL, 1), 0);
    const char *now = (const char *)(uintptr_t)m.bases[PKV_TIER_POOL][1];
    for (uint32_t i = 0; i < MIB; i++)
        assert_int_equal(now[i], 0);
    memset(old, 0x77, MIB);
    assert_int_equal(now[0], 0);
    assert_false(same_file(kept, memory_fd(&m, PKV_TIER_POOL, 1)));
    munmap(old, MIB), close(kept);
    /* A chunk of the arena is pinned again, where it is now. */
    assert_int_equal(memory_reset(&m, PKV_TIER_ARENA, 2), 0);
    assert_int_equal(faults->pins, 3);
    assert_true(m.bases[PKV_TIER_ARENA][2] == (uint64_t)(uintptr_t)m.chunks[PKV_TIER_ARENA][2].base);
    faults->refuse_create = 1; /* somebody still holds the old one: it is not handed out again */
    assert_int_equal(memory_reset(&m, PKV_TIER_POOL, 0), -ENOMEM);
    assert_int_equal(memory_fd(&m, PKV_TIER_POOL, 0), -1);
    faults->refuse_create = 0;
    memory_destroy(&m);
    assert_int_equal(faults->pins + faults->chunks, 0);
}

/* The descriptor of the old chunk opens nothing any more. */
static void test_reset_of_ipc(void **state)
{
    (void)state;
    struct memory m;
    struct gpu_chunk c;
    assert_int_equal(create(&m, &devices, 3 * MIB, 2 * MIB, 0), 0);
    int kept = dup(memory_fd(&m, PKV_TIER_POOL, 1));
    memset((char *)(uintptr_t)m.bases[PKV_TIER_POOL][1], 0x5a, MIB);
    assert_int_equal(memory_reset(&m, PKV_TIER_POOL, 1), 0);
    const char *now = (const char *)(uintptr_t)m.bases[PKV_TIER_POOL][1];
    for (uint32_t i = 0; i < MIB; i++)
        assert_int_equal(now[i], 0);
    assert_int_equal(gpu_device_chunk_import(devices.device[1], kept, MIB, true, &c), -PKV_ERR_GPU_IPC);
    close(kept);
    assert_int_equal(faults->chunks, 3);
    memory_destroy(&m);
    assert_int_equal(faults->chunks, 0);
}

static void test_device_refuses(void **state)
{
    (void)state;
    struct memory m;
    faults->refuse_create = 1;
    assert_int_equal(create(&m, &devices, 2 * MIB, 2 * MIB, 1), -ENOMEM);
    faults->refuse_create = 0;
    faults->refuse_register = 1;
    assert_int_equal(create(&m, &devices, 2 * MIB, 2 * MIB, 1), -EOPNOTSUPP);
    assert_int_equal(create(&m, &devices, 2 * MIB, 2 * MIB, 0), 0); /* nothing was to be pinned */
    memory_destroy(&m);
    faults->refuse_register = 0;
    assert_int_equal(faults->pins + faults->chunks, 0);
}

static void test_names(void **state)
{
    (void)state;
    struct devices d;
    char uuid[DEVICES_UUID_TEXT], both[128];
    assert_int_equal(devices_open(&d, "host", "7", DEVICES_SHARE_AUTO), 0);
    assert_int_equal(d.count, 0);
    assert_int_equal(devices_open(&d, "auto", "", DEVICES_SHARE_AUTO), 0);
    assert_int_equal(d.count, 1);
    devices_uuid_text(gpu_device_about(d.device[0])->uuid, uuid);
    assert_string_equal(uuid, "GPU-face0000-0000-0000-0000-000000000000");
    devices_close(&d);
    assert_int_equal(devices_open(&d, "cuda", "GPU-face01", DEVICES_SHARE_AUTO), 0);
    assert_int_equal(gpu_device_about(d.device[0])->ordinal, 1);
    devices_close(&d);
    snprintf(both, sizeof(both), "1,%s,1", uuid);
    assert_int_equal(devices_open(&d, "cuda", both, DEVICES_SHARE_AUTO), 0);
    assert_int_equal(d.count, 2);
    assert_int_equal(devices_find(&d, gpu_device_about(d.device[1])->uuid), 1);
    assert_int_equal(devices_find(&d, (const uint8_t[PKV_UUID_BYTES]){1}), DEVICES_MAX);
    devices_close(&d);
    assert_int_equal(devices_open(&d, "cuda", "2", DEVICES_SHARE_AUTO), -ENODEV);
    assert_int_equal(devices_open(&d, "auto", "0,gpu", DEVICES_SHARE_AUTO), -ENODEV); /* what was named must be there */
    assert_int_equal(devices_open(&d, "cuda", "GPU-", DEVICES_SHARE_AUTO), -ENODEV);
    faults->no_export = faults->no_ipc = 1;
    assert_int_equal(devices_open(&d, "cuda", "1", DEVICES_SHARE_AUTO), -EOPNOTSUPP);
    assert_int_equal(devices_open(&d, "cuda", "", DEVICES_SHARE_AUTO), -ENODEV);
    assert_int_equal(devices_open(&d, "auto", "", DEVICES_SHARE_AUTO), 0);
    assert_int_equal(d.count, 0);
    faults->no_export = faults->no_ipc = 0;
}

static void assert_shares(enum devices_share asked, int r, enum gpu_share share, bool one_tenant)
{
    struct devices d;
    assert_int_equal(devices_open(&d, "cuda", "all", asked), r);
    assert_int_equal(faults->chunks, 0); /* what was tried is gone */
    if (r)
        return;
    assert_int_equal(d.count, 2);
    assert_int_equal(d.share, share);
    assert_int_equal(d.one_tenant, one_tenant);
    devices_close(&d);
}

static void test_how_memory_is_shared(void **state)
{
    (void)state;
    assert_shares(DEVICES_SHARE_AUTO, 0, GPU_SHARE_VMM, false);
    assert_shares(DEVICES_SHARE_VMM, 0, GPU_SHARE_VMM, false);
    assert_shares(DEVICES_SHARE_IPC, 0, GPU_SHARE_IPC, false);
    uint32_t *lacks[] = {&faults->no_export, &faults->refuse_export}; /* said beforehand, or not */
    for (size_t i = 0; i < 2; i++) {
        *lacks[i] = 1;
        assert_shares(DEVICES_SHARE_AUTO, 0, GPU_SHARE_IPC, true);
        assert_shares(DEVICES_SHARE_VMM, -EOPNOTSUPP, 0, false);
        assert_shares(DEVICES_SHARE_IPC, 0, GPU_SHARE_IPC, false);
        faults->no_ipc = 1;
        assert_shares(DEVICES_SHARE_AUTO, -EOPNOTSUPP, 0, false);
        assert_shares(DEVICES_SHARE_IPC, -EOPNOTSUPP, 0, false);
        *lacks[i] = faults->no_ipc = 0;
    }
    faults->no_ipc = 1;
    assert_shares(DEVICES_SHARE_AUTO, 0, GPU_SHARE_VMM, false);
    faults->no_ipc = 0;
}

static int open_two(void **state)
{
    (void)state;
    return devices_open(&devices, "cuda", "all", DEVICES_SHARE_VMM);
}

static int open_two_ipc(void **state)
{
    (void)state;
    return devices_open(&devices, "cuda", "all", DEVICES_SHARE_IPC);
}

static int close_two(void **state)
{
    (void)state;
    devices_close(&devices);
    return 0;
}

int main(void)
{
    faults = test_faults();
    setenv("PIVOTKV_FAKE_DEVICES", "2", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_reset),
        cmocka_unit_test(test_too_much),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_how_memory_is_shared),
        cmocka_unit_test_setup_teardown(test_pool_on_devices, open_two, close_two),
        cmocka_unit_test_setup_teardown(test_reset_on_devices, open_two, close_two),
        cmocka_unit_test_setup_teardown(test_reset_of_ipc, open_two_ipc, close_two),
        cmocka_unit_test_setup_teardown(test_device_refuses, open_two, close_two),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
