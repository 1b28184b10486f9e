/* What a selection costs, in numbers; and how much of a sample one call may pay for. Pure: time and chance are arguments.
 * What becomes of them: audit.c. */
#ifndef CLIENT_AUDIT_H
#define CLIENT_AUDIT_H

#include "proto/op.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pkv_seq;

#define AUDIT_SLICE_MIN     16u  /* blocks: a smaller slice costs more than it brings */
#define AUDIT_SLICE_SHARE   8    /* a larger one takes at most this part of the call that it follows */
#define AUDIT_CREDIT_MAX_NS 50e6 /* what may be saved up */
#define AUDIT_BLOCK_NS      20e3 /* of a block nothing is known of yet */

/* Time earned by attend calls, spent on blocks. Below zero it is owed: a slice that took longer than thought is paid back
 * before the next one, so that the share holds over any longer time. */
struct audit_purse {
    double credit_ns;
    double block_ns; /* what a block lately cost; 0: unknown */
};

static inline void audit_earn(struct audit_purse *p, uint64_t call_ns, uint32_t ppm)
{
    double credit = p->credit_ns + (double)call_ns * ppm * 1e-6;
    p->credit_ns = credit < AUDIT_CREDIT_MAX_NS ? credit : AUDIT_CREDIT_MAX_NS;
}

/* How many of the `left` blocks to take after a call of `call_ns`; 0: not yet. */
static inline uint32_t audit_slice(const struct audit_purse *p, uint64_t call_ns, uint32_t left)
{
    double each = p->block_ns > 0 ? p->block_ns : AUDIT_BLOCK_NS;
    uint32_t least = PKV_MIN(left, AUDIT_SLICE_MIN);
    if (p->credit_ns < fmin(least * each, AUDIT_CREDIT_MAX_NS))
        return 0;
    double most = fmin(p->credit_ns, (double)call_ns / AUDIT_SLICE_SHARE) / each;
    return most <= least ? least : most < left ? (uint32_t)most : left;
}

static inline void audit_spend(struct audit_purse *p, uint64_t ns, uint32_t blocks)
{
    p->credit_ns -= (double)ns;
    if (blocks) {
        double each = (double)ns / blocks;
        p->block_ns += p->block_ns > 0 ? (each - p->block_ns) / 4 : each;
    }
}

/* Relative error of one q head's output, and the softmax mass that was covered. */
static inline double audit_error(const float *out, const float *exact, uint32_t dim)
{
    double difference = 0, norm = 0;
    for (uint32_t d = 0; d < dim; d++) {
        difference += ((double)out[d] - exact[d]) * ((double)out[d] - exact[d]);
        norm += (double)exact[d] * exact[d];
    }
    return norm > 0 ? sqrt(difference / norm) : 0;
}
static inline double audit_mass(float lse, float exact_lse)
{
    return fmin(1.0, exp((double)lse - exact_lse));
}

/* Index of the histogram's bucket. */
static inline uint32_t audit_bucket(double error)
{
    static const double percent[] = {
#define AUDIT_BOUND(bound) bound,
        PKV_SAMPLE_BOUNDS(AUDIT_BOUND)
#undef AUDIT_BOUND
    };
    uint32_t i = 0;
    while (i < PKV_ARRAY_LEN(percent) && error > percent[i] / 100)
        i++;
    return i;
}

/* Never zero for a seed that is not. */
static inline uint64_t audit_random(uint64_t *state)
{
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17; /* xorshift64 */
    return *state;
}

/* The sampler of a connection (audit.c). */
struct audit {
    bool due, running; /* due: `seq` and `query` of the call under way are to be sampled */
    struct audit_purse purse;
    uint64_t random, begin_ns;
    uint32_t skip; /* sparse calls until the next sample */
    float *lse;    /* scratch of [lse_room], for callers that want none */
    uint64_t lse_room;
    /* the sample */
    struct pkv_seq *seq;
    uint32_t layer, query, head, block; /* query: of the call; block: the next one */
    uint64_t tokens;                    /* that the query sees */
    uint32_t state;                     /* of the sequence, when it was attended */
    uint64_t length, places;            /* of its sequence, as another worker's is known again */
    float scale;
    char *memory; /* q, then out, lse, exact, max, sum, exact lse */
    uint64_t memory_bytes;
};

#endif
