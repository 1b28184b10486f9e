/* Single producer, single consumer accessors over the region's rings. Each side passes its own copy of the index that
 * it owns, so the other side's writes can confuse nobody but itself. Not for device code (atomics). */
#ifndef PROTO_RING_H
#define PROTO_RING_H

#include "proto/region.h"

#include <stdbool.h>
#include <string.h>

static inline uint32_t pkv_load32(const uint32_t *p)
{
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline void pkv_store32(uint32_t *p, uint32_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
static inline uint64_t pkv_load64(const uint64_t *p)
{
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline void pkv_store64(uint64_t *p, uint64_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
static inline void pkv_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Worker: false where the ring is full. `tail` is the worker's own count of entries pushed. */
static inline bool pkv_sq_push(struct pkv_region *r, uint32_t *tail, const struct pkv_submission *s)
{
    if (*tail - pkv_load32(&r->sq_head.value) >= PKV_RING_ENTRIES)
        return false;
    r->sq[*tail % PKV_RING_ENTRIES] = *s;
    pkv_store32(&r->sq_tail.value, ++*tail);
    pkv_fence();
    return true;
}

/* Daemon: copies the next entry out, false where there is none. A tail that claims more than a ring's worth is read as
 * whatever lies in the ring: the entries are checked one by one anyway. `head` is the daemon's own count. */
static inline bool pkv_sq_pop(struct pkv_region *r, uint32_t *head, struct pkv_submission *ret)
{
    if (pkv_load32(&r->sq_tail.value) == *head)
        return false;
    memcpy(ret, &r->sq[*head % PKV_RING_ENTRIES], sizeof(*ret));
    pkv_store32(&r->sq_head.value, ++*head);
    return true;
}

/* Daemon: false where the worker does not reap its completions. `tail` is the daemon's own count. */
static inline bool pkv_cq_push(struct pkv_region *r, uint32_t *tail, const struct pkv_completion *c)
{
    if (*tail - pkv_load32(&r->cq_head.value) >= PKV_RING_ENTRIES)
        return false;
    r->cq[*tail % PKV_RING_ENTRIES] = *c;
    pkv_store32(&r->cq_tail.value, ++*tail);
    pkv_fence();
    return true;
}

static inline bool pkv_cq_pop(struct pkv_region *r, uint32_t *head, struct pkv_completion *ret)
{
    if (pkv_load32(&r->cq_tail.value) == *head)
        return false;
    memcpy(ret, &r->cq[*head % PKV_RING_ENTRIES], sizeof(*ret));
    pkv_store32(&r->cq_head.value, ++*head);
    return true;
}

/* A reader of tables and places: after this returns, whatever it finds in a table stays in its place until the slot is
 * idle again. The fence pairs with the daemon's between changing a table and reading the workers' epochs. */
static inline void pkv_epoch_enter_slot(struct pkv_region *r, const struct pkv_control *c, uint32_t slot)
{
    pkv_store64(&r->epoch[slot], pkv_load64(&c->epoch));
    pkv_fence();
}

/* The oldest read in flight; idle is the greatest number. */
static inline uint64_t pkv_epoch_oldest(const struct pkv_region *r)
{
    uint64_t oldest = PKV_EPOCH_IDLE;
    for (uint32_t i = 0; i < PKV_EPOCH_SLOTS; i++) {
        uint64_t epoch = pkv_load64(&r->epoch[i]); /* once: the worker may write anything at any moment */
        oldest = PKV_MIN(oldest, epoch);
    }
    return oldest;
}

/* The calling thread's own slot. */
static inline void pkv_epoch_enter(struct pkv_region *r, const struct pkv_control *c)
{
    pkv_epoch_enter_slot(r, c, 0);
}

static inline void pkv_epoch_leave(struct pkv_region *r)
{
    pkv_store64(&r->epoch[0], PKV_EPOCH_IDLE);
}

#endif
