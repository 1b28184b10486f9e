/* Where a chosen row lies: pool, row cache or arena; and the row cache's two moves.
 *
 *   find   before any claim of the same call: a row that is there is stamped with the call's length, one that is not gets
 *          bit 0 of its address in the arena
 *   claim  after all finds of the list: a way that this call has not stamped becomes the row's, and whoever reads the row out
 *          of the arena stores it there
 * A list has its cache to itself (cuda.h), so a way is claimed before anybody looks for its new row: rows that are being
 * stored are never read in the same call. */
#ifndef GPU_CUDA_ROWS_CUH
#define GPU_CUDA_ROWS_CUH

#include "gpu/cuda/device.cuh"

#define FETCHED 1ull /* bit 0 of an address: read from the arena, to be kept */

/* A list's place in everything: one query token and kv head. */
struct list_of {
    const struct pkv_block_ref *blocks;
    uint32_t seq, head, length; /* length: the tokens that the query sees, the stamp of its ways */
    bool cached;
};

static __device__ __forceinline__ struct list_of list_at(const struct cuda_attend &a, uint32_t query, uint32_t head,
                                                         const struct span &span)
{
    struct cuda_query where = a.query[query];
    return {a.seqs[where.seq].blocks, where.seq, head, span.visible, a.cache.entries && a.cache.sets && where.back == 0};
}

/* The first way of the token's set, counted over the whole cache. */
static __device__ __forceinline__ uint64_t first_way(const struct cuda_attend &a, const struct list_of &l, uint32_t token)
{
    uint32_t set = __umulhi(token * 2654435761u, a.cache.sets);
    return (((uint64_t)l.seq * a.geom.kv_heads + l.head) * a.cache.sets + set) * CUDA_WAYS;
}

static __device__ __forceinline__ uint64_t way_address(const struct cuda_attend &a, uint64_t way)
{
    return (uint64_t)a.cache.rows + way * pkv_geom_row_bytes(&a.geom);
}

static __device__ __forceinline__ uint64_t cache_find(const struct cuda_attend &a, const struct list_of &l, uint32_t token)
{
    uint64_t first = first_way(a, l, token), *entry = a.cache.entries + first;
    uint64_t found[CUDA_WAYS];
#pragma unroll
    for (uint32_t w = 0; w < CUDA_WAYS; w += 2) {
        ulonglong2 two = __ldcg((const ulonglong2 *)(entry + w));
        found[w] = two.x, found[w + 1] = two.y;
    }
#pragma unroll
    for (uint32_t w = 0; w < CUDA_WAYS; w++)
        if (found[w] >> 32 == token + 1) {
            __stcg((unsigned long long *)entry + w, (uint64_t)(token + 1) << 32 | l.length);
            return way_address(a, first + w);
        }
    return 0;
}

/* Address of a row, and whether it is a hit (1), a miss (2) or no matter of the cache (0). */
static __device__ __forceinline__ uint64_t resolve(const struct cuda_attend &a, const struct list_of &l, uint32_t token,
                                                   uint32_t *outcome)
{
    uint64_t place = l.blocks[token / PKV_BLOCK_TOKENS].rows, at = 0;
    *outcome = 0;
    if (l.cached && pkv_place_tier(place) == PKV_TIER_ARENA) {
        at = cache_find(a, l, token);
        *outcome = at ? 1 : 2;
    }
    return at ? at
              : ((uint64_t)place_address(a.base, place, pkv_geom_block_bytes(&a.geom)) +
                 pkv_geom_row_offset(&a.geom, l.head, token % PKV_BLOCK_TOKENS)) |
                    (*outcome == 2 ? FETCHED : 0);
}

/* A way for a row that is on its way: its address, or 0 where this call has chosen all ways of the set. */
static __device__ __forceinline__ uint64_t cache_claim(const struct cuda_attend &a, const struct list_of &l, uint32_t token)
{
    uint64_t first = first_way(a, l, token);
    unsigned long long *entry = (unsigned long long *)a.cache.entries + first;
    for (uint32_t attempt = 0; attempt < 3; attempt++) {
        unsigned long long victim = 0;
        uint32_t oldest = 0, way = 0;
#pragma unroll
        for (uint32_t w = 0; w < CUDA_WAYS; w++) {
            unsigned long long v = __ldcg(entry + w);
            uint32_t age = v ? l.length - (uint32_t)v : UINT32_MAX;
            if (age > oldest)
                victim = v, oldest = age, way = w;
        }
        if (!oldest)
            return 0;
        if (atomicCAS(entry + way, victim, (unsigned long long)(token + 1) << 32 | l.length) == victim)
            return way_address(a, first + way);
    }
    return 0;
}

/* Counts of one thread block; `outcomes` as resolve gave them, one a thread. */
static __device__ __forceinline__ void count_outcomes(const struct cuda_attend &a, uint32_t hits, uint32_t misses)
{
    hits = __reduce_add_sync(ALL_LANES, hits), misses = __reduce_add_sync(ALL_LANES, misses);
    if (threadIdx.x % WARP == 0 && hits + misses && a.cache.counters) {
        atomicAdd((unsigned long long *)a.cache.counters + CUDA_HITS, hits);
        atomicAdd((unsigned long long *)a.cache.counters + CUDA_MISSES, misses);
    }
}

#endif
