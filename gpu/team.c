/* A small team of threads for parallel loops. The caller works too. */
#include "gpu/internal.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

static void work(struct gpu_team *team, uint32_t thread)
{
    for (;;) {
        uint64_t i = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
        if (i >= team->items)
            return;
        team->task(team->context, i, thread);
    }
}

struct member {
    struct gpu_team *team;
    uint32_t thread;
};

/* A round often follows the last one closely, and waking a thread takes longer than a short round. */
#define SPINS 4000

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void spin_for_round(const struct gpu_team *team, uint64_t seen)
{
    for (int i = 0; i < SPINS && __atomic_load_n(&team->round, __ATOMIC_RELAXED) == seen; i++)
        relax();
}

static void *member_main(void *arg)
{
    struct member m = *(struct member *)arg;
    free(arg);
    uint64_t seen = 0;
    for (;;) {
        spin_for_round(m.team, seen);
        pthread_mutex_lock(&m.team->lock);
        while (m.team->round == seen && !m.team->stop)
            pthread_cond_wait(&m.team->go, &m.team->lock);
        if (m.team->stop)
            break;
        seen = m.team->round;
        pthread_mutex_unlock(&m.team->lock);
        work(m.team, m.thread);
        pthread_mutex_lock(&m.team->lock);
        if (__atomic_sub_fetch(&m.team->busy, 1, __ATOMIC_RELEASE) == 0)
            pthread_cond_signal(&m.team->done);
        pthread_mutex_unlock(&m.team->lock);
    }
    pthread_mutex_unlock(&m.team->lock);
    return NULL;
}

int gpu_team_start(struct gpu_team *team, uint32_t threads)
{
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->go, NULL);
    pthread_cond_init(&team->done, NULL);
    for (uint32_t i = 1; i < threads; i++) {
        struct member *m = malloc(sizeof(*m));
        if (m)
            *m = (struct member){team, i};
        if (!m || pthread_create(&team->threads[team->size], NULL, member_main, m)) {
            free(m);
            gpu_team_stop(team);
            return -PKV_ERR_NO_MEMORY;
        }
        team->size++;
    }
    return 0;
}

void gpu_team_stop(struct gpu_team *team)
{
    pthread_mutex_lock(&team->lock);
    team->stop = 1;
    pthread_cond_broadcast(&team->go);
    pthread_mutex_unlock(&team->lock);
    for (uint32_t i = 0; i < team->size; i++)
        pthread_join(team->threads[i], NULL);
    pthread_cond_destroy(&team->done);
    pthread_cond_destroy(&team->go);
    pthread_mutex_destroy(&team->lock);
}

void gpu_team_run(struct gpu_team *team, gpu_task *task, void *context, uint64_t items)
{
    if (!team->size || items < 2) {
        for (uint64_t i = 0; i < items; i++)
            task(context, i, 0);
        return;
    }
    pthread_mutex_lock(&team->lock);
    team->task = task;
    team->context = context;
    team->items = items;
    team->next = 0;
    __atomic_store_n(&team->busy, team->size, __ATOMIC_RELAXED);
    __atomic_store_n(&team->round, team->round + 1, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&team->go);
    pthread_mutex_unlock(&team->lock);
    work(team, 0);
    for (int i = 0; i < SPINS && __atomic_load_n(&team->busy, __ATOMIC_ACQUIRE); i++)
        relax();
    pthread_mutex_lock(&team->lock);
    while (team->busy)
        pthread_cond_wait(&team->done, &team->lock);
    pthread_mutex_unlock(&team->lock);
}

void *gpu_buffer_get(struct gpu_buffer *buffer, uint64_t bytes)
{
    if (buffer->bytes >= bytes && buffer->data)
        return buffer->data;
    free(buffer->data);
    uint64_t room = PKV_ALIGN_UP(bytes + bytes / 4 + 64, 64);
    buffer->data = aligned_alloc(64, room);
    buffer->bytes = buffer->data ? room : 0;
    return buffer->data;
}

uint64_t gpu_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}
