/* Jobs run on other threads and come back to the one that reaps; none is lost, also when the mover stops. */
#include "cachesvc/mover.h"
#include "proto/base.h"
#include "tests/lib/test.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { JOBS = 5000 };

struct job {
    struct mover_job job;
    int ran, reaped;
    pthread_t thread;
};
static struct job jobs[JOBS];
static pthread_t owner;

static void run(struct mover_job *j)
{
    struct job *job = PKV_CONTAINER_OF(j, struct job, job);
    job->ran++;
    job->thread = pthread_self();
}

static void done(struct mover_job *j)
{
    assert_true(pthread_equal(pthread_self(), owner));
    PKV_CONTAINER_OF(j, struct job, job)->reaped++;
}

static void test_all_jobs_come_back(void **state)
{
    (void)state;
    struct mover mover;
    struct mover_queue list = {NULL, NULL, 0};
    int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), reaped = 0;
    owner = pthread_self();
    assert_int_equal(mover_start(&mover, 3, event), 0);
    assert_false(mover_reap(&mover));
    for (int i = 0; i < JOBS; i++) {
        jobs[i] = (struct job){.job = {.run = run, .done = done}};
        if (i < JOBS / 2)
            mover_submit(&mover, &jobs[i].job);
        else
            mover_queue_push(&list, &jobs[i].job);
        if (i % 100 == 0)
            reaped += mover_reap(&mover);
        if (list.count == 50) {
            mover_submit_list(&mover, &list);
            list = (struct mover_queue){NULL, NULL, 0};
        }
    }
    /* The event says that something is done, so that a loop may sleep. */
    for (int left = JOBS; left;) {
        struct pollfd p = {.fd = event, .events = POLLIN};
        uint64_t ignored;
        left = 0;
        for (int i = 0; i < JOBS; i++)
            left += !jobs[i].reaped;
        if (left && poll(&p, 1, 10000) != 1 && !mover_has_done(&mover))
            fail_msg("%d jobs left and no event", left);
        if (read(event, &ignored, sizeof(ignored)) < 0)
            ignored = 0;
        mover_reap(&mover);
    }
    for (int i = 0; i < JOBS; i++) {
        assert_int_equal(jobs[i].ran, 1);
        assert_int_equal(jobs[i].reaped, 1);
        assert_false(pthread_equal(jobs[i].thread, owner));
    }
    mover_stop(&mover);
    close(event);
    assert_true(reaped >= 0);
}

static void test_stop_finishes_what_was_submitted(void **state)
{
    (void)state;
    struct mover mover;
    int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    owner = pthread_self();
    assert_int_equal(mover_start(&mover, 2, event), 0);
    for (int i = 0; i < 100; i++) {
        jobs[i] = (struct job){.job = {.run = run, .done = done}};
        mover_submit(&mover, &jobs[i].job);
    }
    mover_stop(&mover);
    assert_true(mover_reap(&mover));
    for (int i = 0; i < 100; i++)
        assert_int_equal(jobs[i].reaped, 1);
    close(event);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_jobs_come_back),
        cmocka_unit_test(test_stop_finishes_what_was_submitted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
