/* Pick: the k best of each list by their codes, ascending, ties to the lower index; sinks before them, recent after.
 *
 * Each part writes its own share at its final
 * positions: no barrier between parts, and the order does not depend on their timing. Then it looks up where its rows lie. */
#include "gpu/cuda/choose.cuh"
#include "gpu/cuda/rows.cuh"

#define THREADS 512u
#define WARPS   (THREADS / WARP)

/* A warp's tokens: contiguous, 256 at a time. The first HELD times are read before the threshold is known and kept. */
#define HELD 8u
struct share {
    const uint16_t *codes;
    uint32_t first, last;
    uint4 held[HELD];
};

static __device__ __forceinline__ uint4 load_codes(const struct share &s, uint32_t at)
{
    uint32_t token = at + threadIdx.x % WARP * 8;
    return token < s.last ? *(const uint4 *)(s.codes + token) : make_uint4(0, 0, 0, 0);
}

static __device__ __forceinline__ struct share share_of(const uint16_t *codes, uint32_t begin, uint32_t end)
{
    struct share s;
    uint32_t per = PKV_ALIGN_UP(PKV_DIV_UP(end - begin, WARPS), 256u);
    s.codes = codes, s.first = min(begin + threadIdx.x / WARP * per, end), s.last = min(s.first + per, end);
#pragma unroll
    for (uint32_t i = 0; i < HELD; i++)
        s.held[i] = load_codes(s, s.first + i * 256);
    return s;
}

static __device__ __forceinline__ void count(const uint4 &v, uint32_t code, uint32_t *greater, uint32_t *equal)
{
    uint32_t n = most_of(v) >= code ? tally(v, code) : 0;
    *greater += n & 0xffffu, *equal += n >> 16;
}

/* Writes this part's share; returns how many entries it has, from t.before_greater + min(t.before_equal, t.ties) on. */
static __device__ uint32_t compact(struct choose_shared *m, const struct threshold &t, const struct share &s, uint32_t *index,
                                   uint16_t *scores)
{
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, greater = 0, equal = 0;
#pragma unroll
    for (uint32_t i = 0; i < HELD; i++)
        count(s.held[i], t.code, &greater, &equal);
#pragma unroll 4
    for (uint32_t at = s.first + HELD * 256; at < s.last; at += 256)
        count(load_codes(s, at), t.code, &greater, &equal);
    greater = __reduce_add_sync(ALL_LANES, greater), equal = __reduce_add_sync(ALL_LANES, equal);
    if (lane == 0)
        m->greater[warp] = greater, m->equal[warp] = equal;
    __syncthreads();
    uint32_t g = t.before_greater + __reduce_add_sync(ALL_LANES, lane < warp ? m->greater[lane % WARPS] : 0);
    uint32_t e = t.before_equal + __reduce_add_sync(ALL_LANES, lane < warp ? m->equal[lane % WARPS] : 0);
    uint32_t all = __reduce_add_sync(ALL_LANES, lane < WARPS ? m->greater[lane % WARPS] : 0);
    uint32_t ties = t.before_equal + __reduce_add_sync(ALL_LANES, lane < WARPS ? m->equal[lane % WARPS] : 0);
    uint32_t written = all + min(ties, t.ties) - min(t.before_equal, t.ties);
    if (greater + equal == 0)
        return written;
    auto writer = [&](uint32_t first) {
        return [=](uint32_t at, uint32_t j, uint32_t code) {
            index[at] = first + lane * 8 + j;
            scores[at] = (uint16_t)code;
        };
    };
#pragma unroll
    for (uint32_t i = 0; i < HELD; i++)
        if (__any_sync(ALL_LANES, most_of(s.held[i]) >= t.code))
            place(t, s.held[i], lane, &g, &e, writer(s.first + i * 256));
    for (uint32_t at = s.first + HELD * 256; at < s.last; at += 256) {
        uint4 v = load_codes(s, at);
        if (__any_sync(ALL_LANES, most_of(v) >= t.code))
            place(t, v, lane, &g, &e, writer(at));
    }
    return written;
}

/* Addresses of `count` entries that this block has written. */
static __device__ void look_up(const struct cuda_attend &a, const struct list_of &list, const uint32_t *index,
                               uint64_t *address, uint32_t count)
{
    uint32_t hits = 0, misses = 0, outcome;
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        address[i] = resolve(a, list, index[i], &outcome);
        hits += outcome == 1, misses += outcome == 2;
    }
    count_outcomes(a, hits, misses);
}

static __device__ void write_ends(const struct cuda_attend &a, const struct list_of &l, const struct span &span, uint32_t list,
                                  uint32_t k)
{
    uint64_t to = (uint64_t)list * cuda_rows_max(&a.policy);
    uint32_t after = span.first + k, recent = span.visible - span.last, hits = 0, misses = 0, outcome;
    for (uint32_t i = threadIdx.x; i < span.first + recent; i += THREADS) {
        uint32_t at = i < span.first ? i : after + (i - span.first);
        uint32_t token = i < span.first ? i : span.last + (i - span.first);
        a.work.index[to + at] = token;
        a.work.scores[to + at] = 0;
        a.work.address[to + at] = resolve(a, l, token, &outcome);
        hits += outcome == 1, misses += outcome == 2;
    }
    count_outcomes(a, hits, misses);
    if (threadIdx.x == 0)
        a.work.chosen[list] = after + recent;
}

/* Integer rules: `t` is of the codes' upper bits; the lower ones' sums are there too. */
static __device__ struct threshold refined(const struct cuda_attend &a, struct choose_shared *m, const struct threshold &t,
                                           uint32_t list, uint32_t part)
{
    const uint32_t *fine = a.work.fine + (uint64_t)list * a.parts * CUDA_FINE;
    __syncthreads(); /* all have read the upper bits' sums */
    for (uint32_t i = threadIdx.x; i < a.parts * 33; i += THREADS)
        m->fine[i / 33][i % 33] = __ldcg(fine + i / 33 * CUDA_FINE + i % 33);
    __syncthreads();
    struct threshold low = threshold_of(m, a.parts, part, t.ties, 0);
    low.code += t.code << CODE_LOW_BITS;
    low.before_greater += t.before_greater;
    return low;
}

__global__ void __launch_bounds__(THREADS, 2) pick_kernel(const __grid_constant__ struct cuda_attend a)
{
    __shared__ struct choose_shared m;
    uint32_t list = blockIdx.x / a.parts, part = blockIdx.x % a.parts, query = list / a.geom.kv_heads;
    if (!a.geom.sig_bits) /* the call's first kernel */
        wait_for_former();
    struct span span = span_of(a, query);
    struct list_of l = list_at(a, query, list % a.geom.kv_heads, span);
    wait_for_former();
    if (span.dense) {
        if (part == 0 && threadIdx.x == 0)
            a.work.chosen[list] = 0;
        return;
    }
    const uint32_t *counts = a.work.counts + (uint64_t)list * a.parts * CUDA_COUNTS;
    uint32_t k = a.policy.k, begin, end;
    if (a.policy.top_p > 0) {
        budget(a, &m, counts, a.parts, k);
        k = m.k;
    }
    if (part == 0)
        write_ends(a, l, span, list, k);
    if (!k)
        return;
    part_of(span, part, a.parts, &begin, &end);
    struct share share = share_of(a.work.codes + list * codes_stride(a), begin * PKV_BLOCK_TOKENS, end * PKV_BLOCK_TOKENS);
    struct threshold t = find(&m, counts, a.parts, part, k);
    if (a.policy.rule != PKV_RULE_SOFTMAX && counts[CUDA_LOW_BITS])
        t = refined(a, &m, t, list, part);
    uint64_t to = (uint64_t)list * cuda_rows_max(&a.policy) + span.first;
    uint32_t written = compact(&m, t, share, a.work.index + to, a.work.scores + to);
    __syncthreads();
    to += t.before_greater + min(t.before_equal, t.ties);
    look_up(a, l, a.work.index + to, a.work.address + to, written);
}

extern "C" int cuda_pick_preload(void)
{
    cudaFuncAttributes f;
    return cudaFuncGetAttributes(&f, pick_kernel) == cudaSuccess ? 0 : -(int)PKV_ERR_UNSUPPORTED;
}

extern "C" int cuda_pick_launch(const struct cuda_attend *a, void *stream)
{
    if (!a->parts || a->parts > CUDA_PARTS_MAX)
        return -(int)PKV_ERR_SHAPE;
    return launch(pick_kernel, dim3(a->queries * a->geom.kv_heads * a->parts), THREADS, 0, *a, stream);
}
