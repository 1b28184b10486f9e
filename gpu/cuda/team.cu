/* A whole call in one launch: a team of thread blocks takes a list from the query to the result.
 *
 *   weigh   every block for itself; meanwhile its first signatures are on their way into shared memory
 *   bias    each block looks at its share of sinks and recent tokens; shares by words
 *   scan    codes stay in shared memory; counts to memory, then a gate
 *   choose  every block finds the threshold, and writes the tokens that it has of the list to their places, by words
 *   attend  each block takes an equal run of the list, whoever chose it: which blocks the chosen tokens lie in has no say;
 *           with a row cache, a gate between looking up and claiming
 *   merge   results by words; each block adds up its share of the outputs
 *
 * What does not fit (team_size) runs as the stages of table.c. */
#include "gpu/cuda/choose.cuh"
#include "gpu/cuda/rows.cuh"
#include "gpu/cuda/team_bias.cuh"
#include "gpu/cuda/team_scan.cuh"

#if __CUDA_ARCH__ >= 900

/* ---- choose ---- */

/* What a block knows while it chooses, in the rings' memory. */
struct choose_memory {
    struct choose_shared all;
    __align__(16) uint16_t groups[1]; /* [tokens of the part / 8]: each warp's groups of eight tokens that have a chosen one */
};

/* The block's sums in m->counts and the others' by words: coarse ones first, then those of the bucket that they name. */
static __device__ __forceinline__ struct threshold threshold_find(const struct team &t, struct team_shared *m,
                                                                  struct choose_shared *c, uint32_t k)
{
    uint64_t *coarse = count_words(t), *fine = coarse + t.size * 64;
    uint32_t sum = 0;
    for (uint32_t r = threadIdx.x % 8; r < t.size; r += 8)
        sum += take_word(t, coarse + r * 64 + threadIdx.x / 8);
#pragma unroll
    for (uint32_t s = 4; s; s /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, s);
    if (threadIdx.x % 8 == 0)
        c->coarse[threadIdx.x / 8] = sum;
    __syncthreads();
    uint32_t bucket = bucket_of(c, k);
    if (threadIdx.x < 33)
        put_word(t, fine + t.part * 33 + threadIdx.x, m->counts[bucket * 32 + threadIdx.x]);
    if (t.warp < t.size) { /* a warp has a block's words, the first lane two */
        const uint64_t *from = fine + t.warp * 33;
        uint32_t next = t.lane == 0 ? take_word(t, from + 32) : 0;
        c->fine[t.warp][t.lane] = take_word(t, from + t.lane);
        if (t.lane == 0)
            c->fine[t.warp][32] = next;
    }
    __syncthreads();
    return threshold_of(c, t.size, t.part, k, bucket);
}

/* Groups of eight tokens of this warp's share of the part that reach the threshold, in order; returns how many. */
static __device__ __forceinline__ uint32_t groups_find(const struct team &t, const uint16_t *codes, uint32_t first,
                                                       uint32_t last, uint32_t code, uint16_t *groups)
{
    uint32_t found = 0;
    for (uint32_t at = first; at < last; at += 1024) {
        uint4 v[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t mine = at + i * 256 + t.lane * 8;
            v[i] = mine < last ? *(const uint4 *)(codes + mine) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            bool hit = most_of(v[i]) >= code;
            uint32_t hits = __ballot_sync(ALL_LANES, hit);
            if (hit)
                groups[found + __popc(hits & ((1u << t.lane) - 1))] = (uint16_t)((at + i * 256) / 8 + t.lane);
            found += __popc(hits);
        }
    }
    __syncwarp();
    return found;
}

/* This part's chosen tokens to their places in the list. */
static __device__ __forceinline__ void choose_write(const struct cuda_attend &a, const struct team &t, struct choose_memory *c,
                                                    const struct threshold &limit, const struct span &span,
                                                    const uint16_t *codes, uint32_t begin, uint32_t end)
{
    uint32_t tokens = (end - begin) * PKV_BLOCK_TOKENS, per = PKV_ALIGN_UP(PKV_DIV_UP(tokens, WARPS), 256u);
    uint32_t first = min(t.warp * per, tokens), last = min(first + per, tokens), both = 0;
    uint16_t *groups = c->groups + first / 8;
    uint32_t found = groups_find(t, codes, first, last, limit.code, groups);
    for (uint32_t i = t.lane; i < found; i += WARP)
        both += tally(*(const uint4 *)(codes + groups[i] * 8u), limit.code);
    uint32_t greater = __reduce_add_sync(ALL_LANES, both & 0xffffu), equal = __reduce_add_sync(ALL_LANES, both >> 16);
    if (t.lane == 0)
        c->all.greater[t.warp] = greater, c->all.equal[t.warp] = equal;
    __syncthreads();
    uint32_t g = limit.before_greater + __reduce_add_sync(ALL_LANES, t.lane < t.warp ? c->all.greater[t.lane % WARPS] : 0);
    uint32_t e = limit.before_equal + __reduce_add_sync(ALL_LANES, t.lane < t.warp ? c->all.equal[t.lane % WARPS] : 0);
    uint64_t *words = list_words(t), list = (uint64_t)t.list * cuda_rows_max(&a.policy) + span.first;
    for (uint32_t i = 0; i < found; i += WARP) {
        bool mine = i + t.lane < found;
        uint32_t group = mine ? groups[i + t.lane] : 0, token = begin * PKV_BLOCK_TOKENS + group * 8;
        uint4 v = mine ? *(const uint4 *)(codes + group * 8) : make_uint4(0, 0, 0, 0);
        place(limit, v, t.lane, &g, &e, [&](uint32_t to, uint32_t j, uint32_t code) {
            put_word(t, words + to, token + j);
            if (a.flags & CUDA_KEEP)
                a.work.scores[list + to] = (uint16_t)code;
        });
    }
}

/* Top-p needs all counts of all blocks. */
static __device__ __noinline__ uint32_t budget_take(const struct cuda_attend &a, struct team t, struct choose_shared *c,
                                                    uint4 sums)
{
    uint32_t *counts = a.work.counts + (uint64_t)t.list * t.size * CUDA_COUNTS;
    write_counts(sums, counts + t.part * CUDA_COUNTS);
    team_gate(t);
    budget(a, c, counts, t.size, a.policy.k);
    return c->k;
}

/* Returns how many are chosen beside sinks and recent. */
static __device__ __forceinline__ uint32_t choose(const struct cuda_attend &a, struct team &t, struct team_shared *m,
                                                  struct choose_memory *c, const struct span &span, const uint16_t *codes)
{
    uint32_t k = a.policy.k, begin, end;
    uint4 sums = suffix_sums(m->counts, m->warp_sums);
    ((uint4 *)m->counts)[threadIdx.x] = sums;
    if (threadIdx.x == 0)
        m->counts[2048] = 0;
    if (threadIdx.x % 8 == 0)
        put_word(t, count_words(t) + t.part * 64 + threadIdx.x / 8, sums.x);
    if (a.policy.top_p > 0) {
        k = budget_take(a, t, &c->all, sums);
        t.arrivals += t.size; /* its gate */
    }
    part_of(span, t.part, t.size, &begin, &end);
    if (a.flags & CUDA_KEEP)
        for (uint32_t i = threadIdx.x; i < (end - begin) * PKV_BLOCK_TOKENS; i += THREADS)
            a.work.codes[t.list * codes_stride(a) + begin * PKV_BLOCK_TOKENS + i] = codes[i];
    if (!k)
        return 0;
    struct threshold limit = threshold_find(t, m, &c->all, k);
    choose_write(a, t, c, limit, span, codes, begin, end);
    __syncthreads(); /* the codes' memory is used again */
    return k;
}

/* ---- attend ---- */

/* Entries [begin, end) of the list: where their rows lie. All finds of the team come before its claims. */
static __device__ __forceinline__ void rows_find(const struct cuda_attend &a, struct team &t, const struct list_of &l,
                                                 struct team_rows *r, const struct span &span, uint32_t k, uint32_t begin,
                                                 uint32_t end)
{
    uint32_t hits = 0, misses = 0, outcome;
    uint64_t list = (uint64_t)t.list * cuda_rows_max(&a.policy);
    for (uint32_t i = begin + threadIdx.x; i < end; i += THREADS) {
        uint32_t token = i < span.first       ? i
                         : i < span.first + k ? take_word(t, list_words(t) + (i - span.first))
                                              : span.last + (i - span.first - k);
        r->address[i - begin] = resolve(a, l, token, &outcome);
        r->token[i - begin] = token, r->keep[i - begin] = 0;
        hits += outcome == 1, misses += outcome == 2;
        if (a.flags & CUDA_KEEP) {
            a.work.index[list + i] = token, a.work.address[list + i] = r->address[i - begin];
            if (i < span.first || i >= span.first + k)
                a.work.scores[list + i] = 0;
        }
    }
    if (!l.cached)
        return;
    count_outcomes(a, hits, misses);
    team_gate(t);
    for (uint32_t i = threadIdx.x; i < end - begin; i += THREADS)
        if (r->address[i] & FETCHED)
            r->keep[i] = cache_claim(a, l, r->token[i]), r->address[i] &= ~FETCHED;
}

/* Returns how many warps have a result. */
template <typename T, uint32_t DIM, uint32_t SETS>
static __device__ __forceinline__ uint32_t attend_list(const struct cuda_attend &a, struct team &t, const struct span &span,
                                                       struct team_shared *m, unsigned char *front, uint32_t k)
{
    constexpr uint32_t USED = DIM > 128 ? WARPS / 2 : WARPS, BYTES = tile_shape<T, DIM>::BYTES;
    struct team_rows *r = (struct team_rows *)front;
    unsigned char *tile = front + sizeof(*r) + t.warp * BYTES;
    struct list_of l = list_at(a, t.query, t.head, span);
    struct tile_state<DIM> s;
    tile_reset(s);
    uint32_t count = span.dense ? span.visible : span.first + k + span.visible - span.last, per = PKV_DIV_UP(count, t.size);
    uint32_t begin = min(t.part * per, count), end = min(begin + per, count);
    if (!span.dense)
        rows_find(a, t, l, r, span, k, begin, end);
    for (uint32_t at = begin; at < end; at += ROWS) {
        uint32_t rows = min(ROWS, end - at);
        for (uint32_t i = threadIdx.x; span.dense && i < rows; i += THREADS)
            r->address[i] = (uint64_t)row_address(a, l.blocks, t.head, at + i);
        __syncthreads();
        for (uint32_t first = t.warp * TILE_ROWS; first < rows && t.warp < USED; first += USED * TILE_ROWS) {
            load_tile<tile_shape<T, DIM>::ROW, tile_shape<T, DIM>::PITCH>(
                tile, r->address, l.cached && !span.dense ? r->keep : NULL, first, rows, t.lane);
            tile_attend<T, DIM, (SETS > 1)>((uint32_t)__cvta_generic_to_shared(tile),
                                            (uint32_t)__cvta_generic_to_shared(m->queries), min(TILE_ROWS, rows - first),
                                            a.policy.scale * LOG2E, t.lane, s);
        }
        __syncthreads();
    }
    uint32_t used = min(PKV_DIV_UP(end - begin, TILE_ROWS), USED);
    if (t.warp < used)
        tile_result<DIM, (SETS > 1)>(s, (float *)tile, t.lane);
    __syncthreads();
    return used;
}

/* ---- merge ---- */

/* What each warp's result counts for: keep [USED][HEADS]; sums and maxima go out as words. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void merge_weights(const struct team &t, const float *results, uint32_t used, float *keep,
                                                     uint64_t *words)
{
    constexpr uint32_t STRIDE = tile_shape<T, DIM>::BYTES / 4;
    uint32_t h = t.warp;
    if (h >= t.group)
        return;
    const float *max = results + t.lane * STRIDE + TILE_COLUMNS * RESULT_PITCH(DIM) + h;
    float own = t.lane < used ? max[0] : NOTHING, sum = t.lane < used ? max[TILE_COLUMNS] : 0.0f, most = own;
#pragma unroll
    for (uint32_t s = 8; s; s /= 2)
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
    own = exp2_fast(own - most), sum *= own;
    if (t.lane < used)
        keep[t.lane * HEADS + h] = own;
#pragma unroll
    for (uint32_t s = 8; s; s /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, s);
    uint64_t *to = words + (uint64_t)(t.part * t.group + h) * (DIM + 2) + DIM;
    if (t.lane == 0)
        put_word(t, to, __float_as_uint(most)), put_word(t, to + 1, __float_as_uint(sum));
}

/* Warps into the block's result, as words [group][DIM + 2]. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void merge_warps(const struct team &t, struct team_shared *m, const unsigned char *tiles,
                                                   uint32_t used, uint64_t *words)
{
    constexpr uint32_t STRIDE = tile_shape<T, DIM>::BYTES / 4;
    const float *results = (const float *)tiles;
    float *keep = &m->exact[0][0][0];
    merge_weights<T, DIM>(t, results, used, keep, words);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < t.group * DIM; i += THREADS) {
        uint32_t h = i / DIM, at = h * RESULT_PITCH(DIM) + i % DIM;
        float out = 0;
#pragma unroll 4
        for (uint32_t w = 0; w < used; w++)
            out = fmaf(results[w * STRIDE + at], keep[w * HEADS + h], out);
        put_word(t, words + (uint64_t)(t.part * t.group + h) * (DIM + 2) + i % DIM, __float_as_uint(out));
    }
}

/* A block adds up its share of the outputs: `size` lanes have one output of all blocks. */
template <uint32_t DIM>
static __device__ __forceinline__ void merge_blocks(const struct cuda_attend &a, const struct team &t, const uint64_t *words)
{
    uint32_t share = t.group * DIM / t.size, from = threadIdx.x % t.size;
    for (uint32_t x = threadIdx.x; x < t.group * DIM; x += THREADS) {
        uint32_t i = t.part * share + x / t.size, h = i / DIM;
        const uint64_t *p = words + (uint64_t)(from * t.group + h) * (DIM + 2);
        const uint64_t *const at[3] = {p + DIM, p + DIM + 1, p + i % DIM};
        float got[3];
        take_words(t, at, got);
        float max = got[0], sum = got[1], out = got[2], most = max;
        for (uint32_t s = t.size / 2; s; s /= 2)
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
        float keep = exp2_fast(max - most);
        out *= keep, sum *= keep;
        for (uint32_t s = t.size / 2; s; s /= 2) {
            out += __shfl_xor_sync(ALL_LANES, out, s);
            sum += __shfl_xor_sync(ALL_LANES, sum, s);
        }
        if (from == 0) {
            a.out[t.q_head * DIM + i] = out / sum;
            if (i % DIM == 0 && a.lse)
                a.lse[t.q_head + h] = (most + log2f(sum)) * 0.69314718f;
        }
    }
    __syncthreads();
}

/* ---- the kernel ---- */

/* Everything that the kernel needs first, with as few waits as there are pointers in a row. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ struct span queries_take(const struct cuda_attend &a, const struct team &t,
                                                           struct team_shared *m, struct weigh_shared<HEADS> *w)
{
    constexpr uint32_t EACH = HEADS * DIM / THREADS;
    const T *q = (const T *)a.q + t.q_head * DIM;
    T x[EACH];
#pragma unroll
    for (uint32_t n = 0; n < EACH; n++) {
        uint32_t i = n * THREADS + threadIdx.x, column = i / DIM;
        uint32_t h = t.group > 4 ? min(column, t.group - 1) : min(column % 4, t.group - 1);
        x[n] = q[h * DIM + i % DIM];
    }
    struct span span = span_of(a, t.query);
#pragma unroll
    for (uint32_t n = 0; n < EACH; n++) {
        uint32_t i = n * THREADS + threadIdx.x, column = i / DIM, d = i % DIM;
        *(T *)(m->queries + column * tile_shape<T, DIM>::QUERY + d * sizeof(T)) = x[n];
        w->q[column][d] = to_float(x[n]);
    }
    if (threadIdx.x == 0)
        w->write = t.part == 0;
    return span;
}

template <typename T, uint32_t DIM, uint32_t SETS>
__global__ void __launch_bounds__(THREADS, 1) team_kernel(const __grid_constant__ struct team_call call)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const struct cuda_attend &a = call.a;
    struct team_shared *m = (struct team_shared *)shared;
    unsigned char *front = shared + call.at.front, *rings = shared + call.at.rings;
    struct weigh_shared<HEADS> *w = (struct weigh_shared<HEADS> *)front;
    for (uint32_t i = threadIdx.x; i < 2048 + 8; i += THREADS)
        m->counts[i] = 0;
    if (threadIdx.x < 2 * WARPS)
        arrival_init((uint32_t)__cvta_generic_to_shared(&m->gates[0][threadIdx.x]));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    wait_for_former();
    struct team t = team_join(a, call.group, call.words);
    struct span span = queries_take<T, DIM>(a, t, m, w);
    uint32_t k = 0;
    if (!span.dense) {
        struct stream s = stream_open(a, t, span, m, (uint32_t)__cvta_generic_to_shared(rings), call.at.ring);
        uint16_t *codes = (uint16_t *)front;
        uint32_t recent = span.visible - span.last;
        __syncthreads();
        if (!a.weighed && a.scheme.kind != PKV_SCHEME_SIGN)
            apply_maps(a, w, t.head);
        biases_share<T, DIM, SETS>(a, t, m, w, span, s, front + sizeof(*w));
        biases_join(a, t, m, s, recent ? recent : span.first);
        scan_part<SETS>(a, t, m, w, span, s, codes);
        k = choose(a, t, m, (struct choose_memory *)rings, span, codes);
    }
    __syncthreads();
    uint32_t used = attend_list<T, DIM, SETS>(a, t, span, m, front, k);
    uint64_t *words = result_words(t, cuda_rows_max(&a.policy));
    merge_warps<T, DIM>(t, m, front + sizeof(struct team_rows), used, words);
    merge_blocks<DIM>(a, t, words);
    if (t.part == 0 && threadIdx.x == 0)
        a.work.chosen[t.list] = span.dense ? 0 : span.first + k + span.visible - span.last;
    team_leave(t);
}

#else
template <typename T, uint32_t DIM, uint32_t SETS> __global__ void team_kernel(const __grid_constant__ struct team_call call)
{
    /* never launched: no bulk copies (cuda_team_size) */
}
#endif

#define TEAM_MAX 16u

static uint32_t team_of(const struct cuda_attend *a, uint32_t processors, uint32_t shared)
{
    struct cuda_attend x = *a;
    uint32_t lists = PKV_MAX(a->queries * a->geom.kv_heads, 1u), size = 1;
    while (size < TEAM_MAX && 2 * size * lists <= processors)
        size *= 2;
    x.team = size;
    bool fits = size > 1 && layout_of(&x).bytes <= shared && PKV_DIV_UP(cuda_rows_max(&a->policy), size) <= ROWS;
    return fits ? size : 0;
}

extern "C" uint32_t cuda_team_size(const struct cuda_attend *a, uint32_t processors, uint32_t shared)
{
    const struct pkv_geom &g = a->geom;
    bool able = g.dtype != PKV_F32 && (g.head_dim == 64 || g.head_dim == 128 || g.head_dim == 256) &&
                pkv_geom_group(&g) <= HEADS && g.sig_bits <= 128 && a->policy.rule == PKV_RULE_SOFTMAX;
    return able ? team_of(a, processors, PKV_MIN(shared, SHARED_MAX)) : 0;
}

template <typename T, uint32_t DIM> static void (*kernel_of_group(uint32_t group))(const struct team_call)
{
    return group <= 4 ? team_kernel<T, DIM, 1> : team_kernel<T, DIM, 2>;
}

template <typename T> static void (*kernel_of_dim(uint32_t dim, uint32_t group))(const struct team_call)
{
    return dim == 64    ? kernel_of_group<T, 64>(group)
           : dim == 128 ? kernel_of_group<T, 128>(group)
                        : kernel_of_group<T, 256>(group);
}

extern "C" int cuda_team_preload(void)
{
    int device, major;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
        return -(int)PKV_ERR_SYSTEM;
    int most = 0;
    if (major < 9 || cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        return 0;
    most = PKV_MIN(most, (int)SHARED_MAX);
    for (uint32_t dim = 64; dim <= 256; dim *= 2)
        for (uint32_t group = 4; group <= 8; group += 4)
            if (cudaFuncSetAttribute(kernel_of_dim<__half>(dim, group), cudaFuncAttributeMaxDynamicSharedMemorySize, most) !=
                    cudaSuccess ||
                cudaFuncSetAttribute(kernel_of_dim<__nv_bfloat16>(dim, group), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     most) != cudaSuccess)
                return -(int)PKV_ERR_UNSUPPORTED;
    return 0;
}

extern "C" int cuda_team_launch(const struct cuda_attend *a, void *stream)
{
    uint32_t group = pkv_geom_group(&a->geom);
    auto kernel = a->geom.dtype == PKV_F16 ? kernel_of_dim<__half>(a->geom.head_dim, group)
                                           : kernel_of_dim<__nv_bfloat16>(a->geom.head_dim, group);
    struct team_call call = {*a, layout_of(a), group, cuda_words(a)};
    return launch(kernel, dim3(a->queries * a->geom.kv_heads * a->team), THREADS, call.at.bytes, call, stream, true, true);
}
