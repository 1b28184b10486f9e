/* Append of many tokens whose keys are multiplied by a matrix (`code`, `linear`): a thread block takes 64 tokens of one kv
 * head, keeps their keys in shared memory, a token a column, and 32 of the matrix's rows at a time beside them. A thread makes
 * 4 x 4 products, each in the host's order (gpu_kernels.dot: sixteen sums, a tree), so that bits are equal: no fused
 * multiply-adds, no tensor cores. */
#include "gpu/cuda/append.cuh"

#define TOKENS  64u
#define OUTPUTS 32u
#define THREADS 128u
#define EACH    4u  /* tokens and outputs of a thread */
#define LEAST   16u /* tokens of a call; below, a warp a row is faster */

template <typename T, uint32_t DIM> struct matrix_shared {
    static constexpr uint32_t HALF = DIM * sizeof(T) / 16; /* pieces of a key */
    float x[DIM][TOKENS];                                  /* keys, less their mean */
    union {
        uint4 key[TOKENS][HALF + 1]; /* as they came */
        float weight[DIM][OUTPUTS];
    };
    const uint4 *k[TOKENS], *v[TOKENS];
    uint4 *to[TOKENS];
    uint32_t *signature[TOKENS]; /* its first word; the others follow by fours */
    uint32_t words[TOKENS][PKV_SIG_WORDS_MAX];
    uint16_t first[PKV_SIG_BITS_MAX]; /* bit of an output */
    uint8_t bits[PKV_SIG_BITS_MAX];
    uint32_t used; /* outputs, up to the last that has bits */
};

/* The addresses of the block's tokens, a thread each. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void tokens_find(const struct cuda_append &a, const struct cuda_seq &seq, uint32_t i,
                                                   uint32_t head, uint32_t at, struct matrix_shared<T, DIM> *m)
{
    const struct pkv_geom &g = a.geom;
    uint64_t token = seq.tokens - a.tokens + i;
    uint32_t in = (uint32_t)(token % PKV_BLOCK_TOKENS);
    struct pkv_block_ref ref = seq.blocks[token / PKV_BLOCK_TOKENS];
    row_source<T, DIM / WARP>(a, seq, i, head, &m->k[at], &m->v[at]);
    m->to[at] = (uint4 *)(place_address(a.base, ref.rows, pkv_geom_block_bytes(&g)) + pkv_geom_row_offset(&g, head, in));
    m->signature[at] =
        (uint32_t *)place_address(a.base, ref.signatures, pkv_geom_sig_block_bytes(&g)) + pkv_geom_sig_index(&g, head, in, 0);
}

/* Rows into their block; keys into shared memory as well. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ uint32_t rows_take(const struct cuda_append &a, uint32_t count,
                                                     struct matrix_shared<T, DIM> *m)
{
    constexpr uint32_t HALF = matrix_shared<T, DIM>::HALF;
    uint32_t bad = 0;
#pragma unroll 4
    for (uint32_t n = threadIdx.x; n < count * HALF; n += THREADS) {
        uint32_t row = n / HALF, p = n % HALF;
        uint4 key = __ldcs(m->k[row] + p);
        bad |= not_finite<T>(key);
        m->key[row][p] = key;
        if (a.k)
            __stcg(m->to[row] + p, key);
    }
#pragma unroll 4
    for (uint32_t n = threadIdx.x; n < count * HALF && a.k; n += THREADS) {
        uint32_t row = n / HALF, p = n % HALF;
        uint4 value = __ldcs(m->v[row] + p);
        bad |= not_finite<T>(value);
        __stcg(m->to[row] + HALF + p, value);
    }
    return bad;
}

/* Keys less their mean, a token a column: a lane a token, so that neither side has conflicts. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void keys_turn(const float *mean, struct matrix_shared<T, DIM> *m)
{
    constexpr uint32_t HALF = matrix_shared<T, DIM>::HALF, NUMBERS = 16 / sizeof(T);
    uint32_t token = threadIdx.x % TOKENS;
    for (uint32_t p = threadIdx.x / TOKENS; p < HALF; p += THREADS / TOKENS) {
        uint4 piece = m->key[token][p];
        const T *number = (const T *)&piece;
#pragma unroll
        for (uint32_t i = 0; i < NUMBERS; i++)
            m->x[p * NUMBERS + i][token] = __fsub_rn(to_float(number[i]), mean ? __ldg(mean + p * NUMBERS + i) : 0.0f);
    }
}

/* Which bits each output has, by the first warp. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void outputs_find(const struct cuda_append &a, uint64_t at, uint32_t outputs, uint32_t lane,
                                                    struct matrix_shared<T, DIM> *m)
{
    uint32_t bit = 0, used = 0;
    for (uint32_t i = lane; i < PKV_ALIGN_UP(outputs, WARP); i += WARP) {
        struct code_dim d = {i < outputs, i};
        if (a.scheme.kind == PKV_SCHEME_CODE)
            d = code_dim_of(a.scheme, at, i, lane, &bit);
        m->bits[i] = (uint8_t)d.bits, m->first[i] = (uint16_t)d.first;
        uint32_t some = __ballot_sync(ALL_LANES, d.bits > 0);
        used = some ? i - lane + 32 - __clz(some) : used;
    }
    if (lane == 0)
        m->used = used;
}

/* Rows [first, first + OUTPUTS) of the matrix, an output a column; beyond the last one zeroes. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void weights_take(const float *weight, uint32_t first, uint32_t used,
                                                    struct matrix_shared<T, DIM> *m)
{
    uint32_t output = threadIdx.x % OUTPUTS;
    bool there = first + output < used;
    const float4 *from = (const float4 *)(weight + (uint64_t)(first + output) * DIM);
#pragma unroll 4
    for (uint32_t p = threadIdx.x / OUTPUTS; p < DIM / 4; p += THREADS / OUTPUTS) {
        float4 w = there ? __ldg(from + p) : make_float4(0, 0, 0, 0);
        m->weight[p * 4][output] = w.x, m->weight[p * 4 + 1][output] = w.y;
        m->weight[p * 4 + 2][output] = w.z, m->weight[p * 4 + 3][output] = w.w;
    }
}

typedef float products[EACH][EACH]; /* [token][output] */

static __device__ __forceinline__ void add(products &to, const products &other)
{
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++)
#pragma unroll
        for (uint32_t o = 0; o < EACH; o++)
            to[i][o] = __fadd_rn(to[i][o], other[i][o]);
}

/* One of dot's sixteen sums: dimensions `at`, `at` + 16, ... */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void sum_of(const struct matrix_shared<T, DIM> *m, uint32_t at, uint32_t token,
                                              uint32_t output, products &sum)
{
#pragma unroll
    for (uint32_t j = 0; j < DIM / 16; j++) {
        float4 x4 = *(const float4 *)&m->x[j * 16 + at][token], w4 = *(const float4 *)&m->weight[j * 16 + at][output];
        const float x[EACH] = {x4.x, x4.y, x4.z, x4.w}, w[EACH] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++)
#pragma unroll
            for (uint32_t o = 0; o < EACH; o++) {
                float p = __fmul_rn(w[o], x[i]);
                sum[i][o] = j ? __fadd_rn(sum[i][o], p) : p;
            }
    }
}

/* The tree over the sums that are eight and four apart. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void four_of(const struct matrix_shared<T, DIM> *m, uint32_t at, uint32_t token,
                                               uint32_t output, products &sum)
{
    products other, third;
    sum_of(m, at, token, output, sum);
    sum_of(m, at + 8, token, output, other);
    add(sum, other);
    sum_of(m, at + 4, token, output, other);
    sum_of(m, at + 12, token, output, third);
    add(other, third);
    add(sum, other);
}

/* Then two and one apart. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void dots(const struct matrix_shared<T, DIM> *m, uint32_t token, uint32_t output,
                                            products &all)
{
#pragma unroll 1
    for (uint32_t odd = 0; odd < 2; odd++) {
        products pair = {};
#pragma unroll 1
        for (uint32_t far = 0; far < 2; far++) {
            products four;
            four_of(m, odd + 2 * far, token, output, four);
#pragma unroll
            for (uint32_t i = 0; i < EACH; i++)
#pragma unroll
                for (uint32_t o = 0; o < EACH; o++)
                    pair[i][o] = far ? __fadd_rn(pair[i][o], four[i][o]) : four[i][o];
        }
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++)
#pragma unroll
            for (uint32_t o = 0; o < EACH; o++)
                all[i][o] = odd ? __fadd_rn(all[i][o], pair[i][o]) : pair[i][o];
    }
}

/* What an output's bits say of a value. */
static __device__ __forceinline__ uint32_t level_of(const struct cuda_append &a, uint64_t row, uint32_t bits, float value)
{
    if (a.scheme.kind != PKV_SCHEME_CODE) {
        const float *bias = a.scheme.k[0].bias;
        return (bias ? __fadd_rn(value, __ldg(bias + row)) : value) > 0;
    }
    float most = (float)((1u << bits) - 1);
    float level = floorf(__fdiv_rn(__fsub_rn(value, __ldg(a.scheme.low + row)), __ldg(a.scheme.step + row)));
    return (uint32_t)fminf(fmaxf(level, 0.0f), most);
}

/* A thread's outputs lie side by side: their bits are one piece of a token's signature, of at most 24. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void bits_put(const struct cuda_append &a, uint64_t row, uint32_t token, uint32_t output,
                                                const products &all, struct matrix_shared<T, DIM> *m)
{
    uint32_t first = m->first[output];
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        uint32_t piece = 0;
#pragma unroll
        for (uint32_t o = 0; o < EACH; o++) {
            uint32_t bits = output + o < m->used ? m->bits[output + o] : 0;
            if (bits)
                piece |= level_of(a, row + output + o, bits, all[i][o]) << (m->first[output + o] - first);
        }
        uint64_t both = (uint64_t)piece << first % 32;
        if ((uint32_t)both)
            atomicOr(&m->words[token + i][first / 32], (uint32_t)both);
        if (both >> 32)
            atomicOr(&m->words[token + i][first / 32 + 1], (uint32_t)(both >> 32));
    }
}

template <typename T, uint32_t DIM>
__global__ void __launch_bounds__(THREADS, 4) matrix_kernel(const __grid_constant__ struct cuda_append a)
{
    extern __shared__ __align__(16) unsigned char memory[];
    struct matrix_shared<T, DIM> *m = (struct matrix_shared<T, DIM> *)memory;
    const struct pkv_geom &g = a.geom;
    uint32_t lane = threadIdx.x % WARP, head = blockIdx.z, begin = blockIdx.x * TOKENS, count = min(TOKENS, a.tokens - begin);
    uint64_t at = (uint64_t)a.layer * g.kv_heads + head;
    uint32_t outputs = a.scheme.kind == PKV_SCHEME_CODE ? a.scheme.dims : g.sig_bits, words = pkv_geom_words(&g);
    if (threadIdx.x < WARP)
        outputs_find(a, at, outputs, lane, m);
    for (uint32_t i = threadIdx.x; i < TOKENS * PKV_SIG_WORDS_MAX; i += THREADS)
        m->words[0][i] = 0;
    wait_for_former();
    struct cuda_seq seq = a.seqs[blockIdx.y];
    if (threadIdx.x < count)
        tokens_find(a, seq, begin + threadIdx.x, head, threadIdx.x, m);
    __syncthreads();
    if (rows_take(a, count, m) && a.bad)
        atomicOr(a.bad, 1u);
    __syncthreads();
    keys_turn<T, DIM>(a.scheme.mean ? a.scheme.mean + at * DIM : NULL, m);
    uint32_t token = (threadIdx.x / WARP * 4 + lane / 8) * EACH, output = lane % 8 * EACH;
    for (uint32_t first = 0; first < m->used; first += OUTPUTS) {
        products all = {};
        __syncthreads();
        weights_take<T, DIM>(a.scheme.k[0].weight + at * outputs * DIM, first, m->used, m);
        __syncthreads();
        dots(m, token, output, all);
        bits_put(a, at * outputs, token, first + output, all, m);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < TOKENS * words; i += THREADS) {
        uint32_t t = i / (4 * words) * 4 + i % 4, w = i / 4 % words; /* as they lie */
        if (t < count)
            __stcg(m->signature[t] + w * 4, m->words[t][w]);
    }
}

/* ---- launchers ---- */

typedef void kernel(const struct cuda_append);

template <typename T> static kernel *kernel_of(uint32_t head_dim, size_t *ret_shared)
{
    *ret_shared = head_dim == 64   ? sizeof(struct matrix_shared<T, 64>)
                  : head_dim == 96 ? sizeof(struct matrix_shared<T, 96>)
                                   : sizeof(struct matrix_shared<T, 128>);
    return head_dim == 64 ? matrix_kernel<T, 64> : head_dim == 96 ? matrix_kernel<T, 96> : matrix_kernel<T, 128>;
}

template <typename T> static int start(const struct cuda_append *a, void *stream)
{
    size_t shared;
    kernel *k = kernel_of<T>(a->geom.head_dim, &shared);
    return launch(k, dim3(PKV_DIV_UP(a->tokens, TOKENS), a->count, a->geom.kv_heads), THREADS, shared, *a, stream);
}

bool append_by_matrix(const struct cuda_append *a, void *stream, int *ret)
{
    bool matrix = a->scheme.kind == PKV_SCHEME_CODE || a->scheme.kind == PKV_SCHEME_LINEAR;
    if (!matrix || a->geom.head_dim > 128 || a->tokens < LEAST)
        return false;
    *ret = a->geom.dtype == PKV_F32   ? start<float>(a, stream)
           : a->geom.dtype == PKV_F16 ? start<__half>(a, stream)
                                      : start<__nv_bfloat16>(a, stream);
    return true;
}

template <typename T> static bool preload(void)
{
    bool loaded = true;
    for (uint32_t dim = 64; dim <= 128; dim += 32) {
        size_t shared;
        kernel *k = kernel_of<T>(dim, &shared);
        loaded = loaded && cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared) == cudaSuccess;
    }
    return loaded;
}

bool append_matrix_preload(void)
{
    return preload<float>() && preload<__half>() && preload<__nv_bfloat16>();
}
