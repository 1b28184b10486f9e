/* How a token's group score becomes a code: exact IEEE operations in a fixed order, so that every backend and instruction
 * set gives the same bits for the same inputs. */
#ifndef GPU_CODE_H
#define GPU_CODE_H

#include "proto/base.h"

#include <math.h>
#include <string.h>

/* Softmax codes: 32 steps an octave over 64 octaves, exponents -50..13 of the group's sum of probabilities relative to its
 * reference. Code 0 is left for "not a candidate". */
#define GPU_CODE_STEPS       32
#define GPU_CODE_SOFTMAX_MAX 2047
#define GPU_CODE_BASE        ((127 - 50) * GPU_CODE_STEPS)
#define GPU_CODES            65536

/* 2^s, exact at integers, monotone and continuous, at most 0.4 % off between: a parabola on the mantissa. */
static inline float gpu_exp2(float s)
{
    s = s < -60.0f ? -60.0f : s > 60.0f ? 60.0f : s;
    int32_t whole = (int32_t)s;
    whole -= (float)whole > s;
    float f = s - (float)whole;
    float mantissa = fmaf(f, fmaf(f, 0.3435f, 0.6565f), 1.0f);
    int32_t bits = (whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof(power));
    return mantissa * power;
}

/* A sum of probabilities, above zero, into its code. */
static inline uint16_t gpu_code_softmax(float sum)
{
    int32_t bits;
    memcpy(&bits, &sum, sizeof(bits));
    int32_t code = (bits >> 18) - GPU_CODE_BASE;
    return (uint16_t)(code < 1 ? 1 : code > GPU_CODE_SOFTMAX_MAX ? GPU_CODE_SOFTMAX_MAX : code);
}

/* The middle of the sums that have this code: what top-p counts for one token. */
static inline PKV_HD double gpu_code_mass(uint32_t code)
{
    uint32_t steps = code + GPU_CODE_BASE;
    return ldexp(1.0 + (steps % GPU_CODE_STEPS + 0.5) / GPU_CODE_STEPS, (int)(steps / GPU_CODE_STEPS) - 127);
}

/* Integer scores of at least `low` into 1..65535, monotone; the shift makes `high` fit. */
static inline PKV_HD uint32_t gpu_code_shift(int32_t low, int32_t high)
{
    uint32_t shift = 0;
    while (((uint32_t)(high - low) >> shift) > 65534u)
        shift++;
    return shift;
}
static inline PKV_HD uint16_t gpu_code_integer(int32_t score, int32_t low, uint32_t shift)
{
    return (uint16_t)(1u + ((uint32_t)(score - low) >> shift));
}

#endif
