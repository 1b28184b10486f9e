/* Calibrating a `code` again, beside the serving path, when the daemon asks for it because the model's alarm stands.
 *
 *   IDLE --wanted, a writer's keys or queries come--> GATHERING --enough of all layers--> SOLVING (a thread of its own)
 *        --solved, at the next call--> shared as the state that was wanted: IDLE. New sequences begin with it; those that are
 * there keep theirs (state.c).
 *
 * Failures: the daemon no longer wants it, or another worker was first: what was gathered is dropped; nothing can be solved
 * from it, or no memory, no thread: given up for this number, others may do it; the connection or model is closed: the thread
 * is waited for (it computes, a second or two). None of these fails the call that came by. Owner: the connection's thread; the
 * scheme belongs to the solving thread until `solved` is set. */
#include "client/internal.h"

static void drop(struct recalibration *c)
{
    if (c->phase == RECALIBRATION_SOLVING)
        pthread_join(c->thread, NULL);
    gpu_scheme_close(c->scheme);
    c->scheme = NULL, c->phase = RECALIBRATION_IDLE;
}

static void give_up(struct recalibration *c)
{
    c->given_up = c->number;
    drop(c);
}

void recalibration_close(struct pkv_model *m)
{
    drop(&m->recalibration);
}

static void *solve(void *argument)
{
    struct recalibration *c = argument;
    c->result = gpu_scheme_solve(c->scheme);
    __atomic_store_n(&c->solved, true, __ATOMIC_RELEASE);
    return NULL;
}

static void begin(struct pkv_model *m, uint32_t number)
{
    struct recalibration *c = &m->recalibration;
    c->number = number, c->solved = false;
    if (model_learner(m, &c->scheme)) {
        c->scheme = NULL, c->given_up = number;
        return;
    }
    gpu_scheme_defer(c->scheme);
    c->phase = RECALIBRATION_GATHERING;
}

static void gather(struct recalibration *c, const struct gpu_observation *o)
{
    (void)gpu_scheme_observe(c->scheme, o);
    if (!gpu_scheme_gathered(c->scheme))
        return;
    if (pthread_create(&c->thread, NULL, solve, c))
        give_up(c);
    else
        c->phase = RECALIBRATION_SOLVING;
}

/* The thread is done. */
static void share(struct pkv_model *m)
{
    struct recalibration *c = &m->recalibration;
    pthread_join(c->thread, NULL);
    c->phase = RECALIBRATION_IDLE;
    int r = c->result ? c->result : model_state_put(m, c->number, c->scheme);
    if (c->result)
        give_up(c);
    else if (r)
        drop(c);
    c->scheme = NULL; /* it is a state of the model now */
}

void recalibration_observe(struct pkv_model *m, const struct gpu_observation *o)
{
    struct recalibration *c = &m->recalibration;
    uint32_t wanted = model_published(m).wanted;
    if (c->phase == RECALIBRATION_GATHERING && wanted != c->number)
        drop(c);
    if (c->phase == RECALIBRATION_IDLE && wanted && wanted != c->given_up)
        begin(m, wanted);
    if (c->phase == RECALIBRATION_GATHERING)
        gather(c, o);
    else if (c->phase == RECALIBRATION_SOLVING && __atomic_load_n(&c->solved, __ATOMIC_ACQUIRE))
        share(m);
}
