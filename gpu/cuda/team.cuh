/* A team: the thread blocks that take one list from query to result in one launch. All of them are resident together (a
 * cooperative launch), so they may wait for each other, in two ways:
 *   words  three values and the epoch of the call in 128 bits, written whole once a call: whoever wants the values polls for
 *          the epoch; no order is needed between words
 *   gates  a count of arrivals that only grows; what a block wrote before it arrived is there for all that have passed
 * The epoch of a list is in memory and goes up by one a call, after everybody has read it. Teams have 1, 2, 4, 8 or 16 blocks.
 */
#ifndef GPU_CUDA_TEAM_CUH
#define GPU_CUDA_TEAM_CUH

#include "gpu/cuda/device.cuh"

#define TEAM_MAX 16u
#define WINDOW   64u /* codes around the threshold of the step before, whose counts are sent before it is known */

struct word {
    uint32_t x, y, z, epoch;
};

struct team {
    uint32_t size, part, list, query, head, group; /* part: this block's number in the team */
    uint32_t shift;                                /* size is 1 << shift */
    uint64_t q_head;                               /* the first of the group */
    const struct pkv_block_ref *blocks;            /* of the query's sequence */
    struct word *words;
    uint32_t *gate, *hint;
    uint32_t epoch, arrivals; /* arrivals: of the whole team, before this call, then at the last gate */
    uint32_t window;          /* its first code */
    uint32_t warp, lane;
    bool plain; /* known when the kernel is compiled: see team_kind */
};

/* Where each kind of word begins. Counts are suffix counts: word i of a kind has those at 2 i, 2 i + 1 and 2 i + 2. */
#define WINDOW_WORDS (WINDOW / 2) /* of a block: of codes from the window's first on */
#define COARSE_WORDS 32u          /* of every 32nd code */
#define FINE_WORDS   16u          /* of the 32 codes of a bucket; again of the low bits of codes that are not counted whole */
#define BIAS_WORDS   32u          /* shares of the biases: of four warps, eight heads */
#define MAP_WORDS    CUDA_MAP_WORDS /* of a q head: its map's outputs (team_maps.cuh); behind all others */
static_assert(BIAS_WORDS + WINDOW_WORDS + COARSE_WORDS + 2 * FINE_WORDS == CUDA_COUNT_WORDS, "cuda_words() counts them");
static __device__ __forceinline__ struct word *bias_words(const struct team &t)
{
    return t.words;
}
static __device__ __forceinline__ struct word *window_words(const struct team &t)
{
    return bias_words(t) + t.size * BIAS_WORDS;
}
static __device__ __forceinline__ struct word *coarse_words(const struct team &t)
{
    return window_words(t) + t.size * WINDOW_WORDS;
}
static __device__ __forceinline__ struct word *fine_words(const struct team &t)
{
    return coarse_words(t) + t.size * COARSE_WORDS;
}
static __device__ __forceinline__ struct word *low_words(const struct team &t)
{
    return fine_words(t) + t.size * FINE_WORDS;
}
static __device__ __forceinline__ struct word *row_words(const struct team &t)
{
    return low_words(t) + t.size * FINE_WORDS;
}
static __device__ __forceinline__ struct word *result_words(const struct team &t, uint32_t k)
{
    return row_words(t) + k;
}

static __device__ __forceinline__ uint32_t load_relaxed(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

static __device__ __forceinline__ void put_word(const struct team &t, struct word *to, uint32_t x, uint32_t y, uint32_t z)
{
    uint64_t low = (uint64_t)y << 32 | x, high = (uint64_t)t.epoch << 32 | z;
    asm volatile("{\n\t.reg .b128 v;\n\tmov.b128 v,{%1,%2};\n\tst.relaxed.gpu.global.b128 [%0],v;\n\t}" ::"l"(to), "l"(low),
                 "l"(high)
                 : "memory");
}
static __device__ __forceinline__ struct word look_at_word(const struct word *from)
{
    uint64_t low, high;
    asm volatile("{\n\t.reg .b128 v;\n\tld.relaxed.gpu.global.b128 v,[%2];\n\tmov.b128 {%0,%1},v;\n\t}"
                 : "=l"(low), "=l"(high)
                 : "l"(from)
                 : "memory");
    return {(uint32_t)low, (uint32_t)(low >> 32), (uint32_t)high, (uint32_t)(high >> 32)};
}
static __device__ __forceinline__ struct word take_word(const struct team &t, const struct word *from)
{
    struct word w;
    do
        w = look_at_word(from);
    while (w.epoch != t.epoch);
    return w;
}

/* A look at `count` words of at most MOST, `stride` apart; the others become zero. */
template <uint32_t MOST>
static __device__ __forceinline__ void look_at_words(const struct team &t, const struct word *from, uint32_t stride,
                                                     uint32_t count, struct word (&w)[MOST])
{
#pragma unroll
    for (uint32_t i = 0; i < MOST; i++)
        w[i] = i < count ? look_at_word(from + i * stride) : word{0, 0, 0, t.epoch};
}

/* They have been looked at: again, until all of them are there. One look is for all: at each in turn would wait for L2 as
 * often. The warp is together again. */
template <uint32_t MOST>
static __device__ __forceinline__ void take_words(const struct team &t, const struct word *from, uint32_t stride,
                                                  uint32_t count, struct word (&w)[MOST])
{
    while (true) {
        bool all = true;
#pragma unroll
        for (uint32_t i = 0; i < MOST; i++)
            all = all && w[i].epoch == t.epoch;
        if (all)
            break;
        look_at_words(t, from, stride, count, w);
    }
    __syncwarp();
}

/* All threads call it. */
static __device__ __forceinline__ void team_gate(struct team &t)
{
    t.arrivals += t.size;
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t now;
        asm volatile("fence.acq_rel.gpu;\n\tred.relaxed.gpu.global.add.u32 [%0],1;" ::"l"(t.gate) : "memory");
        do
            asm volatile("ld.acquire.gpu.global.u32 %0,[%1];" : "=r"(now) : "l"(t.gate) : "memory");
        while ((int)(now - t.arrivals) < 0);
    }
    __syncthreads();
}

/* When every block's result has arrived, all have read the epoch. */
static __device__ __forceinline__ void team_leave(const struct team &t)
{
    if (t.part == 0 && threadIdx.x == 0)
        t.gate[64] = t.epoch;
}

#endif
