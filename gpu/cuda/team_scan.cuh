/* A team's first half: its shared memory, the stream of signatures into it, and the scan. */
#ifndef GPU_CUDA_TEAM_SCAN_CUH
#define GPU_CUDA_TEAM_SCAN_CUH

#include "gpu/cuda/code.cuh"
#include "gpu/cuda/team.cuh"
#include "gpu/cuda/tile.cuh"
#include "gpu/cuda/weigh.cuh"

#define THREADS    512u
#define WARPS      (THREADS / WARP)
#define HEADS      TILE_COLUMNS /* of a group at most */
#define RING_MAX   8192u        /* bytes of signatures on their way to a warp, where there is room for them */
#define ROWS       1024u        /* of a list that a block attends */
#define SHARED_MAX (227u * 1024u)
#define END_TILES  8u /* tiles of sinks and recent tokens that a block looks at together */

/* What lives through the whole kernel; behind it `front`: weights and keys of sinks and recent tokens, then codes; then the
 * rings. */
struct team_shared {
    uint32_t counts[2048 + 8];
    uint64_t gates[WARPS][2];
    uint32_t warp_sums[WARPS];
    float exact[END_TILES][TILE_ROWS][HEADS];
    __align__(16) uint32_t signature[END_TILES][TILE_ROWS][4];
    uint64_t ends[END_TILES][TILE_ROWS];
    struct share {
        float max, sum, shift;
    } shares[WARPS][2][2], gathered[16][HEADS];
    float bias[HEADS];
    __align__(16) unsigned char queries[HEADS * (PKV_HEAD_DIM_MAX * 2 + 16)];
};

/* Behind front and rings, once the codes are not needed: addresses, then tiles. */
struct team_rows {
    uint64_t address[ROWS], keep[ROWS];
    uint32_t token[ROWS];
};

struct layout {
    uint32_t front, rings, ring, bytes; /* offsets in shared memory, bytes of a warp's ring, all bytes */
};

/* What the kernel is given; what can be worked out before is. */
struct team_call {
    struct cuda_attend a;
    struct layout at;
    uint32_t group;
    uint64_t words; /* of a list */
};

static struct layout layout_of(const struct cuda_attend *a)
{
    uint32_t blocks = PKV_DIV_UP(pkv_tokens_blocks(a->tokens_max), a->team), codes = blocks * PKV_BLOCK_TOKENS * 2;
    uint32_t keys = END_TILES * 16 * (a->geom.head_dim * 2 + 16), weigh = (uint32_t)sizeof(struct weigh_shared<HEADS>);
    uint32_t tile = 16 * (2 * a->geom.head_dim * 2 + 16), warps = a->geom.head_dim > 128 ? WARPS / 2 : WARPS;
    struct layout l;
    l.front = (uint32_t)PKV_ALIGN_UP(sizeof(struct team_shared), 128u);
    l.rings = l.front + (uint32_t)PKV_ALIGN_UP(PKV_MAX(codes, weigh + keys), 128u);
    l.ring = l.rings + WARPS * RING_MAX <= SHARED_MAX ? RING_MAX : RING_MAX / 2;
    uint32_t scan = l.rings + WARPS * l.ring, rows = l.front + (uint32_t)sizeof(struct team_rows) + warps * tile;
    l.bytes = PKV_MAX(scan, rows);
    return l;
}

#if __CUDA_ARCH__ >= 900

/* ---- signatures on their way: a warp takes every sixteenth block of its part, through the two halves of a ring ---- */

struct stream {
    const struct pkv_block_ref *blocks;
    uint64_t offset, slot;              /* of the head in a block of signatures; bytes of a block */
    uint64_t now, next;                 /* addresses of 32 blocks each, one a lane */
    uint32_t begin, end, count;         /* blocks of the part; how many of them are this warp's */
    uint32_t memory, gates, pace, size; /* the ring, an mbarrier a half, blocks in a half, bytes of a block */
};

static __device__ __forceinline__ uint64_t stream_place(const struct team &t, const struct stream &s, uint32_t i)
{
    uint32_t b = s.begin + t.warp + (i + t.lane) * WARPS;
    return b < s.end ? s.blocks[b].signatures : 0;
}

static __device__ __forceinline__ uint64_t stream_address(const struct cuda_attend &a, const struct stream &s, uint64_t place)
{
    return place ? (uint64_t)place_address(a.base, place, s.slot) + s.offset : 0;
}

/* Half number `turn` of all that this warp will take. */
static __device__ __forceinline__ void stream_fill(const struct cuda_attend &a, const struct team &t, struct stream &s,
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
    if ((first + s.pace) % WARP == 0)
        s.now = s.next, s.next = stream_address(a, s, stream_place(t, s, first + s.pace + WARP));
}

/* A long stream begins before the biases are exchanged, although the exchange then waits behind it; a short one after. */
static __device__ __forceinline__ bool stream_long(const struct stream &s)
{
    return s.end - s.begin > 4 * s.pace * WARPS;
}

/* Looks up the first addresses; nothing is on its way yet. */
static __device__ __forceinline__ struct stream stream_open(const struct cuda_attend &a, const struct team &t,
                                                            const struct span &span, struct team_shared *m, uint32_t rings,
                                                            uint32_t ring)
{
    struct stream s;
    s.blocks = blocks_of(a, t.query);
    s.size = PKV_BLOCK_TOKENS * pkv_geom_words(&a.geom) * 4;
    s.slot = pkv_geom_sig_block_bytes(&a.geom), s.offset = (uint64_t)t.head * s.size;
    part_of(span, t.part, t.size, &s.begin, &s.end);
    s.count = s.begin + t.warp < s.end ? (s.end - s.begin - t.warp + WARPS - 1) / WARPS : 0;
    s.memory = rings + t.warp * ring, s.gates = (uint32_t)__cvta_generic_to_shared(m->gates[t.warp]);
    s.pace = ring / 2 / (s.size > 512 ? 1024 : s.size);
    uint64_t now = stream_place(t, s, 0), next = stream_place(t, s, WARP);
    s.now = stream_address(a, s, now), s.next = stream_address(a, s, next);
    return s;
}

/* ---- scan ---- */

/* Bit planes as this lane's part of B, for the first and the second 32 tokens of a block. Signatures of 64 bits leave half of a
 * fragment free: it holds both halves of the block, and B is zero where the other half's words are. */
template <uint32_t SETS> struct scan_planes {
    struct planes<SETS, 1> half[2];
};

template <uint32_t SETS>
static __device__ __forceinline__ void planes_take(const struct cuda_attend &a, const struct team &t,
                                                   const struct weigh_shared<HEADS> *w, const struct team_shared *m,
                                                   struct scan_planes<SETS> &p)
{
    uint32_t words = pkv_geom_words(&a.geom), column = t.lane % 4;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++)
#pragma unroll
        for (uint32_t set = 0; set < SETS; set++) {
            uint32_t h = set * 4 + t.lane / 8, own = set * 4 + column;
            uint32_t word = words == 2 ? column - 2 * half : column;
#pragma unroll
            for (uint32_t i = 0; i < 4; i++)
                p.half[half].b[set][i][0] = h < t.group && word < words ? w->planes[h][2 * i + t.lane / 4 % 2][word] : 0;
            p.half[half].scale[set] = own < t.group ? w->scale[own] * UNIT_INV : 0.0f;
            p.half[half].bias[set] = own < t.group ? m->bias[own] : NOTHING;
        }
}

static __device__ __forceinline__ uint4 load_shared(uint32_t at, bool there)
{
    uint4 v = make_uint4(0, 0, 0, 0);
    if (there)
        asm("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

/* BLOCKS blocks of 64 tokens, of which all are candidates. at: where this lane's part of the signatures lies, two loads a
 * block; all of a kind together, so that one waits while another works. */
#define BLOCK_STRIDE (WARPS * PKV_BLOCK_TOKENS) /* tokens between a warp's blocks */
template <uint32_t SETS, uint32_t BLOCKS>
static __device__ __forceinline__ void scan_whole(uint32_t at, uint32_t apart, uint32_t size, bool there,
                                                  const struct scan_planes<SETS> &p, uint32_t lane, uint16_t *codes,
                                                  uint32_t *counts)
{
    uint32_t code[BLOCKS][2];
    uint4 x[BLOCKS][2][1];
#pragma unroll
    for (uint32_t b = 0; b < BLOCKS; b++)
        x[b][0][0] = load_shared(at + b * size, there), x[b][1][0] = load_shared(at + b * size + apart, there);
#pragma unroll
    for (uint32_t b = 0; b < BLOCKS; b++)
        code[b][0] = code_of<SETS, 1>(x[b][0], p.half[0], lane), code[b][1] = code_of<SETS, 1>(x[b][1], p.half[1], lane);
#pragma unroll
    for (uint32_t b = 0; b < BLOCKS; b++) {
        codes[b * BLOCK_STRIDE] = (uint16_t)code[b][0], codes[b * BLOCK_STRIDE + 32] = (uint16_t)code[b][1];
        atomicAdd(counts + code[b][0], 1u), atomicAdd(counts + code[b][1], 1u);
    }
}

/* A block at an end of the span, or one alone; `token`: this lane's first. */
template <uint32_t SETS>
static __device__ __forceinline__ void scan_edge(uint32_t at, uint32_t apart, bool there, const struct scan_planes<SETS> &p,
                                                 const struct span &span, uint32_t token, uint32_t lane, uint16_t *codes,
                                                 uint32_t *counts)
{
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        const uint4 x[1] = {load_shared(at + half * apart, there)};
        uint32_t code = code_of<SETS, 1>(x, p.half[half], lane), mine = token + half * 32;
        code = mine >= span.first && mine < span.last ? code : 0;
        codes[half * 32] = (uint16_t)code;
        if (code)
            atomicAdd(counts + code, 1u);
    }
}

template <uint32_t SETS>
static __device__ __forceinline__ void scan_part(const struct cuda_attend &a, const struct team &t, struct team_shared *m,
                                                 const struct weigh_shared<HEADS> *w, const struct span &span, struct stream &s,
                                                 uint16_t *codes)
{
    uint32_t words = pkv_geom_words(&a.geom), column = t.lane % 4;
    bool both = words == 2, there = both || column < words;
    uint32_t at0 =
        s.memory + (both ? ((t.lane / 4 + column / 2 * 8) * 2 + column % 2) * 16 : (t.lane / 4 * words + column) * 16);
    uint32_t apart = both ? 0 : 8 * words * 16, token = (s.begin + t.warp) * PKV_BLOCK_TOKENS + t.lane;
    struct scan_planes<SETS> p;
    planes_take<SETS>(a, t, w, m, p);
    __syncthreads(); /* codes overwrite the weights */
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
                scan_whole<SETS, 2>(at, apart, s.size, there, p, t.lane, to, m->counts);
                continue;
            }
#pragma unroll 1
            for (uint32_t n = 0; n < 2 && i + n < end; n++)
                scan_edge<SETS>(at + n * s.size, apart, there, p, span, token + (i + n) * BLOCK_STRIDE, t.lane,
                                to + n * BLOCK_STRIDE, m->counts);
        }
        __syncwarp();
        stream_fill(a, t, s, turn + 2);
    }
    __syncthreads();
}

#endif /* architecture */

#endif
