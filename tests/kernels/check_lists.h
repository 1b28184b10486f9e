/* What a call chose, by definition: codes from the device's own weights, exactly the k best of them, exact attention over the
 * list. For check_cuda. */
#ifndef TESTS_KERNELS_CHECK_LISTS_H
#define TESTS_KERNELS_CHECK_LISTS_H

#include "tests/kernels/on_device.h"

struct list {
    uint32_t visible, first, last, count;
    const uint16_t *codes, *scores;
    const uint32_t *index;
};

/* The code of a token from the device's own weights, scales and biases, as code.h defines it. */
static inline uint32_t integer_expected(const struct world *w, const int8_t *weights, const uint32_t *sig, uint32_t head,
                                        uint32_t token)
{
    const struct pkv_geom *g = &w->g;
    bool add = w->policy.rule == PKV_RULE_SUM;
    int32_t low = 0, high = 0, score = 0;
    for (uint32_t h = 0; h < pkv_geom_group(g); h++) {
        int32_t s = 0, negative = 0, positive = 0;
        for (uint32_t b = 0; b < g->sig_bits; b++) {
            int32_t x = weights[h * g->sig_bits + b];
            s += (int32_t)(sig[pkv_geom_sig_index(g, head, token % 64, b / 32)] >> b % 32 & 1) * x;
            negative += x < 0 ? x : 0, positive += x > 0 ? x : 0;
        }
        score = add ? score + s : h && score > s ? score : s;
        low = add ? low + negative : h && low < negative ? low : negative;
        high = add ? high + positive : h && high > positive ? high : positive;
    }
    return gpu_code_integer(score, low, gpu_code_shift(low, high));
}

static inline uint32_t code_expected(const struct world *w, const int8_t *weights, const float *scales, const float *biases,
                                     uint32_t head, uint32_t token)
{
    const struct pkv_geom *g = &w->g;
    const uint32_t *sig = (const uint32_t *)(uintptr_t)(w->pool[5] + (token / 64) * pkv_geom_sig_block_bytes(g));
    float sum = 0;
    if (w->policy.rule != PKV_RULE_SOFTMAX)
        return integer_expected(w, weights, sig, head, token);
    for (uint32_t h = 0; h < pkv_geom_group(g); h++) {
        int32_t s = 0;
        for (uint32_t b = 0; b < g->sig_bits; b++)
            s += (int32_t)(sig[pkv_geom_sig_index(g, head, token % 64, b / 32)] >> b % 32 & 1) * weights[h * g->sig_bits + b];
        sum += gpu_exp2(fmaf((float)s, scales[h], biases[h]));
    }
    return gpu_code_softmax(sum);
}

/* k as the host's budget finds it. */
static inline uint32_t budget_expected(const struct world *w, const struct list *l)
{
    static uint32_t histogram[GPU_CODE_SOFTMAX_MAX + 1];
    uint32_t k = PKV_MIN(w->policy.k, l->last - l->first), group = pkv_geom_group(&w->g), taken = 0;
    if (w->policy.top_p <= 0)
        return k;
    memset(histogram, 0, sizeof(histogram));
    double total = group;
    for (uint32_t t = l->first; t < l->last; t++)
        histogram[l->codes[t]]++, total += gpu_code_mass(l->codes[t]);
    double missing = (double)w->policy.top_p * total - group;
    for (uint32_t c = GPU_CODE_SOFTMAX_MAX; c > 0 && missing > 0 && taken < k; c--) {
        double each = gpu_code_mass(c);
        taken += histogram[c] * each < missing ? histogram[c] : (uint32_t)ceil(missing / each);
        missing -= histogram[c] * each;
    }
    return PKV_MIN(taken, k);
}

static inline void check_list(const struct world *w, const struct list *l)
{
    uint32_t ends = l->first + l->visible - l->last, k = l->count - ends, expected = budget_expected(w, l), i = l->first;
    MUST(l->count >= ends && k + 1 >= expected && k <= expected + (w->policy.top_p > 0));
    static uint32_t above[GPU_CODES + 1];
    memset(above, 0, sizeof(above));
    for (uint32_t t = l->first; t < l->last; t++)
        above[l->codes[t]]++;
    for (uint32_t c = GPU_CODES; c-- > 0;)
        above[c] += above[c + 1];
    uint32_t ties = 0, threshold = GPU_CODES;
    while (k && above[threshold] < k)
        threshold--;
    for (uint32_t t = 0; t < l->first; t++)
        MUST(l->index[t] == t);
    for (uint32_t t = l->first; t < l->last; t++) {
        bool tie = k && l->codes[t] == threshold;
        if (!k || l->codes[t] < threshold || (tie && above[threshold + 1] + ties >= k))
            continue;
        ties += tie;
        MUST(i < l->count && l->index[i] == t && l->scores[i] == l->codes[t]);
        i++;
    }
    for (uint32_t t = l->last; t < l->visible; t++, i++)
        MUST(l->index[i] == t);
    MUST(i == l->count);
}

static inline void check_lists(const struct world *w, const struct on_device *d, bool dense, const float *out, const float *lse)
{
    const struct cuda_attend *a = &d->a;
    const struct pkv_geom *g = &w->g;
    uint64_t lists = (uint64_t)a->queries * g->kv_heads, heads = (uint64_t)a->queries * g->q_heads;
    uint64_t stride = PKV_ALIGN_UP(a->tokens_max, 64u), rows = cuda_rows_max(&a->policy);
    uint16_t *codes = host_copy(a->work.codes, lists * stride * 2), *scores = host_copy(a->work.scores, lists * rows * 2);
    uint32_t *index = host_copy(a->work.index, lists * rows * 4), *chosen = host_copy(a->work.chosen, lists * 4);
    int8_t *weights = host_copy(a->work.weights, heads * g->sig_bits);
    float *scales = host_copy(a->work.scales, heads * 4), *biases = host_copy(a->work.biases, heads * 4);
    struct cuda_seq *seqs = host_copy(d->seqs, 2 * sizeof(*seqs));
    uint64_t compared = 0, differ = 0;
    for (uint32_t query = 0; query < a->queries; query++)
        for (uint32_t head = 0; head < g->kv_heads; head++) {
            uint64_t list = (uint64_t)query * g->kv_heads + head,
                     q_head = (uint64_t)query * g->q_heads + head * pkv_geom_group(g);
            struct list l = {seen_by(w, seqs, query), 0, 0, chosen[list], codes + list * stride, scores + list * rows,
                             index + list * rows};
            l.first = PKV_MIN(w->policy.sinks, l.visible);
            l.last = l.visible - PKV_MIN(w->policy.recent, l.visible - l.first);
            bool all = dense || l.last - l.first <= w->policy.k;
            if (!all)
                check_list(w, &l);
            for (uint32_t t = l.first; t < l.last && !all && g->sig_bits; t += 1 + below(5)) {
                int expected = (int)code_expected(w, weights + q_head * g->sig_bits, scales + q_head, biases + q_head, head, t);
                MUST(abs(expected - l.codes[t]) <= (w->policy.rule == PKV_RULE_SOFTMAX));
                compared++, differ += expected != l.codes[t];
            }
            for (uint32_t h = 0; h < pkv_geom_group(g); h += 1 + below(4)) {
                /* The extra query repeats the first one's numbers. */
                uint32_t same = query < w->queries ? query : 0;
                naive_attend(w, same, head * pkv_geom_group(g) + h, all ? NULL : l.index, all ? l.visible : l.count,
                             out + (q_head + h) * g->head_dim, lse[q_head + h]);
            }
        }
    MUST(differ * 2 <= compared + 8); /* one step where rounding decides, not a shift of all */
    free(codes), free(scores), free(index), free(chosen), free(weights), free(scales), free(biases), free(seqs);
}

#endif
