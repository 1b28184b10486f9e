/* A region is hostile: each word is read once, sums that shrink count as nothing, and what they say is cut to what samples can
 * say (quality.c). A worker that lies spoils the means of the models that it opened, and no others. */
#include "cachesvc/audit.h"

#include "cachesvc/worker.h"

#include <string.h>

#define LOOK_NS             100000000ull
#define RECALIBRATE_SAMPLES 64u /* of the latest state, before another one is asked for */

static const char *name_of(struct daemon *d, uint32_t model)
{
    return core_model(d->core, model)->name;
}

static void tell(struct daemon *d, uint32_t model, enum quality_event event)
{
    const struct quality *q = &d->quality[model];
    double limit = (double)d->config.audit_alarm_ppm * 1e-6;
    if (event == QUALITY_RAISED) {
        d->counters.quality_alarms++;
        log_warn("model %s: the selection's mean error is %.3f, above %.3f (mass covered %.3f): raise k or sig_bits, or see "
                 "docs/operating.md",
                 name_of(d, model), q->error, limit, q->mass);
    } else if (event == QUALITY_CLEARED) {
        d->counters.quality_cleared++;
        log_info("model %s: the selection's mean error is %.3f again, below %.3f", name_of(d, model), q->error,
                 QUALITY_CLEAR * limit);
    }
}

/* What has come since the last look. */
static struct pkv_model_quality difference(const struct pkv_model_quality *now, const struct pkv_model_quality *before)
{
    static const struct pkv_model_quality nothing;
    before = now->state == before->state ? before : &nothing;
    if (now->samples <= before->samples || now->mass_ppm < before->mass_ppm || now->error_ppm < before->error_ppm)
        return (struct pkv_model_quality){0};
    return (struct pkv_model_quality){.samples = now->samples - before->samples,
                                      .mass_ppm = now->mass_ppm - before->mass_ppm,
                                      .error_ppm = now->error_ppm - before->error_ppm};
}

void audit_worker(struct worker *w)
{
    struct daemon *d = w->daemon;
    for (uint32_t m = 0; core_model(d->core, m); m++) {
        if (!(w->models >> m & 1))
            continue;
        /* The worker adds to `samples` last: read first, it promises no more than the sums hold. */
        const struct pkv_model_quality *from = &w->region->quality[m];
        struct pkv_model_quality now = {.state = pkv_load64(&from->state)};
        now.samples = pkv_load64(&from->samples);
        now.mass_ppm = pkv_load64(&from->mass_ppm), now.error_ppm = pkv_load64(&from->error_ppm);
        struct pkv_model_quality more = difference(&now, &w->audited[m]);
        w->audited[m] = now;
        if (now.state != d->states[m].latest)
            continue; /* of sequences that are signed as once was usual: no judgement on how it is done now */
        tell(d, m, quality_add(&d->quality[m], &more, d->config.audit_alarm_ppm));
    }
}

/* A `code` that has calibrated itself is to do so again while its alarm stands; see states.h for how often. */
static void recalibrate(struct daemon *d, uint32_t model, uint64_t now_ns)
{
    static const uint8_t no_file[PKV_DIGEST_BYTES];
    const struct pkv_model_request *m = core_model(d->core, model);
    const struct quality *q = &d->quality[model];
    bool asked = d->control->models[model].wanted != 0, alarm = q->alarm && d->config.recalibrate_s;
    if (m->scheme != PKV_SCHEME_CODE || memcmp(m->weights_digest, no_file, sizeof(no_file)))
        return;
    bool due = q->samples >= RECALIBRATE_SAMPLES && now_ns - d->states[model].put_ns >= d->config.recalibrate_s * 1000000000u;
    if (states_want(d, model, alarm && (asked || due)))
        log_info("model %s: %s", m->name,
                 asked ? "no recalibration is needed any more" : "workers are asked to calibrate it again");
}

void audit_turn(struct daemon *d, uint64_t now_ns)
{
    if (now_ns - d->audited_ns < LOOK_NS)
        return;
    d->audited_ns = now_ns;
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++)
        if (d->workers[i] && d->workers[i]->state == WORKER_JOINED)
            audit_worker(d->workers[i]);
    for (uint32_t m = 0; core_model(d->core, m); m++)
        recalibrate(d, m, now_ns);
}
