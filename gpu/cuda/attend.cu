/* Exact attention over the rows of a list, or over all tokens where the span is dense; rows are read where they lie, pool or
 * arena. A list and four q heads are shared by `splits` thread blocks; the one that finishes last merges.
 *
 * A group of lanes holds a row, eight dimensions a lane, so a load is 16 bytes (twice for f32) and the softmax state lives in
 * registers: at decode the kernel waits for memory, not for arithmetic, and plain FMAs serve every dtype and head_dim alike. */
#include "gpu/cuda/rows.cuh"

#define THREADS 256u
#define WARPS   (THREADS / WARP)
#define HEADS   CUDA_HEADS
#define ROWS    512u /* addresses worked out at a time */
#define VECTOR  8u   /* dimensions a lane */

template <uint32_t DIM> struct attend_shared {
    uint64_t address[ROWS], keep[ROWS]; /* keep: the way of the row cache that a fetched row goes to */
    float out[WARPS][HEADS][DIM];
    float max[WARPS][HEADS], sum[WARPS][HEADS];
    uint32_t last;
};

template <typename T> struct vector8 {
    uint4 v[sizeof(T) / 2];
};

template <typename T> static __device__ __forceinline__ void unpack(const vector8<T> &x, float (&to)[VECTOR])
{
    const T *p = (const T *)&x;
#pragma unroll
    for (uint32_t i = 0; i < VECTOR; i++)
        to[i] = to_float(p[i]);
}

template <typename T> static __device__ __forceinline__ vector8<T> load8(const T *p)
{
    vector8<T> x;
#pragma unroll
    for (uint32_t i = 0; i < sizeof(T) / 2; i++)
        x.v[i] = __ldg((const uint4 *)p + i);
    return x;
}

template <typename T> static __device__ __forceinline__ void store8(T *p, const vector8<T> &x)
{
#pragma unroll
    for (uint32_t i = 0; i < sizeof(T) / 2; i++)
        ((uint4 *)p)[i] = x.v[i];
}

/* Running softmax of four heads; `out` is this lane's eight dimensions. Base 2. */
struct state {
    float max[HEADS], sum[HEADS], out[HEADS][VECTOR];
};

static __device__ __forceinline__ void merge(struct state &s, uint32_t apart)
{
#pragma unroll
    for (uint32_t h = 0; h < HEADS; h++) {
        float other = __shfl_xor_sync(ALL_LANES, s.max[h], apart), most = fmaxf(s.max[h], other);
        float keep = exp2_fast(s.max[h] - most);
        s.max[h] = most, s.sum[h] *= keep;
        s.sum[h] += __shfl_xor_sync(ALL_LANES, s.sum[h], apart);
#pragma unroll
        for (uint32_t i = 0; i < VECTOR; i++) {
            float mine = s.out[h][i] * keep;
            s.out[h][i] = mine + __shfl_xor_sync(ALL_LANES, mine, apart);
        }
    }
}

/* U rows a group of lanes; `row` of the first, of `rows`. */
template <typename T, uint32_t DIM, uint32_t U>
static __device__ __forceinline__ void step(const uint64_t *address, const uint64_t *keep, uint32_t row, uint32_t stride,
                                            uint32_t rows, uint32_t lane, const float (&q)[HEADS][VECTOR], struct state &s)
{
    constexpr uint32_t USED = DIM / VECTOR, GROUP = USED == 12 ? 16 : USED;
    vector8<T> k[U], v[U];
    bool there[U];
#pragma unroll
    for (uint32_t u = 0; u < U; u++) {
        uint32_t r = row + u * stride;
        there[u] = r < rows;
        const T *p = (const T *)address[there[u] ? r : 0] + (lane < USED ? lane * VECTOR : 0);
        k[u] = load8(p), v[u] = load8(p + DIM);
    }
    if (keep)
#pragma unroll
        for (uint32_t u = 0; u < U; u++)
            if (there[u] && keep[row + u * stride] && lane < USED) {
                T *p = (T *)keep[row + u * stride] + lane * VECTOR;
                store8(p, k[u]), store8(p + DIM, v[u]);
            }
    float score[U][HEADS];
#pragma unroll
    for (uint32_t u = 0; u < U; u++) {
        float x[VECTOR];
        unpack<T>(k[u], x);
#pragma unroll
        for (uint32_t h = 0; h < HEADS; h++) {
            float dot = 0;
#pragma unroll
            for (uint32_t i = 0; i < VECTOR; i++)
                dot = fmaf(q[h][i], x[i], dot);
#pragma unroll
            for (uint32_t apart = GROUP / 2; apart; apart /= 2)
                dot += __shfl_xor_sync(ALL_LANES, dot, apart);
            score[u][h] = there[u] ? dot : NOTHING;
        }
    }
#pragma unroll
    for (uint32_t h = 0; h < HEADS; h++) {
        float most = s.max[h];
#pragma unroll
        for (uint32_t u = 0; u < U; u++)
            most = fmaxf(most, score[u][h]);
        float keep = exp2_fast(s.max[h] - most);
        s.max[h] = most, s.sum[h] *= keep;
#pragma unroll
        for (uint32_t u = 0; u < U; u++) {
            score[u][h] = there[u] ? exp2_fast(score[u][h] - most) : 0.0f;
            s.sum[h] += score[u][h];
        }
#pragma unroll
        for (uint32_t i = 0; i < VECTOR; i++)
            s.out[h][i] *= keep;
    }
#pragma unroll
    for (uint32_t u = 0; u < U; u++) {
        float x[VECTOR];
        unpack<T>(v[u], x);
#pragma unroll
        for (uint32_t h = 0; h < HEADS; h++)
#pragma unroll
            for (uint32_t i = 0; i < VECTOR; i++)
                s.out[h][i] = fmaf(score[u][h], x[i], s.out[h][i]);
    }
}

/* Warps of the block into one. */
template <uint32_t DIM> static __device__ void write_partial(struct attend_shared<DIM> *m, float *to)
{
    for (uint32_t i = threadIdx.x; i < HEADS * DIM; i += THREADS) {
        uint32_t h = i / DIM, d = i % DIM;
        float most = NOTHING, sum = 0, out = 0;
#pragma unroll
        for (uint32_t w = 0; w < WARPS; w++)
            most = fmaxf(most, m->max[w][h]);
#pragma unroll
        for (uint32_t w = 0; w < WARPS; w++) {
            float keep = exp2_fast(m->max[w][h] - most);
            sum += m->sum[w][h] * keep;
            out += m->out[w][h][d] * keep;
        }
        to[i] = out;
        if (d == 0)
            to[HEADS * DIM + h] = most, to[HEADS * DIM + HEADS + h] = sum;
    }
}

/* Splits into one. Four dimensions a thread, the splits dealt out to what threads there are; what they read is on its way while
 * the splits' weights are worked out. */
#define FLIGHT 18u

template <uint32_t DIM>
static __device__ void weigh_splits(const struct cuda_attend &a, const float *partials, uint32_t heads, uint64_t q_head,
                                    float *weight, float *total)
{
    uint32_t h = threadIdx.x / WARP, lane = threadIdx.x % WARP, next = lane + WARP;
    const float *p = partials + HEADS * DIM + h;
    float max0 = lane < a.splits ? __ldcg(p + lane * CUDA_PARTIAL(DIM)) : NOTHING;
    float max1 = next < a.splits ? __ldcg(p + next * CUDA_PARTIAL(DIM)) : NOTHING;
    float sum0 = lane < a.splits ? __ldcg(p + lane * CUDA_PARTIAL(DIM) + HEADS) : 0.0f;
    float sum1 = next < a.splits ? __ldcg(p + next * CUDA_PARTIAL(DIM) + HEADS) : 0.0f, most = fmaxf(max0, max1);
    for (uint32_t s = 16; s; s /= 2)
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
    max0 = exp2_fast(max0 - most), max1 = exp2_fast(max1 - most);
    weight[h * CUDA_SPLITS_MAX + lane] = max0, weight[h * CUDA_SPLITS_MAX + next] = max1;
    sum0 = sum0 * max0 + sum1 * max1;
    for (uint32_t s = 16; s; s /= 2)
        sum0 += __shfl_xor_sync(ALL_LANES, sum0, s);
    if (lane == 0)
        total[h] = sum0;
    if (lane == 0 && h < heads && a.lse)
        a.lse[q_head + h] = (most + log2f(sum0)) * 0.69314718f;
}

template <uint32_t DIM>
static __device__ void write_result(const struct cuda_attend &a, struct attend_shared<DIM> *m, const float *partials,
                                    uint64_t q_head, uint32_t heads)
{
    constexpr uint32_t QUADS = HEADS * DIM / 4, LANES = THREADS / QUADS ? THREADS / QUADS : 1;
    float *weight = (float *)m->address, *total = weight + HEADS * CUDA_SPLITS_MAX; /* [HEADS][CUDA_SPLITS_MAX], [HEADS] */
    uint32_t quad = threadIdx.x % QUADS, first = threadIdx.x / QUADS;
    float4 sum = make_float4(0, 0, 0, 0);
    for (uint32_t begin = first; begin < a.splits + LANES; begin += FLIGHT * LANES) {
        float4 v[FLIGHT];
#pragma unroll
        for (uint32_t i = 0; i < FLIGHT; i++) {
            uint32_t s = begin + i * LANES;
            v[i] = s < a.splits && first < LANES ? __ldcg((const float4 *)(partials + s * CUDA_PARTIAL(DIM)) + quad)
                                                 : make_float4(0, 0, 0, 0);
        }
        if (begin == first) {
            if (threadIdx.x < HEADS * WARP)
                weigh_splits<DIM>(a, partials, heads, q_head, weight, total);
            __syncthreads();
        }
#pragma unroll
        for (uint32_t i = 0; i < FLIGHT; i++) {
            uint32_t s = begin + i * LANES;
            float w = s < a.splits ? weight[quad * 4 / DIM * CUDA_SPLITS_MAX + s] : 0.0f;
            sum.x = fmaf(v[i].x, w, sum.x), sum.y = fmaf(v[i].y, w, sum.y);
            sum.z = fmaf(v[i].z, w, sum.z), sum.w = fmaf(v[i].w, w, sum.w);
        }
    }
    float4 *shares = (float4 *)m->out; /* [LANES][QUADS] */
    if (first < LANES)
        shares[first * QUADS + quad] = sum;
    __syncthreads();
    if (first || quad * 4 / DIM >= heads)
        return;
#pragma unroll
    for (uint32_t l = 1; l < LANES; l++) {
        float4 v = shares[l * QUADS + quad];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    float by = 1.0f / total[quad * 4 / DIM];
    ((float4 *)(a.out + q_head * DIM))[quad] = make_float4(sum.x * by, sum.y * by, sum.z * by, sum.w * by);
}

/* Addresses of `rows` entries from `at` on. The first chunk of heads claims ways for what is fetched. */
template <uint32_t DIM>
static __device__ void take_addresses(const struct cuda_attend &a, struct attend_shared<DIM> *m, const struct list_of &l,
                                      const struct span &span, uint64_t list, uint32_t at, uint32_t rows, bool keep)
{
    uint64_t first = list * cuda_rows_max(&a.policy) + at;
    for (uint32_t i = threadIdx.x; i < rows; i += THREADS) {
        uint64_t address = span.dense ? (uint64_t)row_address(a, l.blocks, l.head, at + i) : a.work.address[first + i];
        m->keep[i] = keep && address & FETCHED ? cache_claim(a, l, a.work.index[first + i]) : 0;
        m->address[i] = address & ~FETCHED;
    }
}

template <typename T, uint32_t DIM>
static __device__ void attend_rows(const struct cuda_attend &a, struct attend_shared<DIM> *m, const struct span &span,
                                   uint32_t query, uint32_t list, uint32_t head, uint32_t split, bool first_chunk,
                                   const float (&q)[HEADS][VECTOR], struct state &s)
{
    constexpr uint32_t USED = DIM / VECTOR, GROUP = USED == 12 ? 16 : USED, SLOTS = WARP / GROUP, U = sizeof(T) == 4 ? 2 : 5;
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    struct list_of l = list_at(a, query, head, span);
    bool keep = first_chunk && l.cached && !span.dense;
    uint32_t count = span.dense ? span.visible : a.work.chosen[list], per = PKV_DIV_UP(count, a.splits);
    uint32_t begin = min(split * per, count), end = min(begin + per, count);
    for (uint32_t at = begin; at < end; at += ROWS) {
        uint32_t rows = min(ROWS, end - at);
        take_addresses<DIM>(a, m, l, span, list, at, rows, keep);
        __syncthreads();
        for (uint32_t row = warp * SLOTS; row < rows; row += U * WARPS * SLOTS)
            step<T, DIM, U>(m->address, keep ? m->keep : NULL, row + lane / GROUP, WARPS * SLOTS, rows, lane % GROUP, q, s);
        __syncthreads();
    }
}

template <typename T, uint32_t DIM>
__global__ void __launch_bounds__(THREADS, 2) attend_kernel(const __grid_constant__ struct cuda_attend a)
{
    extern __shared__ __align__(16) unsigned char shared[];
    struct attend_shared<DIM> *m = (struct attend_shared<DIM> *)shared;
    constexpr uint32_t USED = DIM / VECTOR, GROUP = USED == 12 ? 16 : USED;
    const struct pkv_geom &g = a.geom;
    uint32_t chunks = cuda_head_chunks(&g), item = blockIdx.x / a.splits, split = blockIdx.x % a.splits, list = item / chunks;
    uint32_t chunk = item % chunks, query = list / g.kv_heads, head = list % g.kv_heads, group = pkv_geom_group(&g);
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, own = lane % GROUP,
             heads = min(HEADS, group - chunk * HEADS);
    uint64_t q_head = (uint64_t)query * g.q_heads + head * group + chunk * HEADS;
    float q[HEADS][VECTOR];
    struct state s;
    struct span span = span_of(a, query);
#pragma unroll
    for (uint32_t h = 0; h < HEADS; h++) {
        s.max[h] = NOTHING, s.sum[h] = 0;
        const T *from = (const T *)a.q + (q_head + min(h, heads - 1)) * DIM + (own < USED ? own * VECTOR : 0);
#pragma unroll
        for (uint32_t i = 0; i < VECTOR; i++) {
            q[h][i] = own < USED ? to_float(from[i]) * (a.policy.scale * LOG2E) : 0.0f;
            s.out[h][i] = 0;
        }
    }
    wait_for_former();
    attend_rows<T, DIM>(a, m, span, query, list, head, split, chunk == 0, q, s);
#pragma unroll
    for (uint32_t apart = GROUP; apart < WARP; apart *= 2)
        merge(s, apart);
    if (lane < USED)
#pragma unroll
        for (uint32_t h = 0; h < HEADS; h++) {
#pragma unroll
            for (uint32_t i = 0; i < VECTOR; i++)
                m->out[warp][h][lane * VECTOR + i] = s.out[h][i];
            m->max[warp][h] = s.max[h], m->sum[warp][h] = s.sum[h];
        }
    __syncthreads();
    float *partials = a.work.partial + (uint64_t)item * a.splits * CUDA_PARTIAL(DIM);
    write_partial<DIM>(m, partials + (uint64_t)split * CUDA_PARTIAL(DIM));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        m->last = atomicInc(a.work.arrived + item, a.splits - 1) == a.splits - 1; /* back to zero for the next call */
    __syncthreads();
    if (!m->last)
        return;
    __threadfence();
    write_result<DIM>(a, m, partials, q_head, heads);
}

template <typename T, uint32_t DIM> static int start(const struct cuda_attend *a, void *stream)
{
    uint32_t items = a->queries * a->geom.kv_heads * cuda_head_chunks(&a->geom);
    return launch(attend_kernel<T, DIM>, dim3(items * a->splits), THREADS, sizeof(struct attend_shared<DIM>), *a, stream,
                  !cuda_dense_only(a)); /* alone, it may not look at anything before the former kernel's end */
}

template <typename T> static int start_dim(const struct cuda_attend *a, void *stream)
{
    switch (a->geom.head_dim) {
    case 64:
        return start<T, 64>(a, stream);
    case 96:
        return start<T, 96>(a, stream);
    case 128:
        return start<T, 128>(a, stream);
    default:
        return start<T, 256>(a, stream);
    }
}

template <typename T, uint32_t DIM> static bool preload(void)
{
    return cudaFuncSetAttribute(attend_kernel<T, DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                sizeof(struct attend_shared<DIM>)) == cudaSuccess;
}

template <typename T> static bool preload_dims(void)
{
    return preload<T, 64>() && preload<T, 96>() && preload<T, 128>() && preload<T, 256>();
}

/* ---- gather: rows of the lists side by side ---- */

__global__ void __launch_bounds__(THREADS) gather_kernel(const __grid_constant__ struct cuda_attend a, char *to)
{
    const struct pkv_geom &g = a.geom;
    uint32_t list = blockIdx.y, lane = threadIdx.x % WARP;
    wait_for_former();
    uint64_t bytes = pkv_geom_row_bytes(&g), first = (uint64_t)list * cuda_rows_max(&a.policy);
    uint32_t count = a.work.chosen[list];
    for (uint32_t i = blockIdx.x * WARPS + threadIdx.x / WARP; i < count; i += gridDim.x * WARPS) {
        const uint4 *from = (const uint4 *)(a.work.address[first + i] & ~FETCHED);
        for (uint32_t p = lane; p < bytes / 16; p += WARP)
            ((uint4 *)(to + (first + i) * bytes))[p] = __ldg(from + p);
    }
}

extern "C" int cuda_attend_preload(void)
{
    cudaFuncAttributes f;
    return preload_dims<float>() && preload_dims<__half>() && preload_dims<__nv_bfloat16>() &&
                   cudaFuncGetAttributes(&f, gather_kernel) == cudaSuccess
               ? 0
               : -(int)PKV_ERR_UNSUPPORTED;
}

extern "C" int cuda_attend_launch(const struct cuda_attend *a, void *stream)
{
    if (!a->splits || a->splits > CUDA_SPLITS_MAX)
        return -(int)PKV_ERR_SHAPE;
    return a->geom.dtype == PKV_F32   ? start_dim<float>(a, stream)
           : a->geom.dtype == PKV_F16 ? start_dim<__half>(a, stream)
                                      : start_dim<__nv_bfloat16>(a, stream);
}

extern "C" int cuda_gather_launch(const struct cuda_gather *g, void *stream)
{
    const struct cuda_attend *a = g->attend;
    dim3 grid(PKV_DIV_UP(cuda_rows_max(&a->policy), WARPS * 4), a->queries * a->geom.kv_heads);
    gather_kernel<<<grid, THREADS, 0, (cudaStream_t)stream>>>(*a, (char *)g->to);
    return cudaGetLastError() == cudaSuccess ? 0 : -(int)PKV_ERR_SYSTEM;
}
