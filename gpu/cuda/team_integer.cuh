/* A team's scan by the rules `sum` and `max`: scores are of the signatures alone, so it needs no biases, and no words. */
#ifndef GPU_CUDA_TEAM_INTEGER_CUH
#define GPU_CUDA_TEAM_INTEGER_CUH

#include "gpu/cuda/integer.cuh"
#include "gpu/cuda/team_scan.cuh"

#if __CUDA_ARCH__ >= 900

struct team_weights : integer_rows<HEADS, TEAM_SIG_WORDS> {
};
static_assert(sizeof(struct team_weights) <= sizeof(((struct team_shared *)0)->digits), "they lie there");

/* CUDA_KEEP: weights, their planes and scales, as the stages leave them. */
static __device__ __noinline__ void weights_keep(const struct team_call &call, const struct team t,
                                                 const struct weigh_shared<HEADS> *w)
{
    for (uint32_t i = t.warp; i < t.group * call.words; i += WARPS) {
        uint32_t h = i / call.words, word = i % call.words;
        int weight = w->weights[h][word * WARP + t.lane];
        word_keep(call, t, h, word, weight, word_planes(weight, t.lane));
        if (t.lane == 0)
            call.a.work.scales[t.q_head + h] = w->scale[h];
    }
}

template <uint32_t COPIES, typename F>
static __device__ __forceinline__ void scan_ring(struct stream &s, const struct integer_rows<HEADS, TEAM_SIG_WORDS> *rows,
                                                 const struct integer_rule &rule, const struct span &span, uint16_t *codes,
                                                 uint32_t *counts, const F &addresses)
{
    uint32_t lane = threadIdx.x % WARP;
    auto load = [&](uint32_t at) { return pieces_load<COPIES, true>(at, rule.words, lane, load_shared); };
    scan_integer<COPIES, TURN_BLOCKS>(rows, rule, counts, [&](uint32_t *own, const auto &code) {
        scan_blocks<COPIES, true>(s, span, codes, own, rule.low_bits, addresses, load, code);
    });
}

/* The part's codes and their counts; returns how many low bits of the codes are not counted. The weights' memory becomes the
 * codes'. */
template <typename F>
static __device__ __forceinline__ uint32_t scan_integers(const struct team_call &call, const struct team &t,
                                                         struct team_shared *m, const struct weigh_shared<HEADS> *w,
                                                         const struct span &span, struct stream &s, uint16_t *codes,
                                                         const F &addresses)
{
    bool sum = call.a.policy.rule == PKV_RULE_SUM;
    struct integer_rows<HEADS, TEAM_SIG_WORDS> *rows = (struct team_weights *)&m->digits;
    rows_make(rows, sum, t.group, call.words, [&](uint32_t h, uint32_t i) { return (int)w->weights[h][i]; });
    if (w->write)
        weights_keep(call, t, w);
    __syncthreads();
    struct integer_rule rule = rule_of(rows, sum, t.group, call.words);
    if (call.words <= 2)
        scan_ring<4>(s, rows, rule, span, codes, m->counts, addresses);
    else
        scan_ring<2>(s, rows, rule, span, codes, m->counts, addresses);
    return rule.low_bits;
}

#endif /* architecture */

#endif
