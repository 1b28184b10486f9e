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

/* Rows of `in` weights, a half warp each, several on their way at a time: use(task, there, this lane's part of row(task)). */
template <uint32_t PIECES, uint32_t AT_ONCE, typename R, typename U>
static __device__ __forceinline__ void rows_take(uint32_t tasks, uint32_t in, const R &row, const U &use)
{
    constexpr uint32_t STRIDE = WEIGH_THREADS / 16;
    uint32_t lane = threadIdx.x % 16, mine = threadIdx.x / 16, pair = mine & ~1u; /* a warp's half warps go together */
#pragma unroll 1
    for (uint32_t first = 0; first + pair < tasks; first += AT_ONCE * STRIDE) {
        float w[AT_ONCE][PIECES];
#pragma unroll
        for (uint32_t t = 0; t < AT_ONCE; t++) {
            const float *from = row(min(first + t * STRIDE + mine, tasks - 1)) + lane;
#pragma unroll
            for (uint32_t j = 0; j < PIECES; j++)
                w[t][j] = j * 16 < in && first + t * STRIDE + pair < tasks ? __ldg(from + j * 16) : 0.0f;
        }
#pragma unroll
        for (uint32_t t = 0; t < AT_ONCE; t++)
            if (first + t * STRIDE + pair < tasks)
                use(min(first + t * STRIDE + mine, tasks - 1), first + t * STRIDE + mine < tasks, w[t]);
    }
}

/* dot16() with weights that are there. */
template <uint32_t PIECES>
static __device__ __forceinline__ float dot_pieces(const float (&w)[PIECES], const float *x, uint32_t in)
{
    float sum = 0;
#pragma unroll
    for (uint32_t j = 0; j < PIECES; j++)
        if (j * 16 < in)
            sum = __fadd_rn(sum, __fmul_rn(w[j], x[j * 16 + threadIdx.x % 16]));
    return sum16(sum);
}

/* Outputs of one map of all the group's heads. own: the heads have maps of their own. */
template <uint32_t PIECES, uint32_t AT_ONCE, typename M>
static __device__ void map_queries(const struct cuda_map &map, M *m, uint64_t first, bool own, uint32_t out, uint32_t group)
{
    rows_take<PIECES, AT_ONCE>(
        own ? out * group : out, map.in,
        [&](uint32_t task) { return map.weight + ((first + task / out) * map.out + task % out) * map.in; },
        [&](uint32_t task, bool there, const float(&w)[PIECES]) {
            uint32_t o = task % out;
            float bias = map.bias ? __ldg(map.bias + (first + task / out) * map.out + o) : 0.0f;
            for (uint32_t h = own ? task / out : 0, end = own ? h + 1 : group; h < end; h++) {
                float sum = dot_pieces(w, m->q[h], map.in);
                if (threadIdx.x % 16 == 0 && there)
                    m->real[h][PKV_SIG_BITS_MAX + o] = map.bias ? __fadd_rn(sum, bias) : sum;
            }
        });
}

/* A stage of the MLPs of `heads` heads from the h-th on; from [heads][stride], hidden [heads][out]. */
template <typename M>
static __device__ void hash_stage(const struct cuda_map &map, M *m, uint64_t first, uint32_t h, uint32_t heads,
                                  const float *from, uint32_t stride, float *hidden, bool last)
{
    auto put = [&](uint32_t task, bool there, float sum) {
        uint32_t o = task % map.out;
        uint64_t row = (first + h + task / map.out) * map.out + o;
        float v = map.bias ? __fadd_rn(sum, map.bias[row]) : sum;
        if (!last)
            v = silu(v);
        if (threadIdx.x % 16 == 0 && there)
            (last ? m->real[h + task / map.out] + PKV_SIG_BITS_MAX + o : hidden + task)[0] = v;
    };
    auto row = [&](uint32_t task) { return map.weight + ((first + h) * map.out + task) * map.in; };
    if (map.in <= 128)
        rows_take<8, 4>(heads * map.out, map.in, row, [&](uint32_t task, bool there, const float(&w)[8]) {
            put(task, there, dot_pieces(w, from + task / map.out * stride, map.in));
        });
    else
        rows_take<1, 1>(heads * map.out, 0, row, [&](uint32_t task, bool there, const float(&)[1]) {
            put(task, there, dot16(row(task), from + task / map.out * stride, map.in, threadIdx.x % 16));
        });
}

/* `hash`: an MLP per q head; all heads at once where there is room for what lies between stages. */
template <typename M> static __device__ void hash_queries(const struct cuda_attend &a, M *m, uint64_t first, uint32_t group)
{
    uint32_t widest = 1;
    for (uint32_t i = 0; i + 1 < a.scheme.q_stages; i++)
        widest = max(widest, a.scheme.q[i].out);
    uint32_t together = min(max(HIDDEN_MAX / widest, 1u), group);
    for (uint32_t h = 0; h < group; h += together) {
        uint32_t heads = min(together, group - h);
        const float *from = m->q[h];
        for (uint32_t i = 0; i < a.scheme.q_stages; i++) {
            hash_stage(a.scheme.q[i], m, first, h, heads, from, i ? a.scheme.q[i].in : PKV_HEAD_DIM_MAX, m->hidden[i % 2],
                       i + 1 == a.scheme.q_stages);
            __syncthreads();
            from = m->hidden[i % 2];
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
    const struct cuda_map &map = s.kind == PKV_SCHEME_CODE || s.q_own ? s.q[0] : s.k[0];
    uint32_t out = s.kind == PKV_SCHEME_CODE ? s.dims : g.sig_bits;
    bool apart = s.kind == PKV_SCHEME_LINEAR && s.q_own;
    if (s.kind == PKV_SCHEME_HASH)
        hash_queries(a, m, own, group);
    else if (g.head_dim <= 128)
        map_queries<8, 4>(map, m, apart ? own : shared, apart, out, group);
    else
        map_queries<16, 2>(map, m, apart ? own : shared, apart, out, group);
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
