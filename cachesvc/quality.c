/* Means and alarm; see quality.h. */
#include "cachesvc/quality.h"

#include <math.h>

static double mean(uint64_t sum_ppm, uint64_t samples, uint64_t most_ppm)
{
    double ppm = (double)sum_ppm / (double)samples;
    return fmin(ppm, (double)most_ppm) * 1e-6;
}

enum quality_event quality_add(struct quality *q, const struct pkv_model_quality *more, uint64_t limit_ppm)
{
    double limit = (double)limit_ppm * 1e-6;
    if (!more->samples)
        return QUALITY_NOTHING;
    q->samples = more->samples > UINT64_MAX - q->samples ? UINT64_MAX : q->samples + more->samples;
    /* The part of the mean that is new: all of it at first, later one window's memory. */
    double kept = q->samples > QUALITY_WINDOW ? pow(1 - 1.0 / QUALITY_WINDOW, (double)more->samples)
                                              : 1 - (double)more->samples / (double)q->samples;
    q->error = kept * q->error + (1 - kept) * mean(more->error_ppm, more->samples, QUALITY_ERROR_MAX_PPM);
    q->mass = kept * q->mass + (1 - kept) * mean(more->mass_ppm, more->samples, 1000000);
    if (q->samples < QUALITY_SAMPLES)
        return QUALITY_NOTHING;
    if (!q->alarm && limit > 0 && q->error > limit) {
        q->alarm = true;
        return QUALITY_RAISED;
    }
    if (q->alarm && q->error < QUALITY_CLEAR * limit) {
        q->alarm = false;
        return QUALITY_CLEARED;
    }
    return QUALITY_NOTHING;
}

void quality_reset(struct quality *q)
{
    *q = (struct quality){.alarm = q->alarm}; /* the alarm stands until new samples say better */
}
