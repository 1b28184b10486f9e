/* What the kernels that append share. */
#ifndef GPU_CUDA_APPEND_CUH
#define GPU_CUDA_APPEND_CUH

#include "gpu/cuda/scheme.cuh"

/* Exponent bits all set: adding their lowest carries into the sign's place. Not 0 where any number of a piece is not finite. */
template <typename T> struct exponent;
template <> struct exponent<float> {
    static constexpr uint32_t bits = 0x7f800000u, lowest = 0x00800000u, sign = 0x80000000u;
};
template <> struct exponent<__half> {
    static constexpr uint32_t bits = 0x7c007c00u, lowest = 0x04000400u, sign = 0x80008000u;
};
template <> struct exponent<__nv_bfloat16> {
    static constexpr uint32_t bits = 0x7f807f80u, lowest = 0x00800080u, sign = 0x80008000u;
};
template <typename T> static __device__ __forceinline__ uint32_t not_finite(const uint4 &v)
{
    using e = exponent<T>;
    return (((v.x & e::bits) + e::lowest) | ((v.y & e::bits) + e::lowest) | ((v.z & e::bits) + e::lowest) |
            ((v.w & e::bits) + e::lowest)) &
           e::sign;
}

/* Where K of a row comes from, and V: the caller's arrays, or the block where it lies already. */
template <typename T, uint32_t PER>
static __device__ __forceinline__ void row_source(const struct cuda_append &a, const struct cuda_seq &seq, uint32_t i,
                                                  uint32_t head, const uint4 **ret_k, const uint4 **ret_v)
{
    uint64_t from = (((uint64_t)blockIdx.y * a.tokens + i) * a.geom.kv_heads + head) * PER * WARP;
    *ret_k = (const uint4 *)((const T *)a.k + from), *ret_v = (const uint4 *)((const T *)a.v + from);
    if (a.k)
        return;
    uint64_t token = seq.tokens - a.tokens + i;
    *ret_k = (const uint4 *)(place_address(a.base, seq.blocks[token / PKV_BLOCK_TOKENS].rows, pkv_geom_block_bytes(&a.geom)) +
                             pkv_geom_row_offset(&a.geom, head, token % PKV_BLOCK_TOKENS));
    *ret_v = *ret_k + PER * WARP * sizeof(T) / 16;
}

/* append_matrix.cu: many tokens, signed by a matrix. False where it does not fit, and append.cu's kernels do it. */
bool append_by_matrix(const struct cuda_append *a, void *stream, int *ret);
bool append_matrix_preload(void);

#endif
