/* Pick: the k best of each list by their codes, ascending, ties to the lower index; sinks before them, recent after.
 *
 * Each part finds the threshold for itself from the suffix sums that the scan left (coarse, then fine: two small rounds), knows
 * from the parts before it how many tokens above and at the threshold come first, and writes its own share at its final
 * positions: no barrier between parts, and the order does not depend on their timing. Then it looks up where its rows lie. */
#include "gpu/cuda/rows.cuh"

#define THREADS 512u
#define WARPS   (THREADS / WARP)

struct pick_shared {
    uint32_t coarse[64];
    uint32_t fine[CUDA_PARTS_MAX][33]; /* suffix counts of the threshold's 32 codes and the next one */
    uint32_t greater[WARPS], equal[WARPS];
    double mass[WARPS];
    uint32_t k;
};

/* Where the k best end: codes above `code` are all taken, of those that have it the first `ties`. before_*: in earlier parts.
 */
struct threshold {
    uint32_t code, ties, before_greater, before_equal;
};

/* Top-p: the smallest k whose estimated mass, with one per q head for sinks and recent, reaches p; at most k. */
static __device__ void budget(const struct cuda_attend &a, struct pick_shared *m, const uint32_t *counts, uint32_t k)
{
    uint32_t t = threadIdx.x, lane = t % WARP, warp = t / WARP, suffix[5];
    double group = pkv_geom_group(&a.geom), own[4], sum = 0;
    for (uint32_t j = 0; j < 5; j++) {
        suffix[j] = 0;
        for (uint32_t r = 0; r < a.parts; r++)
            suffix[j] += counts[r * CUDA_COUNTS + t * 4 + j];
    }
    for (uint32_t j = 4; j-- > 0;)
        sum += own[j] = (t * 4 + j ? (suffix[j] - suffix[j + 1]) * gpu_code_mass(t * 4 + j) : 0.0);
    double scan = sum;
    for (uint32_t s = 1; s < WARP; s *= 2) {
        double other = __shfl_down_sync(ALL_LANES, scan, s);
        scan += lane + s < WARP ? other : 0;
    }
    if (lane == 0)
        m->mass[warp] = scan;
    if (t == 0)
        m->k = k;
    __syncthreads();
    double above = scan - sum, total = group;
    for (uint32_t w = 0; w < WARPS; w++) {
        above += w > warp ? m->mass[w] : 0;
        total += m->mass[w];
    }
    double missing = a.policy.top_p * total - group;
    for (uint32_t j = 4; j-- > 0; above += own[j])
        if (above < missing && above + own[j] >= missing)
            atomicMin(&m->k, suffix[j + 1] + (uint32_t)ceil((missing - above) / gpu_code_mass(t * 4 + j)));
    if (t == 0 && missing <= 0)
        atomicMin(&m->k, 0u);
    __syncthreads();
}

static __device__ struct threshold find(const struct cuda_attend &a, struct pick_shared *m, const uint32_t *counts,
                                        uint32_t part, uint32_t k)
{
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    /* Eight threads add up one coarse sum. */
    uint32_t sum = 0;
    for (uint32_t r = threadIdx.x % 8; r < a.parts; r += 8)
        sum += __ldcg(counts + r * CUDA_COUNTS + CUDA_COARSE + threadIdx.x / 8);
    for (uint32_t s = 4; s; s /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, s);
    if (threadIdx.x % 8 == 0)
        m->coarse[threadIdx.x / 8] = sum;
    __syncthreads();
    uint32_t low = __ballot_sync(ALL_LANES, m->coarse[lane] >= k), high = __ballot_sync(ALL_LANES, m->coarse[32 + lane] >= k);
    uint32_t bucket = high ? 63 - __clz(high) : low ? 31 - __clz(low) : 0;
    for (uint32_t r = warp; r < a.parts; r += WARPS) {
        const uint32_t *from = counts + r * CUDA_COUNTS + bucket * 32;
        m->fine[r][lane] = __ldcg(from + lane);
        if (lane == 0)
            m->fine[r][32] = __ldcg(from + 32);
    }
    __syncthreads();
    uint32_t merged = 0;
#pragma unroll 8
    for (uint32_t r = 0; r < a.parts; r++)
        merged += m->fine[r][lane];
    uint32_t reached = __ballot_sync(ALL_LANES, merged >= k), at = reached ? 31 - __clz(reached) : 0;
    struct threshold t = {bucket * 32 + at, k, 0, 0};
    uint32_t above = 0;
    for (uint32_t r = lane; r < a.parts; r += WARP) {
        uint32_t greater = m->fine[r][at + 1], equal = m->fine[r][at] - greater;
        above += greater;
        t.before_greater += r < part ? greater : 0;
        t.before_equal += r < part ? equal : 0;
    }
    t.ties -= __reduce_add_sync(ALL_LANES, above);
    t.before_greater = __reduce_add_sync(ALL_LANES, t.before_greater);
    t.before_equal = __reduce_add_sync(ALL_LANES, t.before_equal);
    return t;
}

/* Codes of eight tokens: how many are above the threshold (low half) and at it (high half). */
static __device__ __forceinline__ uint32_t tally(const uint4 &v, uint32_t code)
{
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    uint32_t n = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t a = w[i] & 0xffffu, b = w[i] >> 16;
        n += a > code ? 1u : a == code ? 65536u : 0u;
        n += b > code ? 1u : b == code ? 65536u : 0u;
    }
    return n;
}

static __device__ __forceinline__ uint32_t most_of(const uint4 &v)
{
    uint32_t z = __vmaxu2(__vmaxu2(v.x, v.y), __vmaxu2(v.z, v.w));
    return max(z >> 16, z & 0xffffu);
}

/* The chosen of 256 tokens at `token`, eight a lane, go to their places. */
static __device__ void place(const struct threshold &t, const uint4 &v, uint32_t token, uint32_t lane, uint32_t *greater,
                             uint32_t *equal, uint32_t *index, uint16_t *scores)
{
    uint32_t own = tally(v, t.code), sum = own;
#pragma unroll
    for (uint32_t s = 1; s < WARP; s *= 2) {
        uint32_t other = __shfl_up_sync(ALL_LANES, sum, s);
        sum += lane >= s ? other : 0;
    }
    uint32_t g = *greater + ((sum - own) & 0xffffu), e = *equal + ((sum - own) >> 16);
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (uint32_t j = 0; j < 8; j++) {
        uint32_t code = j & 1 ? w[j / 2] >> 16 : w[j / 2] & 0xffffu;
        bool above = code > t.code, tie = code == t.code;
        if (above || (tie && e < t.ties)) {
            uint32_t at = g + min(e, t.ties);
            index[at] = token + lane * 8 + j;
            scores[at] = (uint16_t)code;
        }
        g += above, e += tie;
    }
    uint32_t total = __shfl_sync(ALL_LANES, sum, WARP - 1);
    *greater += total & 0xffffu, *equal += total >> 16;
}

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
static __device__ uint32_t compact(struct pick_shared *m, const struct threshold &t, const struct share &s, uint32_t *index,
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
#pragma unroll
    for (uint32_t i = 0; i < HELD; i++)
        if (__any_sync(ALL_LANES, most_of(s.held[i]) >= t.code))
            place(t, s.held[i], s.first + i * 256, lane, &g, &e, index, scores);
    for (uint32_t at = s.first + HELD * 256; at < s.last; at += 256) {
        uint4 v = load_codes(s, at);
        if (__any_sync(ALL_LANES, most_of(v) >= t.code))
            place(t, v, at, lane, &g, &e, index, scores);
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

__global__ void __launch_bounds__(THREADS, 2) pick_kernel(const __grid_constant__ struct cuda_attend a)
{
    __shared__ struct pick_shared m;
    uint32_t list = blockIdx.x / a.parts, part = blockIdx.x % a.parts, query = list / a.geom.kv_heads;
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
        budget(a, &m, counts, k);
        k = m.k;
    }
    if (part == 0)
        write_ends(a, l, span, list, k);
    if (!k)
        return;
    part_of(a, span, part, &begin, &end);
    struct share share = share_of(a.work.codes + list * codes_stride(a), begin * PKV_BLOCK_TOKENS, end * PKV_BLOCK_TOKENS);
    struct threshold t = find(a, &m, counts, part, k);
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
