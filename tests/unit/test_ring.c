/* The rings: order, fullness, wrap-around of the counters, and a second thread on the other side. */
#include "tests/lib/test.h"

#include "proto/ring.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

static struct pkv_region *region_new(void)
{
    struct pkv_region *r = aligned_alloc(64, PKV_ALIGN_UP(sizeof(*r), 64));
    assert_non_null(r);
    memset(r, 0, sizeof(*r));
    return r;
}

static void test_full_and_empty(void **state)
{
    (void)state;
    struct pkv_region *r = region_new();
    uint32_t tail = UINT32_MAX - 5, head = tail; /* the counters wrap in the middle of the test */
    r->sq_tail.value = r->sq_head.value = tail;
    struct pkv_submission s = {0}, got;
    assert_false(pkv_sq_pop(r, &head, &got));
    for (uint32_t i = 0; i < PKV_RING_ENTRIES; i++) {
        s.tag = i;
        assert_true(pkv_sq_push(r, &tail, &s));
    }
    assert_false(pkv_sq_push(r, &tail, &s));
    for (uint32_t i = 0; i < PKV_RING_ENTRIES; i++) {
        assert_true(pkv_sq_pop(r, &head, &got));
        assert_int_equal(got.tag, i);
    }
    assert_false(pkv_sq_pop(r, &head, &got));
    assert_true(pkv_sq_push(r, &tail, &s));
    free(r);
}

static void test_hostile_tail_ends(void **state)
{
    (void)state;
    struct pkv_region *r = region_new();
    uint32_t head = 0;
    struct pkv_submission got;
    r->sq_tail.value = 0xdeadbeef;
    for (int i = 0; i < 3000; i++)
        assert_true(pkv_sq_pop(r, &head, &got)); /* garbage, but within the ring */
    assert_int_equal(head, 3000);
    free(r);
}

#define MESSAGES 200000u

static void *echo(void *arg)
{
    struct pkv_region *r = arg;
    uint32_t head = 0, tail = 0;
    for (uint32_t i = 0; i < MESSAGES; i++) {
        struct pkv_submission s;
        while (!pkv_sq_pop(r, &head, &s))
            sched_yield();
        struct pkv_completion c = {.tag = s.tag, .value0 = s.seq * 3};
        while (!pkv_cq_push(r, &tail, &c))
            sched_yield();
    }
    return NULL;
}

static void test_two_threads(void **state)
{
    (void)state;
    struct pkv_region *r = region_new();
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, echo, r), 0);
    uint32_t tail = 0, head = 0, sent = 0, seen = 0, wrong = 0;
    while (seen < MESSAGES) {
        struct pkv_submission s = {.tag = sent, .seq = sent};
        struct pkv_completion c;
        if (sent < MESSAGES && pkv_sq_push(r, &tail, &s))
            sent++;
        if (pkv_cq_pop(r, &head, &c)) {
            wrong += c.tag != seen || c.value0 != 3ull * seen;
            seen++;
        } else {
            sched_yield();
        }
    }
    pthread_join(thread, NULL);
    assert_int_equal(wrong, 0);
    free(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_full_and_empty),
        cmocka_unit_test(test_hostile_tail_ends),
        cmocka_unit_test(test_two_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
