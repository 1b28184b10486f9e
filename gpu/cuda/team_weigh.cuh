/* A team's weights: each block makes them for itself. Those of `sign` in registers, a warp a head, from what it has read while
 * the launch before ends; those of maps from words (team_maps.cuh), the rest as in weigh.cuh, out of the way. */
#ifndef GPU_CUDA_TEAM_WEIGH_CUH
#define GPU_CUDA_TEAM_WEIGH_CUH

#include "gpu/cuda/team_maps.cuh"

#if __CUDA_ARCH__ >= 900

template <uint32_t DIM> struct sign_query {
    static constexpr uint32_t PER = DIM / WARP, BASES = DIM == 64 ? 2 : 1;
    struct rotation<PER> turn[BASES];
    float spread[TEAM_SIG_WORDS], x[PER];
};

/* The last warps weigh, a head each. */
static __device__ __forceinline__ uint32_t weighed_head(const struct team &t)
{
    return t.warp + t.group - WARPS;
}
static __device__ __forceinline__ bool weighs_signs(const struct team_call &call, const struct team &t)
{
    return call.bases && weighed_head(t) < t.group;
}

/* What does not change as long as the scheme is used. */
template <uint32_t DIM>
static __device__ __forceinline__ void sign_load(const struct team_call &call, const struct team &t, struct sign_query<DIM> &s)
{
    const float *deviation = call.deviation + t.head * call.words * WARP;
#pragma unroll
    for (uint32_t b = 0; b < s.BASES; b++)
        if (b == 0 || b < call.bases)
            rotation_load(s.turn[b], call.signs + 2ull * b * DIM, t.lane);
#pragma unroll
    for (uint32_t i = 0; i < TEAM_SIG_WORDS; i++)
        s.spread[i] = i < call.words ? __ldg(deviation + i * WARP + t.lane) : 0.0f;
}

template <typename T, uint32_t DIM>
static __device__ __forceinline__ void sign_query_load(const struct cuda_attend &a, const struct team &t,
                                                       struct sign_query<DIM> &s)
{
    const T *q = (const T *)a.q + (t.q_head + weighed_head(t)) * DIM;
#pragma unroll
    for (uint32_t j = 0; j < s.PER; j++)
        s.x[j] = to_float(q[j * WARP + t.lane]);
}

/* weigh_sign() of a head, the same operations in the same order: the query's channels become its real weights. */
template <uint32_t DIM>
static __device__ __forceinline__ void sign_turn(const struct team_call &call, struct sign_query<DIM> &s)
{
#pragma unroll
    for (uint32_t b = s.BASES; b-- > 0;)
        if (b == 0 || b < call.bases) {
            float x[s.PER];
#pragma unroll
            for (uint32_t j = 0; j < s.PER; j++)
                x[j] = s.x[j];
            rotate(x, s.turn[b]);
#pragma unroll
            for (uint32_t j = 0; j < s.PER && b * s.PER + j < TEAM_SIG_WORDS; j++)
                s.spread[b * s.PER + j] = __fmul_rn(__fmul_rn(x[j], rotation_norm(DIM)), s.spread[b * s.PER + j]);
        }
}

/* quantize(), likewise. */
template <uint32_t DIM>
static __device__ __forceinline__ void sign_quantize(const struct team_call &call, const struct team &t,
                                                     struct weigh_shared<HEADS> *w, const struct sign_query<DIM> &s)
{
    uint32_t most = 0;
#pragma unroll
    for (uint32_t i = 0; i < TEAM_SIG_WORDS; i++)
        most = i < call.words ? max(most, __float_as_uint(fabsf(s.spread[i]))) : most; /* in the order of the numbers */
    float top = __uint_as_float(__reduce_max_sync(ALL_LANES, most));
    float step = isfinite(top) && top > 0 ? __fdiv_rn(127.0f, top) : 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < TEAM_SIG_WORDS; i++)
        if (i < call.words)
            w->weights[weighed_head(t)][i * WARP + t.lane] =
                (int8_t)(step > 0 ? __float2int_rn(__fmul_rn(s.spread[i], step)) : 0);
    if (t.lane == 0)
        w->scale[weighed_head(t)] = step > 0 ? __fdiv_rn(call.unit, step) : 0.0f;
}

template <typename T, uint32_t DIM>
static __device__ __noinline__ void other_weigh(const struct cuda_attend &a, uint32_t head, uint32_t group, uint64_t q_head,
                                                struct weigh_shared<HEADS> *w)
{
    const T *q = (const T *)a.q + q_head * DIM;
    for (uint32_t i = threadIdx.x; i < group * DIM; i += THREADS)
        w->q[i / DIM][i % DIM] = to_float(q[i]);
    __syncthreads();
    apply_maps(a, w, head);
    uint32_t warp = threadIdx.x / WARP;
    if (warp < group)
        weigh_head<DIM / WARP>(a, w, head, q_head, warp, threadIdx.x % WARP);
    __syncthreads();
}

/* Whose weights a kernel knows: code for others, though it is never run, would cost it more than a microsecond. */
enum weighing { WEIGH_SIGNS, WEIGH_MAPS, WEIGH_ANY };

/* Other weights than those of `sign`; all threads call it, when they have asked for what others wait for. */
template <typename T, uint32_t DIM, enum weighing WHOSE>
static __device__ __forceinline__ void others_weigh(const struct team_call &call, const struct team &t,
                                                    struct weigh_shared<HEADS> *w)
{
    if constexpr (WHOSE == WEIGH_MAPS)
        maps_take(call.maps, t.group, t.words + call.maps.words, t.epoch, w);
    else if (WHOSE == WEIGH_ANY && !call.bases)
        other_weigh<T, DIM>(call.a, t.head, t.group, t.q_head, w);
}

#endif /* architecture */

#endif
