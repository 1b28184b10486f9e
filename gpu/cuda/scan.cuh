/* The scan of a part of a list by a team's thread block: its signatures on their way into shared memory, a warp every sixteenth
 * block, and their codes. The stages have the pieces without the ring (stage.cuh). For 512 threads. */
#ifndef GPU_CUDA_SCAN_CUH
#define GPU_CUDA_SCAN_CUH

#include "gpu/cuda/code.cuh"

#define SCAN_WARPS   16u
#define RING         4096u                           /* bytes of signatures on their way to a warp: two turns at least */
#define BLOCK_STRIDE (SCAN_WARPS * PKV_BLOCK_TOKENS) /* tokens between a warp's blocks */

/* A warp's blocks pass through a ring, a turn at a time; a turn is two blocks, so that one's arithmetic fills the other's
 * waits. A team's signatures have at most 128 bits: two copies of them at least (COPIES). Asynchronous copies of sixteen bytes
 * a lane bring them: bulk copies need a loop over the blocks and barriers in memory, which cost a quarter of the scan's
 * instructions. */
#define TURN_BLOCKS 2u

static __device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

struct stream {
    uint64_t now, next;         /* addresses of the signatures of 32 blocks each, one a lane; 0: no block */
    uint32_t begin, end, count; /* blocks of the part; how many of them are this warp's */
    uint32_t memory, size;      /* the ring; bytes of a block */
    uint32_t depth;             /* turns in the ring: 2, 4 or 8 */
};

/* Addresses are not known yet, and nothing is on its way. ring: this warp's, `bytes` of shared memory. */
static __device__ __forceinline__ struct stream stream_open(const struct span &span, uint32_t part, uint32_t parts,
                                                            uint32_t words, uint32_t ring, uint32_t bytes)
{
    struct stream s;
    uint32_t warp = threadIdx.x / WARP;
    part_of(span, part, parts, &s.begin, &s.end);
    s.count = s.begin + warp < s.end ? (s.end - s.begin - warp + SCAN_WARPS - 1) / SCAN_WARPS : 0;
    s.size = PKV_BLOCK_TOKENS * 4 * words, s.memory = ring, s.now = s.next = 0;
    uint32_t fit = bytes / ((copies_of(words) == 1 ? 1 : 2) * s.size);
    s.depth = fit >= 8 ? 8 : fit >= 4 ? 4 : 2;
    return s;
}

/* The part's block that is number i of the warp's, plus this lane. */
static __device__ __forceinline__ uint32_t stream_block(const struct stream &s, uint32_t i)
{
    return s.begin + threadIdx.x / WARP + (i + threadIdx.x % WARP) * SCAN_WARPS;
}

/* Copies of the turn that begins with block i of the warp, to `slot` of the ring; a group of its own even if nothing is left.
 * addresses(i): of the block stream_block(s, i), or 0. */
template <uint32_t COPIES, typename F>
static __device__ __forceinline__ void stream_fill(struct stream &s, uint32_t i, uint32_t slot, uint32_t lane,
                                                   const F &addresses)
{
    static_assert(COPIES > 1, "a block a half warp");
    constexpr uint32_t BLOCKS = TURN_BLOCKS, LANES = WARP / BLOCKS, LEAST = COPIES == 4 ? 1 : 3;
    uint32_t own = lane / LANES, at = lane % LANES * 16;
    uint64_t from = __shfl_sync(ALL_LANES, s.now, i % WARP + own) + at;
    if (i + own < s.count)
#pragma unroll
        for (uint32_t n = 0; n < (COPIES == 4 ? 2 : 4); n++)
            if (n < LEAST || at + n * LANES * 16 < s.size)
                asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(slot + own * s.size + at + n * LANES * 16),
                             "l"(from + n * LANES * 16)
                             : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    if ((i + BLOCKS) % WARP == 0)
        s.now = s.next, s.next = addresses(i + BLOCKS + WARP);
}

/* As much as the ring holds; s.now and s.next are known. */
template <uint32_t COPIES, typename F> static __device__ __forceinline__ void stream_begin(struct stream &s, const F &addresses)
{
    constexpr uint32_t BLOCKS = TURN_BLOCKS;
#pragma unroll 1
    for (uint32_t turn = 0; turn < s.depth; turn++)
        stream_fill<COPIES>(s, turn * BLOCKS, s.memory + turn * BLOCKS * s.size, threadIdx.x % WARP, addresses);
}

/* Until the oldest turn is there, for all lanes. */
static __device__ __forceinline__ void stream_wait(const struct stream &s)
{
    if (s.depth == 8)
        asm volatile("cp.async.wait_group 7;" ::: "memory");
    else if (s.depth == 4)
        asm volatile("cp.async.wait_group 3;" ::: "memory");
    else
        asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
}

/* 32 tokens of a block in shared memory; first, second: of this lane's first two words, of its other two. A fragment that holds
 * a signature twice is loaded twice (volatile, so that it is): registers in a row are cheaper so than by moves. */
static __device__ __forceinline__ struct fragments fragments_load(uint32_t first, uint32_t second)
{
    struct fragments f;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++)
#pragma unroll
        for (uint32_t i = 0; i < 2; i++)
            asm volatile("ld.volatile.shared.v2.u32 {%0,%1},[%2];"
                         : "=r"(f.a[half][2 * i]), "=r"(f.a[half][2 * i + 1])
                         : "r"(half ? second : first));
    return f;
}

/* Lanes whose words would meet those of other lanes in the same banks take the other two of their four tokens first. */
template <uint32_t COPIES> static __device__ __forceinline__ uint32_t lane_turned(uint32_t lane)
{
    return COPIES == 2 ? lane ^ lane / 8 % 2 * 2 : lane;
}

static __device__ __forceinline__ uint4 load_shared(uint32_t at)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

/* Tokens [first, last) are candidates; the others have code 0, and are not counted. token: of codes[0]. */
static __device__ __forceinline__ void code_put(uint32_t code, uint32_t token, uint32_t first, uint32_t last, uint16_t *codes,
                                                uint32_t *counts, uint32_t low_bits)
{
    bool candidate = token >= first && token < last;
    *codes = (uint16_t)(candidate ? code : 0);
    if (candidate)
        atomicAdd(counts + (code >> low_bits), 1u);
}

/* Where in a block this lane's first code is; the second one is PAIRED: of the next token, else of the token 32 on. */
template <uint32_t COPIES, bool PAIRED> static __device__ __forceinline__ uint32_t own_token(uint32_t lane)
{
    uint32_t j = lane % 4;
    return !PAIRED ? lane : COPIES == 4 ? lane / 4 * 8 + j % 2 * 4 + j / 2 * 2 : j / 2 * 32 + lane / 4 * 4 + j % 2 * 2;
}

/* Two codes of candidates. */
template <bool PAIRED>
static __device__ __forceinline__ void codes_put(uint32_t one, uint32_t two, uint16_t *codes, uint32_t *counts,
                                                 uint32_t low_bits)
{
    if (PAIRED)
        *(uint32_t *)codes = one | two << 16;
    else
        codes[0] = (uint16_t)one, codes[WARP] = (uint16_t)two;
    atomicAdd(counts + (one >> low_bits), 1u);
    atomicAdd(counts + (two >> low_bits), 1u);
}

/* A block's signatures as they lie, this lane's pieces: a word of four tokens each. */
template <uint32_t COPIES, bool PAIRED> struct pieces {
    static constexpr uint32_t HALVES = PAIRED && COPIES == 4 ? 1 : 2, PARTS = COPIES == 1 ? 2 : 1;
    uint4 of[HALVES][PARTS];
};

/* at: of the block; load(at): of sixteen bytes. Words that signatures do not have are others: their planes are zero. */
template <uint32_t COPIES, bool PAIRED, typename A, typename L>
static __device__ __forceinline__ struct pieces<COPIES, PAIRED> pieces_load(A at, uint32_t words, uint32_t lane,
                                                                            const L &load) {
    struct pieces<COPIES, PAIRED> x;
    uint32_t per = COPIES == 4 ? 2 : 4, four = PAIRED && COPIES == 4 ? lane / 2 : lane / 4, word = min(lane % per, words - 1);
#pragma unroll
    for (uint32_t h = 0; h < x.HALVES; h++)
#pragma unroll
        for (uint32_t p = 0; p < x.PARTS; p++)
            x.of[h][p] = load(at + ((four + h * 8) * words + (p ? min(word + 4, words - 1) : word)) * 16);
    return x;
}

/* Codes of the part's tokens to codes, and their counts, by all but the low bits, without the warp's first TURNS turns (0 or
 * 1); the stream has begun. load(at): what this lane needs of a block that lies at `at` in shared memory; code(loaded, got):
 * its two codes of each block of a turn. */
template <uint32_t COPIES, bool PAIRED, uint32_t TURNS = 0, typename F, typename L, typename C>
static __device__ __forceinline__ void scan_blocks(struct stream &s, const struct span &span, uint16_t *codes, uint32_t *counts,
                                                   uint32_t low_bits, const F &addresses, const L &load, const C &code)
{
    constexpr uint32_t BLOCKS = TURN_BLOCKS, NEXT = PAIRED ? 1 : WARP;
    uint32_t lane = threadIdx.x % WARP, first = s.begin + threadIdx.x / WARP;
    asm volatile("" : "+r"(lane)); /* stays in its register */
    uint32_t token = own_token<COPIES, PAIRED>(lane), bytes = BLOCKS * s.size;
    /* Blocks [whole_from, whole_to) of this warp have no token that is not a candidate. */
    uint32_t before = PKV_DIV_UP(span.first, PKV_BLOCK_TOKENS), whole = span.last / PKV_BLOCK_TOKENS;
    uint32_t whole_from = before > first ? (before - first + SCAN_WARPS - 1) / SCAN_WARPS : 0;
    uint32_t whole_to = min(s.count, whole > first ? (whole - first + SCAN_WARPS - 1) / SCAN_WARPS : 0);
    uint32_t ahead = s.depth * BLOCKS, slot = s.memory + TURNS * bytes, behind = s.memory + s.depth * bytes;
    codes += threadIdx.x / WARP * PKV_BLOCK_TOKENS + token + TURNS * BLOCKS * BLOCK_STRIDE;
#pragma unroll 1
    for (uint32_t i = TURNS * BLOCKS; i < s.count; i += BLOCKS, codes += BLOCKS * BLOCK_STRIDE) {
        uint32_t got[2 * BLOCKS];
        decltype(load(0)) x[BLOCKS];
        stream_wait(s);
#pragma unroll
        for (uint32_t n = 0; n < BLOCKS; n++)
            x[n] = load(slot + n * s.size);
        __syncwarp();
        stream_fill<COPIES>(s, i + ahead, slot, lane, addresses);
        slot = slot + bytes == behind ? s.memory : slot + bytes;
        code(x, got);
        if (i >= whole_from && i + BLOCKS <= whole_to) {
#pragma unroll
            for (uint32_t n = 0; n < BLOCKS; n++)
                codes_put<PAIRED>(got[2 * n], got[2 * n + 1], codes + n * BLOCK_STRIDE, counts, low_bits);
            continue;
        }
#pragma unroll
        for (uint32_t n = 0; n < 2 * BLOCKS; n++)
            if (i + n / 2 < s.count)
                code_put(got[n], (first + (i + n / 2) * SCAN_WARPS) * PKV_BLOCK_TOKENS + token + n % 2 * NEXT, span.first,
                         span.last, codes + n / 2 * BLOCK_STRIDE + n % 2 * NEXT, counts, low_bits);
    }
}

/* A block's signatures, of 32 tokens and of the next 32. */
struct halves {
    struct fragments of[2];
};

template <uint32_t COPIES> static __device__ __forceinline__ struct halves halves_load(uint32_t at, uint32_t words)
{
    uint32_t lane = threadIdx.x % WARP;
    uint32_t word = min(COPIES == 4 ? lane % 2 : lane % 4, words - 1); /* where there is none, its planes are zero */
    uint32_t own = (lane / 4 * words + word) * 16, turned = (lane ^ lane_turned<COPIES>(lane)) * 4, apart = 8 * words * 16;
    uint32_t first = at + own + turned, second = at + own + 8 - turned;
    return {{fragments_load(first, second), fragments_load(first + apart, second + apart)}};
}

/* The same with one load of both halves and moves, for whoever waits for shared memory; no lane is turned. */
template <uint32_t COPIES> static __device__ __forceinline__ struct halves halves_wide(uint32_t at, uint32_t words)
{
    uint32_t lane = threadIdx.x % WARP;
    uint32_t word = min(COPIES == 4 ? lane % 2 : lane % 4, words - 1);
    struct halves h;
    static_assert(COPIES > 1, "a word a lane");
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint4 v = load_shared(at + (lane / 4 * words + word) * 16 + i * 8 * words * 16);
        h.of[i] = {{{v.x, v.y, v.x, v.y}, {v.z, v.w, v.z, v.w}}};
    }
    return h;
}

/* The rule `softmax`. */
template <uint32_t SETS, uint32_t COPIES, uint32_t TURNS = 0, typename F>
static __device__ __forceinline__ void scan_softmax(struct stream &s, const struct planes<SETS, COPIES> &p,
                                                    const struct span &span, uint32_t words, uint16_t *codes, uint32_t *counts,
                                                    const F &addresses)
{
    constexpr uint32_t BLOCKS = TURN_BLOCKS;
    uint32_t lane = lane_turned<COPIES>(threadIdx.x % WARP);
    scan_blocks<COPIES, false, TURNS>(
        s, span, codes, counts, 0, addresses, [&](uint32_t at) { return halves_load<COPIES>(at, words); },
        [&](const halves(&x)[BLOCKS], uint32_t(&got)[2 * BLOCKS]) {
#pragma unroll
            for (uint32_t n = 0; n < 2 * BLOCKS; n++)
                got[n] = code_of(scores_of(x[n / 2].of[n % 2], p), p, lane);
        });
}

#endif
