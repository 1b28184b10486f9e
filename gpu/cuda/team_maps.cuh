/* A team's weights of `code` and `linear`: the blocks share out the outputs of the queries' maps. Each asks for its rows while
 * the launch before ends, sends the values as words, and takes all of them; a warp a head makes weights of them in registers.
 * The same operations in the same order as weigh.cuh, which takes maps of more outputs, and `hash`. */
#ifndef GPU_CUDA_TEAM_MAPS_CUH
#define GPU_CUDA_TEAM_MAPS_CUH

#include "gpu/cuda/team_scan.cuh"

#if __CUDA_ARCH__ >= 900

/* A word has two outputs, 32 apart, so that two of them are what a lane has of 128: word i has i % 32 + i / 32 x 64. This
 * block makes each head's words [begin, begin + per), of which the first one's first output is `first`. */
struct map_share {
    uint32_t per, shift, begin, first;
};

static __device__ __forceinline__ struct map_share map_share_of(uint32_t outputs)
{
    struct map_share s;
    s.shift = (outputs > 64 ? 6 : 5) - (31 - __clz(gridDim.x)), s.per = 1u << s.shift;
    s.begin = blockIdx.x * s.per, s.first = s.begin % WARP + s.begin / WARP * 64;
    return s;
}

/* Whether a block's rows lie in shared memory, [maps][2][per][DIM], where weigh.cuh has its values. */
template <uint32_t DIM> static __device__ __forceinline__ bool map_fits(const struct map_share &s, uint32_t maps)
{
    return maps * 2 * s.per * DIM * sizeof(float) <= sizeof(((struct weigh_shared<HEADS> *)0)->real);
}

/* Of the head's maps: one, or one a q head. */
template <uint32_t DIM>
static __device__ __forceinline__ void maps_ask(const struct team_maps &a, struct weigh_shared<HEADS> *w)
{
    uint32_t outputs = a.outputs, maps = a.each;
    struct map_share s = map_share_of(outputs);
    uint32_t to = shared_address(w->real);
    if (!map_fits<DIM>(s, maps))
        return;
    const float *weight = a.weight + (uint64_t)blockIdx.y * maps * outputs * DIM;
    for (uint32_t i = threadIdx.x; i < maps * 2 * s.per * (DIM / 4); i += THREADS) {
        uint32_t row = i / (DIM / 4), n = row & (s.per - 1), half = row >> s.shift & 1, map = row >> (s.shift + 1);
        const float *from = weight + (map * outputs + min(s.first + n + half * WARP, outputs - 1)) * DIM + i % (DIM / 4) * 4;
        asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to + i * 16), "l"(from) : "memory");
    }
}

/* What was asked for is there, and so are the queries. words [heads][MAP_WORDS]. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void maps_share(const struct team_maps &a, uint32_t group, struct word *words, uint32_t epoch,
                                                  const struct team_shared *m, const struct weigh_shared<HEADS> *w)
{
    const float *weight = a.weight, *bias = a.bias;
    uint32_t outputs = a.outputs, maps = a.each;
    struct map_share s = map_share_of(outputs);
    struct team t;
    bool fits = map_fits<DIM>(s, maps);
    uint32_t lane = threadIdx.x % WARP, half = lane / 16;
    t.epoch = epoch;
#pragma unroll 1
    for (uint32_t task = threadIdx.x / WARP; task < s.per * group; task += WARPS) {
        uint32_t n = task & (s.per - 1), h = task >> s.shift, map = maps > 1 ? h : 0;
        uint64_t row = (uint64_t)(blockIdx.y * maps + map) * outputs + min(s.first + n + half * WARP, outputs - 1);
        const float *from = (fits ? &w->real[0][0] + ((map * 2 + half) * s.per + n) * DIM : weight + row * DIM) + lane % 16;
        const T *x = (const T *)(m->queries + h * tile_shape<T, DIM>::QUERY) + lane % 16;
        float sum = 0;
#pragma unroll
        for (uint32_t j = 0; j < DIM / 16; j++)
            sum = __fadd_rn(sum, __fmul_rn(from[j * 16], to_float(x[j * 16])));
        sum = sum16(sum);
        if (bias)
            sum = __fadd_rn(sum, bias[row]);
        float second = __shfl_down_sync(ALL_LANES, sum, 16);
        if (lane == 0)
            put_word(t, words + h * MAP_WORDS + s.begin + n, __float_as_uint(sum), __float_as_uint(second), 0);
    }
}

/* Where the bits of a lane's dimensions begin, 32 apart each: four counts in one number. */
static __device__ __forceinline__ void bits_behind(uint32_t counts, uint32_t lane, uint32_t (&first)[4])
{
    uint32_t sum = counts, before = 0;
#pragma unroll
    for (uint32_t d = 1; d < WARP; d *= 2) {
        uint32_t other = __shfl_up_sync(ALL_LANES, sum, d);
        sum += lane >= d ? other : 0;
    }
    uint32_t all = __shfl_sync(ALL_LANES, sum, WARP - 1);
#pragma unroll
    for (uint32_t j = 0; j < 4; j++)
        first[j] = before + ((sum - counts) >> 8 * j & 255), before += all >> 8 * j & 255;
}

/* The last warps take a head's values each. bits [kv_heads][outputs] and step likewise: of `code`; NULL: a value is a bit's
 * weight, or its sign is. */
static __device__ __forceinline__ void maps_take(const struct team_maps &a, uint32_t group, const struct word *words,
                                                 uint32_t epoch, struct weigh_shared<HEADS> *w)
{
    const uint8_t *bits = a.bits;
    const float *step = a.step;
    uint32_t outputs = a.outputs;
    bool signs = a.signs;
    uint32_t h = threadIdx.x / WARP + group - WARPS, lane = threadIdx.x % WARP, counts = 0, first[4];
    if (h < group) {
        float v[4], steps[4], most = 0;
        struct word x[2];
        struct team t;
        t.epoch = epoch;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            uint32_t i = j * WARP + lane, at = blockIdx.y * outputs + i;
            counts |= (i >= outputs ? 0u : bits ? bits[at] : 1u) << 8 * j;
            steps[j] = bits && i < outputs ? step[at] : 1.0f;
        }
        words += h * MAP_WORDS + lane;
        look_at_words<2>(t, words, WARP, outputs > 64 ? 2 : 1, x);
        bits_behind(counts, lane, first);
        take_words<2>(t, words, WARP, outputs > 64 ? 2 : 1, x);
        v[0] = __uint_as_float(x[0].x), v[1] = __uint_as_float(x[0].y);
        v[2] = __uint_as_float(x[1].x), v[3] = __uint_as_float(x[1].y);
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            uint32_t count = counts >> 8 * j & 255;
            v[j] = signs ? (v[j] > 0 ? 1.0f : -1.0f) : __fmul_rn(v[j], steps[j]);
            most = count ? fmaxf(most, fabsf(__fmul_rn(v[j], (float)(1u << (count - 1))))) : most; /* of its highest bit */
        }
        /* They are not negative: in the order of the numbers. */
        most = __uint_as_float(__reduce_max_sync(ALL_LANES, __float_as_uint(most)));
        float factor = signs ? 1.0f : isfinite(most) && most > 0 ? __fdiv_rn(127.0f, most) : 0.0f;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++)
#pragma unroll 1
            for (uint32_t p = 0; p < (counts >> 8 * j & 255); p++)
                w->weights[h][first[j] + p] =
                    (int8_t)(factor > 0 ? __float2int_rn(__fmul_rn(__fmul_rn(v[j], (float)(1u << p)), factor)) : 0);
        if (lane == 0)
            w->scale[h] = factor > 0 ? __fdiv_rn(a.unit, factor) : 0.0f;
    }
    __syncthreads();
}

#endif /* architecture */

#endif
