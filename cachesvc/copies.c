/* On the host a mover's thread copies and checksums in one pass. Where the pool lies on a device, its courier copies, and then
 * a mover's thread checksums the arena's copy: what the checksum speaks of is what is at home. A copy that fails is told to the
 * core, which tries it once more and otherwise keeps the block in the pool; a lost device is the loop's matter (loss.c). */
#include "cachesvc/copies.h"

#include "cachesvc/loss.h"
#include "cachesvc/scrub.h"

#include <errno.h>
#include <stdlib.h>

#define HOST_THREADS   4u
#define DEVICE_THREADS 8u             /* checksums for a link of 55 GB/s; 16 only disturb its writes */
#define HANG_NS        30000000000ull /* 16 MiB take a third of a millisecond; a debugger may hold the GPU for a while */

struct copy_job {
    struct mover_job job;
    struct courier_job carry;
    struct daemon *daemon;
    uint32_t copy;
    uint64_t to, from, bytes, checksum, begin_ns, ns;
    uint64_t home; /* to or from: what of them is in the arena; 0: neither */
    int err;       /* 0 or -enum pkv_err */
};

static void host_run(struct mover_job *job)
{
    struct copy_job *c = PKV_CONTAINER_OF(job, struct copy_job, job);
    c->checksum = offload_copy((void *)(uintptr_t)c->to, (const void *)(uintptr_t)c->from, c->bytes);
    c->ns = daemon_now_ns() - c->begin_ns;
}

static void device_run(struct mover_job *job)
{
    struct copy_job *c = PKV_CONTAINER_OF(job, struct copy_job, job);
    if (!c->err && c->home)
        c->checksum = offload_checksum((const void *)(uintptr_t)c->home, c->bytes);
    c->ns = daemon_now_ns() - c->begin_ns;
}

static void check_run(struct mover_job *job)
{
    struct copy_job *c = PKV_CONTAINER_OF(job, struct copy_job, job);
    c->checksum = offload_checksum((const void *)(uintptr_t)c->home, c->bytes);
}

static void carried(void *context, struct courier_job *const *jobs, uint32_t count)
{
    struct daemon *d = context;
    struct mover_queue list = {NULL, NULL, 0};
    for (uint32_t i = 0; i < count; i++) {
        struct copy_job *c = PKV_CONTAINER_OF(jobs[i], struct copy_job, carry);
        c->err = c->carry.err;
        mover_queue_push(&list, &c->job);
    }
    mover_submit_list(&d->copies, &list);
}

static void done(struct mover_job *job)
{
    struct copy_job *c = PKV_CONTAINER_OF(job, struct copy_job, job);
    struct daemon *d = c->daemon;
    d->counters.copy_bytes += c->err ? 0 : c->bytes;
    d->counters.copy_ns += c->ns;
    d->counters.copies_failed += c->err != 0;
    if (c->err == -PKV_ERR_GPU_LOST)
        loss_report(d, "a copy between pool and arena failed");
    core_copied(d->core, c->copy, !c->err, c->checksum);
    scrub_tell(d);
    free(c);
}

static void checked(struct mover_job *job)
{
    struct copy_job *c = PKV_CONTAINER_OF(job, struct copy_job, job);
    core_copied(c->daemon->core, c->copy, true, c->checksum);
    scrub_looked(c->daemon);
    free(c);
}

static struct courier *courier_of(struct daemon *d, uint64_t place)
{
    const struct gpu_device *device = memory_device(&d->memory, place);
    for (uint32_t i = 0; i < d->devices.count; i++)
        if (d->devices.device[i] == device)
            return &d->couriers[i];
    return NULL;
}

void copies_act(struct daemon *d, const struct core_action *a, uint64_t now_ns)
{
    struct copy_job *c = malloc(sizeof(*c));
    bool check = a->kind == CORE_CHECK;
    if (!c) {
        core_copied(d->core, a->copy, false, 0);
        if (check)
            scrub_looked(d);
        return;
    }
    *c = (struct copy_job){.job = {.run = check ? check_run : host_run, .done = check ? checked : done},
                           .daemon = d,
                           .copy = a->copy,
                           .to = check ? 0 : memory_address(&d->memory, a->to, a->bytes),
                           .from = memory_address(&d->memory, a->from, a->bytes),
                           .bytes = a->bytes,
                           .begin_ns = now_ns};
    c->home = pkv_place_tier(a->from) == PKV_TIER_ARENA ? c->from : pkv_place_tier(a->to) == PKV_TIER_ARENA ? c->to : 0;
    if (check) {
        mover_submit(&d->copies, &c->job);
        return;
    }
    struct courier *source = courier_of(d, a->from), *target = courier_of(d, a->to);
    if (!source && !target) {
        mover_submit(&d->copies, &c->job);
        return;
    }
    c->job.run = device_run;
    c->carry = (struct courier_job){.direction = !target   ? GPU_TO_HOST
                                                 : !source ? GPU_TO_DEVICE
                                                           : GPU_ON_DEVICE,
                                    .copy = {.to = c->to, .from = c->from, .bytes = c->bytes}};
    courier_stage(source ? source : target, &c->carry);
}

void copies_flush(struct daemon *d)
{
    for (uint32_t i = 0; i < d->devices.count; i++)
        courier_flush(&d->couriers[i]);
}

int copies_start(struct daemon *d, uint32_t threads)
{
    int r = mover_start(&d->copies, PKV_MIN(threads, d->devices.count ? DEVICE_THREADS : HOST_THREADS), d->copies_event);
    for (uint32_t i = 0; i < d->devices.count && !r; i++)
        r = courier_start(&d->couriers[i], d->devices.device[i], HANG_NS, carried, d);
    return r;
}

/* The couriers first: they hand their jobs to the movers. */
void copies_stop(struct daemon *d)
{
    for (uint32_t i = 0; i < d->devices.count; i++)
        courier_stop(&d->couriers[i]);
    if (d->copies.event > 0)
        mover_stop(&d->copies);
}
