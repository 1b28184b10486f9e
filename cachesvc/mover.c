/* Two queues under one lock, which is held for a few instructions. A thread takes its share of what waits, so that many short
 * jobs do not fight for the lock. */
#include "cachesvc/mover.h"

#include <errno.h>
#include <unistd.h>

#define SHARE_MAX 8u /* jobs that a thread takes at once */

void mover_queue_push(struct mover_queue *q, struct mover_job *job)
{
    job->next = NULL;
    if (q->first)
        q->last->next = job;
    else
        q->first = job;
    q->last = job;
    q->count++;
}

static void append(struct mover_queue *q, const struct mover_queue *more)
{
    if (!more->first)
        return;
    if (q->first)
        q->last->next = more->first;
    else
        q->first = more->first;
    q->last = more->last;
    q->count += more->count;
}

/* From the head: one, or an equal share of what waits. */
static struct mover_queue share(struct mover *m)
{
    struct mover_queue *q = &m->todo, mine = {NULL, NULL, 0};
    uint32_t want = m->count > 1 ? q->count / (m->count + 1) : 1; /* a lone thread fights with nobody: each answer at once */
    want = want < 1 ? 1 : want > SHARE_MAX ? SHARE_MAX : want;
    while (q->first && mine.count < want) {
        struct mover_job *job = q->first;
        q->first = job->next;
        q->count--;
        mover_queue_push(&mine, job);
    }
    return mine;
}

static void *mover_main(void *arg)
{
    struct mover *m = arg;
    pthread_setname_np(pthread_self(), "mover"); /* for top -H */
    pthread_mutex_lock(&m->lock);
    for (;;) {
        struct mover_queue mine = share(m);
        if (!mine.first && m->stop)
            break;
        if (!mine.first) {
            pthread_cond_wait(&m->more, &m->lock);
            continue;
        }
        pthread_mutex_unlock(&m->lock);
        for (struct mover_job *job = mine.first; job; job = job->next)
            job->run(job);
        pthread_mutex_lock(&m->lock);
        append(&m->done, &mine);
        if (__atomic_fetch_add(&m->done_count, mine.count, __ATOMIC_ACQ_REL) == 0) {
            uint64_t one = 1;
            ssize_t n = write(m->event, &one, sizeof(one)); /* full only if nobody has reaped 2^64 jobs */
            (void)n;
        }
    }
    pthread_mutex_unlock(&m->lock);
    return NULL;
}

int mover_start(struct mover *m, uint32_t threads, int event)
{
    *m = (struct mover){.event = event};
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->more, NULL);
    while (m->count < threads && m->count < MOVER_THREADS_MAX) {
        int r = pthread_create(&m->threads[m->count], NULL, mover_main, m);
        if (r) {
            mover_stop(m);
            return -r;
        }
        pthread_mutex_lock(&m->lock); /* those that run already look at it */
        m->count++;
        pthread_mutex_unlock(&m->lock);
    }
    return 0;
}

void mover_stop(struct mover *m)
{
    pthread_mutex_lock(&m->lock);
    m->stop = true;
    pthread_cond_broadcast(&m->more);
    pthread_mutex_unlock(&m->lock);
    for (uint32_t i = 0; i < m->count; i++)
        pthread_join(m->threads[i], NULL);
    m->count = 0;
}

void mover_submit(struct mover *m, struct mover_job *job)
{
    pthread_mutex_lock(&m->lock);
    mover_queue_push(&m->todo, job);
    pthread_cond_signal(&m->more);
    pthread_mutex_unlock(&m->lock);
}

void mover_submit_list(struct mover *m, const struct mover_queue *jobs)
{
    pthread_mutex_lock(&m->lock);
    append(&m->todo, jobs);
    pthread_cond_broadcast(&m->more);
    pthread_mutex_unlock(&m->lock);
}

bool mover_reap(struct mover *m)
{
    if (!mover_has_done(m))
        return false;
    pthread_mutex_lock(&m->lock);
    struct mover_job *job = m->done.first;
    m->done = (struct mover_queue){0};
    __atomic_store_n(&m->done_count, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&m->lock);
    while (job) {
        struct mover_job *next = job->next;
        job->done(job);
        job = next;
    }
    return true;
}
