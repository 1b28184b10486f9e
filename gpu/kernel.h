/* What a backend of the host must do: one struct per kernel, one table of functions. Private to gpu.
 *
 * The kernels are written once in plain C with sixteen explicit lanes and compiled per instruction set: without
 * reassociation the compiler may use wider registers but not change a bit. */
#ifndef GPU_KERNEL_H
#define GPU_KERNEL_H

#include "gpu/gpu.h"

#define GPU_LANES 16

/* Vectors that are mapped at once: one in each lane. */
#define GPU_COLUMNS 16u

/* Rows that one step of attention merges: the partial sums of a step do not depend on where the rows lie. */
#define GPU_ATTEND_STEP 64

/* Scores one kv head's candidates of one query token: codes[t] for first <= t < last, and how often each code occurs. */
struct gpu_scan {
    const uint32_t *const *signatures; /* [blocks] of this kv head: [16][words][4] */
    uint32_t first, last;              /* tokens */
    uint32_t group, words;
    const int8_t *weights; /* [group][words * 32] */
    const float *scales;   /* [group] */
    const float *biases;   /* [group], log2 units, finite */
    uint32_t rule;         /* enum pkv_rule */
    int32_t low;           /* integer rules: the least score */
    uint32_t shift;
    uint32_t k;          /* 0: count all; else codes that cannot be among the k best may be left out of the histogram */
    int16_t *tables;     /* scratch [group][words * 4][256], aligned to 64 */
    uint16_t *codes;     /* [last]; entries below first are not written */
    uint32_t *histogram; /* [codes], zero on entry */
};

/* Running state of exact attention of one q head. */
struct gpu_softmax {
    float max, sum; /* of exp(score - max), natural units */
    float *out;     /* [head_dim], not yet divided */
};

/* Merges rows (at most GPU_ATTEND_STEP) into the states of a group of q heads of several query tokens. */
struct gpu_step {
    const void *const *rows; /* [count] K then V */
    uint32_t count, group, head_dim, dtype;
    uint32_t queries;           /* at most GPU_TILE, and GPU_TILE_HEADS / group */
    const uint32_t *visible;    /* [queries] how many of the rows a query sees */
    const float *q;             /* [queries][group][head_dim], scaled */
    struct gpu_softmax *states; /* [queries][group] */
};
#define GPU_TILE       16u
#define GPU_TILE_HEADS 64u /* queries x group */

struct gpu_kernels {
    const char *name;
    void (*scan)(const struct gpu_scan *args);
    void (*step)(const struct gpu_step *args);
    void (*to_float)(const void *from, uint32_t dtype, float *to, uint64_t count);
    int (*finite)(const void *from, uint32_t dtype, uint64_t count); /* 1 if every number is finite */
    float (*dot)(const float *a, const float *b, uint32_t count);    /* count: a multiple of GPU_LANES */
    /* `rows` rows [rows][dim] by GPU_COLUMNS vectors x [dim][GPU_COLUMNS]: to [rows][GPU_COLUMNS], each as dot() sums it. */
    void (*products)(const float *weight, uint32_t rows, uint32_t dim, const float *x, float *to);
    void (*silu)(float *x, uint32_t count); /* x / (1 + e^-x) in place; count: a multiple of GPU_LANES */
    /* host/rotate.h: to = rotation of from [dim], times gpu_rotate_norm(dim); signs [2][dim]. */
    void (*rotate)(const float *from, const float *signs, uint32_t dim, float *to);
    uint32_t (*positive)(const float *x); /* bit i of 32: x[i] > 0 */
    /* Sum of the weights [words * 32] of the bits set in words[0], words[4], .. */
    int32_t (*score)(const uint32_t *words, uint32_t count, const int8_t *weights);
    /* Tokens t, first <= t < last, whose code is above `threshold`, and the first `ties` of those that have it: how many. */
    uint32_t (*pick)(const uint16_t *codes, uint32_t first, uint32_t last, uint32_t threshold, uint32_t ties,
                     uint32_t *ret_index);
};

/* Two rounds over blocks of 32 (head_dim 96) or of the whole vector. */
static inline float gpu_rotate_norm(uint32_t dim)
{
    return dim == 96 ? 32.0f : (float)dim;
}

extern const struct gpu_kernels gpu_kernels_c, gpu_kernels_avx2, gpu_kernels_avx512;

/* The best table that the CPU can run, or the named one; NULL if it is unknown or the CPU lacks it. */
const struct gpu_kernels *gpu_kernels_choose(const char *name);

#endif
