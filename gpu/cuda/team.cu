/* A whole call in one launch: a team of thread blocks takes a list from the query to the result.
 *
 *   weigh   every block for itself, the signatures of its part already on their way into shared memory
 *   bias    every block for itself: exact scores and estimates of the ends, the sinks and recent tokens
 *   scan    codes and their counts stay in shared memory
 *   choose  counts around the threshold of the step before go to all blocks, by words; a second round where it has moved too
 * far attend  each block takes what it has chosen; more than its share goes to others, by words. With a row cache, a gate
 * between looking up and claiming merge   results by words; each block adds up its share of the outputs
 *
 * What does not fit (team_size) runs as the stages of table.c. */
#include "gpu/cuda/team_choose.cuh"
#include "gpu/cuda/team_integer.cuh"
#include "gpu/cuda/team_weigh.cuh"

/* PLAIN: by softmax, no row cache, nothing kept, k given. Code for the rest in between would cost such a
 * call more than a microsecond: it runs every instruction once, and each jump over some that are not run waits for others. */
enum team_kind { TEAM_PLAIN, TEAM_ANY, TEAM_INTEGER };

#if __CUDA_ARCH__ >= 900

/* ---- attend ---- */

/* Ways for the rows that the block will fetch. All finds of the team come before its claims. */
static __device__ __noinline__ void rows_claim(const struct cuda_attend &a, struct team t, const struct list_of l,
                                               struct team_rows *r, uint32_t count, const uint32_t *outcomes)
{
    if (threadIdx.x < CUDA_COUNTERS && outcomes[threadIdx.x] && a.cache.counters)
        atomicAdd((unsigned long long *)a.cache.counters + threadIdx.x, (unsigned long long)outcomes[threadIdx.x]);
    team_gate(t);
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        uint64_t address = r->address[i];
        r->keep[i] = address & FETCHED ? cache_claim(a, l, r->token[i]) : 0, r->address[i] = address & ~FETCHED;
    }
}

/* Addresses of a part of all rows. */
static __device__ __forceinline__ void dense_rows(const struct cuda_attend &a, const struct team &t, struct team_rows *r,
                                                  uint32_t at, uint32_t rows)
{
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < rows; i += THREADS) {
        uint64_t place = t.blocks[(at + i) / PKV_BLOCK_TOKENS].rows;
        r->address[i] = (uint64_t)place_address(a.base, place, pkv_geom_block_bytes(&a.geom)) +
                        pkv_geom_row_offset(&a.geom, t.head, (at + i) % PKV_BLOCK_TOKENS);
    }
}

/* Rows of r, or all tokens from `begin` on; the first warp begins with the ends that are in their tile. Returns how many warps
 * have a result. */
template <typename T, uint32_t DIM, uint32_t SETS>
static __device__ __forceinline__ uint32_t rows_attend(const struct cuda_attend &a, const struct team &t, struct team_shared *m,
                                                       struct team_rows *r, unsigned char *tiles, unsigned char *ends,
                                                       const struct own_rows &own, uint32_t begin, bool dense, bool cached)
{
    uint32_t there = own.there, count = own.count;
    constexpr uint32_t USED = DIM > 128 ? WARPS / 2 : WARPS, BYTES = tile_shape<T, DIM>::BYTES, ROW = tile_shape<T, DIM>::ROW;
    unsigned char *tile = tiles + t.warp * BYTES;
    uint32_t busy = there ? 1 : 0, turn = t.warp >= busy ? t.warp - busy : USED - 1;
    struct tile_state<DIM> s;
    tile_reset(s);
#pragma unroll 1
    for (uint32_t at = 0; at < count || there; at += ROWS) {
        uint32_t rows = at < count ? min(ROWS, count - at) : 0;
        if (dense) {
            dense_rows(a, t, r, begin + at, rows);
            __syncthreads();
        }
#pragma unroll 1
        for (uint32_t first = turn * TILE_ROWS; t.warp < USED; first += USED * TILE_ROWS) {
            bool ready = there && !t.warp;
            if (!ready) {
                if (first >= rows)
                    break;
                load_tile<ROW, tile_shape<T, DIM>::PITCH>(tile, r->address, cached ? r->keep : NULL, first, rows, t.lane);
            }
            tile_attend<T, DIM, (SETS > 1)>((uint32_t)__cvta_generic_to_shared(ready ? ends : tile),
                                            (uint32_t)__cvta_generic_to_shared(m->queries),
                                            ready ? there : min(TILE_ROWS, rows - first), a.policy.scale * LOG2E, t.lane, s);
            if (ready)
                first -= USED * TILE_ROWS, there = 0;
        }
        there = 0;
        if (at + ROWS < count)
            __syncthreads(); /* the addresses are written again */
    }
    uint32_t used = min(PKV_DIV_UP(count, TILE_ROWS) + busy, USED);
    if (t.warp < used)
        tile_result<DIM, (SETS > 1)>(s, (float *)tile, &m->ends[0][0][t.warp], &m->ends[1][0][t.warp], WARPS, t.lane);
    __syncthreads();
    return used;
}

/* ---- merge ---- */

/* Warps into the block's result, as words [group][DIM]: output, maximum, sum. A warp takes 32 outputs of a head, a lane first
 * the weight of another warp's result. */
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void merge_warps(const struct team &t, const struct team_shared *m,
                                                   const unsigned char *tiles, uint32_t used, struct word *words)
{
    constexpr uint32_t STRIDE = tile_shape<T, DIM>::BYTES / 4;
    const float *results = (const float *)tiles;
    words += t.part * t.group * DIM;
#pragma unroll 1
    for (uint32_t i = t.warp * WARP; i < t.group * DIM; i += THREADS) {
        uint32_t h = i / DIM, at = h * RESULT_PITCH(DIM) + i % DIM + t.lane;
        bool there = t.lane < used;
        float max = there ? m->ends[0][h][t.lane % WARPS] : NOTHING, sum = there ? m->ends[1][h][t.lane % WARPS] : 0.0f;
        float most = max, out = 0;
#pragma unroll
        for (uint32_t s = 8; s; s /= 2)
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
        float keep = exp2_fast(max - most);
        sum *= keep;
#pragma unroll
        for (uint32_t s = 8; s; s /= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, s);
#pragma unroll 4
        for (uint32_t w = 0; w < used; w++)
            out = fmaf(results[w * STRIDE + at], __shfl_sync(ALL_LANES, keep, w), out);
        most = __shfl_sync(ALL_LANES, most, 0), sum = __shfl_sync(ALL_LANES, sum, 0);
        put_word(t, words + i + t.lane, __float_as_uint(out), __float_as_uint(most), __float_as_uint(sum));
    }
}

/* A block adds up its share of the outputs: up to four lanes have one output, each of up to four blocks. */
#define MERGE_LANES 4u
template <uint32_t DIM>
static __device__ __forceinline__ void merge_blocks(const struct cuda_attend &a, const struct team &t, const struct word *words)
{
    constexpr uint32_t EACH = TEAM_MAX / MERGE_LANES;
    uint32_t share = t.group * DIM >> t.shift, lanes = min(t.size, MERGE_LANES), shift = min(t.shift, 2u),
             from = t.lane % lanes;
#pragma unroll 1
    for (uint32_t x = threadIdx.x; x - t.lane < share << shift; x += THREADS) {
        bool there = x >> shift < share;
        uint32_t i = t.part * share + (there ? x >> shift : 0), blocks = t.size / lanes;
        struct word w[EACH];
        look_at_words<EACH>(t, words + from * t.group * DIM + i, lanes * t.group * DIM, blocks, w);
        take_words<EACH>(t, words + from * t.group * DIM + i, lanes * t.group * DIM, blocks, w);
        float most = NOTHING, out = 0, sum = 0;
#pragma unroll
        for (uint32_t j = 0; j < EACH; j++)
            most = j < blocks ? fmaxf(most, __uint_as_float(w[j].y)) : most;
        for (uint32_t s = 1; s < lanes; s *= 2)
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, s));
#pragma unroll
        for (uint32_t j = 0; j < EACH; j++) {
            float keep = j < blocks ? exp2_fast(__uint_as_float(w[j].y) - most) : 0.0f;
            out = fmaf(__uint_as_float(w[j].x), keep, out), sum = fmaf(__uint_as_float(w[j].z), keep, sum);
        }
        for (uint32_t s = 1; s < lanes; s *= 2) {
            out += __shfl_xor_sync(ALL_LANES, out, s);
            sum += __shfl_xor_sync(ALL_LANES, sum, s);
        }
        if (there && from == 0) {
            a.out[t.q_head * DIM + i] = __fdividef(out, sum);
            if (i % DIM == 0 && a.lse)
                a.lse[t.q_head + i / DIM] = (most + __log2f(sum)) * 0.69314718f;
        }
    }
}

/* ---- the kernel ---- */

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
template <typename T, uint32_t DIM>
static __device__ __forceinline__ void select_prepare(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                      const struct span &span, const struct list_of &l,
                                                      struct sign_query<DIM> &sign)
{
    struct weigh_shared<HEADS> *w = (struct weigh_shared<HEADS> *)((unsigned char *)m + call.at.front);
    if (weighs_signs(call, t)) {
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
template <typename T, uint32_t DIM, uint32_t SETS, uint32_t COPIES, typename F>
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
    others_weigh<T, DIM>(call, t, w);
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
template <typename T, uint32_t DIM, uint32_t SETS>
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
        own->there = codes_find<T, DIM, SETS, 4>(call, t, m, span, e, keys, s, codes, addresses);
    else
        own->there = codes_find<T, DIM, SETS, 2>(call, t, m, span, e, keys, s, codes, addresses);
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
    others_weigh<T, DIM>(call, t, w);
    uint32_t low_bits = scan_integers(call, t, m, w, span, s, codes, addresses);
    return choose<true>(call, t, m, c, r, span, l, s, codes, low_bits, own);
}

template <typename T, uint32_t DIM, uint32_t SETS, enum team_kind KIND>
__global__ void __launch_bounds__(THREADS, 1) team_kernel(const __grid_constant__ struct team_call call)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const struct cuda_attend &a = call.a;
    struct team_shared *m = (struct team_shared *)shared;
    unsigned char *front = shared + call.at.front;
    struct team_rows *r = (struct team_rows *)(shared + call.at.rows);
    struct team t = team_of_block(call, KIND == TEAM_PLAIN);
    struct sign_query<DIM> sign;
    if (weighs_signs(call, t))
        sign_load<DIM>(call, t, sign);
    ((uint4 *)m->counts)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x < 8)
        m->counts[2048 + threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        m->outcomes[CUDA_HITS] = m->outcomes[CUDA_MISSES] = m->plan.found = 0;
        ((struct weigh_shared<HEADS> *)front)->write = t.part == 0 && keeps(call, t);
    }
    struct cuda_query where = a.query[t.query];
    wait_for_former();
    struct cuda_seq seq = a.seqs[where.seq];
    team_join(t);
    if (weighs_signs(call, t))
        sign_query_load<T, DIM>(a, t, sign);
    queries_take<T, DIM>(a, t, m);
    struct span span = span_in(a, seq.tokens, where.back);
    struct list_of l = {seq.blocks, where.seq, t.head, span.visible,
                        !t.plain && a.cache.entries && a.cache.sets && where.back == 0};
    t.blocks = seq.blocks;
    if (!span.dense)
        select_prepare<T, DIM>(call, t, m, span, l, sign);
    __syncthreads();
    uint32_t k = 0, begin = 0;
    struct own_rows own = {0, 0};
    if (span.dense) {
        uint32_t per = (span.visible + t.size - 1) >> t.shift;
        begin = min(t.part * per, span.visible), own.count = min(per, span.visible - begin);
    } else {
        if constexpr (KIND == TEAM_INTEGER)
            k = select_integers<T, DIM>(call, t, m, r, span, l, &own);
        else
            k = select_rows<T, DIM, SETS>(call, t, m, r, span, l, &own);
        if (l.cached) {
            rows_claim(a, t, l, r, own.count, m->outcomes);
            __syncthreads();
        }
    }
    uint32_t used =
        rows_attend<T, DIM, SETS>(a, t, m, r, front, shared + call.at.ends, own, begin, span.dense, l.cached && !span.dense);
    struct word *words = result_words(t, a.policy.k);
    merge_warps<T, DIM>(t, m, front, used, words);
    merge_blocks<DIM>(a, t, words);
    if (t.part == 0 && threadIdx.x == 0)
        a.work.chosen[t.list] = span.dense ? 0 : span.first + k + span.visible - span.last;
    team_leave(t);
}

#else
template <typename T, uint32_t DIM, uint32_t SETS, enum team_kind KIND>
__global__ void team_kernel(const __grid_constant__ struct team_call call)
{
    /* never launched: no words of 128 bits (cuda_team_preload) */
}
#endif

static uint32_t team_of(const struct cuda_attend *a, uint32_t processors, uint32_t shared)
{
    struct cuda_attend x = *a;
    uint32_t lists = PKV_MAX(a->queries * a->geom.kv_heads, 1u), size = 1;
    while (size < TEAM_MAX && 2 * size * lists <= processors)
        size *= 2;
    x.team = size;
    uint32_t rows = PKV_DIV_UP(a->policy.sinks + a->policy.recent, size) + PKV_DIV_UP(a->policy.k, size);
    bool fits = size > 1 && layout_of(&x).bytes <= shared && rows <= ROWS;
    return fits ? size : 0;
}

extern "C" uint32_t cuda_team_size(const struct cuda_attend *a, uint32_t processors, uint32_t shared)
{
    const struct pkv_geom &g = a->geom;
    bool able = g.dtype != PKV_F32 && (g.head_dim == 64 || g.head_dim == 128 || g.head_dim == 256) &&
                pkv_geom_group(&g) <= HEADS && g.sig_bits && g.sig_bits <= 128;
    return able ? team_of(a, processors, PKV_MIN(shared, SHARED_MAX)) : 0;
}

template <typename T, uint32_t DIM, enum team_kind KIND> static void (*kernel_of_group(uint32_t group))(const struct team_call)
{
    return group <= 4 ? team_kernel<T, DIM, 1, KIND> : team_kernel<T, DIM, 2, KIND>;
}

template <typename T, uint32_t DIM> static void (*kernel_of_kind(uint32_t group, enum team_kind kind))(const struct team_call)
{
    return kind == TEAM_PLAIN ? kernel_of_group<T, DIM, TEAM_PLAIN>(group)
           : kind == TEAM_ANY ? kernel_of_group<T, DIM, TEAM_ANY>(group)
                              : kernel_of_group<T, DIM, TEAM_INTEGER>(group);
}

template <typename T> static void (*kernel_of_dim(uint32_t dim, uint32_t group, enum team_kind kind))(const struct team_call)
{
    return dim == 64    ? kernel_of_kind<T, 64>(group, kind)
           : dim == 128 ? kernel_of_kind<T, 128>(group, kind)
                        : kernel_of_kind<T, 256>(group, kind);
}

static void (*kernel_of(uint32_t dtype, uint32_t dim, uint32_t group, enum team_kind kind))(const struct team_call)
{
    return dtype == PKV_F16 ? kernel_of_dim<__half>(dim, group, kind) : kernel_of_dim<__nv_bfloat16>(dim, group, kind);
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
    for (uint32_t i = 0; i < 36; i++)
        if (cudaFuncSetAttribute(
                kernel_of(i & 1 ? PKV_F16 : PKV_BF16, 64 << i / 12, i & 2 ? 8 : 4, (enum team_kind)(i / 4 % 3)),
                cudaFuncAttributeMaxDynamicSharedMemorySize, most) != cudaSuccess)
            return -(int)PKV_ERR_UNSUPPORTED;
    return 0;
}

/* The unit of `sign`, as in weigh.cuh; here by the CPU's IEEE operations. */
static float sign_unit(const struct cuda_attend *a)
{
    const struct pkv_geom *g = &a->geom;
    float partial = g->sig_bits < g->head_dim ? (float)g->head_dim / (float)g->sig_bits : 1.0f;
    return a->scheme.bases ? 2.0f * a->policy.scale * LOG2E * sqrtf(partial) / (float)a->scheme.bases : 0.0f;
}

/* Rows beside the ends that a block attends at most: what its warps take in a turn, if that leaves room for unevenness. */
static uint32_t rows_most(const struct cuda_attend *a)
{
    uint32_t ends = PKV_DIV_UP(a->policy.sinks + a->policy.recent, a->team), mean = PKV_DIV_UP(a->policy.k, a->team);
    uint32_t turn = (a->geom.head_dim > 128 ? WARPS / 2 : WARPS) * TILE_ROWS;
    return PKV_MIN(PKV_ALIGN_UP(mean + mean / 4 + ends, turn), ROWS) - ends;
}

static enum team_kind kind_of(const struct cuda_attend *a)
{
    bool plain = !(a->flags & CUDA_KEEP) && !a->cache.entries && a->policy.top_p <= 0;
    return a->policy.rule != PKV_RULE_SOFTMAX ? TEAM_INTEGER : plain ? TEAM_PLAIN : TEAM_ANY;
}

extern "C" int cuda_team_launch(const struct cuda_attend *a, void *stream)
{
    const struct pkv_geom *g = &a->geom;
    uint32_t group = pkv_geom_group(g);
    uint64_t heads = (uint64_t)a->layer * g->kv_heads, lists = (uint64_t)a->queries * g->kv_heads;
    struct team_call call = {.list_words = (struct word *)a->work.words,
                             .gates = a->work.gates,
                             .hints = a->work.hints + a->layer * lists,
                             .signs = a->scheme.signs,
                             .deviation = a->scheme.deviation ? a->scheme.deviation + heads * g->sig_bits : NULL,
                             .at = layout_of(a),
                             .group = group,
                             .words = pkv_geom_words(g),
                             .rows_slot = (uint32_t)pkv_geom_block_bytes(g),
                             .signatures_slot = (uint32_t)pkv_geom_sig_block_bytes(g),
                             .rows_head = (uint32_t)(PKV_BLOCK_TOKENS * pkv_geom_row_bytes(g)),
                             .most = rows_most(a),
                             .each = (uint32_t)cuda_words(a),
                             .unit = sign_unit(a),
                             .bases = !a->weighed && a->scheme.kind == PKV_SCHEME_SIGN ? a->scheme.bases : 0,
                             .a = *a};
    return launch(kernel_of(g->dtype, g->head_dim, group, kind_of(a)), dim3(a->team, g->kv_heads, a->queries), THREADS,
                  call.at.bytes, call, stream, true, true);
}
