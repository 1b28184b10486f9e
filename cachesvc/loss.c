/* A GPU that met a fault answers no call of this process any more (a kernel of a worker that faults ends the worker's work
 * alone; a fault of the memory, the link or the driver, and of a kernel under MPS, ends ours). The pool is gone with it.
 *
 *   WELL --a call says GPU_LOST, or a copy hangs--> TOLD --TOLD_NS later--> ENDED --the loop ends--> exit status 3
 *
 * TOLD: the control page says it, so that workers which ask nobody see it at their next call; every submission, hello and chunk
 * is answered GPU_LOST; nothing is granted, no block is copied home, none that is home is touched. Who waits for room gets his
 * answer from the control page too, for all sleepers are woken. ENDED: the process must go, for only a new one can use the
 * device: a supervisor starts it again. What has been parked in files before is as it was; what is in pool and arena is gone.
 */
#include "cachesvc/loss.h"

#include "cachesvc/worker.h"

#define TOLD_NS 250000000ull

void loss_report(struct daemon *d, const char *what)
{
    if (loss_happened(&d->loss))
        return;
    d->loss = (struct loss){LOSS_TOLD, daemon_now_ns()};
    log_error("GPU lost (%s): %s; the daemon ends with status %d so that it is started again", what,
              pkv_err_text(PKV_ERR_GPU_LOST), DAEMON_EXIT_GPU_LOST);
    pkv_store64(&d->control->lost, PKV_ERR_GPU_LOST);
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++)
        if (d->workers[i])
            worker_wake(d->workers[i]);
}

bool loss_turn(struct daemon *d, uint64_t now_ns)
{
    if (!loss_happened(&d->loss) && devices_lost(&d->devices))
        loss_report(d, "its driver says so");
    if (d->loss.state == LOSS_TOLD && now_ns - d->loss.told_ns > TOLD_NS)
        d->loss.state = LOSS_ENDED;
    return d->loss.state == LOSS_ENDED;
}
