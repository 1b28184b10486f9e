/* Append and sign in one pass: a warp takes a token's row of one kv head, writes K and V side by side into the block, and signs
 * the key. Bits equal the host's: the same operations in the same order (scheme.cuh).
 *
 * `rotated_kernel` has no weights to read: rows come through a ring of asynchronous copies in shared memory, several ahead of
 * the one that is signed. `mapped_kernel` multiplies each key with a matrix, or runs it through an MLP. */
#include "gpu/cuda/append.cuh"

#define THREADS    256u
#define WARPS      (THREADS / WARP)
#define CHUNK      8u    /* tokens that a warp takes, so that a head's rows are written in runs */
#define RING_BYTES 4096u /* of a warp, at most */
#define RING_ROWS  4u    /* at most */

/* Dimensions up to the last one that has bits. */
static __device__ __forceinline__ uint32_t dims_used(const struct cuda_scheme &s, uint64_t at, uint32_t lane)
{
    uint32_t used = 0;
    for (uint32_t i = lane; i < PKV_ALIGN_UP(s.dims, WARP); i += WARP) {
        uint32_t some = __ballot_sync(ALL_LANES, i < s.dims && s.bits[at * s.dims + i]);
        used = some ? i - lane + 32 - __clz(some) : used;
    }
    return used;
}

static __device__ void sign_mapped(const struct cuda_append &a, uint64_t at, const float *key, float *values, uint32_t *words,
                                   uint32_t lane)
{
    const struct pkv_geom &g = a.geom;
    const struct cuda_scheme &s = a.scheme;
    bool code = s.kind == PKV_SCHEME_CODE;
    uint32_t rows = code ? s.dims : g.sig_bits, out = code ? dims_used(s, at, lane) : rows;
    const float *bias = s.k[0].bias ? s.k[0].bias + at * rows : NULL;
    apply_map(s.k[0].weight + at * rows * g.head_dim, bias, 0, out, key, g.head_dim, values, lane);
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

/* ---- no signature, or one by a rotation ---- */

/* A row is PIECES of 16 bytes, K then V. */
template <typename T, uint32_t PER> struct ring {
    static constexpr uint32_t PIECES = 2 * PER * WARP * sizeof(T) / 16, LIMIT = RING_BYTES / (16 * PIECES),
                              ROWS = LIMIT < RING_ROWS ? LIMIT : RING_ROWS;
    uint4 piece[WARPS][ROWS][PIECES];
};

template <uint32_t PENDING> static __device__ __forceinline__ void copies_wait(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Row i, if there is one, on its way; a group of copies of its own in any case. */
template <typename T, uint32_t PER>
static __device__ __forceinline__ void row_fetch(const struct cuda_append &a, const struct cuda_seq &seq, uint32_t i,
                                                 uint32_t last, uint32_t head, uint32_t lane, uint4 *to)
{
    constexpr uint32_t PIECES = ring<T, PER>::PIECES;
    if (i < last) {
        const uint4 *k, *v;
        row_source<T, PER>(a, seq, i, head, &k, &v);
#pragma unroll
        for (uint32_t n = 0; n < PKV_DIV_UP(PIECES, WARP); n++) {
            uint32_t p = n * WARP + lane;
            if (PIECES % WARP == 0 || p < PIECES)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to + p)),
                             "l"(p < PIECES / 2 ? k + p : v + (p - PIECES / 2))
                             : "memory");
        }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Signatures of four tokens lie together, word by word: lane 4 w + t holds word w of token t until all are there. */
struct quad {
    uint32_t word, since; /* this lane's; the first token that is here */
};

/* Words [at, at + PER) of a signature. */
template <uint32_t PER>
static __device__ __forceinline__ void rotated_words(const float (&key)[PER], const struct rotation<PER> &r, uint32_t head_dim,
                                                     uint32_t at, uint32_t lane, uint32_t token, struct quad &q)
{
    float x[PER];
#pragma unroll
    for (uint32_t j = 0; j < PER; j++)
        x[j] = key[j];
    rotate(x, r);
#pragma unroll
    for (uint32_t j = 0; j < PER; j++) {
        uint32_t word = __ballot_sync(ALL_LANES, __fmul_rn(x[j], rotation_norm(head_dim)) > 0);
        if (lane == (at + j) * 4 + token % 4) /* of words that the signature does not have, nothing is stored */
            q.word = word;
    }
}

template <uint32_t PER>
static __device__ __forceinline__ void sign_rotated(const struct cuda_append &a, const float (&key)[PER],
                                                    const struct rotation<PER> &first, uint32_t lane, uint32_t token,
                                                    struct quad &q)
{
    rotated_words<PER>(key, first, WARP * PER, 0, lane, token, q);
#pragma unroll 1
    for (uint32_t b = 1; b < a.scheme.bases; b++) {
        struct rotation<PER> r;
        rotation_load(r, a.scheme.signs + 2ull * b * WARP * PER, lane);
        rotated_words<PER>(key, r, WARP * PER, b * PER, lane, token, q);
    }
}

/* Rows [first, last) of a head, which a warp has to itself. */
template <typename T, uint32_t PER>
static __device__ __forceinline__ void append_rows(const struct cuda_append &a, const struct cuda_seq &seq,
                                                   const struct rotation<PER> &rotation, uint32_t first, uint32_t last,
                                                   uint32_t head, uint32_t lane, uint4 (*rows)[ring<T, PER>::PIECES])
{
    using R = ring<T, PER>;
    const struct pkv_geom &g = a.geom;
    bool sign = a.scheme.kind != PKV_SCHEME_NONE;
    uint32_t words = pkv_geom_words(&g), bad = 0;
    uint64_t begin = seq.tokens - a.tokens, block = ~0ull;
    float mean[PER];
    uint4 *to = NULL;
    uint32_t *signatures = NULL;
#pragma unroll
    for (uint32_t s = 0; s < R::ROWS; s++)
        row_fetch<T, PER>(a, seq, first + s, last, head, lane, rows[s]);
#pragma unroll
    for (uint32_t j = 0; j < PER; j++)
        mean[j] = a.scheme.mean ? a.scheme.mean[((uint64_t)a.layer * g.kv_heads + head) * PER * WARP + j * WARP + lane] : 0.0f;
    struct quad q = {0, (uint32_t)(begin + first) % 4};
    for (uint32_t i = first; i < last; i++) {
        uint4 *row = rows[(i - first) % R::ROWS];
        uint32_t in = (uint32_t)((begin + i) % PKV_BLOCK_TOKENS);
        if ((begin + i) / PKV_BLOCK_TOKENS != block) {
            block = (begin + i) / PKV_BLOCK_TOKENS;
            struct pkv_block_ref ref = seq.blocks[block];
            to = (uint4 *)(place_address(a.base, ref.rows, pkv_geom_block_bytes(&g)) + pkv_geom_row_offset(&g, head, 0));
            if (sign)
                signatures = (uint32_t *)place_address(a.base, ref.signatures, pkv_geom_sig_block_bytes(&g)) +
                             pkv_geom_sig_index(&g, head, 0, 0);
        }
        copies_wait<R::ROWS - 1>();
        __syncwarp();
#pragma unroll
        for (uint32_t n = 0; n < PKV_DIV_UP(R::PIECES, WARP); n++) {
            uint32_t p = n * WARP + lane;
            if (R::PIECES % WARP && p >= R::PIECES)
                continue;
            uint4 piece = row[p];
            bad |= not_finite<T>(piece);
            if (a.k)
                __stcg(&to[in * R::PIECES + p], piece);
        }
        float key[PER];
#pragma unroll
        for (uint32_t j = 0; j < PER; j++)
            key[j] = __fsub_rn(to_float(((const T *)row)[j * WARP + lane]), mean[j]);
        __syncwarp();
        row_fetch<T, PER>(a, seq, i + R::ROWS, last, head, lane, row);
        if (!sign)
            continue;
        sign_rotated<PER>(a, key, rotation, lane, in, q);
        if (in % 4 != 3 && i + 1 < last)
            continue;
        if (lane / 4 < words && lane % 4 >= q.since && lane % 4 <= in % 4)
            __stcg(&signatures[in / 4 * 4 * words + lane], q.word);
        q.since = 0;
    }
    if (bad && a.bad)
        atomicOr(a.bad, 1u);
}

/* Warps that share a head: with fewer heads than warps each takes a chunk of its own. */
static __host__ __device__ __forceinline__ uint32_t warps_a_head(uint32_t kv_heads)
{
    return kv_heads < WARPS ? WARPS / kv_heads : 1;
}

template <typename T, uint32_t PER>
__global__ void __launch_bounds__(THREADS) rotated_kernel(const __grid_constant__ struct cuda_append a)
{
    __shared__ __align__(16) struct ring<T, PER> m;
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, share = warps_a_head(a.geom.kv_heads);
    uint32_t first = (blockIdx.x * share + warp % share) * CHUNK, last = min(first + CHUNK, a.tokens);
    struct rotation<PER> r = {
    };
    if (a.scheme.kind != PKV_SCHEME_NONE) /* it was there before any kernel of the batch */
        rotation_load(r, a.scheme.signs, lane);
    wait_for_former();
    struct cuda_seq seq = a.seqs[blockIdx.y];
    for (uint32_t head = warp / share; head < a.geom.kv_heads && first < last; head += WARPS)
        append_rows<T, PER>(a, seq, r, first, last, head, lane, m.piece[warp]);
}

/* ---- a signature by a matrix or an MLP ---- */

struct mapped_shared {
    float raw[WARPS][PKV_HEAD_DIM_MAX]; /* a key as it came, or centred */
    float values[WARPS][PKV_SIG_BITS_MAX];
    uint32_t words[WARPS][PKV_SIG_WORDS_MAX];
};

/* A row on its way: this lane's pieces of K, then V. */
template <typename T, uint32_t PER> struct row {
    static constexpr uint32_t HALF = PER * WARP * sizeof(T) / 16, PIECES = (2 * HALF + WARP - 1) / WARP;
    uint4 piece[PIECES];
};

template <typename T, uint32_t PER>
static __device__ __forceinline__ void load_row(const struct cuda_append &a, const struct cuda_seq &seq, uint32_t i,
                                                uint32_t head, uint32_t lane, struct row<T, PER> &r)
{
    const uint4 *k, *v;
    row_source<T, PER>(a, seq, i, head, &k, &v);
#pragma unroll
    for (uint32_t n = 0; n < r.PIECES; n++) {
        uint32_t p = n * WARP + lane;
        if (p < 2 * r.HALF)
            r.piece[n] = __ldcs(p < r.HALF ? k + p : v + (p - r.HALF));
    }
}

template <typename T, uint32_t PER>
static __device__ __forceinline__ void append_mapped(const struct cuda_append &a, struct mapped_shared *m,
                                                     const struct row<T, PER> &r, const float (&mean)[PER], char *rows,
                                                     uint32_t *signatures, uint32_t in, uint32_t head)
{
    extern __shared__ float hidden[]; /* [WARPS][2][HASH_WIDTH], `hash` alone */
    const struct pkv_geom &g = a.geom;
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, bad = 0;
    uint4 *row = (uint4 *)(rows + pkv_geom_row_offset(&g, head, in));
#pragma unroll
    for (uint32_t n = 0; n < r.PIECES; n++) {
        uint32_t p = n * WARP + lane;
        if (p >= 2 * r.HALF)
            continue;
        bad |= not_finite<T>(r.piece[n]);
        if (a.k)
            row[p] = r.piece[n];
        if (p < r.HALF)
            ((uint4 *)m->raw[warp])[p] = r.piece[n];
    }
    if (bad && a.bad)
        atomicOr(a.bad, 1u);
    __syncwarp();
    float key[PER];
#pragma unroll
    for (uint32_t j = 0; j < PER; j++)
        key[j] = __fsub_rn(to_float(((const T *)m->raw[warp])[j * WARP + lane]), mean[j]);
    __syncwarp();
#pragma unroll
    for (uint32_t j = 0; j < PER; j++)
        m->raw[warp][j * WARP + lane] = key[j];
    __syncwarp();
    if (a.scheme.kind == PKV_SCHEME_HASH)
        sign_hashed(a, head, m->raw[warp], hidden + warp * 2 * HASH_WIDTH, m->values[warp], m->words[warp], lane);
    else
        sign_mapped(a, (uint64_t)a.layer * g.kv_heads + head, m->raw[warp], m->values[warp], m->words[warp], lane);
    __syncwarp();
    if (lane < pkv_geom_words(&g))
        signatures[pkv_geom_sig_index(&g, head, in, lane)] = m->words[warp][lane];
    __syncwarp();
}

template <typename T, uint32_t PER>
__global__ void __launch_bounds__(THREADS) mapped_kernel(const __grid_constant__ struct cuda_append a)
{
    __shared__ __align__(16) struct mapped_shared m;
    const struct pkv_geom &g = a.geom;
    uint32_t first = blockIdx.x * CHUNK, last = min(first + CHUNK, a.tokens), lane = threadIdx.x % WARP;
    wait_for_former();
    struct cuda_seq seq = a.seqs[blockIdx.y];
    uint64_t begin = seq.tokens - a.tokens, block = ~0ull;
    for (uint32_t head = threadIdx.x / WARP; head < g.kv_heads; head += WARPS) {
        struct row<T, PER> now = {}, next = {
        };
        float mean[PER];
        char *rows = NULL;
        uint32_t *signatures = NULL;
        load_row<T, PER>(a, seq, first, head, lane, now);
#pragma unroll
        for (uint32_t j = 0; j < PER; j++)
            mean[j] =
                a.scheme.mean ? a.scheme.mean[((uint64_t)a.layer * g.kv_heads + head) * PER * WARP + j * WARP + lane] : 0.0f;
        for (uint32_t i = first; i < last; i++) {
            uint64_t token = begin + i;
            if (i + 1 < last)
                load_row<T, PER>(a, seq, i + 1, head, lane, next);
            if (token / PKV_BLOCK_TOKENS != block || i == first) {
                block = token / PKV_BLOCK_TOKENS;
                struct pkv_block_ref ref = seq.blocks[block];
                rows = place_address(a.base, ref.rows, pkv_geom_block_bytes(&g));
                signatures = (uint32_t *)place_address(a.base, ref.signatures, pkv_geom_sig_block_bytes(&g));
            }
            append_mapped<T, PER>(a, &m, now, mean, rows, signatures, (uint32_t)(token % PKV_BLOCK_TOKENS), head);
            now = next;
        }
    }
}

/* ---- launchers ---- */

typedef void kernel(const struct cuda_append);

template <typename T> static kernel *rotated_of(uint32_t head_dim)
{
    return head_dim == 64    ? rotated_kernel<T, 2>
           : head_dim == 96  ? rotated_kernel<T, 3>
           : head_dim == 128 ? rotated_kernel<T, 4>
                             : rotated_kernel<T, 8>;
}

template <typename T> static kernel *mapped_of(uint32_t head_dim)
{
    return head_dim == 64    ? mapped_kernel<T, 2>
           : head_dim == 96  ? mapped_kernel<T, 3>
           : head_dim == 128 ? mapped_kernel<T, 4>
                             : mapped_kernel<T, 8>;
}

template <typename T> static int start(const struct cuda_append *a, void *stream)
{
    uint32_t kind = a->scheme.kind, chunks = PKV_DIV_UP(a->tokens, CHUNK);
    if (kind == PKV_SCHEME_SIGN || kind == PKV_SCHEME_NONE)
        return launch(rotated_of<T>(a->geom.head_dim), dim3(PKV_DIV_UP(chunks, warps_a_head(a->geom.kv_heads)), a->count),
                      THREADS, 0, *a, stream);
    size_t shared = kind == PKV_SCHEME_HASH ? HASH_BYTES : 0;
    return launch(mapped_of<T>(a->geom.head_dim), dim3(chunks, a->count), THREADS, shared, *a, stream);
}

template <typename T> static bool preload(void)
{
    cudaFuncAttributes f;
    bool loaded = true;
    for (uint32_t dim = 64; dim <= 256; dim += dim == 64 || dim == 96 ? 32 : 128)
        loaded =
            loaded && cudaFuncGetAttributes(&f, rotated_of<T>(dim)) == cudaSuccess &&
            cudaFuncSetAttribute(mapped_of<T>(dim), cudaFuncAttributeMaxDynamicSharedMemorySize, HASH_BYTES) == cudaSuccess;
    return loaded;
}

extern "C" int cuda_append_preload(void)
{
    return preload<float>() && preload<__half>() && preload<__nv_bfloat16>() && append_matrix_preload()
               ? 0
               : -(int)PKV_ERR_UNSUPPORTED;
}

extern "C" int cuda_append_launch(const struct cuda_append *a, void *stream)
{
    if (!a->tokens || !a->count || (a->scheme.kind == PKV_SCHEME_NONE && !a->k))
        return -(int)PKV_ERR_SHAPE;
    int r;
    if (append_by_matrix(a, stream, &r))
        return r;
    return a->geom.dtype == PKV_F32   ? start<float>(a, stream)
           : a->geom.dtype == PKV_F16 ? start<__half>(a, stream)
                                      : start<__nv_bfloat16>(a, stream);
}
