/* The kernels against a second, naive reference (double precision, sorting), and every instruction set against plain C bit
 * for bit, over random shapes with ragged tails.
 * usage: check_kernels [SEED [CASES]]
 *        check_kernels --bench [TOKENS]   times each kernel of each instruction set instead */
#include "tests/kernels/world.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Everything that one table of kernels makes of a world. */
struct result {
    struct gpu_rows rows;
    float *out, *lse, *dense_out, *dense_lse, *state;
    char *gathered;
};

static void fill(struct gpu *gpu, struct gpu_scheme *scheme, struct world *w)
{
    uint32_t cut = below(w->tokens); /* two appends: ragged borders */
    uint64_t bytes = (uint64_t)w->g.kv_heads * w->g.head_dim * pkv_dtype_bytes(w->g.dtype);
    gpu_scheme_observe(scheme, &(struct gpu_observation){.layer = 1, .tokens = w->tokens, .context = w->tokens, .k = w->k});
    for (uint32_t first = 0; first < w->tokens; first = first ? w->tokens : cut ? cut : w->tokens) {
        uint32_t n = first || !cut ? w->tokens - first : cut;
        struct gpu_append_args a = {
            &w->g, w->space, w->refs, first, n, (char *)w->k + first * bytes, (char *)w->v + first * bytes, 0, 0};
        MUST(gpu_append(gpu, &a) == 0);
        struct gpu_sign_args s = {&w->g, w->space, scheme, 1, w->refs, first, n};
        MUST(gpu_sign(gpu, &s) == 0);
    }
}

static void run(struct gpu *gpu, struct gpu_scheme *scheme, struct world *w, struct result *r)
{
    uint64_t heads = (uint64_t)w->queries * w->g.q_heads, lists = (uint64_t)w->queries * w->g.kv_heads;
    r->rows.rows_max = w->policy.k + w->policy.sinks + w->policy.recent;
    uint64_t entries = lists * r->rows.rows_max;
    r->rows.index = take(entries * 4), r->rows.count = take(lists * 4), r->rows.score = take(entries * 2);
    memset(r->rows.index, 0, entries * 4);
    r->out = take(heads * w->g.head_dim * 4), r->lse = take(heads * 4), r->state = take(heads * 8);
    r->dense_out = take(heads * w->g.head_dim * 4), r->dense_lse = take(heads * 4);
    r->gathered = take(entries * pkv_geom_row_bytes(&w->g));
    struct gpu_weights_args weights = {&w->g, scheme, 1, w->queries, 0, w->q, w->weights, w->scales};
    MUST(gpu_weights(gpu, &weights) == 0);
    struct gpu_select_args a = {&w->g, w->space, w->policy, 1, &w->view, w->q, w->weights, w->scales, NULL};
    MUST(gpu_select(gpu, &a, &r->rows) == 0);
    MUST(gpu_gather(gpu, &a, &r->rows, r->gathered) == 0);
    MUST(gpu_attend_rows(gpu, &a, &r->rows, NULL, r->out, r->lse) == 0);
    float *again = take(heads * w->g.head_dim * 4);
    MUST(gpu_attend_rows(gpu, &a, &r->rows, r->gathered, again, NULL) == 0);
    MUST(!memcmp(again, r->out, heads * w->g.head_dim * 4)); /* gathered rows give the same bits */
    free(again);
    uint32_t cut = below(w->blocks + 1);
    struct gpu_dense_args d = {.geom = &w->g,
                               .space = w->space,
                               .seqs = 1,
                               .views = &w->view,
                               .q = w->q,
                               .blocks = cut,
                               .start = true,
                               .out = r->dense_out,
                               .max = r->state,
                               .sum = r->state + heads,
                               .lse = r->dense_lse};
    MUST(gpu_dense(gpu, &d) == 0);
    d.first_block = cut, d.blocks = UINT32_MAX, d.start = false, d.finish = true;
    for (uint32_t head = 0; head < w->g.kv_heads; head++) { /* the heads one by one give what all at once give */
        d.first_head = head, d.heads = 1;
        MUST(gpu_dense(gpu, &d) == 0);
    }
    d.heads = 2;
    MUST(gpu_dense(gpu, &d) == -PKV_ERR_SHAPE);
}

static void result_free(struct result *r)
{
    free(r->rows.index), free(r->rows.count), free(r->rows.score), free(r->out), free(r->lse), free(r->state);
    free(r->dense_out), free(r->dense_lse), free(r->gathered);
}

static void check_same(const struct world *w, const struct result *a, const struct result *b)
{
    uint64_t heads = (uint64_t)w->queries * w->g.q_heads, lists = (uint64_t)w->queries * w->g.kv_heads;
    MUST(!memcmp(a->rows.count, b->rows.count, lists * 4));
    for (uint64_t l = 0; l < lists; l++) {
        uint64_t at = l * a->rows.rows_max;
        MUST(!memcmp(a->rows.index + at, b->rows.index + at, a->rows.count[l] * 4ull));
        MUST(!memcmp(a->rows.score + at, b->rows.score + at, a->rows.count[l] * 2ull));
    }
    MUST(!memcmp(a->out, b->out, heads * w->g.head_dim * 4) && !memcmp(a->lse, b->lse, heads * 4));
    MUST(!memcmp(a->dense_out, b->dense_out, heads * w->g.head_dim * 4) && !memcmp(a->dense_lse, b->dense_lse, heads * 4));
}

/* The list from its definition: integer scores bit by bit from the rotation's signs in the blocks, then a stable order.
 * Only the integer rules are repeated exactly; for softmax the scores that select reports are checked for order. */
static int32_t naive_score(const struct world *w, uint32_t query, uint32_t head, uint32_t token)
{
    const struct pkv_geom *g = &w->g;
    const uint32_t *sig = (const uint32_t *)(uintptr_t)(w->pool[5] + (token / 64) * pkv_geom_sig_block_bytes(g));
    int32_t total = 0, best = INT32_MIN;
    for (uint32_t h = 0; h < pkv_geom_group(g); h++) {
        int32_t s = 0;
        uint64_t at = ((uint64_t)query * g->q_heads + head * pkv_geom_group(g) + h) * g->sig_bits;
        for (uint32_t b = 0; b < g->sig_bits; b++)
            s += (int32_t)(sig[pkv_geom_sig_index(g, head, token % 64, b / 32)] >> b % 32 & 1) * w->weights[at + b];
        total += s, best = s > best ? s : best;
    }
    return w->policy.rule == PKV_RULE_SUM ? total : best;
}

static void check_list(const struct world *w, const struct result *r, uint32_t query, uint32_t head)
{
    uint64_t list = (uint64_t)query * w->g.kv_heads + head, at = list * r->rows.rows_max;
    const uint32_t *index = r->rows.index + at, count = r->rows.count[list];
    uint32_t visible = w->tokens - w->queries + 1 + query, first = PKV_MIN(w->policy.sinks, visible);
    uint32_t last = visible - PKV_MIN(w->policy.recent, visible - first), chosen = 0;
    for (uint32_t i = 0; i < count; i++) {
        MUST(index[i] < visible && (!i || index[i] > index[i - 1]));
        chosen += index[i] >= first && index[i] < last;
    }
    MUST(count == first + (visible - last) + chosen && chosen <= PKV_MIN(w->policy.k, last - first));
    MUST(w->policy.top_p > 0 || chosen == PKV_MIN(w->policy.k, last - first));
    if (w->policy.rule == PKV_RULE_SOFTMAX)
        return;
    /* A token is chosen if and only if fewer than k candidates come before it: higher code, or equal and lower index. */
    uint16_t *code = take(visible * 2ull);
    int32_t low = INT32_MAX, shift_low = 0, shift_high = 0, least = INT32_MAX, most = INT32_MIN;
    for (uint32_t h = 0; h < pkv_geom_group(&w->g); h++) {
        int32_t n = 0, p = 0;
        for (uint32_t b = 0; b < w->g.sig_bits; b++) {
            int8_t x = w->weights[((uint64_t)query * w->g.q_heads + head * pkv_geom_group(&w->g) + h) * w->g.sig_bits + b];
            *(x < 0 ? &n : &p) += x;
        }
        shift_low += n, shift_high += p, least = PKV_MIN(least, n), most = PKV_MAX(most, p);
    }
    low = w->policy.rule == PKV_RULE_SUM ? shift_low : least;
    uint32_t shift = gpu_code_shift(low, w->policy.rule == PKV_RULE_SUM ? shift_high : most);
    for (uint32_t t = first; t < last; t++)
        code[t] = gpu_code_integer(naive_score(w, query, head, t), low, shift);
    for (uint32_t t = first, i = first; t < last; t++) {
        uint32_t before = 0;
        for (uint32_t o = first; o < last; o++)
            before += code[o] > code[t] || (code[o] == code[t] && o < t);
        bool listed = i < count && index[i] == t;
        MUST(listed == (before < w->policy.k));
        MUST(!listed || r->rows.score[at + i] == code[t]);
        i += listed;
    }
    free(code);
}

static void check_naive(const struct world *w, const struct result *r)
{
    for (uint32_t query = 0; query < w->queries; query++) {
        for (uint32_t head = 0; head < w->g.kv_heads; head++)
            check_list(w, r, query, head);
        for (uint32_t q_head = 0; q_head < w->g.q_heads; q_head += 1 + below(4)) {
            uint64_t at = (uint64_t)query * w->g.q_heads + q_head;
            uint64_t list = (uint64_t)query * w->g.kv_heads + q_head / pkv_geom_group(&w->g);
            naive_attend(w, query, q_head, r->rows.index + list * r->rows.rows_max, r->rows.count[list],
                         r->out + at * w->g.head_dim, r->lse[at]);
            naive_attend(w, query, q_head, NULL, w->tokens - w->queries + 1 + query, r->dense_out + at * w->g.head_dim,
                         r->dense_lse[at]);
        }
    }
}

static void check_case(void)
{
    static const struct gpu_options options[] = {
        {.isa = "c", .threads = 1}, {.isa = "c", .threads = 3}, {.isa = "avx2", .threads = 2}, {.isa = "avx512", .threads = 2}};
    struct world w = world_random();
    struct result first = {0};
    for (size_t i = 0; i < PKV_ARRAY_LEN(options); i++) {
        struct gpu *gpu;
        int opened = gpu_open(&options[i], &gpu);
        if (opened == -PKV_ERR_UNSUPPORTED && i >= 2)
            continue;
        MUST(opened == 0);
        struct gpu_scheme *scheme;
        uint8_t digest[PKV_DIGEST_BYTES];
        MUST(gpu_scheme_open(PKV_SCHEME_SIGN, &w.g, NULL, &scheme, digest) == 0);
        uint64_t seed = state;
        struct result r = {0};
        fill(gpu, scheme, &w);
        run(gpu, scheme, &w, &r);
        state = seed;
        if (i == 0) {
            check_naive(&w, &r);
            first = r;
        } else {
            check_same(&w, &first, &r);
            result_free(&r);
        }
        gpu_scheme_close(scheme);
        gpu_close(gpu);
    }
    result_free(&first);
    world_free(&w);
}

static void check_refusals(void)
{
    struct gpu_options options = {.backend = "host", .threads = 1};
    struct gpu *gpu;
    MUST(gpu_open(&(struct gpu_options){.backend = "abacus"}, &gpu) == -PKV_ERR_UNSUPPORTED);
    MUST(gpu_open(&(struct gpu_options){.isa = "abacus"}, &gpu) == -PKV_ERR_UNSUPPORTED);
    MUST(gpu_open(&options, &gpu) == 0);
    state = 5;
    struct world w = world_random();
    struct gpu_append_args a = {&w.g, w.space, w.refs, 0, w.tokens, w.k, w.v, 0, 0};
    memset((char *)w.v, 0xff, 4); /* NaN in every dtype */
    char *before = take(64);
    memcpy(before, (void *)(uintptr_t)w.pool[3], 64);
    MUST(gpu_append(gpu, &a) == -PKV_ERR_NOT_FINITE);
    MUST(!memcmp(before, (void *)(uintptr_t)w.pool[3], 64));
    a.first_token = PKV_SEQ_TOKENS_MAX;
    MUST(gpu_append(gpu, &a) == -PKV_ERR_LENGTH);
    w.pool[3] ^= 0; /* an unmapped chunk is refused, not followed */
    struct gpu_space none = {{w.arena, w.arena, w.arena}};
    a.first_token = 0, a.space = none;
    MUST(gpu_append(gpu, &a) == -PKV_ERR_RANGE);
    free(before);
    world_free(&w);
    gpu_close(gpu);
}

/* ---- benchmark: a Llama-3.1-8B layer; bytes that a kernel must read or write against a plain sum over the rows ---- */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double plain_sum(const uint64_t *data, uint64_t bytes)
{
    double begin = now();
    uint64_t sum = 0;
    for (uint64_t i = 0; i < bytes / 8; i++)
        sum += data[i];
    double seconds = now() - begin;
    MUST(sum != 1); /* used: the loop stays */
    return (double)bytes / seconds * 1e-9;
}

static struct world bench_world(uint32_t tokens)
{
    struct world w = {.g = {.layers = 2, .q_heads = 32, .kv_heads = 8, .head_dim = 128, .dtype = PKV_F16, .sig_bits = 128},
                      .tokens = tokens,
                      .queries = 1,
                      .policy = {.k = 2048, .sinks = 128, .recent = 128}};
    world_data(&w);
    world_places(&w);
    return w;
}

#define TIMED(label, bytes, call)                                                                                          \
    do {                                                                                                                   \
        double best = 1e9;                                                                                                 \
        for (int round = 0; round < 5; round++) {                                                                          \
            double begin = now();                                                                                          \
            MUST((call) == 0);                                                                                             \
            best = PKV_MIN(best, now() - begin);                                                                           \
        }                                                                                                                  \
        printf("%-8s %-8s %9.3f ms %8.2f GB/s %6.1f %% of the plain sum\n", isa, label, best * 1e3, (bytes) / best * 1e-9, \
               (bytes) / best * 1e-7 / peak);                                                                              \
    } while (0)

static void bench_isa(const char *isa, struct world *w, double peak)
{
    struct gpu_options options = {.isa = isa, .threads = 1};
    struct gpu *gpu;
    struct gpu_scheme *scheme;
    uint8_t digest[PKV_DIGEST_BYTES];
    if (gpu_open(&options, &gpu))
        return;
    MUST(gpu_scheme_open(PKV_SCHEME_SIGN, &w->g, NULL, &scheme, digest) == 0);
    gpu_scheme_observe(scheme, &(struct gpu_observation){.layer = 1, .tokens = w->tokens, .context = w->tokens, .k = w->k});
    double rows = (double)w->tokens * w->g.kv_heads * (double)pkv_geom_row_bytes(&w->g), signatures = rows / 32;
    uint32_t rows_max = w->policy.k + w->policy.sinks + w->policy.recent;
    double chosen = (double)rows_max * w->g.kv_heads * (double)pkv_geom_row_bytes(&w->g);
    struct gpu_rows lists = {rows_max, take(rows_max * 8 * 4), take(8 * 4), NULL};
    float *out = take(32 * 128 * 4), *lse = take(32 * 4), *sums = take(64 * 4);
    void *gathered = take((uint64_t)chosen);
    struct gpu_append_args append = {&w->g, w->space, w->refs, 0, w->tokens, w->k, w->v, 0, 0};
    struct gpu_sign_args sign = {&w->g, w->space, scheme, 1, w->refs, 0, w->tokens};
    struct gpu_weights_args weights = {&w->g, scheme, 1, 1, 0, w->q, w->weights, w->scales};
    struct gpu_select_args select = {&w->g, w->space, w->policy, 1, &w->view, w->q, w->weights, w->scales, NULL};
    struct gpu_dense_args dense = {.geom = &w->g,
                                   .space = w->space,
                                   .seqs = 1,
                                   .views = &w->view,
                                   .q = w->q,
                                   .blocks = UINT32_MAX,
                                   .start = true,
                                   .finish = true,
                                   .out = out,
                                   .max = sums,
                                   .sum = sums + 32,
                                   .lse = lse};
    TIMED("append", 2 * rows, gpu_append(gpu, &append));
    TIMED("sign", rows / 2 + signatures, gpu_sign(gpu, &sign));
    TIMED("weights", 32.0 * 128 * 3, gpu_weights(gpu, &weights));
    TIMED("select", signatures, gpu_select(gpu, &select, &lists));
    TIMED("gather", 2 * chosen, gpu_gather(gpu, &select, &lists, gathered));
    TIMED("attend", chosen, gpu_attend_rows(gpu, &select, &lists, NULL, out, lse));
    TIMED("dense", rows, gpu_dense(gpu, &dense));
    free(lists.index), free(lists.count), free(out), free(lse), free(sums), free(gathered);
    gpu_scheme_close(scheme);
    gpu_close(gpu);
}

static void bench(uint32_t tokens)
{
    static const char *const isas[] = {"c", "avx2", "avx512"};
    struct world w = bench_world(PKV_ALIGN_UP(PKV_MAX(tokens, 4096u), 64u));
    double peak = plain_sum(w.k, (uint64_t)w.tokens * 8 * 128 * 2);
    printf("%u tokens, 32 q / 8 kv heads x 128, f16, 128 bits, k 2048, one thread; plain sum %.1f GB/s\n", w.tokens, peak);
    for (size_t i = 0; i < PKV_ARRAY_LEN(isas); i++)
        bench_isa(isas[i], &w, peak);
    world_free(&w);
}

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "--bench")) {
        bench(argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 0) : 65536);
        return 0;
    }
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1, cases = argc > 2 ? strtoull(argv[2], NULL, 0) : 60;
    check_refusals();
    for (uint64_t i = 0; i < cases; i++) {
        state = seed * 1000003 + i;
        printf("seed %" PRIu64 " case %" PRIu64 ": ", seed, i);
        check_case();
    }
    printf("%" PRIu64 " cases\n", cases);
    return 0;
}
