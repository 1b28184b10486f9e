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

/* ---- maps: a half warp has four rows of weights at a time ---- */

#define MAP_ROWS   4u
#define HALF_WARPS (WEIGH_THREADS / 16)

/* Four rows of `in` weights on their way to this lane; row(i) of those that there are. */
template <uint32_t PIECES, typename R>
static __device__ __forceinline__ void map_rows(float (&w)[MAP_ROWS][PIECES], uint32_t in, uint32_t rows, const R &row)
{
#pragma unroll
    for (uint32_t i = 0; i < MAP_ROWS; i++) {
        const float *from = row(min(i, rows - 1)) + threadIdx.x % 16;
#pragma unroll
        for (uint32_t j = 0; j < PIECES; j++)
            w[i][j] = j * 16 < in && i < rows ? __ldg(from + j * 16) : 0.0f;
    }
}

/* What this lane adds to its row's product with x, in dot16()'s order. */
template <uint32_t PIECES>
static __device__ __forceinline__ float map_part(const float (&w)[PIECES], const float *x, uint32_t in)
{
    float sum = 0;
#pragma unroll
    for (uint32_t j = 0; j < PIECES; j++)
        if (j * 16 < in)
            sum = __fadd_rn(sum, __fmul_rn(w[j], x[j * 16 + threadIdx.x % 16]));
    return sum;
}

/* sum16() of four values at once: this lane's is of value own_row(). */
static __device__ __forceinline__ uint32_t own_row(void)
{
    return threadIdx.x / 4 % MAP_ROWS;
}
static __device__ __forceinline__ float sums16(const float (&v)[MAP_ROWS])
{
    bool high = threadIdx.x & 8, odd = threadIdx.x & 4;
    float a = __fadd_rn(high ? v[2] : v[0], __shfl_xor_sync(ALL_LANES, high ? v[0] : v[2], 8));
    float b = __fadd_rn(high ? v[3] : v[1], __shfl_xor_sync(ALL_LANES, high ? v[1] : v[3], 8));
    float sum = __fadd_rn(odd ? b : a, __shfl_xor_sync(ALL_LANES, odd ? a : b, 4));
    sum = __fadd_rn(sum, __shfl_xor_sync(ALL_LANES, sum, 2));
    return __fadd_rn(sum, __shfl_xor_sync(ALL_LANES, sum, 1));
}

/* Outputs of one map of all the group's heads: the rows are outputs a stride apart. */
template <uint32_t PIECES, typename M>
static __device__ void map_shared(const struct cuda_map &map, M *m, uint64_t at, uint32_t out, uint32_t group)
{
    uint32_t mine = threadIdx.x / 16;
#pragma unroll 1
    for (uint32_t first = 0; first + (mine & ~1u) < out; first += MAP_ROWS * HALF_WARPS) {
        float w[MAP_ROWS][PIECES];
        uint32_t o = min(first + mine, out - 1), rows = (out - 1 - o) / HALF_WARPS + 1, own = o + own_row() * HALF_WARPS;
        bool put = threadIdx.x % 4 == 0 && own_row() < rows && first + mine < out;
        map_rows<PIECES>(w, map.in, rows,
                         [&](uint32_t i) { return map.weight + (at * map.out + o + i * HALF_WARPS) * map.in; });
        float bias = map.bias && put ? __ldg(map.bias + at * map.out + own) : 0.0f;
#pragma unroll 1
        for (uint32_t h = 0; h < group; h++) {
            float v[MAP_ROWS];
#pragma unroll
            for (uint32_t i = 0; i < MAP_ROWS; i++)
                v[i] = map_part(w[i], m->q[h], map.in);
            float sum = sums16(v);
            if (put)
                m->real[h][PKV_SIG_BITS_MAX + own] = map.bias ? __fadd_rn(sum, bias) : sum;
        }
    }
}

/* The same where heads from `at` on have maps of their own: the rows are heads. x [heads][stride], put(h, o, value). */
template <uint32_t PIECES, typename U>
static __device__ __forceinline__ void map_apart(const struct cuda_map &map, uint64_t at, uint32_t heads, const float *x,
                                                 uint32_t stride, uint32_t out, const U &put)
{
    uint32_t mine = threadIdx.x / 16;
#pragma unroll 1
    for (uint32_t first = 0; first + (mine & ~1u) < out; first += HALF_WARPS)
#pragma unroll 1
        for (uint32_t h = 0; h < heads; h += MAP_ROWS) {
            float w[MAP_ROWS][PIECES], v[MAP_ROWS];
            uint32_t o = min(first + mine, out - 1), rows = min(heads - h, MAP_ROWS), own = h + own_row();
            bool there = threadIdx.x % 4 == 0 && own < heads && first + mine < out;
            map_rows<PIECES>(w, map.in, rows, [&](uint32_t i) { return map.weight + ((at + h + i) * map.out + o) * map.in; });
            float bias = map.bias && there ? __ldg(map.bias + (at + own) * map.out + o) : 0.0f;
#pragma unroll
            for (uint32_t i = 0; i < MAP_ROWS; i++)
                v[i] = i < rows ? map_part(w[i], x + (h + i) * stride, map.in) : 0.0f;
            float sum = sums16(v);
            sum = map.bias ? __fadd_rn(sum, bias) : sum;
            if (there)
                put(own, o, sum);
        }
}

/* A stage of the MLPs of `heads` heads from the h-th on; from [heads][stride], hidden [heads][out]. */
template <typename M>
static __device__ void hash_stage(const struct cuda_map &map, M *m, uint64_t first, uint32_t h, uint32_t heads,
                                  const float *from, uint32_t stride, float *hidden, bool last)
{
    if (map.in <= 128 && map.in % 16 == 0) {
        map_apart<8>(map, first + h, heads, from, stride, map.out, [&](uint32_t own, uint32_t o, float v) {
            (last ? m->real[h + own] + PKV_SIG_BITS_MAX : hidden + own * map.out)[o] = last ? v : silu(v);
        });
        return;
    }
    for (uint32_t i = 0; i < heads; i++)
        for (uint32_t pair = threadIdx.x / WARP * 2; pair < map.out; pair += HALF_WARPS)
            stage_outputs(map, first + h + i, pair, from + i * stride,
                          last ? m->real[h + i] + PKV_SIG_BITS_MAX : hidden + i * map.out, last);
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
    auto put = [&](uint32_t h, uint32_t o, float v) { m->real[h][PKV_SIG_BITS_MAX + o] = v; };
    if (s.kind == PKV_SCHEME_HASH)
        hash_queries(a, m, own, group);
    else if (s.kind == PKV_SCHEME_LINEAR && s.q_own)
        map_apart<PKV_HEAD_DIM_MAX / 16>(map, own, group, m->q[0], PKV_HEAD_DIM_MAX, out, put);
    else if (g.head_dim <= 128)
        map_shared<8>(map, m, shared, out, group);
    else
        map_shared<PKV_HEAD_DIM_MAX / 16>(map, m, shared, out, group);
    __syncthreads();
}

/* `code`: a dimension's value, at the weight of each of its bits. */
template <typename M>
static __device__ __forceinline__ void weigh_dims(const struct cuda_attend &a, M *m, uint32_t head, uint32_t h, uint32_t lane)
{
    constexpr uint32_t PER = PKV_HEAD_DIM_MAX / WARP;
    const struct cuda_scheme &s = a.scheme;
    uint64_t at = ((uint64_t)a.layer * a.geom.kv_heads + head) * s.dims;
    uint32_t bits[PER], before = 0;
    float step[PER]; /* all on their way together */
#pragma unroll
    for (uint32_t j = 0; j < PER; j++) {
        uint32_t i = j * WARP + lane;
        bits[j] = i < s.dims ? s.bits[at + i] : 0, step[j] = i < s.dims ? s.step[at + i] : 0.0f;
    }
#pragma unroll
    for (uint32_t j = 0; j < PER; j++) {
        if (j * WARP >= s.dims)
            break;
        struct code_dim d = code_dim_behind(bits[j], lane, &before);
        float each = d.bits ? __fmul_rn(m->real[h][PKV_SIG_BITS_MAX + j * WARP + lane], step[j]) : 0.0f;
        for (uint32_t p = 0; p < d.bits; p++)
            m->real[h][d.first + p] = __fmul_rn(each, (float)(1u << p));
    }
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
        weigh_dims(a, m, head, h, lane);
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
