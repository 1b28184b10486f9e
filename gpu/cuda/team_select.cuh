/* A team's first half: from the query to the rows that each block attends. */
#ifndef GPU_CUDA_TEAM_SELECT_CUH
#define GPU_CUDA_TEAM_SELECT_CUH

#include "gpu/cuda/team_choose.cuh"
#include "gpu/cuda/team_integer.cuh"
#include "gpu/cuda/team_weigh.cuh"

#if __CUDA_ARCH__ >= 900

/* Queries as columns of B, sixteen bytes a thread. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void queries_take(const struct cuda_attend &a, const struct team &t, struct team_shared *m)
{
    constexpr uint32_t PIECES = DIM * sizeof(T) / 16;
    uint32_t i = threadIdx.x - THREADS / 2, column = i / PIECES, h = min(t.group > 4 ? column : column % 4, t.group - 1);
    if (i < HEADS * PIECES)
        *(uint4 *)(m->queries + column * tile_shape<T, DIM>::QUERY + i % PIECES * 16) =
            ((const uint4 *)((const T *)a.q + (t.q_head + h) * DIM))[i % PIECES];
}

/* Addresses of what the block looks at first: half of the threads have an end each, others a block of the part. */
static __device__ __forceinline__ void places_find(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                   const struct span &span, const struct ends &e, bool cached)
{
    uint64_t *places = (uint64_t *)((unsigned char *)m + call.at.places);
    uint32_t begin, end, i = threadIdx.x;
    if (t.warp < WARPS / 2) {
        if (i < min(e.count, FIRST_ENDS)) {
            uint64_t row = end_row(call, t, e, i, cached);
            m->end_rows[i] = row;
            if ((i / TILE_ROWS & (t.size - 1)) == t.part &&
                !(row & FAR)) /* this block scores its key; its value is wanted later */
#pragma unroll 1
                for (uint32_t at = 0; at < call.rows_head / PKV_BLOCK_TOKENS; at += 128)
                    asm volatile("prefetch.global.L2 [%0];" ::"l"(row + at));
        }
        struct fitted f = fitted_of(e);
        if (i < PKV_ARRAY_LEN(m->fitted) && (f.first / 16 + i) * 16 < f.first + f.count)
            m->fitted[i] = signatures_of(call, t, t.blocks[f.first / 16 + i].signatures);
        return;
    }
    part_of(span, t.part, t.size, &begin, &end);
#pragma unroll 1
    for (i -= THREADS / 2; i < min(end - begin, FIRST_BLOCKS); i += THREADS / 2) {
        ulonglong2 entry = *(const ulonglong2 *)(t.blocks + begin + i);
        places[i] = rows_at(call, t, entry.x, cached), m->signatures[i] = signatures_of(call, t, entry.y);
    }
}

/* Up to the first barrier, everything for which a thread needs no other: the last warps weigh, the others find addresses. */
template <typename T, uint32_t DIM, bool SIGN>
static __device__ __forceinline__ void select_prepare(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                      const struct span &span, const struct list_of &l,
                                                      struct sign_query<DIM> &sign)
{
    struct weigh_shared<HEADS> *w = (struct weigh_shared<HEADS> *)((unsigned char *)m + call.at.front);
    if (SIGN && weighs_signs(call, t)) {
        sign_turn<DIM>(call, sign);
        sign_quantize<DIM>(call, t, w, sign);
    }
    places_find(call, t, m, span, ends_of(span), l.cached);
}

/* Turns [from, to) into their places in the ring, to <= depth + 1; a group each, also of what is beyond the warp's blocks. They
 * are less than 32 blocks: their addresses are known. */
template <uint32_t COPIES> static __device__ __forceinline__ void stream_turns(struct stream &s, uint32_t from, uint32_t to)
{
    auto none = [](uint32_t) -> uint64_t { return 0; };
    uint32_t turn = from;
#pragma unroll 1
    for (; turn < to && turn * 2 < s.count; turn++)
        stream_fill<COPIES>(s, turn * 2, s.memory + (turn == s.depth ? 0 : turn * 2 * s.size), threadIdx.x % WARP, none);
#pragma unroll 1
    for (; turn < to; turn++)
        asm volatile("cp.async.commit_group;" ::: "memory");
}

/* The scores of the warp's first turn are made while the biases are on their way. */
template <uint32_t SETS> struct first_turn {
    struct scores<SETS> of[4]; /* two blocks */
};

/* `asked` turns, a power of two, are on their way: until the first is there. */
static __device__ __forceinline__ void first_wait(uint32_t asked)
{
    if (asked == 8)
        asm volatile("cp.async.wait_group 7;" ::: "memory");
    else if (asked == 4)
        asm volatile("cp.async.wait_group 3;" ::: "memory");
    else if (asked == 2)
        asm volatile("cp.async.wait_group 1;" ::: "memory");
    else
        asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();
}

template <uint32_t SETS, uint32_t COPIES>
static __device__ __forceinline__ void first_scores(const struct stream &s, const struct planes<SETS, COPIES> &p,
                                                    uint32_t words, struct first_turn<SETS> &x)
{
#pragma unroll
    for (uint32_t n = 0; n < 2; n++) {
        struct halves h = halves_wide<COPIES>(s.memory + n * s.size, words);
        x.of[2 * n] = scores_of(h.of[0], p), x.of[2 * n + 1] = scores_of(h.of[1], p);
    }
    __syncwarp(); /* the turn's place is filled again */
}

template <uint32_t SETS, uint32_t COPIES>
static __device__ __forceinline__ void first_codes(const struct stream &s, const struct planes<SETS, COPIES> &p,
                                                   const struct span &span, const struct first_turn<SETS> &x, uint16_t *codes,
                                                   uint32_t *counts)
{
    uint32_t lane = threadIdx.x % WARP, at = threadIdx.x / WARP * PKV_BLOCK_TOKENS + lane;
#pragma unroll
    for (uint32_t n = 0; n < 4; n++, at += n % 2 ? 32 : BLOCK_STRIDE - 32)
        if (n / 2 < s.count)
            code_put(code_of(x.of[n], p, lane), s.begin * PKV_BLOCK_TOKENS + at, span.first, span.last, codes + at, counts, 0);
}

/* The stream of the part's signatures through `rings`: its first addresses are known. */
static __device__ __forceinline__ struct stream part_stream(const struct team_call &call, const struct team &t,
                                                            const struct team_shared *m, const struct span &span,
                                                            const void *rings)
{
    uint32_t ring = shared_address(rings) + t.warp * call.at.ring;
    struct stream s = stream_open(span, t.part, t.size, call.words, ring, call.at.ring);
    s.now = stream_block(s, 0) < s.end ? m->signatures[t.warp + t.lane * WARPS] : 0;
    return s;
}

/* From the queries' weights to the part's codes and their counts; the first ends' keys are on their way. Returns how many of
 * the ends that the block attends are there meanwhile. */
template <typename T, uint32_t DIM, uint32_t SETS, uint32_t COPIES, enum weighing WHOSE, typename F>
static __device__ __forceinline__ uint32_t codes_find(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                      const struct span &span, const struct ends &e, struct end_keys<DIM> &keys,
                                                      struct stream &s, uint16_t *codes, const F &addresses)
{
    struct weigh_shared<HEADS> *w = (struct weigh_shared<HEADS> *)((unsigned char *)m + call.at.front);
    struct fitted f = fitted_of(e);
    uint32_t word = min(t.warp / (SETS * 4), call.words - 1);
    uint4 bits[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; i++)
        bits[i] = fitted_load(f, t.lane + i * WARP, m->fitted[(f.first % 16 + t.lane + i * WARP) / 16], call.words, word);
    /* Turns that are asked for at once, of a full ring a part: the words of the biases would wait behind the rest. */
    constexpr uint32_t EARLY = COPIES == 4 ? 2 : 1;
    uint32_t asked = EARLY, there = 0;
    stream_turns<COPIES>(s, 0, EARLY);
    ends_share<T, DIM>(call, t, m, e, keys);
    others_weigh<T, DIM, WHOSE>(call, t, w);
    words_take<SETS, COPIES>(call, t, m, w, f, bits);
    struct shares_seen<SETS> seen;
    if (t.warp == 0)
        shares_look<SETS>(t, e, seen);
    __syncthreads();
    struct planes<SETS, COPIES> p;
    struct first_turn<SETS> first;
    /* The first warp joins the biases, and has its scores after the others. Those of wide signatures ask for one more turn. */
#pragma unroll 1
    for (bool joined = false;; joined = true) {
        if (joined == (t.warp == 0)) {
            if (s.count > 2 && (joined || COPIES == 2))
                stream_turns<COPIES>(s, EARLY, asked = joined ? s.depth : EARLY + 1);
            planes_digits(p, m->digits, t.group, call.words, t.lane);
            first_wait(asked);
            first_scores(s, p, call.words, first);
            there = ends_fetch<T, DIM>(call, t, m, e);
        }
        if (joined)
            break;
        if (t.warp == 0)
            biases_join<SETS>(call, t, m, w, e, seen);
        __syncthreads();
    }
    if (s.count > 2)
        stream_turns<COPIES>(s, asked, s.depth + 1);
    planes_biases(p, m->scale, m->bias, t.group, t.lane);
    first_codes(s, p, span, first, codes, m->counts);
    scan_softmax<SETS, COPIES, 1>(s, p, span, call.words, codes, m->counts, addresses);
    asm volatile("cp.async.wait_all;" ::: "memory"); /* ends_fetch() */
    __syncthreads();
    return there;
}

/* From the query to the rows that this block attends. */
template <typename T, uint32_t DIM, uint32_t SETS, enum weighing WHOSE>
static __device__ __forceinline__ uint32_t select_rows(const struct team_call &call, struct team &t, struct team_shared *m,
                                                       struct team_rows *r, const struct span &span, const struct list_of &l,
                                                       struct own_rows *own)
{
    uint16_t *codes = (uint16_t *)((unsigned char *)m + call.at.front);
    struct choose_memory *c = (struct choose_memory *)((unsigned char *)m + call.at.rings);
    uint64_t *places = (uint64_t *)((unsigned char *)m + call.at.places);
    struct ends e = ends_of(span);
    struct end_keys<DIM> keys;
    ends_begin<T, DIM>(call, t, m, e, own_tile(t) * TILE_ROWS, keys);
    struct stream s = part_stream(call, t, m, span, c);
    auto addresses = [&](uint32_t i) { return stream_address(call, t, s, places, l.cached, i); };
    s.next = s.count > WARP ? addresses(WARP) : 0;
    if (call.words <= 2)
        own->there = codes_find<T, DIM, SETS, 4, WHOSE>(call, t, m, span, e, keys, s, codes, addresses);
    else
        own->there = codes_find<T, DIM, SETS, 2, WHOSE>(call, t, m, span, e, keys, s, codes, addresses);
    return choose<false>(call, t, m, c, r, span, l, s, codes, 0, own);
}

/* The same by the rules `sum` and `max`. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ uint32_t select_integers(const struct team_call &call, struct team &t, struct team_shared *m,
                                                           struct team_rows *r, const struct span &span,
                                                           const struct list_of &l, struct own_rows *own)
{
    struct weigh_shared<HEADS> *w = (struct weigh_shared<HEADS> *)((unsigned char *)m + call.at.front);
    uint16_t *codes = (uint16_t *)w;
    struct choose_memory *c = (struct choose_memory *)((unsigned char *)m + call.at.rings);
    uint64_t *places = (uint64_t *)((unsigned char *)m + call.at.places);
    struct stream s = part_stream(call, t, m, span, c);
    auto addresses = [&](uint32_t i) { return stream_address(call, t, s, places, l.cached, i); };
    s.next = s.count > WARP ? addresses(WARP) : 0;
    auto none = [](uint32_t) -> uint64_t { return 0; };
    if (call.words <= 2)
        stream_begin<4>(s, none);
    else
        stream_begin<2>(s, none);
    others_weigh<T, DIM, WEIGH_ANY>(call, t, w);
    uint32_t low_bits = scan_integers(call, t, m, w, span, s, codes, addresses);
    return choose<true>(call, t, m, c, r, span, l, s, codes, low_bits, own);
}

#endif /* architecture */

#endif
