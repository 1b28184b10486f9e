/* Threads that do what the loop must not wait for: copies, and served selects. A job is embedded in the caller's own struct;
 * the caller owns it again when the loop reaps it. Owner of everything but the queues: the loop's thread. */
#ifndef CACHESVC_MOVER_H
#define CACHESVC_MOVER_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct mover_job {
    void (*run)(struct mover_job *job);  /* on a mover's thread */
    void (*done)(struct mover_job *job); /* on the loop's thread */
    struct mover_job *next;
};

struct mover_queue {
    struct mover_job *first, *last;
    uint32_t count;
};

#define MOVER_THREADS_MAX 16u
struct mover {
    pthread_mutex_t lock;
    pthread_cond_t more;
    pthread_t threads[MOVER_THREADS_MAX];
    uint32_t count;
    bool stop;
    int event;           /* eventfd that says that jobs are done; owned by the daemon */
    uint32_t done_count; /* atomic: jobs that wait to be reaped */
    struct mover_queue todo, done;
};

/* -errno. `event` is written when a job is done. */
int mover_start(struct mover *mover, uint32_t threads, int event);
/* Finishes what was submitted, then ends the threads. What was not reaped is reaped by the caller. */
void mover_stop(struct mover *mover);
void mover_submit(struct mover *mover, struct mover_job *job);
/* Many at once, linked by `next`: one lock and one wake-up for all. */
void mover_submit_list(struct mover *mover, const struct mover_queue *jobs);
void mover_queue_push(struct mover_queue *queue, struct mover_job *job);
/* Calls done() of every finished job; false if there was none. */
bool mover_reap(struct mover *mover);
static inline bool mover_has_done(const struct mover *mover)
{
    return __atomic_load_n(&mover->done_count, __ATOMIC_ACQUIRE) > 0;
}

#endif
