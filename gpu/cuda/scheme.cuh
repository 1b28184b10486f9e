/* Arithmetic of the schemes that queries and keys share: the host's IEEE operations in the host's order, never fused, so that
 * both backends get the same bits. */
#ifndef GPU_CUDA_SCHEME_CUH
#define GPU_CUDA_SCHEME_CUH

#include "gpu/cuda/device.cuh"

/* The rotation of host/rotate.h: element d = j x 32 + lane, so strides below 32 cross lanes and the others stay in one. A
 * product with +-1 is exact, so x * flip + other is the sum or difference, rounded once. */
template <uint32_t PER> struct rotation {
    float signs[2][PER];
    float flip[5]; /* -1 where this lane subtracts at stride 1 << i */
};

template <uint32_t PER>
static __device__ __forceinline__ void rotation_load(struct rotation<PER> &r, const float *signs, uint32_t lane)
{
#pragma unroll
    for (uint32_t round = 0; round < 2; round++)
#pragma unroll
        for (uint32_t j = 0; j < PER; j++)
            r.signs[round][j] = __ldg(signs + (round * PER + j) * WARP + lane);
#pragma unroll
    for (uint32_t i = 0; i < 5; i++)
        r.flip[i] = lane >> i & 1 ? -1.0f : 1.0f;
}

template <uint32_t PER> static __device__ __forceinline__ void rotate(float (&x)[PER], const struct rotation<PER> &r)
{
#pragma unroll
    for (uint32_t round = 0; round < 2; round++) {
#pragma unroll
        for (uint32_t j = 0; j < PER; j++)
            x[j] = __fmul_rn(x[j], r.signs[round][j]);
#pragma unroll
        for (uint32_t i = 0; i < 5; i++)
#pragma unroll
            for (uint32_t j = 0; j < PER; j++)
                x[j] = fmaf(x[j], r.flip[i], __shfl_xor_sync(ALL_LANES, x[j], 1u << i));
        if constexpr (PER == 3) { /* head_dim 96: three blocks, mixed by a Householder reflection */
            float third = __fmul_rn(__fadd_rn(__fadd_rn(x[0], x[1]), x[2]), 2.0f / 3.0f);
            x[0] = __fsub_rn(x[0], third), x[1] = __fsub_rn(x[1], third), x[2] = __fsub_rn(x[2], third);
        } else {
#pragma unroll
            for (uint32_t s = 1; s < PER; s *= 2)
#pragma unroll
                for (uint32_t j = 0; j < PER; j++)
                    if (!(j & s)) {
                        float a = x[j], b = x[j + s];
                        x[j] = __fadd_rn(a, b), x[j + s] = __fsub_rn(a, b);
                    }
        }
    }
}

static __device__ __forceinline__ float rotation_norm(uint32_t head_dim)
{
    return 1.0f / (head_dim == 96 ? 32.0f : (float)head_dim);
}

/* The end of gpu_kernels.dot: sixteen sums by a fixed tree. Half a warp calls it, the other half too. */
static __device__ __forceinline__ float sum16(float sum)
{
#pragma unroll
    for (uint32_t s = 8; s; s /= 2)
        sum = __fadd_rn(sum, __shfl_xor_sync(ALL_LANES, sum, s));
    return sum;
}

static __device__ __forceinline__ float dot16(const float *weight, const float *x, uint32_t count, uint32_t lane16)
{
    float sum = 0;
    for (uint32_t i = lane16; i < count; i += 16)
        sum = __fadd_rn(sum, __fmul_rn(weight[i], x[i]));
    return sum16(sum);
}

static __device__ __forceinline__ float silu(float x)
{
    return __fdiv_rn(x, __fadd_rn(1.0f, (float)exp(-(double)x)));
}

/* Outputs `pair` and `pair` + 1 of a stage of an MLP, a half warp each; SiLU but in the last stage. */
static __device__ __forceinline__ void stage_outputs(const struct cuda_map &map, uint64_t at, uint32_t pair, const float *from,
                                                     float *to, bool last)
{
    uint32_t mine = pair + threadIdx.x / 16 % 2, o = min(mine, map.out - 1);
    uint64_t row = at * map.out + o;
    float v = dot16(map.weight + row * map.in, from, map.in, threadIdx.x % 16);
    if (map.bias)
        v = __fadd_rn(v, map.bias[row]);
    if (!last)
        v = silu(v);
    if (threadIdx.x % 16 == 0 && o == mine)
        to[o] = v;
}

/* values [out] of map `map` of weight [maps][out][dim] and bias [maps][out] or NULL; a warp calls it. */
static __device__ __forceinline__ void apply_map(const float *weight, const float *bias, uint64_t map, uint32_t out,
                                                 const float *x, uint32_t dim, float *values, uint32_t lane)
{
    for (uint32_t o = lane / 16; o < PKV_ALIGN_UP(out, 2u); o += 2) {
        uint64_t row = map * out + min(o, out - 1);
        float v = dot16(weight + row * dim, x, dim, lane % 16);
        if (bias)
            v = __fadd_rn(v, bias[row]);
        if (lane % 16 == 0 && o < out)
            values[o] = v;
    }
    __syncwarp();
}

/* `code`: how many bits dimension i has and where they begin; a warp asks for 32 dimensions, in order. */
struct code_dim {
    uint32_t bits, first;
};

static __device__ __forceinline__ struct code_dim code_dim_behind(uint32_t own, uint32_t lane, uint32_t *before)
{
    uint32_t sum = own;
#pragma unroll
    for (uint32_t d = 1; d < WARP; d *= 2) {
        uint32_t other = __shfl_up_sync(ALL_LANES, sum, d);
        sum += lane >= d ? other : 0;
    }
    struct code_dim r = {own, *before + sum - own};
    *before += __shfl_sync(ALL_LANES, sum, WARP - 1);
    return r;
}

static __device__ __forceinline__ struct code_dim code_dim_of(const struct cuda_scheme &s, uint64_t at, uint32_t i,
                                                              uint32_t lane, uint32_t *before)
{
    return code_dim_behind(i < s.dims ? s.bits[at * s.dims + i] : 0, lane, before);
}

#endif
