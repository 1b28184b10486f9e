/* Calibrating a `code`, beside the serving path: for a model's first state, and again when the daemon asks for another one
 * because the model's alarm stands.
 *
 *   IDLE --the first state, or one that is wanted; a writer's keys or queries come--> GATHERING
 *        --enough of all layers--> SOLVING (a thread of its own) --solved, at the next call--> put at the daemon: IDLE
 *   only for the first: what each layer has gathered at GPU_LEARN_EARLY is copied, and solved likewise meanwhile; this worker's
 *   sequences without a state are signed with it (turn.c) until there is a state.
 *
 * No call waits for a solve; calibration_wait does, for whoever wants to know when. Failures: another worker was first, or the
 * daemon no longer wants it: what was gathered is dropped, and a solve under way ends within a layer's time; nothing can be
 * solved from it (a later state: not all of it), no memory, no thread: given up for this number, others may do it; the early
 * one fails: `sign` serves until the last; the connection or model is closed: the solve is ended likewise. None of these fails
 * the call that came by. Owner: the connection's thread; what is being solved belongs to the solving thread until `solved` is
 * set. */
#include "client/internal.h"

#include <unistd.h>

#define SLEEP_NS 1000000

static void solver_end(struct solver *s)
{
    if (!s->running)
        return;
    pthread_join(s->thread, NULL);
    if (s->fd >= 0)
        close(s->fd);
    *s = (struct solver){0};
}

static void drop_early(struct calibration *c)
{
    gpu_scheme_close(c->early);
    c->early = NULL, c->early_over = true;
}

static void drop(struct calibration *c)
{
    if (!c->number)
        return;
    __atomic_store_n(&c->solver.stop, true, __ATOMIC_RELAXED);
    solver_end(&c->solver);
    drop_early(c);
    gpu_scheme_close(c->learner);
    c->learner = NULL, c->number = 0;
}

static void give_up(struct calibration *c)
{
    c->given_up = c->number;
    drop(c);
}

void calibration_close(struct pkv_model *m)
{
    drop(&m->calibration);
}

/* ---- solving ---- */

static void *solve(void *argument)
{
    struct solver *s = argument;
    s->result = gpu_scheme_solve(s->scheme, s->all, &s->stop);
    if (!s->result && s->shares)
        s->result = state_export(s->scheme, &s->fd); /* many megabytes: not in a call */
    __atomic_store_n(&s->solved, true, __ATOMIC_RELEASE);
    return NULL;
}

static void solver_start(struct calibration *c, struct gpu_scheme *scheme)
{
    struct solver *s = &c->solver;
    bool last = scheme == c->learner;
    *s = (struct solver){.scheme = scheme, .shares = last, .all = last && c->number > 1, .fd = -1};
    s->running = !pthread_create(&s->thread, NULL, solve, s);
    if (!s->running) {
        *s = (struct solver){0};
        give_up(c);
    }
}

static bool enough(const struct pkv_model *m)
{
    const struct calibration *c = &m->calibration;
    uint32_t l = 0;
    while (l < m->geom.layers && gpu_scheme_gathered(c->learner, l, GPU_LEARN_TOKENS))
        l++;
    return l == m->geom.layers;
}

/* Solves what can be, one thing at a time. */
static void carry_on(struct pkv_model *m)
{
    struct calibration *c = &m->calibration;
    if (!c->number || c->solver.running)
        return;
    if (enough(m)) {
        drop_early(c);
        solver_start(c, c->learner);
    } else if (c->early && c->early_layers == m->geom.layers) {
        solver_start(c, c->early);
    }
}

static void share(struct pkv_model *m, const struct solver *done)
{
    struct calibration *c = &m->calibration;
    if (done->result)
        c->given_up = c->number;
    else if (!model_state_put(m, c->number, c->learner, done->fd))
        c->learner = NULL; /* a state of the model now */
    drop(c);
}

/* The thread is done. */
static void take_over(struct pkv_model *m)
{
    struct calibration *c = &m->calibration;
    struct solver done = c->solver;
    c->solver.fd = -1;
    solver_end(&c->solver);
    if (done.scheme == c->learner) {
        share(m, &done);
    } else {
        if (!done.result && !enough(m) && model_turn_early(m, c->early))
            c->early = NULL;
        drop_early(c);
        carry_on(m);
    }
    if (done.fd >= 0)
        close(done.fd);
}

void calibration_poll(struct pkv_model *m)
{
    struct calibration *c = &m->calibration;
    if (c->number == 1 && model_published(m).latest)
        drop(c);
    if (c->solver.running && __atomic_load_n(&c->solver.solved, __ATOMIC_ACQUIRE))
        take_over(m);
}

int calibration_wait(struct pkv_model *m)
{
    struct calibration *c = &m->calibration;
    uint64_t begin = clock_ns();
    for (calibration_poll(m); c->solver.running; calibration_poll(m)) {
        if (clock_ns() - begin > m->kv->timeout_ms * 1000000ull)
            return -PKV_ERR_TIMEOUT;
        nanosleep(&(struct timespec){0, SLEEP_NS}, NULL);
    }
    return 0;
}

/* ---- gathering ---- */

static int learner_open(struct pkv_model *m, struct gpu_scheme **ret)
{
    int r = model_scheme(m, ret);
    r = r ? r : gpu_scheme_gather(*ret, m->rope_base, m->rope_dims, m->rope_interleaved);
    if (r) {
        gpu_scheme_close(*ret);
        *ret = NULL;
    }
    return r;
}

static void begin(struct pkv_model *m, uint32_t number)
{
    struct calibration *c = &m->calibration;
    c->number = number, c->early_layers = 0, c->early_over = number > 1;
    if (learner_open(m, &c->learner))
        give_up(c);
}

static void copy_early(struct pkv_model *m, uint32_t layer)
{
    struct calibration *c = &m->calibration;
    if (c->early_over || c->early_layers == m->geom.layers || !gpu_scheme_gathered(c->learner, layer, GPU_LEARN_EARLY))
        return; /* when it is complete it may be the thread's */
    if (c->early && gpu_scheme_gathered(c->early, layer, 1))
        return;
    if (!c->early && learner_open(m, &c->early)) {
        c->early_over = true;
        return;
    }
    gpu_scheme_gathered_copy(c->learner, layer, c->early);
    c->early_layers++;
}

void calibration_observe(struct pkv_model *m, const struct gpu_observation *o)
{
    struct calibration *c = &m->calibration;
    struct pkv_model_states published = model_published(m);
    uint32_t number = published.latest ? published.wanted : 1;
    if (number == 1 && o->tokens < CALIBRATION_CALL)
        return;
    if (c->number && c->number != number)
        drop(c);
    if (!c->number && number && number != c->given_up)
        begin(m, number);
    if (!c->learner || c->solver.scheme == c->learner)
        return;
    (void)gpu_scheme_observe(c->learner, o);
    copy_early(m, o->layer);
    carry_on(m);
}
