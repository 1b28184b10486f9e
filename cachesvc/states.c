/* What workers learnt, kept for others; see states.h. */
#include "cachesvc/states.h"

#include "cachesvc/daemon.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

void states_init(struct states *s)
{
    for (uint32_t m = 0; m < PKV_MODELS_MAX; m++)
        for (uint32_t i = 0; i < STATES_KEPT; i++)
            s[m].kept[i].fd = -1;
}

void states_close(struct states *s)
{
    for (uint32_t m = 0; m < PKV_MODELS_MAX; m++)
        for (uint32_t i = 0; i < STATES_KEPT; i++)
            if (s[m].kept[i].fd >= 0)
                close(s[m].kept[i].fd);
}

const struct state *states_find(const struct daemon *d, uint32_t model, uint32_t number)
{
    const struct states *s = model < PKV_MODELS_MAX ? &d->states[model] : NULL;
    number = s && !number ? s->latest : number;
    for (uint32_t i = 0; s && number && i < STATES_KEPT; i++)
        if (s->kept[i].fd >= 0 && s->kept[i].number == number)
            return &s->kept[i];
    return NULL;
}

/* A place for the next state: a free one, or that of an older state that no sequence is signed with. Sequences without a state
 * will be signed with the first one. */
static struct state *room(struct daemon *d, uint32_t model)
{
    struct states *s = &d->states[model];
    for (uint32_t i = 0; i < STATES_KEPT; i++) {
        const struct state *old = &s->kept[i];
        if (old->fd < 0 || (old->number != s->latest && !core_state_used(d->core, model, old->number) &&
                            !(old->number == 1 && core_state_used(d->core, model, 0))))
            return &s->kept[i];
    }
    return NULL;
}

/* No scheme keeps more than a few words per head and dimension and two maps. */
static uint64_t bytes_max(const struct pkv_geom *g)
{
    uint64_t heads = (uint64_t)g->layers * g->kv_heads, dim = g->head_dim;
    return 4096 + heads * (8 * dim * dim + 32 * dim + 8ull * g->sig_bits);
}

/* A worker's memfd that others will map: nobody may change or shrink it any more. */
static enum pkv_err judge(const struct pkv_geom *g, int fd, uint64_t *ret_bytes)
{
    int want = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
    int seals = fd < 0 ? -1 : fcntl(fd, F_GET_SEALS);
    off_t bytes = seals < 0 ? -1 : lseek(fd, 0, SEEK_END);
    if (seals < 0 || (seals & want) != want || bytes <= 0 || (uint64_t)bytes > bytes_max(g))
        return PKV_ERR_INVALID;
    *ret_bytes = (uint64_t)bytes;
    return PKV_ERR_OK;
}

static void publish(struct daemon *d, uint32_t model, uint32_t latest, uint32_t wanted)
{
    struct pkv_model_states *to = &d->control->models[model];
    __atomic_store_n(&to->wanted, wanted, __ATOMIC_RELAXED);
    __atomic_store_n(&to->latest, latest, __ATOMIC_RELEASE);
}

enum pkv_err states_put(struct daemon *d, uint32_t model, uint32_t number, int *fd)
{
    struct states *s = &d->states[model];
    static const uint8_t no_file[PKV_DIGEST_BYTES];
    uint64_t bytes = 0;
    if (memcmp(core_model(d->core, model)->weights_digest, no_file, sizeof(no_file)) ||
        core_model(d->core, model)->scheme == PKV_SCHEME_NONE)
        return PKV_ERR_INVALID; /* it is signed as its file says, or not at all */
    enum pkv_err e = judge(&core_model(d->core, model)->geom, *fd, &bytes);
    if (e != PKV_ERR_OK)
        return e;
    if (number != s->latest + 1 || (s->latest && d->control->models[model].wanted != number))
        return PKV_ERR_STATE_EXISTS;
    struct state *to = room(d, model);
    if (!to)
        return PKV_ERR_BUSY;
    if (to->fd >= 0)
        close(to->fd);
    *to = (struct state){*fd, number, bytes};
    *fd = -1;
    d->counters.states_put++, d->counters.recalibrations += number > 1;
    s->latest = number, s->put_ns = daemon_now_ns();
    quality_reset(&d->quality[model]);
    publish(d, model, number, 0);
    log_info("model %s: signature state %u", core_model(d->core, model)->name, number);
    return PKV_ERR_OK;
}

bool states_want(struct daemon *d, uint32_t model, bool wanted)
{
    struct states *s = &d->states[model];
    uint32_t before = d->control->models[model].wanted, now = wanted && s->latest && room(d, model) ? s->latest + 1 : 0;
    if (now == before)
        return false;
    publish(d, model, s->latest, now);
    return true;
}
