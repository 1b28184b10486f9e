/* Copies on a (fake) device: every job comes back once, with its bytes where they should be, or with an error; also when the
 * device fails, hangs, or is lost, and when the courier stops. */
#include "cachesvc/courier.h"
#include "proto/base.h"
#include "tests/lib/faults.h"
#include "tests/lib/test.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { JOBS = 1000, BLOCK = 512 };
#define HANG_NS 200000000ull

struct job {
    struct courier_job job;
    uint32_t back; /* atomic */
};

static struct fake_faults *faults;
static struct gpu_device *device;
static struct courier courier;
static struct job jobs[JOBS];
static char from[JOBS][BLOCK], to[JOBS][BLOCK];
static uint32_t all_back;

static void carried(void *context, struct courier_job *const *back, uint32_t count)
{
    assert_ptr_equal(context, &courier);
    for (uint32_t i = 0; i < count; i++)
        __atomic_fetch_add(&PKV_CONTAINER_OF(back[i], struct job, job)->back, 1, __ATOMIC_ACQ_REL);
    __atomic_fetch_add(&all_back, count, __ATOMIC_ACQ_REL);
}

static int start(void **state)
{
    (void)state;
    *faults = (struct fake_faults){.lost = 0};
    all_back = 0;
    memset(to, 0, sizeof(to));
    for (uint32_t i = 0; i < JOBS; i++)
        for (uint32_t b = 0; b < BLOCK; b++)
            from[i][b] = (char)(i * 31 + b);
    return gpu_device_open(0, &device) || courier_start(&courier, device, HANG_NS, carried, &courier);
}

static int stop(void **state)
{
    (void)state;
    courier_stop(&courier);
    gpu_device_close(device);
    return 0;
}

/* In no order of addresses, directions mixed. */
static void submit(uint32_t first, uint32_t count)
{
    for (uint32_t n = first; n < first + count; n++) {
        uint32_t i = n * 37 % JOBS;
        jobs[n] = (struct job){.job = {.direction = n % 7 ? GPU_TO_HOST : GPU_ON_DEVICE,
                                       .copy = {(uint64_t)(uintptr_t)to[i], (uint64_t)(uintptr_t)from[i], BLOCK}}};
        courier_submit(&courier, &jobs[n].job);
    }
}

static void wait_back(uint32_t count)
{
    for (int i = 0; i < 5000 && __atomic_load_n(&all_back, __ATOMIC_ACQUIRE) < count; i++)
        usleep(1000);
    assert_int_equal(__atomic_load_n(&all_back, __ATOMIC_ACQUIRE), count);
}

static uint32_t failed(uint32_t count)
{
    uint32_t bad = 0;
    for (uint32_t n = 0; n < count; n++) {
        assert_int_equal(jobs[n].back, 1);
        if (jobs[n].job.err)
            bad++;
        else
            assert_memory_equal(to[n * 37 % JOBS], from[n * 37 % JOBS], BLOCK);
    }
    return bad;
}

static void test_all_arrive(void **state)
{
    (void)state;
    submit(0, JOBS);
    wait_back(JOBS);
    assert_int_equal(failed(JOBS), 0);
    assert_memory_equal(to, from, sizeof(to));
}

static void test_stop_carries_what_was_submitted(void **state)
{
    (void)state;
    faults->copy_delay_us = 100;
    submit(0, 300);
    courier_stop(&courier);
    assert_int_equal(all_back, 300);
    assert_int_equal(failed(300), 0);
}

static void test_a_failed_call_fails_its_jobs(void **state)
{
    (void)state;
    faults->copies_fail = 3;
    submit(0, JOBS);
    wait_back(JOBS);
    uint32_t bad = failed(JOBS);
    assert_true(bad >= 3 && bad <= 3 * COURIER_BATCH);
    for (uint32_t n = 0; n < JOBS; n++)
        assert_true(!jobs[n].job.err || jobs[n].job.err == -PKV_ERR_SYSTEM);
}

static void test_lost_device_fails_the_rest(void **state)
{
    (void)state;
    faults->copy_delay_us = 50;
    faults->lost_in_copies = 150;
    submit(0, JOBS);
    wait_back(JOBS);
    assert_true(failed(JOBS) >= JOBS - 150);
    for (uint32_t n = 0; n < JOBS; n++)
        assert_true(!jobs[n].job.err || jobs[n].job.err == -PKV_ERR_GPU_LOST);
}

static void test_hanging_device_counts_as_lost(void **state)
{
    (void)state;
    faults->copies_hang = 1;
    submit(0, 300);
    wait_back(300); /* after HANG_NS, not after a multiple of it */
    assert_int_equal(failed(300), 300);
    assert_int_equal(jobs[0].job.err, -PKV_ERR_GPU_LOST);
    faults->copies_hang = 0;
    submit(300, 1); /* it stays so, whatever the device does now */
    wait_back(301);
    assert_int_equal(jobs[300].job.err, -PKV_ERR_GPU_LOST);
}

int main(void)
{
    faults = test_faults();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_all_arrive, start, stop),
        cmocka_unit_test_setup_teardown(test_stop_carries_what_was_submitted, start, stop),
        cmocka_unit_test_setup_teardown(test_a_failed_call_fails_its_jobs, start, stop),
        cmocka_unit_test_setup_teardown(test_lost_device_fails_the_rest, start, stop),
        cmocka_unit_test_setup_teardown(test_hanging_device_counts_as_lost, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
