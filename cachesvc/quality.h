/* A model's selection quality as the samples of all workers tell it, and the alarm over it. Pure: one owner, no clock.
 *
 *   QUIET --mean error above the limit--> ALARM --below QUALITY_CLEAR of it--> QUIET, each over at least QUALITY_SAMPLES
 *
 * The mean is of all samples until there are QUALITY_WINDOW, then it moves with that memory. Between clear and raise nothing
 * changes: a mean that stays near the limit does not ring again and again. */
#ifndef CACHESVC_QUALITY_H
#define CACHESVC_QUALITY_H

#include "proto/region.h"

#include <stdbool.h>

#define QUALITY_SAMPLES       32u       /* before a mean counts */
#define QUALITY_WINDOW        64u       /* samples that a mean remembers */
#define QUALITY_CLEAR         0.8       /* of the limit */
#define QUALITY_ERROR_MAX_PPM 10000000u /* what one sample can claim */

struct quality {
    uint64_t samples;   /* since the start, or the last reset */
    double mass, error; /* means, 1 being all */
    bool alarm;
};

enum quality_event { QUALITY_NOTHING, QUALITY_RAISED, QUALITY_CLEARED };

/* Further samples: how many, and their sums. Sums that such samples cannot have are cut. limit_ppm 0: no alarm. */
enum quality_event quality_add(struct quality *quality, const struct pkv_model_quality *more, uint64_t limit_ppm);
/* The signatures are made another way from now on. */
void quality_reset(struct quality *quality);

#endif
