/* A team's first half: its shared memory, the stream of signatures into it, and the scan. */
#ifndef GPU_CUDA_TEAM_SCAN_CUH
#define GPU_CUDA_TEAM_SCAN_CUH

#include "gpu/cuda/choose.cuh"
#include "gpu/cuda/code.cuh"
#include "gpu/cuda/team.cuh"
#include "gpu/cuda/tile.cuh"
#include "gpu/cuda/weigh.cuh"

#define THREADS        512u
#define WARPS          (THREADS / WARP)
#define HEADS          TILE_COLUMNS /* of a group at most */
#define RING_MAX       8192u        /* bytes of signatures on their way to a warp, where there is room for them */
#define ROWS           1024u        /* of a list that a block attends */
#define SHARED_MAX     (227u * 1024u)
#define TEAM_SIG_WORDS 4u /* of a signature at most */

/* What lives through the whole kernel; behind it the addresses of its part's blocks, then `front`: weights, then codes, then
 * the warps' tiles; then the rings, where choosing happens later, and team_rows. */
struct team_shared {
    uint32_t counts[2048 + 8];
    uint64_t gates[WARPS][2];
    uint32_t warp_sums[WARPS];
    uint32_t digits[HEADS * TEAM_SIG_WORDS][DIGIT_PLANES];
    float scale[HEADS], bias[HEADS];
    struct share {
        float max, sum, shift;
    } shares[WARPS][HEADS]; /* of the ends, of each warp */
    int estimates[HEADS][TEAM_SIG_WORDS];
    float ends[2][HEADS][WARPS]; /* maxima and sums of the warps' results */
    uint32_t outcomes[CUDA_COUNTERS];
    struct plan { /* found: the rest is there */
        uint32_t found, code, ties, before_greater, before_equal, keep, take, spill_first, take_first;
    } plan;
    __align__(16) unsigned char queries[HEADS * (PKV_HEAD_DIM_MAX * 2 + 16)];
};

/* Rows that a block attends; keep: where in the row cache one that was FETCHED goes, or 0. */
struct team_rows {
    uint64_t address[ROWS], keep[ROWS];
    uint32_t token[ROWS];
};

/* Offsets in shared memory, bytes of a warp's ring, all bytes. */
struct layout {
    uint32_t places, front, rings, ring, rows, bytes;
};

/* What the kernel is given; what can be worked out before is. */
struct team_call {
    struct cuda_attend a;
    struct layout at;
    uint32_t group, words, rows_slot, signatures_slot; /* words: of a signature; bytes of a block's rows and signatures */
    uint64_t each;                                     /* words of a list, of 16 bytes */
    float unit;                                        /* of the weights of `sign` */
};

/* While a block chooses, in the rings' memory: behind it each warp's groups of eight tokens that have a chosen one [blocks x
 * 8]. */
struct choose_memory {
    struct choose_shared all;
};

static struct layout layout_of(const struct cuda_attend *a)
{
    uint32_t blocks = PKV_DIV_UP(pkv_tokens_blocks(a->tokens_max), a->team), codes = blocks * PKV_BLOCK_TOKENS * 2;
    uint32_t weigh = (uint32_t)sizeof(struct weigh_shared<HEADS>),
             choose = (uint32_t)sizeof(struct choose_memory) + blocks * 16;
    uint32_t tile = 16 * (2 * a->geom.head_dim * 2 + 16), warps = a->geom.head_dim > 128 ? WARPS / 2 : WARPS;
    struct layout l;
    l.places = (uint32_t)PKV_ALIGN_UP(sizeof(struct team_shared), 16u);
    l.front = PKV_ALIGN_UP(l.places + blocks * 8, 128u);
    l.rings = l.front + PKV_ALIGN_UP(PKV_MAX(codes, weigh), 128u);
    l.ring = l.rings + WARPS * RING_MAX <= SHARED_MAX ? RING_MAX : RING_MAX / 2;
    l.rows = PKV_ALIGN_UP(PKV_MAX(l.front + warps * tile, l.rings + choose), 128u);
    l.bytes = PKV_MAX(l.rings + WARPS * l.ring, l.rows + (uint32_t)sizeof(struct team_rows));
    return l;
}

#if __CUDA_ARCH__ >= 900

static __device__ __forceinline__ uint64_t address_of(const struct cuda_attend &a, uint64_t place, uint32_t slot_bytes)
{
    const uint64_t *base = pkv_place_tier(place) == PKV_TIER_POOL ? a.base[PKV_TIER_POOL] : a.base[PKV_TIER_ARENA];
    return __ldg(base + pkv_place_chunk(place)) + (uint64_t)pkv_place_slot(place) * slot_bytes;
}

/* ---- signatures on their way: a warp takes every sixteenth block of its part, through the two halves of a ring ---- */

struct stream {
    uint64_t *places;             /* of the part's blocks' rows, in shared memory */
    uint64_t now, next;           /* addresses of 32 blocks each, one a lane */
    uint32_t offset, size;        /* of the head in a block of signatures; bytes of it */
    uint32_t begin, end, count;   /* blocks of the part; how many of them are this warp's */
    uint32_t memory, gates, pace; /* the ring, an mbarrier a half, blocks in a half */
    bool cached;
};

/* Table entry of the block that this lane has of 32 from the i-th of the warp on; nothing behind the end. */
static __device__ __forceinline__ ulonglong2 stream_entry(const struct team &t, const struct stream &s, uint32_t i)
{
    uint32_t b = s.begin + t.warp + (i + t.lane) * WARPS;
    return b < s.end ? *(const ulonglong2 *)(t.blocks + b) : make_ulonglong2(0, 0);
}

/* Where the rows of this block begin, of this head (FETCHED: to be looked up in the row cache), is noted; where its signatures
 * lie comes back. */
static __device__ __forceinline__ uint64_t stream_address(const struct team_call &call, const struct team &t,
                                                          const struct stream &s, const ulonglong2 &entry, uint32_t i)
{
    if (!entry.y)
        return 0;
    uint64_t rows = address_of(call.a, entry.x, call.rows_slot) + pkv_geom_row_offset(&call.a.geom, t.head, 0);
    uint64_t signatures = address_of(call.a, entry.y, call.signatures_slot) + s.offset;
    s.places[t.warp + (i + t.lane) * WARPS] = rows | (s.cached && pkv_place_tier(entry.x) == PKV_TIER_ARENA ? 1 : 0);
    return signatures;
}

/* Half number `turn` of all that this warp will take. */
static __device__ __forceinline__ void stream_fill(const struct team_call &call, const struct team &t, struct stream &s,
                                                   uint32_t turn)
{
    uint32_t first = turn * s.pace, mine = t.lane - first % WARP, gate = s.gates + turn % 2 * 8;
    if (first >= s.count)
        return;
    uint32_t blocks = min(s.pace, s.count - first);
    if (t.lane == 0)
        bulk_expect(gate, blocks * s.size);
    __syncwarp();
    if (mine < blocks)
        bulk_copy(s.memory + (turn % 2 * s.pace + mine) * s.size, s.now, s.size, gate);
    if ((first + s.pace) % WARP == 0) {
        uint32_t i = first + s.pace + WARP;
        s.now = s.next, s.next = stream_address(call, t, s, stream_entry(t, s, i), i);
    }
}

/* Nothing is on its way yet, and no address known. */
static __device__ __forceinline__ struct stream stream_open(const struct team_call &call, const struct team &t,
                                                            const struct span &span, struct team_shared *m, bool cached)
{
    struct stream s;
    s.places = (uint64_t *)((unsigned char *)m + call.at.places), s.cached = cached;
    s.size = PKV_BLOCK_TOKENS * 4 * call.words, s.offset = t.head * s.size;
    part_of(span, t.part, t.size, &s.begin, &s.end);
    s.count = s.begin + t.warp < s.end ? (s.end - s.begin - t.warp + WARPS - 1) / WARPS : 0;
    s.memory = (uint32_t)__cvta_generic_to_shared(m) + call.at.rings + t.warp * call.at.ring;
    s.gates = (uint32_t)__cvta_generic_to_shared(m->gates[t.warp]);
    s.pace = call.at.ring / 2 / (s.size > 512 ? 1024 : s.size);
    s.now = s.next = 0;
    return s;
}

/* ---- scan ---- */

static __device__ __forceinline__ uint4 load_shared(uint32_t at)
{
    uint4 v;
    asm("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

/* BLOCKS blocks of 64 tokens, of which all are candidates. at: where this lane's part of the signatures lies, two loads a
 * block; all of a kind together, so that one waits while another works. */
#define BLOCK_STRIDE (WARPS * PKV_BLOCK_TOKENS) /* tokens between a warp's blocks */
template <uint32_t SETS, uint32_t STEPS, uint32_t BLOCKS>
static __device__ __forceinline__ void scan_whole(uint32_t at, uint32_t apart, uint32_t size,
                                                  const struct planes<SETS, STEPS> &p, uint32_t lane, uint16_t *codes,
                                                  uint32_t *counts)
{
    uint32_t code[BLOCKS][2];
    uint4 x[BLOCKS][2][1];
#pragma unroll
    for (uint32_t b = 0; b < BLOCKS; b++)
        x[b][0][0] = load_shared(at + b * size), x[b][1][0] = load_shared(at + b * size + apart);
#pragma unroll
    for (uint32_t b = 0; b < BLOCKS; b++)
        code[b][0] = code_of(x[b][0], p, lane), code[b][1] = code_of(x[b][1], p, lane);
#pragma unroll
    for (uint32_t b = 0; b < BLOCKS; b++) {
        codes[b * BLOCK_STRIDE] = (uint16_t)code[b][0], codes[b * BLOCK_STRIDE + 32] = (uint16_t)code[b][1];
        atomicAdd(counts + code[b][0], 1u), atomicAdd(counts + code[b][1], 1u);
    }
}

/* A block at an end of the span, or one alone; `token`: this lane's first. */
template <uint32_t SETS, uint32_t STEPS>
static __device__ __forceinline__ void scan_edge(uint32_t at, uint32_t apart, const struct planes<SETS, STEPS> &p,
                                                 const struct span &span, uint32_t token, uint32_t lane, uint16_t *codes,
                                                 uint32_t *counts)
{
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        const uint4 x[1] = {load_shared(at + half * apart)};
        uint32_t code = code_of(x, p, lane), mine = token + half * 32;
        code = mine >= span.first && mine < span.last ? code : 0;
        codes[half * 32] = (uint16_t)code;
        if (code)
            atomicAdd(counts + code, 1u);
    }
}

template <uint32_t SETS, uint32_t STEPS>
static __device__ __forceinline__ void scan_steps(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                  const struct span &span, struct stream &s, uint16_t *codes)
{
    uint32_t words = call.words, token = (s.begin + t.warp) * PKV_BLOCK_TOKENS + t.lane;
    uint32_t at0 = s.memory + (t.lane / 4 * words + fragment_word(STEPS, words, 0, t.lane)) * 16, apart = 8 * words * 16;
    struct planes<SETS, STEPS> p;
    planes_take(p, m->digits, m->scale, m->bias, t.group, words, t.lane);
    /* Blocks [whole_from, whole_to) of this warp have no token that is not a candidate. */
    uint32_t first = s.begin + t.warp, before = span.first / PKV_BLOCK_TOKENS + (span.first % PKV_BLOCK_TOKENS != 0);
    uint32_t whole = span.last / PKV_BLOCK_TOKENS, whole_from = before > first ? (before - first + WARPS - 1) / WARPS : 0;
    uint32_t whole_to = min(s.count, whole > first ? (whole - first + WARPS - 1) / WARPS : 0);
    codes += t.warp * PKV_BLOCK_TOKENS + t.lane;
    for (uint32_t turn = 0; turn * s.pace < s.count; turn++) {
        uint32_t i = turn * s.pace, end = min(i + s.pace, s.count), at = at0 + turn % 2 * s.pace * s.size;
        bulk_wait(s.gates + turn % 2 * 8, turn / 2 % 2);
        for (; i < end; i += 2, at += 2 * s.size) {
            uint16_t *to = codes + i * BLOCK_STRIDE;
            if (i >= whole_from && i + 1 < whole_to && i + 1 < end) {
                scan_whole<SETS, STEPS, 2>(at, apart, s.size, p, t.lane, to, m->counts);
                continue;
            }
#pragma unroll 1
            for (uint32_t n = 0; n < 2 && i + n < end; n++)
                scan_edge(at + n * s.size, apart, p, span, token + (i + n) * BLOCK_STRIDE, t.lane, to + n * BLOCK_STRIDE,
                          m->counts);
        }
        __syncwarp();
        stream_fill(call, t, s, turn + 2);
    }
    __syncthreads();
}

template <uint32_t SETS>
static __device__ __forceinline__ void scan_part(const struct team_call &call, const struct team &t, struct team_shared *m,
                                                 const struct span &span, struct stream &s, uint16_t *codes)
{
    if (call.words <= 2)
        scan_steps<SETS, 2>(call, t, m, span, s, codes);
    else
        scan_steps<SETS, 4>(call, t, m, span, s, codes);
}

#endif /* architecture */

#endif
