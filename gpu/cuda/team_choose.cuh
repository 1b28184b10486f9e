/* A team's choice: every block finds the threshold for itself and takes the rows that it has chosen; what is too much for a
 * block goes to those that have fewer, by words. */
#ifndef GPU_CUDA_TEAM_CHOOSE_CUH
#define GPU_CUDA_TEAM_CHOOSE_CUH

#include "gpu/cuda/choose.cuh"
#include "gpu/cuda/rows.cuh"
#include "gpu/cuda/team_bias.cuh"

#if __CUDA_ARCH__ >= 900

static __device__ __forceinline__ uint16_t *choose_groups(struct choose_memory *c)
{
    return (uint16_t *)(c + 1);
}

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

/* ---- rows ---- */

/* Codes below the step before's threshold that count as reaching it: an eighth of an octave, or where codes are integers, of
 * which many tokens have the same, one. */
#define GUESS_LOW(integer) ((integer) ? 1u : 4u)

static __device__ __noinline__ uint64_t row_cached(const struct cuda_attend &a, const struct list_of l, uint32_t token,
                                                   uint64_t address, uint32_t *outcomes)
{
    uint64_t found = cache_find(a, l, token);
    atomicAdd(outcomes + (found ? CUDA_HITS : CUDA_MISSES), 1u);
    return found ? found : address;
}

static __device__ __forceinline__ void row_kept(const struct cuda_attend &a, const struct team &t, uint32_t to, uint32_t token,
                                                uint64_t address, uint32_t code)
{
    uint64_t list = (uint64_t)t.list * cuda_rows_max(&a.policy);
    a.work.index[list + to] = token, a.work.address[list + to] = address, a.work.scores[list + to] = (uint16_t)code;
}

/* This block's part of the ends. `there`: in their own tile already. */
static __device__ __forceinline__ uint32_t ends_take(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                     const struct list_of &l, const struct ends &e, struct team_rows *r,
                                                     uint32_t k, bool there)
{
    struct own_ends own = own_ends(t, e);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < own.count; i += THREADS) {
        uint32_t at = own.begin + i, token = end_token(e, at);
        uint64_t address = (at < FIRST_ENDS ? m->end_rows[at] : end_row(call, t, e, at, l.cached)) & ~FAR;
        if (!t.plain && address & FETCHED)
            address = row_cached(call.a, l, token, address, m->outcomes);
        if (!there)
            r->address[i] = address, r->token[i] = token;
        if (keeps(call, t))
            row_kept(call.a, t, at < e.first ? at : at + k, token, address, 0);
    }
    return there ? 0 : own.count;
}

/* Groups of eight tokens of this warp's share of the part, [first, last), that reach a code, in order; returns how many. */
template <uint32_t AT_ONCE>
static __device__ __forceinline__ uint32_t groups_find(const uint16_t *codes, uint32_t first, uint32_t last, uint32_t lane,
                                                       uint32_t code, uint16_t *groups)
{
    uint32_t found = 0;
#pragma unroll 1
    for (uint32_t at = first; at < last; at += AT_ONCE * 256) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            uint32_t mine = at + i * 256 + lane * 8;
            v[i] = mine < last ? *(const uint4 *)(codes + mine) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            bool hit = most_of(v[i]) >= code;
            uint32_t hits = __ballot_sync(ALL_LANES, hit);
            if (hit)
                groups[found + __popc(hits & ((1u << lane) - 1))] = (uint16_t)((at + i * 256) / 8 + lane);
            found += __popc(hits);
        }
    }
    __syncwarp();
    return found;
}

static __device__ __forceinline__ uint32_t groups_take(const uint16_t *codes, uint32_t first, uint32_t last, uint32_t lane,
                                                       uint32_t code, uint16_t *groups)
{
    return last - first > 512 ? groups_find<4>(codes, first, last, lane, code, groups)
                              : groups_find<1>(codes, first, last, lane, code, groups);
}

/* A token of those groups that this lane has, four groups at a time: its code, 0 where there is none. */
static __device__ __forceinline__ uint32_t group_token(const uint16_t *codes, const uint16_t *groups, uint32_t i,
                                                       uint32_t found, uint32_t lane, uint32_t *ret_token)
{
    uint32_t group = i + lane / 8 < found ? groups[i + lane / 8] : 0;
    *ret_token = group * 8 + lane % 8;
    return i + lane / 8 < found ? codes[*ret_token] : 0;
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

/* ---- what is written once the threshold is known ---- */

/* A warp's tokens that reach the guess, one a lane, in order, if they are few: all that can be known of them before the
 * threshold. */
struct likely {
    uint32_t count, code, token; /* count: of the warp, more than WARP if they are many; token: of the part */
    uint64_t address;            /* of its row, as rows_at() */
};

static __device__ __forceinline__ uint64_t row_of(const struct team_call &call, const uint64_t *places, uint32_t token)
{
    return (places[token / PKV_BLOCK_TOKENS] & ~FAR) + token % PKV_BLOCK_TOKENS * (call.rows_head / PKV_BLOCK_TOKENS);
}

static __device__ __forceinline__ struct likely likely_find(const struct team_call &call, const struct team &t,
                                                            struct choose_memory *c, const uint64_t *places,
                                                            const uint16_t *codes, const uint16_t *groups, uint32_t found,
                                                            uint32_t guess)
{
    uint32_t *list = c->all.fine[0] + t.warp * WARP, token, before = (1u << t.lane) - 1;
    static_assert(sizeof(c->all.fine) >= THREADS * 4, "a number a thread");
    struct likely x = {0, 0, 0, 0};
#pragma unroll 1
    for (uint32_t i = 0; i < found && x.count <= WARP; i += 4) {
        uint32_t code = group_token(codes, groups, i, found, t.lane, &token), hits = __ballot_sync(ALL_LANES, code >= guess);
        uint32_t at = x.count + __popc(hits & before);
        if (code >= guess && at < WARP)
            list[at] = token << 16 | code;
        x.count += __popc(hits);
    }
    __syncwarp();
    if (t.lane < x.count && x.count <= WARP) {
        uint32_t both = list[t.lane];
        x.code = both & 0xffffu, x.token = both >> 16, x.address = row_of(call, places, x.token);
    }
    return x;
}

/* Where a warp's chosen tokens begin in the list: how many above and at the threshold come before them. */
struct rank {
    uint32_t greater, equal, first; /* first: the list's first of this block */
};

/* To the block's rows, behind its `ends`, or to the words where others find it. Lanes whose token is above the threshold or at
 * it are `above` and `at`. */
static __device__ __forceinline__ void row_write(const struct team_call &call, const struct team &t, const struct list_of &l,
                                                 struct team_shared *m, struct team_rows *r, const struct team_shared::plan &p,
                                                 const struct rank &k, uint32_t above, uint32_t at, uint32_t code,
                                                 uint32_t token, uint64_t address, uint32_t ends, uint32_t sinks)
{
    uint32_t before = (1u << t.lane) - 1, own = k.equal + __popc(at & before);
    uint32_t to = k.greater + __popc(above & before) + min(own, p.ties), n = to - k.first;
    if (!((above | (own < p.ties ? at : 0)) >> t.lane & 1))
        return;
    if (!t.plain && address & FETCHED)
        address = row_cached(call.a, l, token, address, m->outcomes);
    if (n < p.keep)
        r->address[ends + n] = address, r->token[ends + n] = token;
    else
        put_word(t, row_words(t) + p.spill_first + n - p.keep, (uint32_t)address, (uint32_t)(address >> 32), token);
    if (keeps(call, t))
        row_kept(call.a, t, sinks + to, token, address, code);
}

/* The tokens that this part has chosen, in their order. `groups`: this warp's `found` that have some. */
static __device__ __forceinline__ void rows_write(const struct team_call &call, const struct team &t, const struct list_of &l,
                                                  struct team_shared *m, struct choose_memory *c, struct team_rows *r,
                                                  const uint64_t *places, const struct likely &x, const uint16_t *codes,
                                                  const uint16_t *groups, uint32_t found, uint32_t begin, uint32_t ends,
                                                  uint32_t sinks)
{
    const struct team_shared::plan p = m->plan;
    uint32_t above = __ballot_sync(ALL_LANES, x.code > p.code), at = __ballot_sync(ALL_LANES, x.code == p.code && x.code);
    uint32_t greater = __popc(above), equal = __popc(at);
    bool few = x.count <= WARP;
    if (!few) {
        uint32_t both = 0;
#pragma unroll 1
        for (uint32_t i = t.lane; i < found; i += WARP)
            both += tally(*(const uint4 *)(codes + groups[i] * 8u), p.code);
        greater = __reduce_add_sync(ALL_LANES, both & 0xffffu), equal = __reduce_add_sync(ALL_LANES, both >> 16);
    }
    if (t.lane == 0)
        c->all.greater[t.warp] = greater, c->all.equal[t.warp] = equal;
    __syncthreads();
    struct rank k = {p.before_greater, p.before_equal, p.before_greater + min(p.before_equal, p.ties)};
    k.greater += __reduce_add_sync(ALL_LANES, t.lane < t.warp ? c->all.greater[t.lane % WARPS] : 0);
    k.equal += __reduce_add_sync(ALL_LANES, t.lane < t.warp ? c->all.equal[t.lane % WARPS] : 0);
    begin *= PKV_BLOCK_TOKENS;
    if (few) {
        row_write(call, t, l, m, r, p, k, above, at, x.code, begin + x.token, x.address, ends, sinks);
        return;
    }
    uint32_t last = k.greater + greater, token;
#pragma unroll 1
    for (uint32_t i = 0; i < found && (k.greater < last || k.equal < p.ties); i += 4) {
        uint32_t code = group_token(codes, groups, i, found, t.lane, &token);
        above = __ballot_sync(ALL_LANES, code > p.code), at = __ballot_sync(ALL_LANES, code == p.code);
        row_write(call, t, l, m, r, p, k, above, at, code, begin + token, row_of(call, places, token), ends, sinks);
        __syncwarp();
        k.greater += __popc(above), k.equal += __popc(at);
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
