/* The scan as a stage: signatures straight into registers, a block of 64 tokens ahead. Without a ring in shared memory the
 * kernel lies beside those before and behind it, and starts while they end. */
#ifndef GPU_CUDA_STAGE_CUH
#define GPU_CUDA_STAGE_CUH

#include "gpu/cuda/scan.cuh"

/* Where the signatures of a kv head lie in the block stream_block(s, i), or 0. */
static __device__ __forceinline__ uint64_t signatures_at(const struct cuda_attend &a, const struct stream &s, uint32_t query,
                                                         uint32_t head, uint32_t i)
{
    uint32_t b = stream_block(s, i);
    uint64_t slot = pkv_geom_sig_block_bytes(&a.geom);
    return b < s.end ? (uint64_t)place_address(a.base, blocks_of(a, query)[b].signatures, slot) + (uint64_t)head * s.size : 0;
}

/* Nobody reads signatures twice; codes shall stay in L2. */
static __device__ __forceinline__ uint64_t policy_once(void)
{
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    return policy;
}
static __device__ __forceinline__ uint4 load_once(uint64_t from, uint64_t policy)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3},[%4],%5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from), "l"(policy));
    return v;
}

/* This lane's pieces of the block at `from`; zeros if there is none (0). */
template <uint32_t COPIES, bool PAIRED>
static __device__ __forceinline__ struct pieces<COPIES, PAIRED> pieces_once(uint64_t from, uint32_t words, uint32_t lane,
                                                                            uint64_t policy) {
    struct pieces<COPIES, PAIRED> none = {
    };
    return from ? pieces_load<COPIES, PAIRED>(from, words, lane, [&](uint64_t at) { return load_once(at, policy); }) : none;
}

/* Codes of the part's tokens to codes, and their counts, by all but the low bits. first: the warp's first block, as load(from)
 * gives it; code(loaded, got): this lane's two codes of a block. */
template <uint32_t COPIES, bool PAIRED, typename X, typename F, typename L, typename C>
static __device__ __forceinline__ void scan_direct(struct stream &s, const struct span &span, X first, uint16_t *codes,
                                                   uint32_t *counts, uint32_t low_bits, const F &addresses, const L &load,
                                                   const C &code)
{
    constexpr uint32_t NEXT = PAIRED ? 1 : WARP;
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    asm volatile("" : "+r"(lane)); /* stays in its register */
    uint32_t own = own_token<COPIES, PAIRED>(lane), token = (s.begin + warp) * PKV_BLOCK_TOKENS;
    X even[1] = {first}, odd[1];
    codes += warp * PKV_BLOCK_TOKENS + own;
    auto put = [&](const X(&x)[1]) {
        uint32_t got[2];
        code(x, got);
        if (token >= span.first && token + PKV_BLOCK_TOKENS <= span.last) {
            codes_put<PAIRED>(got[0], got[1], codes, counts, low_bits);
        } else {
            code_put(got[0], token + own, span.first, span.last, codes, counts, low_bits);
            code_put(got[1], token + own + NEXT, span.first, span.last, codes + NEXT, counts, low_bits);
        }
        token += BLOCK_STRIDE, codes += BLOCK_STRIDE;
    };
    /* Two blocks a turn, so that none is moved; 32 is even, so addresses change at the end of a turn. */
#pragma unroll 1
    for (uint32_t i = 0; i < s.count; i += 2) {
        odd[0] = load(__shfl_sync(ALL_LANES, s.now, (i + 1) % WARP));
        put(even);
        if ((i + 2) % WARP == 0)
            s.now = s.next, s.next = addresses(i + 2 + WARP);
        even[0] = load(__shfl_sync(ALL_LANES, s.now, (i + 2) % WARP));
        if (i + 1 < s.count)
            put(odd);
    }
}

#endif
