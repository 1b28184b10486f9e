/* A block's rows: which tokens of its part reach a code, and the addresses of those that are chosen. */
#ifndef GPU_CUDA_TEAM_ROWS_CUH
#define GPU_CUDA_TEAM_ROWS_CUH

#include "gpu/cuda/choose.cuh"
#include "gpu/cuda/rows.cuh"
#include "gpu/cuda/team_bias.cuh"

#if __CUDA_ARCH__ >= 900

static __device__ __forceinline__ uint16_t *choose_groups(struct choose_memory *c)
{
    return (uint16_t *)(c + 1);
}

/* ---- rows ---- */

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

#endif /* architecture */

#endif
