/* One pass over the chunks: touch, register.
 * Failures: the driver refuses the first chunk: the daemon does not start; a later one (the locked-memory limit): said once,
 * those chunks stay unpinned; a chunk changes its tenant meanwhile: it is taken, and pinned again when it is given back; the
 * daemon ends: after the chunk at hand. */
#include "cachesvc/pins.h"

#include "cachesvc/log.h"

#include <stdlib.h>
#include <time.h>

/* Under the lock. Where kernels see it must be where we do: places are told apart by their addresses alone. */
static int pin(struct pins *p, uint32_t chunk)
{
    struct offload_chunk *c = &p->chunks[chunk];
    uint64_t address = 0;
    int r = p->pinned[chunk] ? 0 : offload_chunk_populate(c, p->populate) ? -PKV_ERR_NO_MEMORY : 0;
    if (r || p->pinned[chunk])
        return r;
    r = gpu_device_register(p->device, c->base, c->bytes, false, &address);
    if (!r && address != (uint64_t)(uintptr_t)c->base) {
        gpu_device_unregister(p->device, c->base);
        r = -PKV_ERR_GPU_REGISTER;
    }
    p->pinned[chunk] = !r;
    if (!r)
        __atomic_fetch_add(&p->done, 1, __ATOMIC_RELEASE);
    return r;
}

static void unpin(struct pins *p, uint32_t chunk)
{
    if (p->pinned[chunk])
        gpu_device_unregister(p->device, p->chunks[chunk].base);
    __atomic_fetch_sub(&p->done, p->pinned[chunk], __ATOMIC_RELEASE);
    p->pinned[chunk] = false;
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void *main_pins(void *arg)
{
    struct pins *p = arg;
    pthread_setname_np(pthread_self(), "pins");
    double begin = seconds();
    int r = 0;
    for (uint32_t c = 0; c < p->count && !r && !__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE); c++) {
        pthread_mutex_lock(&p->lock);
        r = pin(p, c);
        pthread_mutex_unlock(&p->lock);
    }
    __atomic_store_n(&p->refused, r, __ATOMIC_RELEASE);
    pthread_mutex_lock(&p->lock);
    const char *pages = offload_pages_name(p->chunks[0].pages);
    pthread_mutex_unlock(&p->lock);
    uint32_t done = __atomic_load_n(&p->done, __ATOMIC_ACQUIRE);
    if (r)
        log_warn("only %u of %u chunks of the arena are pinned, copies to the others are slower: %s", done, p->count,
                 pkv_err_text((uint32_t)-r));
    else
        log_info("%u chunks of the arena pinned in %.1f s (%s)", done, seconds() - begin, pages);
    return NULL;
}

int pins_start(struct pins *p, struct gpu_device *device, struct offload_chunk *chunks, uint32_t count, uint32_t populate)
{
    if (!populate)
        return 0;
    *p = (struct pins){.device = device, .chunks = chunks, .count = count, .populate = populate};
    p->pinned = calloc(count, sizeof(*p->pinned));
    pthread_mutex_init(&p->lock, NULL);
    int r = p->pinned ? pin(p, 0) : -PKV_ERR_NO_MEMORY;
    if (!r)
        r = pthread_create(&p->thread, NULL, main_pins, p) ? -PKV_ERR_NO_MEMORY : 0;
    p->started = !r;
    if (!r)
        return 0;
    log_error("the arena cannot be pinned for the GPU: %s", pkv_err_text((uint32_t)-r));
    for (uint32_t c = 0; p->pinned && c < count; c++)
        unpin(p, c);
    free(p->pinned);
    return pkv_err_status((uint32_t)-r);
}

void pins_stop(struct pins *p)
{
    if (!p->started)
        return;
    __atomic_store_n(&p->stop, true, __ATOMIC_RELEASE);
    pthread_join(p->thread, NULL);
    for (uint32_t c = 0; c < p->count; c++)
        unpin(p, c);
    free(p->pinned);
    *p = (struct pins){.started = false};
}

void pins_take(struct pins *p, uint32_t chunk)
{
    if (!p->started || chunk == PINS_NONE)
        return;
    pthread_mutex_lock(&p->lock);
    unpin(p, chunk);
}

void pins_give(struct pins *p, uint32_t chunk)
{
    if (!p->started || chunk == PINS_NONE)
        return;
    if (!__atomic_load_n(&p->refused, __ATOMIC_ACQUIRE))
        (void)pin(p, chunk); /* unpinned it is slower, not wrong */
    pthread_mutex_unlock(&p->lock);
}
