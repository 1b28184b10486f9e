/* Arithmetic of the schemes that queries and keys share: the host's IEEE operations in the host's order, never fused, so that
 * both backends get the same bits. */
#ifndef GPU_CUDA_SCHEME_CUH
#define GPU_CUDA_SCHEME_CUH

#include "gpu/cuda/device.cuh"

#define LANE_DIMS (PKV_HEAD_DIM_MAX / WARP) /* dimensions of a vector that a lane holds: j x 32 + lane */

/* The rotation of host/rotate.h: element d = j x 32 + lane, so strides below 32 cross lanes and the others stay in one. */
static __device__ void rotate_round(float (&x)[LANE_DIMS], const float *signs, uint32_t per, uint32_t lane)
{
#pragma unroll
    for (uint32_t j = 0; j < LANE_DIMS; j++)
        if (j < per) {
            x[j] = __fmul_rn(x[j], signs[j * WARP + lane]);
#pragma unroll
            for (uint32_t s = 1; s < WARP; s *= 2) {
                float other = __shfl_xor_sync(ALL_LANES, x[j], s);
                x[j] = lane & s ? __fsub_rn(other, x[j]) : __fadd_rn(other, x[j]);
            }
        }
    if (per == 3) { /* head_dim 96: three blocks, mixed by a Householder reflection */
        float third = __fmul_rn(__fadd_rn(__fadd_rn(x[0], x[1]), x[2]), 2.0f / 3.0f);
        x[0] = __fsub_rn(x[0], third), x[1] = __fsub_rn(x[1], third), x[2] = __fsub_rn(x[2], third);
        return;
    }
#pragma unroll
    for (uint32_t s = 1; s < LANE_DIMS; s *= 2)
#pragma unroll
        for (uint32_t j = 0; j < LANE_DIMS; j++)
            if (!(j & s) && j + s < per) {
                float a = x[j], b = x[j + s];
                x[j] = __fadd_rn(a, b), x[j + s] = __fsub_rn(a, b);
            }
}

/* gpu_kernels.dot: sixteen sums, then a fixed tree. Half a warp gives one value. */
static __device__ __forceinline__ float dot16(const float *weight, const float *x, uint32_t count, uint32_t lane16)
{
    float sum = 0;
    for (uint32_t i = lane16; i < count; i += 16)
        sum = __fadd_rn(sum, __fmul_rn(weight[i], x[i]));
#pragma unroll
    for (uint32_t s = 8; s; s /= 2)
        sum = __fadd_rn(sum, __shfl_xor_sync(ALL_LANES, sum, s));
    return sum;
}

#endif
