/* Queries into what the scan needs. One thread block is one list: a query token and kv head.
 *   weights  the scheme's transform, one int8 per signature bit; the same IEEE operations in the same order as the host, so the
 *            weights and scales agree bit for bit
 *   planes   the weights' bits, for the 1-bit tensor cores
 *   biases   minus the log-sum-exp of the exact scores over sinks and recent, plus the mean of exact minus estimated score over
 *            the recent tokens; sums run in another order than the host's */
#include "gpu/cuda/weigh.cuh"

#define THREADS 512u
#define WARPS   (THREADS / WARP)

struct query_shared : weigh_shared<PKV_GROUP_MAX> {
    float max[WARPS][PKV_GROUP_MAX], sum[WARPS][PKV_GROUP_MAX], shift[WARPS][PKV_GROUP_MAX];
};

/* ---- biases: tiles of rows; exact scores by groups of 16 lanes, estimates by one thread each ---- */

#define TILE 256u

struct bias_tile {
    uint64_t row[TILE], signature[TILE];
    float exact[PKV_GROUP_MAX][TILE];
};

/* Row i of the sinks and recent tokens, 0 <= i < first + visible - last. */
static __device__ void tile_addresses(const struct cuda_attend &a, struct bias_tile *t, uint32_t head, const struct span &span,
                                      const struct pkv_block_ref *blocks, uint32_t begin, uint32_t rows)
{
    const struct pkv_geom &g = a.geom;
    for (uint32_t i = threadIdx.x; i < rows; i += THREADS) {
        uint32_t n = begin + i, token = n < span.first ? n : span.last + (n - span.first);
        uint64_t place = blocks[token / PKV_BLOCK_TOKENS].signatures;
        t->row[i] = (uint64_t)row_address(a, blocks, head, token);
        t->signature[i] = (uint64_t)place_address(a.base, place, pkv_geom_sig_block_bytes(&g)) +
                          4ull * pkv_geom_sig_index(&g, head, token % PKV_BLOCK_TOKENS, 0);
    }
}

/* Two neighbouring numbers, as they lie. */
template <typename T> struct pair;
template <> struct pair<float> {
    typedef float2 type;
    static __device__ __forceinline__ float2 value(float2 p)
    {
        return p;
    }
};
template <> struct pair<__half> {
    typedef __half2 type;
    static __device__ __forceinline__ float2 value(__half2 p)
    {
        return __half22float2(p);
    }
};
template <> struct pair<__nv_bfloat16> {
    typedef __nv_bfloat162 type;
    static __device__ __forceinline__ float2 value(__nv_bfloat162 p)
    {
        return __bfloat1622float2(p);
    }
};

/* Exact scores in units of log2. Sixteen lanes have a row; as many rows as registers hold are on their way at a time, for the
 * wait is what costs: at head_dim 128 and 16 bits, all 256 of a tile. */
template <typename T, uint32_t USED>
static __device__ void tile_exact(const struct cuda_attend &a, const struct query_shared *m, struct bias_tile *t, uint32_t rows,
                                  uint32_t first_warp)
{
    constexpr uint32_t ROWS = 48 * 2 / sizeof(T) / USED > 12 ? 12 : 48 * 2 / sizeof(T) / USED;
    const struct pkv_geom &g = a.geom;
    uint32_t group = pkv_geom_group(&g), lane = threadIdx.x % 16, stride = (THREADS - first_warp * WARP) / 16;
    if (threadIdx.x / WARP < first_warp)
        return;
    for (uint32_t first = (threadIdx.x - first_warp * WARP) / 32 * 2; first < rows; first += ROWS * stride) {
        typename pair<T>::type k[ROWS][USED];
        uint32_t mine = first + threadIdx.x / 16 % 2;
#pragma unroll
        for (uint32_t r = 0; r < ROWS; r++) {
            const T *key = (const T *)t->row[min(mine + r * stride, rows - 1)];
#pragma unroll
            for (uint32_t j = 0; j < USED; j++)
                k[r][j] = *(const typename pair<T>::type *)(key + j * 32 + 2 * lane);
        }
        for (uint32_t h = 0; h < group; h++) {
            float dot[ROWS] = {};
#pragma unroll
            for (uint32_t j = 0; j < USED; j++) {
                float2 q = *(const float2 *)&m->q[h][j * 32 + 2 * lane];
#pragma unroll
                for (uint32_t r = 0; r < ROWS; r++) {
                    float2 x = pair<T>::value(k[r][j]);
                    dot[r] = fmaf(x.x, q.x, fmaf(x.y, q.y, dot[r]));
                }
            }
#pragma unroll
            for (uint32_t r = 0; r < ROWS; r++) {
#pragma unroll
                for (uint32_t s = 8; s; s /= 2)
                    dot[r] += __shfl_xor_sync(ALL_LANES, dot[r], s);
                if (lane == 0 && mine + r * stride < rows)
                    t->exact[h][mine + r * stride] = dot[r] * (a.policy.scale * LOG2E);
            }
        }
    }
}

template <typename T>
static __device__ void tile_scores(const struct cuda_attend &a, const struct query_shared *m, struct bias_tile *t,
                                   uint32_t rows, uint32_t first_warp)
{
    switch (a.geom.head_dim) {
    case 64:
        tile_exact<T, 2>(a, m, t, rows, first_warp);
        break;
    case 96:
        tile_exact<T, 3>(a, m, t, rows, first_warp);
        break;
    case 128:
        tile_exact<T, 4>(a, m, t, rows, first_warp);
        break;
    default:
        tile_exact<T, 8>(a, m, t, rows, first_warp);
    }
}

/* Sum of the weights of a signature's set bits. */
static __device__ __forceinline__ int estimate(const struct query_shared *m, const uint32_t *signature, uint32_t words,
                                               uint32_t h)
{
    int sum = 0;
    for (uint32_t w = 0; w < words; w++) {
        uint32_t bits = signature[w * 4];
#pragma unroll
        for (uint32_t p = 0; p < 8; p++) {
            int n = __popc(bits & m->planes[h][p][w]) << p;
            sum += p == 7 ? -n : n;
        }
    }
    return sum;
}

/* One head's share: running maximum, sum and shift of a warp's lanes. */
struct reference {
    float max, sum, shift;
};

static __device__ __forceinline__ void join(struct reference &r, float max, float sum, float shift)
{
    float most = fmaxf(r.max, max);
    r.sum = r.sum * exp2f(r.max - most) + sum * exp2f(max - most);
    r.max = most, r.shift += shift;
}

template <typename T>
static __device__ void write_biases(const struct cuda_attend &a, struct query_shared *m, struct bias_tile *t, uint32_t head,
                                    uint64_t q_head, const struct span &span)
{
    uint32_t recent = span.visible - span.last, total = span.first + recent, fitted = recent ? recent : span.first;
    uint32_t group = pkv_geom_group(&a.geom), words = pkv_geom_words(&a.geom), warp = threadIdx.x / WARP,
             lane = threadIdx.x % WARP;
    for (uint32_t begin = 0; begin < total; begin += TILE) {
        uint32_t rows = min(TILE, total - begin);
        if (begin) { /* the first tile's were worked out while the weights were */
            __syncthreads();
            tile_addresses(a, t, head, span, blocks_of(a, blockIdx.x / a.geom.kv_heads), begin, rows);
            __syncthreads();
            tile_scores<T>(a, m, t, rows, 0);
        }
        __syncthreads();
        /* A warp takes 32 rows of a head at a time. */
        uint32_t strips = PKV_DIV_UP(rows, WARP);
        for (uint32_t x = warp; x < strips * group; x += WARPS) {
            uint32_t h = x / strips, i = x % strips * WARP + lane;
            bool there = i < rows, fit = there && (begin + i >= span.first || !recent);
            float exact = there ? t->exact[h][i] : NOTHING, shift = 0;
            if (fit)
                shift = exact - (float)estimate(m, (const uint32_t *)t->signature[i], words, h) * m->scale[h];
            float most = exact;
            for (uint32_t s = 16; s; s /= 2)
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
            float sum = there ? exp2f(exact - most) : 0.0f;
            for (uint32_t s = 16; s; s /= 2) {
                sum += __shfl_xor_sync(ALL_LANES, sum, s);
                shift += __shfl_xor_sync(ALL_LANES, shift, s);
            }
            if (lane == 0) {
                struct reference r = {m->max[warp][h], m->sum[warp][h], m->shift[warp][h]};
                join(r, most, sum, shift);
                m->max[warp][h] = r.max, m->sum[warp][h] = r.sum, m->shift[warp][h] = r.shift;
            }
            __syncwarp();
        }
    }
    __syncthreads();
    if (warp >= group)
        return;
    /* A warp joins what the warps found of its head. */
    struct reference r = {NOTHING, 0, 0};
    if (lane < WARPS)
        r = (struct reference){m->max[lane][warp], m->sum[lane][warp], m->shift[lane][warp]};
    for (uint32_t s = 16; s; s /= 2)
        join(r, __shfl_xor_sync(ALL_LANES, r.max, s), __shfl_xor_sync(ALL_LANES, r.sum, s),
             __shfl_xor_sync(ALL_LANES, r.shift, s));
    float bias = fitted ? r.shift / (float)fitted - (r.max + log2f(r.sum)) : 0.0f;
    if (lane == 0)
        a.work.biases[q_head + warp] = isfinite(bias) ? bias : 0.0f;
}

static_assert(WARPS >= PKV_GROUP_MAX && WARPS <= WARP, "a warp for each head, a lane for each warp");

template <typename T> __global__ void __launch_bounds__(THREADS) query_kernel(const __grid_constant__ struct cuda_attend a)
{
    extern __shared__ __align__(16) unsigned char shared[];
    struct query_shared *m = (struct query_shared *)shared;
    struct bias_tile *t = (struct bias_tile *)(m + 1);
    const struct pkv_geom &g = a.geom;
    uint32_t query = blockIdx.x / g.kv_heads, head = blockIdx.x % g.kv_heads, group = pkv_geom_group(&g);
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint64_t q_head = (uint64_t)query * g.q_heads + head * group;
    wait_for_former();
    struct span span = span_of(a, query);
    if (span.dense)
        return;
    uint32_t rows = min(TILE, span.first + span.visible - span.last), busy = min(group, WARPS / 2);
    const T *q = (const T *)a.q + q_head * g.head_dim;
    for (uint32_t i = threadIdx.x; i < group * g.head_dim; i += THREADS)
        m->q[i / g.head_dim][i % g.head_dim] = to_float(q[i]);
    for (uint32_t i = threadIdx.x; i < WARPS * PKV_GROUP_MAX; i += THREADS)
        m->max[0][i] = NOTHING, m->sum[0][i] = 0, m->shift[0][i] = 0;
    tile_addresses(a, t, head, span, blocks_of(a, query), 0, rows);
    m->write = 1;
    __syncthreads();
    /* Some warps weigh while the others look at the rows. */
    apply_maps(a, m, head);
    for (uint32_t h = warp; h < group && warp < busy; h += busy)
        weigh_head<0>(a, m, head, q_head, h, lane);
    if (rows)
        tile_scores<T>(a, m, t, rows, busy);
    write_biases<T>(a, m, t, head, q_head, span);
}

#define SHARED (sizeof(struct query_shared) + sizeof(struct bias_tile))

template <typename T> static int start(const struct cuda_attend *a, void *stream)
{
    return launch(query_kernel<T>, dim3(a->queries * a->geom.kv_heads), THREADS, SHARED, *a, stream);
}

template <typename T> static int preload(void)
{
    return cudaFuncSetAttribute(query_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED) == cudaSuccess
               ? 0
               : -(int)PKV_ERR_UNSUPPORTED;
}

extern "C" int cuda_query_preload(void)
{
    int r = preload<float>();
    r = r ? r : preload<__half>();
    return r ? r : preload<__nv_bfloat16>();
}

extern "C" int cuda_query_launch(const struct cuda_attend *a, void *stream)
{
    return a->geom.dtype == PKV_F32   ? start<float>(a, stream)
           : a->geom.dtype == PKV_F16 ? start<__half>(a, stream)
                                      : start<__nv_bfloat16>(a, stream);
}
