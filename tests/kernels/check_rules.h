/* The rules `sum` and `max` over one world after another that their arithmetic could stumble over: weights of every width, and
 * ranges that need a shift; signatures of which many are the same. By definition, as in check_lists.h. For check_cuda. */
#ifndef TESTS_KERNELS_CHECK_RULES_H
#define TESTS_KERNELS_CHECK_RULES_H

#include "tests/kernels/check_lists.h"

enum weights { WEIGHTS_SHARES, WEIGHTS_ONES, WEIGHTS_BYTES, WEIGHTS_LARGEST, WEIGHTS_OPPOSED, WEIGHTS_NONE, WEIGHTS };

/* Of head h of a group, at bit b: +-1 for a share of the bits each, or for all; any; -128 or 127; heads that cancel each other
 * out, so that sums are small and their range is not; none. */
static inline int weight_random(enum weights kind, uint32_t h, uint32_t b, uint32_t group, uint32_t bits)
{
    int sign = below(2) ? 1 : -1;
    switch (kind) {
    case WEIGHTS_SHARES:
        return b * group / bits == h ? sign : 0;
    case WEIGHTS_ONES:
        return sign;
    case WEIGHTS_BYTES:
        return (int)below(256) - 128;
    case WEIGHTS_LARGEST:
        return below(2) ? 127 : -128;
    case WEIGHTS_OPPOSED:
        return group == 1 ? sign : h % 2 ? -127 : 127;
    default:
        return 0;
    }
}

static inline void weights_put(const struct world *w, const struct on_device *d, enum weights kind)
{
    uint64_t heads = (uint64_t)d->a.queries * w->g.q_heads;
    uint32_t bits = w->g.sig_bits, group = pkv_geom_group(&w->g);
    int8_t *weights = take(heads * bits);
    for (uint64_t h = 0; h < heads; h++)
        for (uint32_t b = 0; b < bits; b++)
            weights[h * bits + b] = (int8_t)weight_random(kind, (uint32_t)(h % group), b, group, bits);
    CUDA(cudaMemcpy(d->a.work.weights, weights, heads * bits, cudaMemcpyHostToDevice));
    free(weights);
}

/* `distinct` different signatures, in the world and on the device; 0: all are. */
static inline void signatures_put(const struct world *w, const struct on_device *d, uint32_t distinct)
{
    const struct pkv_geom *g = &w->g;
    uint64_t block = pkv_geom_sig_block_bytes(g) / 4;
    uint32_t *to = (uint32_t *)(uintptr_t)w->pool[5], some[3] = {below(UINT32_MAX), below(UINT32_MAX), below(UINT32_MAX)};
    for (uint32_t t = 0; t < w->tokens; t++) {
        uint32_t which = distinct ? below(distinct) : 0;
        for (uint32_t h = 0; h < g->kv_heads; h++)
            for (uint32_t word = 0; word < pkv_geom_words(g); word++)
                to[t / 64 * block + pkv_geom_sig_index(g, h, t % 64, word)] =
                    distinct ? some[which] * (2 * word + 1) : below(UINT32_MAX);
    }
    CUDA(cudaMemcpy(d->signatures, to, w->blocks * block * 4, cudaMemcpyHostToDevice));
}

/* One call by the device's weights; work holds what it left. */
static inline void check_integers(const struct world *w, const struct on_device *d)
{
    uint64_t heads = (uint64_t)d->a.queries * w->g.q_heads;
    MUST(table->call(&d->a, NULL) == 0);
    CUDA(cudaDeviceSynchronize());
    float *out = host_copy(d->a.out, heads * w->g.head_dim * 4), *lse = host_copy(d->a.lse, heads * 4);
    check_lists(w, d, false, out, lse);
    free(out), free(lse);
}

/* The world's signatures and the call's rule are others afterwards. Lengths shrink and grow between calls, as they do between
 * the replays of a graph, so that thresholds lie far from those of the call before. */
static inline void check_rules(struct world *w, struct on_device *d, uint32_t rounds)
{
    static const uint32_t distinct[] = {0, 0, 1, 3};
    uint32_t team = d->a.team, tokens = w->tokens;
    d->a.weighed = 1, d->a.policy.dense_below = 0, d->a.policy.top_p = w->policy.top_p = 0;
    for (uint32_t round = 0; round < rounds; round++) {
        enum weights kind = (enum weights)below(WEIGHTS);
        uint32_t same = distinct[below(4)];
        w->policy.rule = d->a.policy.rule = below(2) ? PKV_RULE_SUM : PKV_RULE_MAX;
        uint32_t fewer = 1 + below(tokens);
        w->tokens = below(2) ? tokens : PKV_MAX(fewer, w->queries);
        printf("  rule %u weights %u distinct %u tokens %u\n", w->policy.rule, kind, same, w->tokens);
        struct cuda_seq seqs[2] = {{d->refs, w->tokens}, {d->refs, 1 + below(w->tokens)}};
        CUDA(cudaMemcpy(d->seqs, seqs, sizeof(seqs), cudaMemcpyHostToDevice));
        signatures_put(w, d, same);
        weights_put(w, d, kind);
        d->a.team = below(4) ? team : 0;
        check_integers(w, d);
    }
    d->a.team = team, d->a.weighed = 0, w->tokens = tokens;
}

#endif
