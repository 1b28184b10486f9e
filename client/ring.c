/* Operations through the shared rings: push, wake the daemon if it sleeps, spin, then sleep on a futex in slices, looking after
 * each whether the daemon lives. */
#include "client/internal.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SLICE_NS   50000000ull   /* a daemon's death shows within this */
#define POSTED     0x80000000u   /* tag of an operation that nobody waits for */
#define ASKED      (POSTED | 1u) /* the same, and whose failure is no matter */
#define SPIN_LOOKS 64u           /* at the ring, between looks at the clock */

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Takes completions until the awaited one; true when it was there. */
static bool reap(struct pkv *kv, uint32_t tag, struct pkv_completion *ret)
{
    struct pkv_completion c;
    while (pkv_cq_pop(kv->region, &kv->cq_head, &c)) {
        if (c.tag == tag) {
            *ret = c;
            return true;
        }
        /* Others are late answers to calls that timed out, or to posted ones. */
        if (c.tag == POSTED && c.err != PKV_ERR_OK && kv->late == PKV_ERR_OK)
            kv->late = c.err < PKV_ERR_COUNT ? (enum pkv_err)c.err : PKV_ERR_INVALID;
    }
    return false;
}

static void sleep_slice(struct pkv *kv)
{
    struct pkv_index *cq = &kv->region->cq_tail;
    struct timespec slice = {0, SLICE_NS};
    pkv_store32(&cq->waiting, 1);
    pkv_fence();
    uint32_t seen = pkv_load32(&cq->value);
    if (seen == kv->cq_head)
        syscall(SYS_futex, &cq->value, FUTEX_WAIT, seen, &slice, NULL, 0);
    pkv_store32(&cq->waiting, 0);
}

static int wait_for(struct pkv *kv, uint32_t tag, struct pkv_completion *ret)
{
    uint64_t begin = clock_ns(), deadline = begin + kv->timeout_ms * 1000000ull, spin = begin + kv->spin_us * 1000ull;
    for (;;) {
        for (uint32_t i = 0; i < SPIN_LOOKS; i++) {
            if (reap(kv, tag, ret))
                return 0;
            relax();
        }
        uint64_t now = clock_ns();
        if (now < spin)
            continue;
        sleep_slice(kv);
        if (reap(kv, tag, ret))
            return 0;
        int r = daemon_check(kv);
        if (r)
            return r;
        if (now >= deadline)
            return -PKV_ERR_TIMEOUT;
    }
}

static int push(struct pkv *kv, struct pkv_submission *s)
{
    uint64_t deadline = clock_ns() + kv->timeout_ms * 1000000ull;
    while (!pkv_sq_push(kv->region, &kv->sq_tail, s)) {
        struct pkv_completion ignored;
        (void)reap(kv, POSTED - 1, &ignored); /* no call has this tag */
        int r = daemon_check(kv);
        if (r)
            return r;
        if (clock_ns() > deadline)
            return -PKV_ERR_RING_FULL;
    }
    if (pkv_load32(&kv->region->sq_tail.waiting)) {
        uint64_t one = 1;
        ssize_t n = write(kv->event, &one, sizeof(one));
        (void)n; /* fails only if it is raised already */
    }
    return 0;
}

int ring_call(struct pkv *kv, const struct pkv_submission *submission, struct pkv_completion *ret)
{
    struct pkv_completion c;
    struct pkv_submission s = *submission;
    if (kv->gone)
        return daemon_check(kv);
    s.tag = kv->next_tag++ % (POSTED - 1);
    int r = push(kv, &s);
    if (!r)
        r = wait_for(kv, s.tag, &c);
    if (r)
        return r;
    if (c.err != PKV_ERR_OK)
        return c.err < PKV_ERR_COUNT ? -(int)c.err : -PKV_ERR_INVALID;
    if (ret)
        *ret = c;
    return 0;
}

static int post(struct pkv *kv, const struct pkv_submission *submission, uint32_t tag)
{
    struct pkv_submission s = *submission;
    if (kv->gone)
        return daemon_check(kv);
    s.tag = tag;
    struct pkv_completion ignored;
    (void)reap(kv, POSTED - 1, &ignored);
    return push(kv, &s);
}

int ring_post(struct pkv *kv, const struct pkv_submission *submission)
{
    return post(kv, submission, POSTED);
}

int ring_ask(struct pkv *kv, const struct pkv_submission *submission)
{
    return post(kv, submission, ASKED);
}

int pkv_ping(struct pkv *kv, uint64_t *ret_ns)
{
    struct pkv_submission s = {.op = PKV_OP_NOP};
    uint64_t begin = clock_ns();
    int r = ring_call(kv, &s, NULL);
    if (!r && ret_ns)
        *ret_ns = clock_ns() - begin;
    return kv_done(kv, r);
}
