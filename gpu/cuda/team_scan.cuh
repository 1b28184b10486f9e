/* A team's first half: its shared memory, the stream of signatures into it, and the scan. */
#ifndef GPU_CUDA_TEAM_SCAN_CUH
#define GPU_CUDA_TEAM_SCAN_CUH

#include "gpu/cuda/choose.cuh"
#include "gpu/cuda/rows.cuh"
#include "gpu/cuda/scan.cuh"
#include "gpu/cuda/team.cuh"
#include "gpu/cuda/tile.cuh"
#include "gpu/cuda/weigh.cuh"

#define THREADS        512u
#define WARPS          (THREADS / WARP)
#define HEADS          TILE_COLUMNS /* of a group at most */
#define ROWS           1024u        /* of a list that a block attends */
#define SHARED_MAX     (227u * 1024u)
#define TEAM_SIG_WORDS 4u   /* of a signature at most */
#define FIRST_BLOCKS   512u /* of a part, and ends, whose addresses are found by a thread each */
#define FIRST_ENDS     (WARPS * TILE_ROWS)

/* What lives through the whole kernel; behind it the addresses of its part's blocks, then `front`: weights, then codes, then
 * the warps' tiles; then the rings, where choosing happens later, and team_rows. */
struct team_shared {
    uint32_t counts[2048 + 8];
    uint32_t warp_sums[WARPS];
    struct digit_planes<HEADS * TEAM_SIG_WORDS> digits;
    float scale[HEADS], bias[HEADS];
    struct share {
        float max, sum, shift;
    };
    int estimates[HEADS][TEAM_SIG_WORDS];
    float ends[2][HEADS][WARPS]; /* maxima and sums of the warps' results */
    uint32_t outcomes[CUDA_COUNTERS];
    uint64_t signatures[FIRST_BLOCKS], end_rows[FIRST_ENDS]; /* addresses, of this head */
    uint64_t fitted[8]; /* of signatures of blocks that have fitted tokens (team_bias.cuh) */
    struct plan {       /* found: the rest is there */
        uint32_t found, code, ties, before_greater, before_equal, keep, take, spill_first, take_first;
    } plan;
    __align__(16) unsigned char queries[HEADS * (PKV_HEAD_DIM_MAX * 2 + 16)];
};

/* Rows that a block attends; keep: where in the row cache one that was FETCHED goes, or 0. */
struct team_rows {
    uint64_t address[ROWS], keep[ROWS];
    uint32_t token[ROWS];
};

/* Offsets in shared memory, bytes of a warp's ring, all bytes. ends: a tile for those that the block attends, 0 where there is
 * no room. */
struct layout {
    uint32_t places, front, rings, ring, rows, ends, bytes;
};

/* Maps whose outputs the blocks share out (team_maps.cuh), of the layer; outputs 0: none, or weigh.cuh applies them. */
struct team_maps {
    const float *weight, *bias, *step;
    const uint8_t *bits;
    uint32_t outputs, each; /* of a map; maps of a kv head */
    uint32_t signs;
    float unit;
    uint64_t words; /* where a list's begin */
};

/* What the kernel is given; what can be worked out before is. What it reads first lies together. */
struct team_call {
    struct word *list_words;        /* of the first list, `each` a list */
    uint32_t *gates, *hints;        /* hints: of the layer */
    const float *signs, *deviation; /* of the layer */
    struct layout at;
    uint32_t group, words;                          /* words: of a signature */
    uint32_t rows_slot, signatures_slot, rows_head; /* bytes of a block's rows, signatures, rows of a head */
    uint32_t most;                                  /* rows beside the ends that a block attends at most */
    uint32_t each;                                  /* words of a list, of 16 bytes */
    float unit;                                     /* of the weights of `sign` */
    uint32_t bases;                                 /* of `sign`; 0: the weights are others, or given */
    struct cuda_attend a;
    struct team_maps maps;
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
    uint32_t tile = TILE_ROWS * (2 * a->geom.head_dim * 2 + 16), warps = a->geom.head_dim > 128 ? WARPS / 2 : WARPS;
    struct layout l;
    l.places = (uint32_t)PKV_ALIGN_UP(sizeof(struct team_shared), 16u);
    l.front = PKV_ALIGN_UP(l.places + blocks * 8, 128u);
    l.rings = l.front + PKV_ALIGN_UP(PKV_MAX(codes, weigh), 128u);
    l.ring = l.rings + WARPS * 2 * RING <= SHARED_MAX ? 2 * RING : RING; /* twice as deep where there is room */
    l.rows = PKV_ALIGN_UP(PKV_MAX(l.front + warps * tile, l.rings + choose), 128u);
    l.bytes = PKV_MAX(l.rings + WARPS * l.ring, l.rows + (uint32_t)sizeof(struct team_rows));
    uint32_t all = a->policy.sinks + a->policy.recent, behind = PKV_ALIGN_UP(l.bytes, 128u);
    bool few = all <= FIRST_ENDS && PKV_DIV_UP(all, a->team) <= TILE_ROWS;
    l.ends = few && behind + tile <= SHARED_MAX ? behind : 0;
    l.bytes = l.ends ? behind + tile : l.bytes;
    return l;
}

#if __CUDA_ARCH__ >= 900

/* ---- the team ---- */

/* What is known without memory; the grid is [queries][kv_heads][size]. */
static __device__ __forceinline__ struct team team_of_block(const struct team_call &call, bool plain)
{
    struct team t;
    t.size = gridDim.x, t.part = blockIdx.x, t.head = blockIdx.y, t.query = blockIdx.z, t.group = call.group;
    t.shift = 31 - __clz(t.size), t.list = t.query * gridDim.y + t.head;
    t.q_head = (uint64_t)t.list * t.group;
    t.words = call.list_words + (uint64_t)t.list * call.each, t.gate = call.gates + t.list * CUDA_GATE;
    t.hint = call.hints + t.list;
    t.warp = threadIdx.x / WARP, t.lane = threadIdx.x % WARP, t.plain = plain;
    return t;
}

static __device__ __forceinline__ void team_join(struct team &t)
{
    t.epoch = load_relaxed(t.gate + 64) + 1;
    t.arrivals = load_relaxed(t.gate) & ~(t.size - 1); /* this block has not arrived, so the rest cannot be whole */
    uint32_t hint = load_relaxed(t.hint);
    t.window = min(hint > WINDOW / 2 ? hint - WINDOW / 2 : 0, 2048 - WINDOW);
}

/* CUDA_KEEP, which a plain call does not have. */
static __device__ __forceinline__ bool keeps(const struct team_call &call, const struct team &t)
{
    return !t.plain && call.a.flags & CUDA_KEEP;
}

static __device__ __forceinline__ uint64_t address_of(const struct cuda_attend &a, uint64_t place, uint32_t slot_bytes)
{
    const uint64_t *base = pkv_place_tier(place) == PKV_TIER_POOL ? a.base[PKV_TIER_POOL] : a.base[PKV_TIER_ARENA];
    return __ldg(base + pkv_place_chunk(place)) + (uint64_t)pkv_place_slot(place) * slot_bytes;
}

/* ---- the part's blocks ---- */

/* Where the rows of a block begin (FAR: in the CPU's memory; FETCHED: to be looked up in the row cache), and where its
 * signatures lie, of this head; from its places in the table. */
#define FAR 2ull
static __device__ __forceinline__ uint64_t rows_at(const struct team_call &call, const struct team &t, uint64_t rows,
                                                   bool cached)
{
    return (address_of(call.a, rows, call.rows_slot) + t.head * call.rows_head) |
           (pkv_place_tier(rows) == PKV_TIER_ARENA ? cached ? FAR | FETCHED : FAR : 0);
}
static __device__ __forceinline__ uint64_t signatures_of(const struct team_call &call, const struct team &t,
                                                         uint64_t signatures)
{
    return address_of(call.a, signatures, call.signatures_slot) + t.head * (PKV_BLOCK_TOKENS * 4 * call.words);
}

/* Signatures of the block that this lane has of 32 from the i-th of the warp on, or 0; the place of its rows is noted. */
static __device__ __forceinline__ uint64_t stream_address(const struct team_call &call, const struct team &t,
                                                          const struct stream &s, uint64_t *places, bool cached, uint32_t i)
{
    uint32_t b = stream_block(s, i);
    if (b >= s.end)
        return 0;
    ulonglong2 entry = *(const ulonglong2 *)(t.blocks + b);
    places[b - s.begin] = rows_at(call, t, entry.x, cached);
    return signatures_of(call, t, entry.y);
}

/* ---- weights ---- */

/* Of 32 weights, a lane each: bit plane lane / 4. */
static __device__ __forceinline__ uint32_t word_planes(int weight, uint32_t lane)
{
    uint32_t own = 0;
#pragma unroll
    for (uint32_t p = 0; p < 8; p++) {
        uint32_t plane = __ballot_sync(ALL_LANES, weight >> p & 1);
        own = lane / 4 == p ? plane : own;
    }
    return own;
}

/* CUDA_KEEP: a word of a head's weights. */
static __device__ __forceinline__ void word_keep(const struct team_call &call, const struct team &t, uint32_t h, uint32_t word,
                                                 int weight, uint32_t plane)
{
    call.a.work.weights[(t.q_head + h) * call.a.geom.sig_bits + word * WARP + t.lane] = (int8_t)weight;
    if (t.lane % 4 == 0)
        call.a.work.planes[((t.q_head + h) * 8 + t.lane / 4) * call.words + word] = plane;
}

#endif /* architecture */

#endif
