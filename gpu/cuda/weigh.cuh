/* Queries into int8 weights and their bit planes: the schemes' transforms, the same IEEE operations in the same order as the
 * host, so that weights and scales agree bit for bit (`hash` but for the exponential in its SiLU). For 512 threads. */
#ifndef GPU_CUDA_WEIGH_CUH
#define GPU_CUDA_WEIGH_CUH

#include "gpu/cuda/scheme.cuh"

#define WEIGH_THREADS 512u
#define HIDDEN_MAX    1024u /* width of `hash`'s hidden layers */

template <uint32_t GROUP> struct __align__(16) weigh_shared
{
    float q[GROUP][PKV_HEAD_DIM_MAX];        /* as float, unscaled */
    float real[GROUP][2 * PKV_SIG_BITS_MAX]; /* rotated channels or a map's values, then real weights */
    float hidden[2][HIDDEN_MAX];
    uint32_t planes[GROUP][8][PKV_SIG_WORDS_MAX];
    int8_t weights[GROUP][PKV_SIG_BITS_MAX];
    float unit[GROUP], scale[GROUP];
    uint32_t write; /* weights, planes and scales go to the work area too */
};

template <uint32_t PER, typename M>
static __device__ void rotate_query(const struct cuda_attend &a, M *m, uint32_t h, uint32_t lane)
{
    const struct pkv_geom &g = a.geom;
    for (uint32_t b = 0; b < a.scheme.bases; b++) {
        struct rotation<PER> r;
        float x[PER];
        rotation_load(r, a.scheme.signs + 2ull * b * g.head_dim, lane);
#pragma unroll
        for (uint32_t j = 0; j < PER; j++)
            x[j] = m->q[h][j * WARP + lane];
        rotate(x, r);
#pragma unroll
        for (uint32_t j = 0; j < PER; j++)
            m->real[h][b * g.head_dim + j * WARP + lane] = __fmul_rn(x[j], rotation_norm(g.head_dim));
    }
}

template <uint32_t PER, typename M>
static __device__ void weigh_sign(const struct cuda_attend &a, M *m, uint32_t head, uint32_t h, uint32_t lane)
{
    const struct pkv_geom &g = a.geom;
    const float *deviation = a.scheme.deviation + ((uint64_t)a.layer * g.kv_heads + head) * g.sig_bits;
    float spread[PKV_SIG_WORDS_MAX]; /* on its way while the query is turned */
#pragma unroll
    for (uint32_t w = 0; w < PKV_SIG_WORDS_MAX; w++)
        spread[w] = w < pkv_geom_words(&g) ? __ldg(deviation + w * WARP + lane) : 0.0f;
    if constexpr (PER != 0)
        rotate_query<PER>(a, m, h, lane);
    else if (g.head_dim == 64)
        rotate_query<2>(a, m, h, lane);
    else if (g.head_dim == 96)
        rotate_query<3>(a, m, h, lane);
    else if (g.head_dim == 128)
        rotate_query<4>(a, m, h, lane);
    else
        rotate_query<8>(a, m, h, lane);
    __syncwarp();
#pragma unroll
    for (uint32_t w = 0; w < PKV_SIG_WORDS_MAX; w++)
        if (w < pkv_geom_words(&g))
            m->real[h][w * WARP + lane] = __fmul_rn(m->real[h][w * WARP + lane], spread[w]);
    float partial = g.sig_bits < g.head_dim ? (float)g.head_dim / (float)g.sig_bits : 1.0f;
    if (lane == 0)
        m->unit[h] =
            __fdiv_rn(__fmul_rn(__fmul_rn(__fmul_rn(2.0f, a.policy.scale), LOG2E), __fsqrt_rn(partial)), (float)a.scheme.bases);
}

/* Outputs of one map of all the group's heads, a half warp each. own: the heads have maps of their own. */
template <typename M>
static __device__ void map_queries(const struct cuda_map &map, M *m, uint64_t first, bool own, uint32_t out, uint32_t group)
{
    uint32_t lane = threadIdx.x % 16;
    for (uint32_t pair = threadIdx.x / WARP * 2; pair < out; pair += WEIGH_THREADS / 16) {
        uint32_t o = min(pair + threadIdx.x / 16 % 2, out - 1);
        float w[PKV_HEAD_DIM_MAX / 16];
        for (uint32_t h = 0; h < group; h++) {
            uint64_t row = (first + (own ? h : 0)) * map.out + o;
            float sum = 0;
#pragma unroll
            for (uint32_t j = 0; j < PKV_HEAD_DIM_MAX / 16; j++)
                if (j * 16 < map.in && (own || h == 0))
                    w[j] = __ldg(map.weight + row * map.in + j * 16 + lane);
#pragma unroll
            for (uint32_t j = 0; j < PKV_HEAD_DIM_MAX / 16; j++)
                if (j * 16 < map.in)
                    sum = __fadd_rn(sum, __fmul_rn(w[j], m->q[h][j * 16 + lane]));
            sum = sum16(sum);
            if (lane == 0 && o == pair + threadIdx.x / 16 % 2)
                m->real[h][PKV_SIG_BITS_MAX + o] = map.bias ? __fadd_rn(sum, map.bias[row]) : sum;
        }
    }
}

/* `hash`: an MLP per q head, one head after the other. */
template <typename M> static __device__ void hash_queries(const struct cuda_attend &a, M *m, uint64_t first, uint32_t group)
{
    for (uint32_t h = 0; h < group; h++) {
        const float *from = m->q[h];
        for (uint32_t i = 0; i < a.scheme.q_stages; i++) {
            bool last = i + 1 == a.scheme.q_stages;
            float *to = last ? m->real[h] + PKV_SIG_BITS_MAX : m->hidden[i % 2];
            const struct cuda_map &map = a.scheme.q[i];
            for (uint32_t pair = threadIdx.x / WARP * 2; pair < map.out; pair += WEIGH_THREADS / 16)
                stage_outputs(map, first + h, pair, from, to, last);
            __syncthreads();
            from = to;
        }
    }
}

/* What all warps do before each of them takes a head: the maps of the schemes that have some. q is in place. */
template <typename M> static __device__ __noinline__ void apply_maps(const struct cuda_attend &a, M *m, uint32_t head)
{
    const struct pkv_geom &g = a.geom;
    const struct cuda_scheme &s = a.scheme;
    uint32_t group = pkv_geom_group(&g);
    uint64_t shared = (uint64_t)a.layer * g.kv_heads + head, own = (uint64_t)a.layer * g.q_heads + head * group;
    if (a.weighed || s.kind == PKV_SCHEME_SIGN)
        return;
    if (s.kind == PKV_SCHEME_HASH)
        hash_queries(a, m, own, group);
    else if (s.kind == PKV_SCHEME_CODE)
        map_queries(s.q[0], m, shared, false, s.dims, group);
    else
        map_queries(s.q_own ? s.q[0] : s.k[0], m, s.q_own ? own : shared, s.q_own, g.sig_bits, group);
    __syncthreads();
}

/* The maps' values, or their signs, spread over the bits. */
template <typename M>
static __device__ __noinline__ void weigh_mapped(const struct cuda_attend &a, M *m, uint32_t head, uint32_t h, uint32_t lane)
{
    const struct pkv_geom &g = a.geom;
    const struct cuda_scheme &s = a.scheme;
    const float *values = m->real[h] + PKV_SIG_BITS_MAX;
    float unit = s.unit;
    if (s.kind == PKV_SCHEME_CODE) {
        uint64_t at = (uint64_t)a.layer * g.kv_heads + head;
        for (uint32_t i = lane, bit = 0; i < PKV_ALIGN_UP(s.dims, WARP); i += WARP) {
            struct code_dim d = code_dim_of(s, at, i, lane, &bit);
            float each = d.bits ? __fmul_rn(values[i], s.step[at * s.dims + i]) : 0.0f;
            for (uint32_t p = 0; p < d.bits; p++)
                m->real[h][d.first + p] = __fmul_rn(each, (float)(1u << p));
        }
        unit = __fmul_rn(__fmul_rn(s.unit, a.policy.scale), LOG2E);
    } else if (s.kind == PKV_SCHEME_HASH) {
        uint32_t each = g.sig_bits / pkv_geom_group(&g);
        for (uint32_t b = lane; b < g.sig_bits; b += WARP)
            m->real[h][b] = b / each != h ? 0.0f : values[b % each] > 0 ? 1.0f : -1.0f;
    } else {
        for (uint32_t b = lane; b < g.sig_bits; b += WARP)
            m->real[h][b] = s.q_signs ? (values[b] > 0 ? 1.0f : -1.0f) : values[b];
        if (!s.q_signs)
            unit = __fmul_rn(s.unit, __fmul_rn(__fmul_rn(2.0f, a.policy.scale), LOG2E));
    }
    if (lane == 0)
        m->unit[h] = unit;
}

template <typename M>
static __device__ void write_planes(const struct cuda_attend &a, M *m, uint64_t q_head, uint32_t h, uint32_t w, int weight,
                                    uint32_t lane)
{
    uint32_t own = 0;
    m->weights[h][w * WARP + lane] = (int8_t)weight;
#pragma unroll
    for (uint32_t p = 0; p < 8; p++) {
        uint32_t plane = __ballot_sync(ALL_LANES, weight >> p & 1);
        own = lane == p ? plane : own;
    }
    if (lane >= 8)
        return;
    m->planes[h][lane][w] = own;
    if (m->write)
        a.work.planes[((q_head + h) * 8 + lane) * pkv_geom_words(&a.geom) + w] = own;
}

/* The caller has weighed. */
template <typename M>
static __device__ void take_weights(const struct cuda_attend &a, M *m, uint64_t q_head, uint32_t h, uint32_t lane)
{
    const int8_t *weights = a.work.weights + (q_head + h) * a.geom.sig_bits;
    for (uint32_t w = 0; w < pkv_geom_words(&a.geom); w++)
        write_planes(a, m, q_head, h, w, weights[w * 32 + lane], lane);
    if (lane == 0)
        m->scale[h] = a.work.scales[q_head + h];
}

template <typename M>
static __device__ void quantize(const struct cuda_attend &a, M *m, uint64_t q_head, uint32_t h, uint32_t lane)
{
    uint32_t bits = a.geom.sig_bits, words = bits / 32;
    float most = 0;
    for (uint32_t b = lane; b < bits; b += WARP)
        most = fmaxf(most, fabsf(m->real[h][b]));
    for (uint32_t s = 16; s; s /= 2)
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
    most = isfinite(most) ? most : 0.0f;
    float step = a.scheme.q_signs ? 1.0f : most > 0 ? __fdiv_rn(127.0f, most) : 0.0f;
    float scale = step > 0 ? __fdiv_rn(m->unit[h], step) : 0.0f;
    for (uint32_t w = 0; w < words; w++) {
        int weight = step > 0 ? __float2int_rn(__fmul_rn(m->real[h][w * 32 + lane], step)) : 0;
        if (m->write)
            a.work.weights[(q_head + h) * bits + w * 32 + lane] = (int8_t)weight;
        write_planes(a, m, q_head, h, w, weight, lane);
    }
    if (lane == 0) {
        m->scale[h] = scale;
        if (m->write)
            a.work.scales[q_head + h] = scale;
    }
}

/* A warp takes a head, after apply_maps. PER: head_dim / 32, or 0 where only the geometry knows. */
template <uint32_t PER, typename M>
static __device__ void weigh_head(const struct cuda_attend &a, M *m, uint32_t head, uint64_t q_head, uint32_t h, uint32_t lane)
{
    if (a.weighed) {
        take_weights(a, m, q_head, h, lane);
        return;
    }
    if (a.scheme.kind == PKV_SCHEME_SIGN)
        weigh_sign<PER>(a, m, head, h, lane);
    else
        weigh_mapped(a, m, head, h, lane);
    __syncwarp();
    quantize(a, m, q_head, h, lane);
}

#endif
