/* A team: the thread blocks that take one list from query to result in one launch. All of them are resident together (a
 * cooperative launch), so they may wait for each other, in two ways:
 *   words  value and epoch of the call in 64 bits, written once a call: whoever wants a value polls for its epoch; no order is
 *          needed between words
 *   gates  a count of arrivals that only grows; what a block wrote before it arrived is there for all that have passed
 * The epoch of a list is in memory and goes up by one a call, after everybody has read it. Teams have 1, 2, 4, 8 or 16 blocks.
 */
#ifndef GPU_CUDA_TEAM_CUH
#define GPU_CUDA_TEAM_CUH

#include "gpu/cuda/device.cuh"

struct team {
    uint32_t size, part, list, query, head, group; /* part: this block's number in the team */
    uint64_t q_head;                               /* the first of the group */
    uint64_t *words;
    uint32_t *gate;
    uint32_t epoch, arrivals; /* arrivals: of the whole team, before this call, then at the last gate */
    uint32_t warp, lane;
};

/* Where each kind of word begins. */
static __device__ __forceinline__ uint64_t *bias_words(const struct team &t)
{
    return t.words;
}
static __device__ __forceinline__ uint64_t *count_words(const struct team &t) /* coarse [size][64], fine [size][33] */
{
    return t.words + t.size * WARP;
}
static __device__ __forceinline__ uint64_t *list_words(const struct team &t)
{
    return count_words(t) + t.size * (64 + 33);
}
static __device__ __forceinline__ uint64_t *result_words(const struct team &t, uint32_t rows_max)
{
    return list_words(t) + rows_max;
}

static __device__ __forceinline__ uint32_t load_relaxed(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

static __device__ __forceinline__ void put_word(const struct team &t, uint64_t *to, uint32_t value)
{
    asm volatile("st.relaxed.gpu.global.u64 [%0],%1;" ::"l"(to), "l"((uint64_t)value << 32 | t.epoch) : "memory");
}
static __device__ __forceinline__ uint32_t take_word(const struct team &t, const uint64_t *from)
{
    uint64_t v;
    do
        asm volatile("ld.relaxed.gpu.global.u64 %0,[%1];" : "=l"(v) : "l"(from) : "memory");
    while ((uint32_t)v != t.epoch);
    return (uint32_t)(v >> 32);
}

/* Three at once, one wait. */
static __device__ __forceinline__ void take_words(const struct team &t, const uint64_t *const (&from)[3], float (&to)[3])
{
    uint64_t v[3];
    do
#pragma unroll
        for (uint32_t i = 0; i < 3; i++)
            asm volatile("ld.relaxed.gpu.global.u64 %0,[%1];" : "=l"(v[i]) : "l"(from[i]) : "memory");
    while ((uint32_t)v[0] != t.epoch || (uint32_t)v[1] != t.epoch || (uint32_t)v[2] != t.epoch);
#pragma unroll
    for (uint32_t i = 0; i < 3; i++)
        to[i] = __uint_as_float((uint32_t)(v[i] >> 32));
}

static __device__ __forceinline__ struct team team_join(const struct cuda_attend &a, uint32_t group, uint64_t words)
{
    struct team t;
    t.size = a.team, t.list = blockIdx.x / a.team, t.part = blockIdx.x & (a.team - 1);
    t.query = t.list / a.geom.kv_heads, t.head = t.list - t.query * a.geom.kv_heads, t.group = group;
    t.q_head = (uint64_t)t.query * a.geom.q_heads + t.head * t.group;
    t.words = a.work.words + t.list * words, t.gate = a.work.gates + t.list * CUDA_GATE;
    t.epoch = load_relaxed(t.gate + 64) + 1;
    t.arrivals = load_relaxed(t.gate) & ~(t.size - 1); /* this block has not arrived, so the rest cannot be whole */
    t.warp = threadIdx.x / WARP, t.lane = threadIdx.x % WARP;
    return t;
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

/* ---- bulk copies into shared memory, watched by an mbarrier ---- */

#if __CUDA_ARCH__ >= 900
static __device__ __forceinline__ void arrival_init(uint32_t gate)
{
    asm volatile("mbarrier.init.shared.b64 [%0],1;" ::"r"(gate) : "memory");
}
static __device__ __forceinline__ void bulk_expect(uint32_t gate, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(gate), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void bulk_copy(uint32_t to, uint64_t from, uint32_t bytes, uint32_t gate)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(gate)
                 : "memory");
}
static __device__ __forceinline__ void bulk_wait(uint32_t gate, uint32_t phase)
{
    uint32_t done;
    do
        asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared.b64 p,[%1],%2;\n\tselp.u32 %0,1,0,p;\n\t}"
                     : "=r"(done)
                     : "r"(gate), "r"(phase)
                     : "memory");
    while (!done);
}
#endif

#endif
