/* Happy path: wait for a job -> take all of its direction from the queue's head, up to a batch -> in the order of their
 * destinations, so that neighbours become one copy -> start -> as long as more wait and fewer than COURIER_DEPTH batches are
 * under way, again -> wait for the oldest -> hand its jobs back.
 *
 * Failures: a call of copy fails: its jobs fail, nothing of it is under way; a wait fails: the jobs of that batch fail; the
 * device is lost, or a batch hangs: its jobs and all later ones fail with GPU_LOST, at once. What hangs may still write: the
 * caller must reuse none of that memory, and end (loss.c). */
#include "cachesvc/courier.h"

#include <stdlib.h>

static int by_destination(const void *a, const void *b)
{
    const struct courier_job *x = *(struct courier_job *const *)a, *y = *(struct courier_job *const *)b;
    return (x->copy.to > y->copy.to) - (x->copy.to < y->copy.to);
}

/* Jobs from the queue's head; waits for one unless batches are under way. False: stopped, and nothing is left. */
static bool take(struct courier *c, struct courier_batch *b)
{
    b->count = 0;
    pthread_mutex_lock(&c->lock);
    while (!c->first && !c->stop && !c->under_way)
        pthread_cond_wait(&c->more, &c->lock);
    bool end = !c->first && c->stop && !c->under_way;
    while (c->first && b->count < COURIER_BATCH && (!b->count || c->first->direction == b->jobs[0]->direction)) {
        b->jobs[b->count++] = c->first;
        c->first = c->first->next;
    }
    pthread_mutex_unlock(&c->lock);
    return !end;
}

static void hand_back(struct courier *c, struct courier_batch *b, int err)
{
    for (uint32_t i = 0; i < b->count; i++)
        b->jobs[i]->err = err;
    c->carried(c->context, b->jobs, b->count);
    b->count = 0;
}

static void finish_oldest(struct courier *c)
{
    struct courier_batch *b = &c->batches[c->oldest];
    int r = c->broken ? c->broken : gpu_device_wait(c->device, b->ticket, c->hang_ns);
    if (r == -PKV_ERR_TIMEOUT || r == -PKV_ERR_GPU_LOST)
        r = c->broken = -PKV_ERR_GPU_LOST;
    c->oldest = (c->oldest + 1) % COURIER_DEPTH;
    c->under_way--;
    hand_back(c, b, r);
}

static void start(struct courier *c, struct courier_batch *b)
{
    struct gpu_copy copies[COURIER_BATCH];
    qsort(b->jobs, b->count, sizeof(*b->jobs), by_destination);
    for (uint32_t i = 0; i < b->count; i++)
        copies[i] = b->jobs[i]->copy;
    int r = c->broken ? c->broken : gpu_device_copy(c->device, b->jobs[0]->direction, copies, b->count, &b->ticket);
    if (r == -PKV_ERR_GPU_LOST)
        c->broken = r;
    if (r)
        hand_back(c, b, r);
    else
        c->under_way++;
}

static void *courier_main(void *arg)
{
    struct courier *c = arg;
    pthread_setname_np(pthread_self(), "courier"); /* for top -H */
    for (;;) {
        struct courier_batch *b = &c->batches[(c->oldest + c->under_way) % COURIER_DEPTH];
        if (!take(c, b))
            return NULL;
        bool more = b->count > 0;
        if (more)
            start(c, b);
        if (c->under_way && (!more || c->under_way == COURIER_DEPTH))
            finish_oldest(c);
    }
}

int courier_start(struct courier *c, struct gpu_device *device, uint64_t hang_ns, courier_carried *carried, void *context)
{
    *c = (struct courier){.device = device, .hang_ns = hang_ns, .carried = carried, .context = context};
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->more, NULL);
    int r = pthread_create(&c->thread, NULL, courier_main, c);
    c->started = !r;
    return -r;
}

void courier_stop(struct courier *c)
{
    if (!c->started)
        return;
    pthread_mutex_lock(&c->lock);
    c->stop = true;
    pthread_cond_signal(&c->more);
    pthread_mutex_unlock(&c->lock);
    pthread_join(c->thread, NULL);
    c->started = false;
}

void courier_stage(struct courier *c, struct courier_job *job)
{
    job->next = NULL;
    if (c->staged_first)
        c->staged_last->next = job;
    else
        c->staged_first = job;
    c->staged_last = job;
}

void courier_flush(struct courier *c)
{
    if (!c->staged_first)
        return;
    pthread_mutex_lock(&c->lock);
    if (c->first)
        c->last->next = c->staged_first;
    else
        c->first = c->staged_first;
    c->last = c->staged_last;
    pthread_cond_signal(&c->more);
    pthread_mutex_unlock(&c->lock);
    c->staged_first = NULL;
}

void courier_submit(struct courier *c, struct courier_job *job)
{
    courier_stage(c, job);
    courier_flush(c);
}
