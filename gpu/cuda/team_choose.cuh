/* A team's choice: every block finds the threshold for itself and takes the rows that it has chosen; what is too much for a
 * block goes to those that have fewer, by words. */
#ifndef GPU_CUDA_TEAM_CHOOSE_CUH
#define GPU_CUDA_TEAM_CHOOSE_CUH

#include "gpu/cuda/team_rows.cuh"

#if __CUDA_ARCH__ >= 900

/* ---- the threshold ---- */

/* The block's suffix sums are in m->counts. */
static __device__ __forceinline__ void counts_send(const struct team &t, const struct team_shared *m)
{
    if (t.warp == 0) {
        const uint32_t *from = m->counts + t.window + t.lane * 2;
        put_word(t, window_words(t) + t.part * WINDOW_WORDS + t.lane, from[0], from[1], from[2]);
    } else if (t.warp == 1) {
        const uint32_t *from = m->counts + t.lane * 64;
        put_word(t, coarse_words(t) + t.part * COARSE_WORDS + t.lane, from[0], from[32], t.lane < 31 ? from[64] : 0);
    }
}

/* What is too much for a block goes to those that have fewer than the mean. Sixteen lanes have a block's counts each. */
static __device__ __noinline__ struct team_shared::plan spill_plan(struct team_shared::plan p, uint32_t size, uint32_t part,
                                                                   uint32_t mask, uint32_t greater, uint32_t equal, uint32_t k,
                                                                   uint32_t most)
{
    uint32_t lane = threadIdx.x % 16, sum = equal, mean = PKV_DIV_UP(k, size);
    for (uint32_t d = 1; d < 16; d *= 2) {
        uint32_t other = __shfl_up_sync(mask, sum, d, 16);
        sum += lane >= d ? other : 0;
    }
    uint32_t before = sum - equal, chosen = greater + min(equal, p.ties > before ? p.ties - before : 0),
             keep = min(chosen, most);
    uint32_t spill = chosen - keep, room = lane < size && keep < mean ? mean - keep : 0;
    uint32_t spilled = spill, rooms = room;
    for (uint32_t d = 1; d < 16; d *= 2) {
        uint32_t a = __shfl_up_sync(mask, spilled, d, 16), b = __shfl_up_sync(mask, rooms, d, 16);
        spilled += lane >= d ? a : 0, rooms += lane >= d ? b : 0;
    }
    uint32_t all = __shfl_sync(mask, spilled, 15, 16);
    p.spill_first = __shfl_sync(mask, spilled - spill, part, 16), p.take_first = __shfl_sync(mask, rooms - room, part, 16);
    p.take = min(__shfl_sync(mask, room, part, 16), all > p.take_first ? all - p.take_first : 0);
    return p;
}

/* Sums of all blocks' counts; whoever has those between which the k-th best lies leaves the plan in m. `step` codes are from
 * one count to the next. Ends with a barrier. */
static __device__ __forceinline__ void threshold_find(const struct team &t, struct team_shared *m, const struct word *words,
                                                      uint32_t each, uint32_t first, uint32_t step, uint32_t k, uint32_t most)
{
    uint32_t part = threadIdx.x % TEAM_MAX, i = threadIdx.x / TEAM_MAX, mask = t.lane < 16 ? 0xffffu : 0xffff0000u;
    struct word w = {0, 0, 0, 0};
    if (part < t.size && i < each)
        w = take_word(t, words + part * each + i);
    uint32_t x = w.x, y = w.y, z = w.z;
    __syncwarp();
#pragma unroll
    for (uint32_t s = 8; s; s /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, s);
        y += __shfl_xor_sync(ALL_LANES, y, s);
        z += __shfl_xor_sync(ALL_LANES, z, s);
    }
    if (x >= k && z < k) {
        bool second = y >= k;
        uint32_t greater = second ? w.z : w.y, equal = (second ? w.y : w.x) - greater;
        uint32_t before_greater = part < t.part ? greater : 0, before_equal = part < t.part ? equal : 0;
#pragma unroll
        for (uint32_t s = 8; s; s /= 2) {
            before_greater += __shfl_xor_sync(mask, before_greater, s);
            before_equal += __shfl_xor_sync(mask, before_equal, s);
        }
        struct team_shared::plan p = {1, first + (i * 2 + second) * step, k - (second ? z : y), before_greater, before_equal};
        p.keep = min(greater + min(equal, p.ties > before_equal ? p.ties - before_equal : 0), most);
        if (__any_sync(mask, greater + equal > most))
            p = spill_plan(p, t.size, t.part, mask, greater, equal, k, most);
        if (part == t.part)
            m->plan = p;
    }
    __syncthreads();
}

/* The window was a bad guess: the coarse counts say in which bucket of 32 codes to look. */
static __device__ __noinline__ void threshold_search(const struct team t, struct team_shared *m, uint32_t k, uint32_t most)
{
    __syncthreads(); /* all have seen that there is no plan */
    threshold_find(t, m, coarse_words(t), COARSE_WORDS, 0, 32, k, most);
    uint32_t first = m->plan.code;
    if (t.warp == 0 && t.lane < FINE_WORDS) {
        const uint32_t *from = m->counts + first + t.lane * 2;
        put_word(t, fine_words(t) + t.part * FINE_WORDS + t.lane, from[0], from[1], from[2]);
    }
    __syncthreads();
    threshold_find(t, m, fine_words(t), FINE_WORDS, first, 1, k, most);
}

/* Codes have low bits that were not counted, and the plan is of the others: each block counts the low bits of those that share
 * the threshold's, and sends how many have at least each whole code. `groups`: this warp's `found` that have some. */
static __device__ __noinline__ void threshold_refine(const struct team t, struct team_shared *m, struct choose_memory *c,
                                                     const uint16_t *codes, const uint16_t *groups, uint32_t found, uint32_t k,
                                                     uint32_t most)
{
    uint32_t upper = m->plan.code, above = m->counts[upper + 1], *low = c->all.coarse;
    if (threadIdx.x < WARP)
        low[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = t.lane; i < found * 8; i += WARP) {
        uint32_t code = codes[groups[i / 8] * 8u + i % 8];
        if (code && code >> CODE_LOW_BITS == upper)
            atomicAdd(low + code % WARP, 1u);
    }
    __syncthreads();
    if (t.warp == 0) {
        uint32_t sum = low[t.lane];
#pragma unroll
        for (uint32_t s = 1; s < WARP; s *= 2) {
            uint32_t other = __shfl_down_sync(ALL_LANES, sum, s);
            sum += t.lane + s < WARP ? other : 0;
        }
        sum += above;
        uint32_t next = __shfl_down_sync(ALL_LANES, sum, 1), third = __shfl_down_sync(ALL_LANES, sum, 2);
        if (t.lane % 2 == 0)
            put_word(t, low_words(t) + t.part * FINE_WORDS + t.lane / 2, sum, next, t.lane < 30 ? third : above);
    }
    threshold_find(t, m, low_words(t), FINE_WORDS, upper << CODE_LOW_BITS, 1, k, most);
}

/* Codes below the step before's threshold that count as reaching it: an eighth of an octave, or where codes are integers, of
 * which many tokens have the same, one. */
#define GUESS_LOW(integer) ((integer) ? 1u : 4u)

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

/* What a block attends: ends that are in their tile already, rows whose addresses it has. */
struct own_rows {
    uint32_t there, count;
};

/* Returns how many of the list are chosen beside the ends; r has this block's own->count rows then. low_bits: of codes, that
 * are not counted. */
template <bool INTEGER>
static __device__ __forceinline__ uint32_t choose(const struct team_call &call, struct team &t, struct team_shared *m,
                                                  struct choose_memory *c, struct team_rows *r, const struct span &span,
                                                  const struct list_of &l, const struct stream &s, const uint16_t *codes,
                                                  uint32_t low_bits, struct own_rows *own)
{
    const struct cuda_attend &a = call.a;
    const uint64_t *places = (const uint64_t *)((unsigned char *)m + call.at.places);
    uint32_t k = a.policy.k, tokens = (s.end - s.begin) * PKV_BLOCK_TOKENS;
    uint4 sums = suffix_sums(m->counts, m->warp_sums);
    ((uint4 *)m->counts)[threadIdx.x] = sums;
    __syncthreads();
    counts_send(t, m);
    if (!t.plain && a.policy.top_p > 0) {
        k = budget_take(a, t, &c->all, sums);
        t.arrivals += t.size; /* its gate */
    }
    uint32_t ends = 0;
    if (!own->there || keeps(call, t))
        ends = ends_take(call, t, m, l, ends_of(span), r, k, own->there > 0);
    if (keeps(call, t))
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < tokens; i += THREADS)
            a.work.codes[t.list * codes_stride(a) + s.begin * PKV_BLOCK_TOKENS + i] = codes[i];
    own->count = ends;
    if (k) {
        uint32_t per = PKV_ALIGN_UP(PKV_DIV_UP(tokens, WARPS), 32u), first = min(t.warp * per, tokens);
        uint32_t last = min(first + per, tokens), most = call.most;
        uint16_t *groups = choose_groups(c) + first / 8;
        /* What reached the threshold of the step before will mostly reach this one's: found while others' counts come. */
        uint32_t guess = (t.window ? t.window + WINDOW / 2 - GUESS_LOW(INTEGER) : 2048) << low_bits;
        uint32_t found = groups_take(codes, first, last, t.lane, guess, groups);
        struct likely x = likely_find(call, t, c, places, codes, groups, found, guess);
        threshold_find(t, m, window_words(t), WINDOW_WORDS, t.window, 1, k, most);
        if (!m->plan.found)
            threshold_search(t, m, k, most);
        if (m->plan.code << low_bits < guess)
            found = groups_take(codes, first, last, t.lane, m->plan.code << low_bits, groups), x.count = ALL_LANES;
        if (INTEGER && low_bits)
            threshold_refine(t, m, c, codes, groups, found, k, most);
        rows_write(call, t, l, m, c, r, places, x, codes, groups, found, s.begin, ends, span.first);
        if (t.part == 0 && threadIdx.x == 0)
            *t.hint = m->plan.code >> low_bits;
        uint32_t at = ends + m->plan.keep, take = m->plan.take;
        for (uint32_t i = threadIdx.x; i < take; i += THREADS) {
            struct word w = take_word(t, row_words(t) + m->plan.take_first + i);
            r->address[at + i] = (uint64_t)w.y << 32 | w.x, r->token[at + i] = w.z;
        }
        own->count = at + take;
    }
    __syncthreads(); /* the codes' memory is used again */
    return k;
}

#endif /* architecture */

#endif
