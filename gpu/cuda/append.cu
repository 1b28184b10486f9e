/* Append and sign in one pass: a warp takes a token's row of one kv head, writes K and V side by side into the block, and signs
 * the key while it holds it. Bits equal the host's: the same operations in the same order (scheme.cuh). */
#include "gpu/cuda/device.cuh"
#include "gpu/cuda/scheme.cuh"

#define THREADS 256u
#define WARPS   (THREADS / WARP)
#define CHUNK   8u /* tokens that a thread block takes, so that a head's rows are written in runs */

struct append_shared {
    float raw[WARPS][PKV_HEAD_DIM_MAX]; /* a key as it came, or centred */
    float values[WARPS][PKV_SIG_BITS_MAX];
    uint32_t words[WARPS][PKV_SIG_WORDS_MAX];
};

/* Exponent bits all set, in any of the numbers of a piece. */
template <typename T> static __device__ __forceinline__ bool not_finite(const uint4 &v);
template <> __device__ __forceinline__ bool not_finite<float>(const uint4 &v)
{
    const uint32_t m = 0x7f800000u;
    return (v.x & m) == m || (v.y & m) == m || (v.z & m) == m || (v.w & m) == m;
}
static __device__ __forceinline__ bool halves(const uint4 &v, uint32_t m)
{
    bool bad = false;
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (uint32_t i = 0; i < 4; i++)
        bad = bad || (w[i] & m) == m || (w[i] >> 16 & m) == m;
    return bad;
}
template <> __device__ __forceinline__ bool not_finite<__half>(const uint4 &v)
{
    return halves(v, 0x7c00u);
}
template <> __device__ __forceinline__ bool not_finite<__nv_bfloat16>(const uint4 &v)
{
    return halves(v, 0x7f80u);
}

template <uint32_t PER>
static __device__ __forceinline__ void sign_rotated(const struct cuda_append &a, const float (&key)[PER],
                                                    const struct rotation<PER> &first, uint32_t lane, uint32_t *words)
{
    const struct pkv_geom &g = a.geom;
    uint32_t done = 0;
    for (uint32_t b = 0; b < a.scheme.bases; b++) {
        struct rotation<PER> r = first;
        float x[PER];
        if (b)
            rotation_load(r, a.scheme.signs + 2ull * b * g.head_dim, lane);
#pragma unroll
        for (uint32_t j = 0; j < PER; j++)
            x[j] = key[j];
        rotate(x, r);
#pragma unroll
        for (uint32_t j = 0; j < PER; j++)
            if (done < pkv_geom_words(&g)) {
                uint32_t word = __ballot_sync(ALL_LANES, __fmul_rn(x[j], rotation_norm(g.head_dim)) > 0);
                if (lane == 0)
                    words[done] = word;
                done++;
            }
    }
}

static __device__ void sign_mapped(const struct cuda_append &a, uint64_t at, const float *key, float *values, uint32_t *words,
                                   uint32_t lane)
{
    const struct pkv_geom &g = a.geom;
    const struct cuda_scheme &s = a.scheme;
    bool code = s.kind == PKV_SCHEME_CODE;
    uint32_t out = code ? s.dims : g.sig_bits;
    apply_map(s.k[0].weight, s.k[0].bias, at, out, key, g.head_dim, values, lane);
    if (!code) {
        for (uint32_t w = 0; w < pkv_geom_words(&g); w++) {
            uint32_t word = __ballot_sync(ALL_LANES, values[w * 32 + lane] > 0);
            if (lane == 0)
                words[w] = word;
        }
    } else {
        if (lane < pkv_geom_words(&g))
            words[lane] = 0;
        __syncwarp();
        for (uint32_t i = lane, bit = 0; i < PKV_ALIGN_UP(s.dims, WARP); i += WARP) {
            struct code_dim d = code_dim_of(s, at, i, lane, &bit);
            uint64_t dim = at * s.dims + i;
            if (!d.bits)
                continue;
            float most = (float)((1u << d.bits) - 1), level = floorf(__fdiv_rn(__fsub_rn(values[i], s.low[dim]), s.step[dim]));
            uint32_t v = (uint32_t)fminf(fmaxf(level, 0.0f), most);
            uint64_t both = (uint64_t)v << d.first % 32; /* at most four bits: two words */
            atomicOr(&words[d.first / 32], (uint32_t)both);
            if (both >> 32)
                atomicOr(&words[d.first / 32 + 1], (uint32_t)(both >> 32));
        }
    }
    __syncwarp();
}

/* `hash`: an MLP for each q head of the group, their bits side by side. hidden [2][HASH_WIDTH] is this warp's. */
#define HASH_WIDTH 1024u
#define HASH_BYTES (WARPS * 2 * HASH_WIDTH * sizeof(float))
static __device__ void sign_hashed(const struct cuda_append &a, uint32_t head, const float *key, float *hidden, float *values,
                                   uint32_t *words, uint32_t lane)
{
    const struct pkv_geom &g = a.geom;
    uint32_t group = pkv_geom_group(&g), each = g.sig_bits / group;
    if (lane < pkv_geom_words(&g))
        words[lane] = 0;
    __syncwarp();
    for (uint32_t h = 0; h < group; h++) {
        const float *from = key;
        for (uint32_t i = 0; i < a.scheme.k_stages; i++) {
            bool last = i + 1 == a.scheme.k_stages;
            float *to = last ? values : hidden + i % 2 * HASH_WIDTH;
            for (uint32_t pair = 0; pair < a.scheme.k[i].out; pair += 2)
                stage_outputs(a.scheme.k[i], (uint64_t)a.layer * g.q_heads + head * group + h, pair, from, to, last);
            __syncwarp();
            from = to;
        }
        for (uint32_t b = lane; b < each; b += WARP)
            if (values[b] > 0)
                atomicOr(&words[(h * each + b) / 32], 1u << (h * each + b) % 32);
        __syncwarp();
    }
}

/* A row on its way: this lane's pieces of K, then V. */
template <typename T, uint32_t PER> struct row {
    static constexpr uint32_t HALF = PER * WARP * sizeof(T) / 16, PIECES = (2 * HALF + WARP - 1) / WARP;
    uint4 piece[PIECES];
};

template <typename T, uint32_t PER>
static __device__ __forceinline__ void load_row(const struct cuda_append &a, const struct cuda_seq &seq, uint32_t i,
                                                uint32_t head, uint32_t lane, struct row<T, PER> &r)
{
    uint64_t from = (((uint64_t)blockIdx.y * a.tokens + i) * a.geom.kv_heads + head) * PER * WARP;
    const uint4 *k = (const uint4 *)((const T *)a.k + from), *v = (const uint4 *)((const T *)a.v + from);
    if (!a.k) {
        uint64_t token = seq.tokens - a.tokens + i;
        k = (const uint4 *)(place_address(a.base, seq.blocks[token / PKV_BLOCK_TOKENS].rows, pkv_geom_block_bytes(&a.geom)) +
                            pkv_geom_row_offset(&a.geom, head, token % PKV_BLOCK_TOKENS));
        v = k + r.HALF;
    }
#pragma unroll
    for (uint32_t n = 0; n < r.PIECES; n++) {
        uint32_t p = n * WARP + lane;
        if (p < 2 * r.HALF)
            r.piece[n] = __ldcs(p < r.HALF ? k + p : v + (p - r.HALF));
    }
}

/* What stays the same for all rows of a head. */
template <uint32_t PER> struct constants {
    struct rotation<PER> rotation;
    float mean[PER];
};

template <typename T, uint32_t PER>
static __device__ __forceinline__ void append_row(const struct cuda_append &a, struct append_shared *m,
                                                  const struct row<T, PER> &r, const struct constants<PER> &c, char *rows,
                                                  uint32_t *signatures, uint32_t in, uint32_t head)
{
    extern __shared__ float hidden[]; /* [WARPS][2][HASH_WIDTH], `hash` alone */
    const struct pkv_geom &g = a.geom;
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint4 *row = (uint4 *)(rows + pkv_geom_row_offset(&g, head, in));
    bool bad = false;
#pragma unroll
    for (uint32_t n = 0; n < r.PIECES; n++) {
        uint32_t p = n * WARP + lane;
        if (p >= 2 * r.HALF)
            continue;
        bad = bad || not_finite<T>(r.piece[n]);
        if (a.k)
            row[p] = r.piece[n];
        if (p < r.HALF)
            ((uint4 *)m->raw[warp])[p] = r.piece[n];
    }
    if (bad && a.bad)
        atomicOr(a.bad, 1u);
    if (a.scheme.kind == PKV_SCHEME_NONE)
        return;
    __syncwarp();
    float key[PER];
#pragma unroll
    for (uint32_t j = 0; j < PER; j++)
        key[j] = __fsub_rn(to_float(((const T *)m->raw[warp])[j * WARP + lane]), c.mean[j]);
    __syncwarp();
    if (a.scheme.kind == PKV_SCHEME_SIGN) {
        sign_rotated<PER>(a, key, c.rotation, lane, m->words[warp]);
    } else {
#pragma unroll
        for (uint32_t j = 0; j < PER; j++)
            m->raw[warp][j * WARP + lane] = key[j];
        __syncwarp();
        if (a.scheme.kind == PKV_SCHEME_HASH)
            sign_hashed(a, head, m->raw[warp], hidden + warp * 2 * HASH_WIDTH, m->values[warp], m->words[warp], lane);
        else
            sign_mapped(a, (uint64_t)a.layer * g.kv_heads + head, m->raw[warp], m->values[warp], m->words[warp], lane);
    }
    __syncwarp();
    if (lane < pkv_geom_words(&g))
        signatures[pkv_geom_sig_index(&g, head, in, lane)] = m->words[warp][lane];
    __syncwarp();
}

template <typename T, uint32_t PER>
__global__ void __launch_bounds__(THREADS) append_kernel(const __grid_constant__ struct cuda_append a)
{
    __shared__ __align__(16) struct append_shared m;
    const struct pkv_geom &g = a.geom;
    uint32_t first = blockIdx.x * CHUNK, last = min(first + CHUNK, a.tokens), lane = threadIdx.x % WARP;
    wait_for_former();
    struct cuda_seq seq = a.seqs[blockIdx.y];
    uint64_t begin = seq.tokens - a.tokens, block = ~0ull;
    for (uint32_t head = threadIdx.x / WARP; head < g.kv_heads; head += WARPS) {
        struct row<T, PER> now = {}, next = {
        };
        struct constants<PER> c = {
        };
        char *rows = NULL;
        uint32_t *signatures = NULL;
        load_row<T, PER>(a, seq, first, head, lane, now);
        if (a.scheme.kind == PKV_SCHEME_SIGN)
            rotation_load(c.rotation, a.scheme.signs, lane);
#pragma unroll
        for (uint32_t j = 0; j < PER; j++)
            c.mean[j] =
                a.scheme.mean ? a.scheme.mean[((uint64_t)a.layer * g.kv_heads + head) * PER * WARP + j * WARP + lane] : 0.0f;
        for (uint32_t i = first; i < last; i++) {
            uint64_t token = begin + i;
            if (i + 1 < last)
                load_row<T, PER>(a, seq, i + 1, head, lane, next);
            if (token / PKV_BLOCK_TOKENS != block || i == first) {
                block = token / PKV_BLOCK_TOKENS;
                struct pkv_block_ref ref = seq.blocks[block];
                rows = place_address(a.base, ref.rows, pkv_geom_block_bytes(&g));
                if (a.scheme.kind != PKV_SCHEME_NONE)
                    signatures = (uint32_t *)place_address(a.base, ref.signatures, pkv_geom_sig_block_bytes(&g));
            }
            append_row<T, PER>(a, &m, now, c, rows, signatures, (uint32_t)(token % PKV_BLOCK_TOKENS), head);
            now = next;
        }
    }
}

template <typename T> static void (*kernel_of(uint32_t head_dim))(const struct cuda_append)
{
    return head_dim == 64    ? append_kernel<T, 2>
           : head_dim == 96  ? append_kernel<T, 3>
           : head_dim == 128 ? append_kernel<T, 4>
                             : append_kernel<T, 8>;
}

template <typename T> static int start(const struct cuda_append *a, void *stream)
{
    size_t shared = a->scheme.kind == PKV_SCHEME_HASH ? HASH_BYTES : 0;
    return launch(kernel_of<T>(a->geom.head_dim), dim3(PKV_DIV_UP(a->tokens, CHUNK), a->count), THREADS, shared, *a, stream);
}

template <typename T> static bool preload(void)
{
    bool loaded = true;
    for (uint32_t dim = 64; dim <= 256; dim += dim == 64 || dim == 96 ? 32 : 128)
        loaded = loaded && cudaFuncSetAttribute(kernel_of<T>(dim), cudaFuncAttributeMaxDynamicSharedMemorySize, HASH_BYTES) ==
                               cudaSuccess;
    return loaded;
}

extern "C" int cuda_append_preload(void)
{
    return preload<float>() && preload<__half>() && preload<__nv_bfloat16>() ? 0 : -(int)PKV_ERR_UNSUPPORTED;
}

extern "C" int cuda_append_launch(const struct cuda_append *a, void *stream)
{
    if (!a->tokens || !a->count || (a->scheme.kind == PKV_SCHEME_NONE && !a->k))
        return -(int)PKV_ERR_SHAPE;
    return a->geom.dtype == PKV_F32   ? start<float>(a, stream)
           : a->geom.dtype == PKV_F16 ? start<__half>(a, stream)
                                      : start<__nv_bfloat16>(a, stream);
}
