/* Append of many tokens whose keys are multiplied by a matrix (`code`, `linear`): a thread block takes 64 tokens of one kv
 * head.
 *
 * The bits must be the host's, whose sums are rounded in one order (gpu_kernels.dot). Tensor cores do not round so, but their
 * products are near enough to tell nearly all levels: numbers are split in two halves (bf16), three products of halves are
 * added, and what can be wrong with the sum is bounded (CLOSE). Where a step's border lies within the bound, the value is in
 * doubt: it is put on a list, and the list's values are computed in the host's order. */
#include "gpu/cuda/append.cuh"
#include "gpu/cuda/tile.cuh"

#define TOKENS  64u
#define OUTPUTS 64u /* rows of the matrix at a time */
#define THREADS 128u
#define TILE    16u /* tokens of a warp */
#define COLUMNS 8u  /* outputs of a product */
#define LEAST   16u /* tokens of a call; below, a warp a row is faster */

/* Of |w| |x|, what a sum may be off by: 3 2^-18 for what the halves leave out, 24 2^-21 for the tensor core's additions, 12
 * 2^-24 for the host's: 2.4e-5. */
#define CLOSE 6.1e-5f
#define TINY  1e-30f /* below it, halves vanish */

template <typename T, uint32_t DIM> struct matrix_shared {
    static constexpr uint32_t HALF = DIM * sizeof(T) / 16,
                              PITCH = DIM / 2 + 4; /* pieces of a key; pairs of a row, and no conflicts */
    uint4 key[TOKENS][HALF + 1];                   /* as they came */
    uint32_t weight[2][OUTPUTS][PITCH];            /* pairs: the first halves, the second ones */
    const uint4 *k[TOKENS], *v[TOKENS];
    uint4 *to[TOKENS];
    uint32_t *signature[TOKENS]; /* its first word; the others follow by fours */
    uint32_t words[PKV_SIG_WORDS_MAX][TOKENS];
    float mean[DIM];
    float norm[OUTPUTS]; /* of a row */
    float low[PKV_SIG_BITS_MAX], step[PKV_SIG_BITS_MAX], bias[PKV_SIG_BITS_MAX];
    uint16_t first[PKV_SIG_BITS_MAX]; /* bit of an output */
    uint8_t bits[PKV_SIG_BITS_MAX];
    uint16_t doubt[TOKENS * OUTPUTS]; /* token x OUTPUTS + output */
    uint32_t doubts;
    uint32_t used; /* outputs, up to the last that has bits */
};

static_assert(sizeof(struct matrix_shared<float, 128>) <= 99u << 10, "the least that a thread block has from sm_80 on");

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

/* Rows into their block; keys into shared memory as well. All of a thread's loads are under way at once. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ uint32_t rows_take(const struct cuda_append &a, uint32_t count,
                                                     struct matrix_shared<T, DIM> *m)
{
    constexpr uint32_t HALF = matrix_shared<T, DIM>::HALF, MINE = TOKENS * HALF / THREADS;
    uint32_t bad = 0;
    uint4 value[MINE];
#pragma unroll
    for (uint32_t i = 0; i < MINE; i++) {
        uint32_t n = i * THREADS + threadIdx.x, row = n / HALF, p = n % HALF;
        value[i] = make_uint4(0, 0, 0, 0);
        if (row < count)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(&m->key[row][p])),
                         "l"(m->k[row] + p)
                         : "memory");
        else
            m->key[row][p] = value[i];
        if (row < count && a.k)
            value[i] = __ldcs(m->v[row] + p);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll
    for (uint32_t i = 0; i < MINE; i++) {
        uint32_t n = i * THREADS + threadIdx.x, row = n / HALF, p = n % HALF;
        uint4 key = m->key[row][p];
        bad |= not_finite<T>(key) | not_finite<T>(value[i]);
        if (row < count && a.k) {
            __stcg(m->to[row] + p, key);
            __stcg(m->to[row] + HALF + p, value[i]);
        }
    }
    return bad;
}

/* What each output's bits are. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void outputs_read(const struct cuda_append &a, uint64_t map, uint32_t outputs,
                                                    struct matrix_shared<T, DIM> *m)
{
    bool code = a.scheme.kind == PKV_SCHEME_CODE;
    const float *bias = a.scheme.k[0].bias;
    for (uint32_t i = threadIdx.x; i < PKV_ALIGN_UP(outputs, WARP); i += THREADS) {
        uint64_t row = map * outputs + i;
        bool there = i < outputs;
        m->bits[i] = there && code ? __ldg(a.scheme.bits + row) : there;
        m->low[i] = there && code ? __ldg(a.scheme.low + row) : 0;
        m->step[i] = there && code ? __ldg(a.scheme.step + row) : 1;
        m->bias[i] = there && bias ? __ldg(bias + row) : 0;
    }
}

/* Where they begin, by the first warp. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void outputs_find(uint32_t outputs, uint32_t lane, struct matrix_shared<T, DIM> *m)
{
    uint32_t before = 0, used = 0;
    for (uint32_t i = lane; i < PKV_ALIGN_UP(outputs, WARP); i += WARP) {
        uint32_t own = m->bits[i], sum = own, some = __ballot_sync(ALL_LANES, own > 0);
#pragma unroll
        for (uint32_t d = 1; d < WARP; d *= 2) {
            uint32_t other = __shfl_up_sync(ALL_LANES, sum, d);
            sum += lane >= d ? other : 0;
        }
        m->first[i] = (uint16_t)(before + sum - own);
        before += __shfl_sync(ALL_LANES, sum, WARP - 1);
        used = some ? i - lane + 32 - __clz(some) : used;
    }
    if (lane == 0)
        m->used = used;
}

/* Two numbers as their first halves, and what is left of them. */
static __device__ __forceinline__ uint32_t halves_of(float x, float y, uint32_t *ret_rest)
{
    uint32_t first = two<__nv_bfloat16>::pack(x, y);
    float2 got = two<__nv_bfloat16>::unpack(first);
    *ret_rest = two<__nv_bfloat16>::pack(__fsub_rn(x, got.x), __fsub_rn(y, got.y));
    return first;
}

/* Rows [first, first + OUTPUTS) of the matrix, a warp a row; beyond the last one zeroes. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void weights_take(const float *weight, uint32_t first, uint32_t used, uint32_t lane,
                                                    struct matrix_shared<T, DIM> *m)
{
#pragma unroll 8
    for (uint32_t r = threadIdx.x / WARP; r < OUTPUTS; r += THREADS / WARP) {
        const float4 *from = (const float4 *)(weight + (uint64_t)(first + r) * DIM);
        float4 w = first + r < used && lane < DIM / 4 ? __ldg(from + lane) : make_float4(0, 0, 0, 0);
        float sum = w.x * w.x + w.y * w.y + w.z * w.z + w.w * w.w;
#pragma unroll
        for (uint32_t s = 16; s; s /= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, s);
        if (lane < DIM / 4) {
            uint32_t *one = &m->weight[0][r][lane * 2], *rest = &m->weight[1][r][lane * 2];
            one[0] = halves_of(w.x, w.y, &rest[0]);
            one[1] = halves_of(w.z, w.w, &rest[1]);
        }
        if (lane == 0)
            m->norm[r] = 1.001f * sqrtf(sum) + TINY;
    }
}

/* A number of a key, less its mean, as the host has it. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ float number_of(const struct matrix_shared<T, DIM> *m, uint32_t token, uint32_t dim)
{
    return __fsub_rn(to_float(((const T *)m->key[token])[dim]), m->mean[dim]);
}

/* The warp's keys as A of the products, in halves; *near: CLOSE times the norms of this lane's two tokens. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void keys_take(const struct matrix_shared<T, DIM> *m, uint32_t token, uint32_t lane,
                                                 uint32_t (&one)[DIM / 16][4], uint32_t (&rest)[DIM / 16][4], float (&near)[2])
{
    float sum[2] = {0, 0};
#pragma unroll
    for (uint32_t s = 0; s < DIM / 16; s++)
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) { /* rows and columns of a piece of A: i % 2, i / 2 */
            uint32_t row = token + lane / 4 + i % 2 * 8, dim = s * 16 + i / 2 * 8 + lane % 4 * 2;
            float x = number_of(m, row, dim), y = number_of(m, row, dim + 1);
            sum[i % 2] += x * x + y * y;
            one[s][i] = halves_of(x, y, &rest[s][i]);
        }
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
        near[i] = CLOSE * 1.001f * sqrtf(sum[i]) + TINY;
    }
}

/* The level of a value; the host's arithmetic. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ uint32_t level_exactly(const struct cuda_append &a, const struct matrix_shared<T, DIM> *m,
                                                         uint32_t output, float value)
{
    if (a.scheme.k[0].bias)
        value = __fadd_rn(value, m->bias[output]);
    if (a.scheme.kind != PKV_SCHEME_CODE)
        return value > 0;
    float most = (float)((1u << m->bits[output]) - 1);
    float level = floorf(__fdiv_rn(__fsub_rn(value, m->low[output]), m->step[output]));
    return (uint32_t)fminf(fmaxf(level, 0.0f), most);
}

/* The level of a value that may be off by `off`. False: two are possible. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ bool level_surely(bool code, const struct matrix_shared<T, DIM> *m, uint32_t output,
                                                    float value, float off, uint32_t *ret)
{
    value += m->bias[output];
    off += fabsf(value) * 0x1p-20f;
    if (!code) {
        *ret = value > 0;
        return fabsf(value) > off;
    }
    float each = __fdividef(1.0f, m->step[output]), most = (float)((1u << m->bits[output]) - 1);
    float level = (value - m->low[output]) * each, border = rintf(level);
    *ret = (uint32_t)fminf(fmaxf(floorf(level), 0.0f), most);
    off = off * each + (fabsf(level) + 1) * 0x1p-18f;
    return off < 0.25f && (fabsf(level - border) > off || border < 1 || border > most);
}

/* What a lane's two outputs say of a token, as bits from the tile's first on; what is in doubt goes on the list. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ uint64_t levels_of(const struct cuda_append &a, struct matrix_shared<T, DIM> *m,
                                                     uint32_t first, uint32_t column, uint32_t token, float near, float x,
                                                     float y)
{
    uint32_t begin = m->first[first + column / COLUMNS * COLUMNS];
    uint64_t piece = 0;
    const float value[2] = {x, y};
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t output = first + column + i, level = 0;
        if (!m->bits[output])
            continue;
        if (level_surely(a.scheme.kind == PKV_SCHEME_CODE, m, output, value[i], near * m->norm[column + i], &level))
            piece |= (uint64_t)level << (m->first[output] - begin);
        else
            m->doubt[atomicAdd(&m->doubts, 1u)] = (uint16_t)(token * OUTPUTS + column + i);
    }
    return piece;
}

/* A tile's bits of a token, from all four lanes that have some, into its words: at most 48 from `begin` on. No other warp has
 * the token. */
static __device__ __forceinline__ void piece_put(uint64_t piece, uint32_t begin, uint32_t (*words)[TOKENS], uint32_t token,
                                                 uint32_t quarter)
{
    piece |= __shfl_xor_sync(ALL_LANES, piece, 1);
    piece |= __shfl_xor_sync(ALL_LANES, piece, 2);
    uint32_t shift = begin % 32, word = quarter == 0            ? (uint32_t)(piece << shift)
                                        : quarter == 1          ? (uint32_t)(piece >> (32 - shift))
                                        : quarter == 2 && shift ? (uint32_t)(piece >> (64 - shift))
                                                                : 0;
    if (word)
        words[begin / 32 + quarter][token] |= word;
}

/* Eight outputs by sixteen tokens. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void
tile_sign(const struct cuda_append &a, struct matrix_shared<T, DIM> *m, uint32_t first, uint32_t column, uint32_t token,
          uint32_t lane, const uint32_t (&one)[DIM / 16][4], const uint32_t (&rest)[DIM / 16][4], const float (&near)[2])
{
    float sum[3][4] = {};
    const uint32_t *w = m->weight[0][column + lane / 4] + lane % 4, *left = m->weight[1][column + lane / 4] + lane % 4;
#pragma unroll
    for (uint32_t s = 0; s < DIM / 16; s++) {
        uint32_t w0 = w[s * 8], w1 = w[s * 8 + 4], left0 = left[s * 8], left1 = left[s * 8 + 4];
        multiply<__nv_bfloat16>(sum[0], one[s], w0, w1);
        multiply<__nv_bfloat16>(sum[1], rest[s], w0, w1);
        multiply<__nv_bfloat16>(sum[2], one[s], left0, left1);
    }
    uint32_t begin = m->first[first + column];
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        float x = sum[0][2 * i] + (sum[1][2 * i] + sum[2][2 * i]);
        float y = sum[0][2 * i + 1] + (sum[1][2 * i + 1] + sum[2][2 * i + 1]);
        uint32_t mine = token + lane / 4 + i * 8;
        uint64_t piece = levels_of(a, m, first, column + lane % 4 * 2, mine, near[i], x, y);
        piece_put(piece, begin, m->words, mine, lane % 4);
    }
}

/* The list, half a warp an entry: as gpu_kernels.dot adds up, dimension d to sum d % 16, then the tree. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void doubts_settle(const struct cuda_append &a, const float *weight, uint32_t first,
                                                     uint32_t lane, struct matrix_shared<T, DIM> *m)
{
    uint32_t doubts = m->doubts;
#pragma unroll 1
    for (uint32_t pair = threadIdx.x / WARP * 2; pair < doubts; pair += THREADS / WARP * 2) {
        uint32_t entry = m->doubt[min(pair + lane / 16, doubts - 1)], token = entry / OUTPUTS, output = first + entry % OUTPUTS;
        const float *row = weight + (uint64_t)output * DIM + lane % 16;
        float sum = 0;
#pragma unroll
        for (uint32_t j = 0; j < DIM; j += 16)
            sum = __fadd_rn(sum, __fmul_rn(__ldg(row + j), number_of(m, token, lane % 16 + j)));
        sum = sum16(sum);
        if (lane % 16 || pair + lane / 16 >= doubts)
            continue;
        uint32_t bit = m->first[output];
        uint64_t both = (uint64_t)level_exactly(a, m, output, sum) << bit % 32;
        if ((uint32_t)both)
            atomicOr(&m->words[bit / 32][token], (uint32_t)both);
        if (both >> 32)
            atomicOr(&m->words[bit / 32 + 1][token], (uint32_t)(both >> 32));
    }
}

template <typename T, uint32_t DIM>
static __device__ __forceinline__ void tile_words(const struct matrix_shared<T, DIM> *m, uint32_t words, uint32_t count)
{
    for (uint32_t i = threadIdx.x; i < TOKENS * words; i += THREADS) {
        uint32_t t = i / (4 * words) * 4 + i % 4, w = i / 4 % words; /* as they lie */
        if (t < count)
            __stcg(m->signature[t] + w * 4, m->words[w][t]);
    }
}

template <typename T, uint32_t DIM>
__global__ void __launch_bounds__(THREADS, 3) matrix_kernel(const __grid_constant__ struct cuda_append a)
{
    extern __shared__ __align__(16) unsigned char memory[];
    struct matrix_shared<T, DIM> *m = (struct matrix_shared<T, DIM> *)memory;
    const struct pkv_geom &g = a.geom;
    uint32_t lane = threadIdx.x % WARP, head = blockIdx.z, begin = blockIdx.x * TOKENS, count = min(TOKENS, a.tokens - begin);
    uint32_t outputs = a.scheme.kind == PKV_SCHEME_CODE ? a.scheme.dims : g.sig_bits;
    uint64_t map = (uint64_t)a.layer * g.kv_heads + head;
    const float *weight = a.scheme.k[0].weight + map * outputs * DIM;
    /* What belongs to the scheme was there before any kernel of the batch. */
    outputs_read(a, map, outputs, m);
    for (uint32_t i = threadIdx.x; i < TOKENS * PKV_SIG_WORDS_MAX; i += THREADS)
        m->words[i / TOKENS][i % TOKENS] = 0;
    for (uint32_t i = threadIdx.x; i < DIM; i += THREADS)
        m->mean[i] = a.scheme.mean ? __ldg(a.scheme.mean + map * DIM + i) : 0;
    __syncthreads();
    if (threadIdx.x < WARP)
        outputs_find(outputs, lane, m);
    weights_take(weight, 0, outputs, lane, m);
    wait_for_former();
    struct cuda_seq seq = a.seqs[blockIdx.y];
    if (threadIdx.x < count)
        tokens_find(a, seq, begin + threadIdx.x, head, threadIdx.x, m);
    __syncthreads();
    if (rows_take(a, count, m) && a.bad)
        atomicOr(a.bad, 1u);
    __syncthreads();
    uint32_t one[DIM / 16][4], rest[DIM / 16][4], token = threadIdx.x / WARP * TILE, used = m->used;
    float near[2];
    keys_take(m, token, lane, one, rest, near);
#pragma unroll 1
    for (uint32_t first = 0; first < used; first += OUTPUTS) {
        if (first)
            weights_take(weight, first, used, lane, m);
        if (threadIdx.x == 0)
            m->doubts = 0;
        __syncthreads();
#pragma unroll 1
        for (uint32_t column = 0; column < OUTPUTS && first + column < used; column += COLUMNS)
            tile_sign(a, m, first, column, token, lane, one, rest, near);
        __syncthreads();
        doubts_settle(a, weight, first, lane, m);
        __syncthreads();
    }
    tile_words(m, pkv_geom_words(&g), count);
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
