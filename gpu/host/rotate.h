/* The fixed rotation of `sign`: random signs, Walsh-Hadamard, random signs, Walsh-Hadamard. d log d additions instead of d x d
 * products (Ailon, Chazelle: The fast Johnson-Lindenstrauss transform; two rounds mix sparse vectors too). head_dim 96 is three
 * blocks of 32, mixed by a Householder reflection. Lane by lane, so every instruction set gives the same bits. Private to
 * host/. */
#ifndef GPU_HOST_ROTATE_H
#define GPU_HOST_ROTATE_H

#include "gpu/host/vector.h"
#include "gpu/kernel.h"

typedef int32_t lanes16i __attribute__((vector_size(64), aligned(4), may_alias));

#define ROTATE_VECTORS (PKV_HEAD_DIM_MAX / 16)

/* One stage inside of a vector: lane l becomes x[l ^ S] +- x[l]. */
#define ROTATE_STAGE(v, S)                                                                                     \
    do {                                                                                                       \
        const lanes16i other = {0 ^ (S), 1 ^ (S), 2 ^ (S),  3 ^ (S),  4 ^ (S),  5 ^ (S),  6 ^ (S),  7 ^ (S),   \
                                8 ^ (S), 9 ^ (S), 10 ^ (S), 11 ^ (S), 12 ^ (S), 13 ^ (S), 14 ^ (S), 15 ^ (S)}; \
        const lanes16 sign = {0 & (S) ? -1 : 1,  1 & (S) ? -1 : 1,  2 & (S) ? -1 : 1,  3 & (S) ? -1 : 1,       \
                              4 & (S) ? -1 : 1,  5 & (S) ? -1 : 1,  6 & (S) ? -1 : 1,  7 & (S) ? -1 : 1,       \
                              8 & (S) ? -1 : 1,  9 & (S) ? -1 : 1,  10 & (S) ? -1 : 1, 11 & (S) ? -1 : 1,      \
                              12 & (S) ? -1 : 1, 13 & (S) ? -1 : 1, 14 & (S) ? -1 : 1, 15 & (S) ? -1 : 1};     \
        (v) = __builtin_shuffle((v), other) + sign * (v);                                                      \
    } while (0)

static inline __attribute__((always_inline)) void rotate_round(lanes16 *x, const float *signs, uint32_t vectors, uint32_t block)
{
    for (uint32_t i = 0; i < vectors; i++) {
        x[i] *= *(const lanes16 *)(const void *)(signs + i * 16ull);
        ROTATE_STAGE(x[i], 1);
        ROTATE_STAGE(x[i], 2);
        ROTATE_STAGE(x[i], 4);
        ROTATE_STAGE(x[i], 8);
    }
    for (uint32_t s = 1; s < block; s *= 2)
        for (uint32_t i = 0; i < vectors; i++)
            if (!(i & s)) {
                lanes16 a = x[i], b = x[i + s];
                x[i] = a + b;
                x[i + s] = a - b;
            }
    if (vectors == 6) /* three blocks of two vectors */
        for (uint32_t i = 0; i < 2; i++) {
            lanes16 third = (x[i] + x[i + 2] + x[i + 4]) * (2.0f / 3.0f);
            x[i] -= third, x[i + 2] -= third, x[i + 4] -= third;
        }
}

/* to = rotated from, longer by the square root of the block's length each round (rotate_norm undoes it).
 * signs [2][dim] of +-1. */
static inline __attribute__((always_inline)) void rotate_dim(const float *from, const float *signs, uint32_t vectors,
                                                             uint32_t block, float *to)
{
    lanes16 x[ROTATE_VECTORS];
    for (uint32_t i = 0; i < vectors; i++)
        x[i] = *(const lanes16 *)(const void *)(from + i * 16ull);
    rotate_round(x, signs, vectors, block);
    rotate_round(x, signs + vectors * 16ull, vectors, block);
    for (uint32_t i = 0; i < vectors; i++)
        *(lanes16 *)(void *)(to + i * 16ull) = x[i];
}

static void rotate(const float *from, const float *signs, uint32_t dim, float *to)
{
    switch (dim) { /* constant lengths keep the vector in registers */
    case 64:
        rotate_dim(from, signs, 4, 4, to);
        return;
    case 96:
        rotate_dim(from, signs, 6, 2, to);
        return;
    case 128:
        rotate_dim(from, signs, 8, 8, to);
        return;
    default:
        rotate_dim(from, signs, 16, 16, to);
    }
}

/* Bit i of 32: x[i] is above zero. */
static uint32_t positive(const float *x)
{
    uint32_t bits = 0;
#if defined(__AVX512F__)
    bits = (uint32_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_setzero_ps(), _CMP_GT_OQ) |
           (uint32_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16), _mm512_setzero_ps(), _CMP_GT_OQ) << 16;
#elif defined(__AVX2__)
    for (uint32_t i = 0; i < 32; i += 8)
        bits |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + i), _mm256_setzero_ps(), _CMP_GT_OQ)) << i;
#else
    for (uint32_t i = 0; i < 32; i++)
        bits |= (uint32_t)(x[i] > 0) << i;
#endif
    return bits;
}

#endif
