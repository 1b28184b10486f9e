/* The CUDA kernels against the host backend and against definitions, over random shapes with ragged tails:
 *   append, sign     rows and signatures equal the host's bit for bit
 *   query            weights and scales likewise
 *   scan             codes equal gpu/code.h's but for one step, where the exponential's rounding decides
 *   pick             exactly the k best of the device's own codes, ties to the lower index
 *   attend, gather   exact attention in double precision over the device's list; rows byte for byte
 *   cache            rows that a second call finds in the row cache are the arena's, and the counters say how many
 *   graph            a captured call, replayed while its sequences grow over block borders, equals a fresh call
 * usage: check_cuda [SEED [CASES]] */
#include "tests/kernels/device.h"
#include "tests/kernels/schemes.h"
#include "tests/lib/text.h"

#include <inttypes.h>
#include <string.h>
#include <unistd.h>

static const struct cuda_table *table;

struct on_device {
    char *pool, *arena, *signatures;
    uint64_t *bases;
    struct pkv_block_ref *refs;
    struct cuda_seq *seqs;
    struct cuda_query *queries;
    void *q, *work, *scheme_memory;
    uint64_t entries; /* bytes */
    struct cuda_attend a;
};

/* ---- setting up ---- */

static void host_fill(struct gpu *gpu, struct gpu_scheme *scheme, struct world *w)
{
    gpu_scheme_observe(scheme, &(struct gpu_observation){.layer = 1, .tokens = w->tokens, .context = w->tokens, .k = w->k});
    struct gpu_append_args a = {&w->g, w->space, w->refs, 0, w->tokens, w->k, w->v, 0, 0};
    struct gpu_sign_args s = {&w->g, w->space, scheme, 1, w->refs, 0, w->tokens};
    MUST(gpu_append(gpu, &a) == 0 && gpu_sign(gpu, &s) == 0);
}

/* From one set, where nearly everything is pushed out, to more than all rows need. */
static void cache_open(const struct world *w, struct on_device *d)
{
    uint32_t sets = below(4) ? 1 + below(w->tokens) : 0;
    uint64_t ways = 2ull * w->g.kv_heads * sets * CUDA_WAYS;
    if (!sets)
        return;
    d->entries = ways * 8;
    d->a.cache = (struct cuda_cache){.entries = device_take(d->entries),
                                     .rows = device_take(ways * pkv_geom_row_bytes(&w->g)),
                                     .counters = device_take(CUDA_COUNTERS * 8),
                                     .sets = sets};
    CUDA(cudaMemset(d->a.cache.entries, 0, d->entries));
    CUDA(cudaMemset(d->a.cache.counters, 0, CUDA_COUNTERS * 8));
}

/* Query i of the world sees what it sees on the host; a second sequence, shorter, shares the blocks. */
static void device_open(const struct world *w, const struct gpu_scheme *scheme, struct on_device *d)
{
    uint64_t rows = w->blocks * pkv_geom_block_bytes(&w->g), signatures = w->blocks * pkv_geom_sig_block_bytes(&w->g);
    uint64_t *bases = calloc(2ull * PKV_CHUNKS_MAX, 8);
    MUST(bases);
    *d = (struct on_device){.pool = device_take(rows), .signatures = device_take(signatures)};
    CUDA(cudaHostAlloc((void **)&d->arena, rows, cudaHostAllocMapped)); /* the arena is the CPU's memory */
    CUDA(cudaMemset(d->pool, 0, rows));
    CUDA(cudaMemset(d->signatures, 0, signatures));
    memset(d->arena, 0, rows);
    bases[3] = (uintptr_t)d->pool, bases[5] = (uintptr_t)d->signatures;
    bases[PKV_CHUNKS_MAX + 7] = (uintptr_t)d->arena;
    d->bases = device_copy(bases, 2ull * PKV_CHUNKS_MAX * 8);
    d->refs = device_copy(w->refs, w->blocks * sizeof(*w->refs));
    struct cuda_seq seqs[2] = {{d->refs, w->tokens}, {d->refs, 1 + below(w->tokens)}};
    d->seqs = device_copy(seqs, sizeof(seqs));
    struct cuda_query *queries = take((w->queries + 1) * sizeof(*queries));
    for (uint32_t i = 0; i < w->queries; i++)
        queries[i] = (struct cuda_query){0, w->queries - 1 - i};
    queries[w->queries] = (struct cuda_query){1, 0};
    d->queries = device_copy(queries, (w->queries + 1) * sizeof(*queries));
    uint64_t each = (uint64_t)w->g.q_heads * w->g.head_dim * pkv_dtype_bytes(w->g.dtype);
    d->q = device_take((w->queries + 1) * each);
    CUDA(cudaMemcpy(d->q, w->q, w->queries * each, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy((char *)d->q + w->queries * each, w->q, each, cudaMemcpyHostToDevice)); /* the first query again */
    free(queries), free(bases);
    d->a = (struct cuda_attend){.geom = w->g,
                                .policy = {.k = w->policy.k,
                                           .sinks = w->policy.sinks,
                                           .recent = w->policy.recent,
                                           .rule = w->policy.rule,
                                           .top_p = w->policy.top_p,
                                           .scale = 1.0f / sqrtf(w->g.head_dim)},
                                .base = {NULL, d->bases, d->bases + PKV_CHUNKS_MAX},
                                .seqs = d->seqs,
                                .query = d->queries,
                                .q = d->q,
                                .layer = 1,
                                .queries = w->queries + 1,
                                .tokens_max = w->tokens};
    MUST(cuda_grid(&d->a) == 0);
    d->a.parts = 1 + below(33), d->a.splits = 1 + below(16);
    uint32_t smaller = 2u << below(4);
    d->a.team = d->a.team > smaller ? smaller : d->a.team;
    d->a.flags = CUDA_KEEP;
    MUST(cuda_scheme_upload(scheme, &d->a.scheme, &d->scheme_memory) == 0);
    uint64_t heads = (uint64_t)d->a.queries * w->g.q_heads, bytes = cuda_work_bytes(&d->a);
    d->work = device_take(bytes);
    CUDA(cudaMemset(d->work, 0, bytes));
    cuda_work_bind(&d->a, d->work);
    d->a.out = device_take(heads * w->g.head_dim * 4), d->a.lse = device_take(heads * 4);
    CUDA(cudaMemset(d->a.out, 0xff, heads * w->g.head_dim * 4));
    cache_open(w, d);
}

static void device_close(struct on_device *d)
{
    CUDA(cudaFree(d->a.cache.entries));
    CUDA(cudaFree(d->a.cache.rows));
    CUDA(cudaFree(d->a.cache.counters));
    CUDA(cudaFreeHost(d->arena));
    void *all[] = {d->pool, d->signatures, d->bases, d->refs, d->seqs, d->queries, d->q, d->work, d->a.out, d->a.lse};
    for (size_t i = 0; i < PKV_ARRAY_LEN(all); i++)
        CUDA(cudaFree(all[i]));
    cuda_scheme_free(d->scheme_memory);
}

/* ---- the steps ---- */

static void check_written(const struct world *w, const struct on_device *d)
{
    uint64_t rows = w->blocks * pkv_geom_block_bytes(&w->g), signatures = w->blocks * pkv_geom_sig_block_bytes(&w->g);
    char *pool = host_copy(d->pool, rows), *sig = host_copy(d->signatures, signatures);
    MUST(!memcmp(sig, (void *)(uintptr_t)w->pool[5], signatures) || d->a.scheme.kind == PKV_SCHEME_HASH);
    MUST(bits_apart(sig, (void *)(uintptr_t)w->pool[5], signatures / 4) <= 2); /* `hash`: the exponentials' last bits */
    for (uint32_t t = 0; t < w->tokens; t++)
        for (uint32_t h = 0; h < w->g.kv_heads; h++) {
            uint64_t place = w->refs[t / 64].rows, at = pkv_place_slot(place) * pkv_geom_block_bytes(&w->g);
            bool hot = pkv_place_tier(place) == PKV_TIER_POOL;
            at += pkv_geom_row_offset(&w->g, h, t % 64);
            MUST(!memcmp((hot ? pool : d->arena) + at, (char *)(uintptr_t)(hot ? w->pool[3] : w->arena[7]) + at,
                         pkv_geom_row_bytes(&w->g)));
        }
    free(pool), free(sig);
}

/* Rows alone, then their signatures where they lie. */
static void check_apart(const struct world *w, const struct on_device *d, struct cuda_append append)
{
    uint64_t rows = w->blocks * pkv_geom_block_bytes(&w->g), signatures = w->blocks * pkv_geom_sig_block_bytes(&w->g);
    struct cuda_seq seq = {d->refs, w->tokens};
    CUDA(cudaMemset(d->pool, 0, rows));
    CUDA(cudaMemset(d->signatures, 0, signatures));
    memset(d->arena, 0, rows);
    CUDA(cudaMemcpy(d->seqs, &seq, sizeof(seq), cudaMemcpyHostToDevice));
    append.tokens = w->tokens, append.scheme.kind = PKV_SCHEME_NONE;
    MUST(table->append(&append, NULL) == 0);
    append.k = append.v = NULL;
    MUST(table->append(&append, NULL) == -PKV_ERR_SHAPE);
    append.scheme = d->a.scheme;
    MUST(table->append(&append, NULL) == 0);
    CUDA(cudaDeviceSynchronize());
    check_written(w, d);
}

static void check_append(const struct world *w, struct on_device *d)
{
    uint64_t numbers = (uint64_t)w->tokens * w->g.kv_heads * w->g.head_dim, bytes = numbers * pkv_dtype_bytes(w->g.dtype);
    uint32_t cut = below(w->tokens), zero = 0;
    char *k = device_copy(w->k, bytes), *v = device_copy(w->v, bytes);
    uint64_t each = bytes / w->tokens;
    struct cuda_append append = {.geom = w->g,
                                 .scheme = d->a.scheme,
                                 .base = {NULL, d->a.base[1], d->a.base[2]},
                                 .seqs = d->seqs,
                                 .bad = device_copy(&zero, 4),
                                 .layer = 1,
                                 .count = 1};
    struct cuda_seq seq = {d->refs, cut};
    for (uint32_t first = 0; first < w->tokens; first = first ? w->tokens : cut ? cut : w->tokens) {
        append.tokens = first || !cut ? w->tokens - first : cut;
        append.k = k + first * each, append.v = v + first * each, seq.tokens = first + append.tokens;
        CUDA(cudaMemcpy(d->seqs, &seq, sizeof(seq), cudaMemcpyHostToDevice));
        MUST(table->append(&append, NULL) == 0);
        CUDA(cudaDeviceSynchronize());
    }
    check_written(w, d);
    append.k = k, append.v = v;
    check_apart(w, d, append);
    uint32_t *bad = host_copy(append.bad, 4);
    MUST(*bad == 0);
    CUDA(cudaFree(k));
    CUDA(cudaFree(v));
    CUDA(cudaFree(append.bad));
    free(bad);
}

static uint32_t seen_by(const struct world *w, const struct cuda_seq *seqs, uint32_t query)
{
    return query < w->queries ? w->tokens - (w->queries - 1 - query) : (uint32_t)seqs[1].tokens;
}

static void check_query(struct gpu *gpu, struct gpu_scheme *scheme, const struct world *w, const struct on_device *d)
{
    uint64_t heads = (uint64_t)w->queries * w->g.q_heads;
    struct gpu_weights_args weights = {&w->g, scheme, 1, w->queries, 0, w->q, w->weights, w->scales};
    MUST(gpu_weights(gpu, &weights) == 0);
    int8_t *got = host_copy(d->a.work.weights, heads * w->g.sig_bits);
    float *scales = host_copy(d->a.work.scales, heads * 4);
    struct cuda_seq *seqs = host_copy(d->seqs, 2 * sizeof(*seqs));
    for (uint32_t query = 0; query < w->queries; query++) {
        uint32_t visible = seen_by(w, seqs, query), first = PKV_MIN(w->policy.sinks, visible);
        if (visible - first - PKV_MIN(w->policy.recent, visible - first) <= w->policy.k)
            continue; /* dense: nobody needs weights */
        uint64_t at = (uint64_t)query * w->g.q_heads;
        MUST(!memcmp(got + at * w->g.sig_bits, w->weights + at * w->g.sig_bits, (uint64_t)w->g.q_heads * w->g.sig_bits));
        MUST(!memcmp(scales + at, w->scales + at, w->g.q_heads * 4ull));
    }
    free(got), free(scales), free(seqs);
}

struct list {
    uint32_t visible, first, last, count;
    const uint16_t *codes, *scores;
    const uint32_t *index;
};

/* The code of a token from the device's own weights, scales and biases, as code.h defines it. */
static uint32_t integer_expected(const struct world *w, const int8_t *weights, const uint32_t *sig, uint32_t head,
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

static uint32_t code_expected(const struct world *w, const int8_t *weights, const float *scales, const float *biases,
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
static uint32_t budget_expected(const struct world *w, const struct list *l)
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

static void check_list(const struct world *w, const struct list *l)
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

static void check_lists(const struct world *w, const struct on_device *d, bool dense, const float *out, const float *lse)
{
    const struct cuda_attend *a = &d->a;
    const struct pkv_geom *g = &w->g;
    uint64_t lists = (uint64_t)a->queries * g->kv_heads, heads = (uint64_t)a->queries * g->q_heads;
    uint64_t stride = PKV_ALIGN_UP(w->tokens, 64u), rows = cuda_rows_max(&a->policy);
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
            for (uint32_t t = l.first; t < l.last && !all; t += 1 + below(5)) {
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

static void launch_all(const struct cuda_attend *a, cudaStream_t stream)
{
    MUST(table->call(a, stream) == 0);
}

static void check_attend(const struct world *w, struct on_device *d, bool dense)
{
    uint64_t heads = (uint64_t)d->a.queries * w->g.q_heads;
    d->a.policy.dense_below = dense ? UINT32_MAX : 0;
    launch_all(&d->a, NULL);
    CUDA(cudaDeviceSynchronize());
    float *out = host_copy(d->a.out, heads * w->g.head_dim * 4), *lse = host_copy(d->a.lse, heads * 4);
    check_lists(w, d, dense, out, lse);
    free(out), free(lse);
}

/* Weights that the caller gives: the same planes and biases as those of the scheme. */
static void check_weighed(const struct world *w, const struct on_device *d)
{
    uint64_t heads = (uint64_t)d->a.queries * w->g.q_heads, planes = heads * w->g.sig_bits;
    struct cuda_attend a = d->a;
    char *before = host_copy(a.work.planes, planes);
    float *biases = host_copy(a.work.biases, heads * 4);
    CUDA(cudaMemset(a.work.planes, 0x55, planes));
    a.weighed = 1, a.policy.dense_below = 0, a.scheme = (struct cuda_scheme){.kind = PKV_SCHEME_HASH};
    MUST((a.team ? table->call : table->query)(&a, NULL) == 0);
    CUDA(cudaDeviceSynchronize());
    char *after = host_copy(a.work.planes, planes);
    float *again = host_copy(a.work.biases, heads * 4);
    struct cuda_seq *seqs = host_copy(d->seqs, 2 * sizeof(*seqs));
    for (uint32_t query = 0; query < a.queries; query++) {
        uint32_t visible = seen_by(w, seqs, query), first = PKV_MIN(w->policy.sinks, visible);
        uint64_t at = (uint64_t)query * w->g.q_heads;
        if (visible - first - PKV_MIN(w->policy.recent, visible - first) <= w->policy.k)
            continue; /* dense: nobody needs them */
        MUST(!memcmp(before + at * w->g.sig_bits, after + at * w->g.sig_bits, (uint64_t)w->g.q_heads * w->g.sig_bits));
        MUST(!memcmp(biases + at, again + at, w->g.q_heads * 4ull));
    }
    free(before), free(biases), free(after), free(again), free(seqs);
}

static void check_gather(const struct world *w, const struct on_device *d)
{
    uint64_t lists = (uint64_t)d->a.queries * w->g.kv_heads, rows = cuda_rows_max(&d->a.policy),
             bytes = pkv_geom_row_bytes(&w->g);
    struct cuda_gather g = {&d->a, device_take(lists * rows * bytes)};
    CUDA(cudaMemset(g.to, 0, lists * rows * bytes)); /* lists shorter than rows_max leave the rest as it is */
    MUST(table->gather(&g, NULL) == 0);
    CUDA(cudaDeviceSynchronize());
    char *got = host_copy(g.to, lists * rows * bytes);
    uint32_t *index = host_copy(d->a.work.index, lists * rows * 4), *chosen = host_copy(d->a.work.chosen, lists * 4);
    for (uint64_t list = 0; list < lists; list++)
        for (uint32_t i = 0; i < chosen[list]; i++) {
            uint32_t t = index[list * rows + i];
            uint64_t place = w->refs[t / 64].rows;
            const char *base = (const char *)(uintptr_t)(pkv_place_tier(place) == PKV_TIER_POOL ? w->pool[3] : w->arena[7]);
            base += pkv_place_slot(place) * pkv_geom_block_bytes(&w->g);
            MUST(!memcmp(got + (list * rows + i) * bytes,
                         base + pkv_geom_row_offset(&w->g, (uint32_t)(list % w->g.kv_heads), t % 64), bytes));
        }
    CUDA(cudaFree(g.to));
    free(got), free(index), free(chosen);
}

/* Chosen rows that lie in the arena, of the queries that use the cache. */
static uint64_t arena_rows(const struct world *w, const struct on_device *d)
{
    uint64_t lists = (uint64_t)d->a.queries * w->g.kv_heads, rows = cuda_rows_max(&d->a.policy), count = 0;
    uint32_t *index = host_copy(d->a.work.index, lists * rows * 4), *chosen = host_copy(d->a.work.chosen, lists * 4);
    for (uint64_t list = (w->queries - 1) * w->g.kv_heads; list < lists; list++)
        for (uint32_t i = 0; i < chosen[list]; i++)
            count += index[list * rows + i] / 64 % 2;
    free(index), free(chosen);
    return count;
}

/* Twice the same call: what the first one fetched is found by the second. */
static void check_cache(const struct world *w, struct on_device *d)
{
    if (!d->entries)
        return;
    uint64_t *found[2], rows = 0, ways = (uint64_t)d->a.cache.sets * CUDA_WAYS;
    CUDA(cudaMemset(d->a.cache.entries, 0, d->entries));
    for (int i = 0; i < 2; i++) {
        CUDA(cudaMemset(d->a.cache.counters, 0, CUDA_COUNTERS * 8));
        check_attend(w, d, false);
        check_gather(w, d);
        found[i] = host_copy(d->a.cache.counters, CUDA_COUNTERS * 8), rows = arena_rows(w, d);
        MUST(found[i][CUDA_HITS] + found[i][CUDA_MISSES] == rows);
    }
    uint64_t hits = found[1][CUDA_HITS];
    MUST(found[0][CUDA_HITS] == 0 && hits <= 2 * w->g.kv_heads * ways && (hits || !rows));
    if (ways > 8ull * cuda_rows_max(&d->a.policy))
        MUST(hits >= rows * 9 / 10);
    free(found[0]), free(found[1]);
}

/* The class of bug where a graph replays yesterday's table or length. */
static void check_graph(const struct world *w, struct on_device *d)
{
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    uint64_t heads = (uint64_t)d->a.queries * w->g.q_heads, bytes = heads * w->g.head_dim * 4;
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    d->a.policy.dense_below = 0;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    launch_all(&d->a, stream);
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&replay, graph, 0));
    struct cuda_seq seqs[2] = {{d->refs, 0}, {d->refs, 0}};
    for (uint32_t length = w->queries; length <= w->tokens; length += 1 + below(90)) {
        seqs[0].tokens = length, seqs[1].tokens = 1 + below(length);
        CUDA(cudaMemcpyAsync(d->seqs, seqs, sizeof(seqs), cudaMemcpyHostToDevice, stream));
        CUDA(cudaMemsetAsync(d->a.out, 0xff, bytes, stream));
        CUDA(cudaGraphLaunch(replay, stream));
        CUDA(cudaStreamSynchronize(stream));
        float *replayed = host_copy(d->a.out, bytes);
        CUDA(cudaMemsetAsync(d->a.out, 0xff, bytes, stream)); /* this stream waits for no other */
        launch_all(&d->a, stream);
        CUDA(cudaStreamSynchronize(stream));
        float *fresh = host_copy(d->a.out, bytes);
        for (uint32_t query = 0; query < w->queries; query++) { /* against exact attention where everything is attended */
            uint32_t visible = length - (w->queries - 1 - query);
            if (visible <= (uint64_t)w->policy.sinks + w->policy.recent + w->policy.k) {
                float *lse = host_copy(d->a.lse, heads * 4);
                naive_attend(w, query, 0, NULL, visible, replayed + (uint64_t)query * w->g.q_heads * w->g.head_dim,
                             lse[(uint64_t)query * w->g.q_heads]);
                free(lse);
            }
        }
        MUST(!memcmp(replayed, fresh, bytes)); /* no sum depends on timing */
        free(replayed), free(fresh);
    }
    CUDA(cudaGraphExecDestroy(replay));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
}

/* In stages, then by teams. */
static void check_call(struct gpu *gpu, struct gpu_scheme *scheme, const struct world *w, struct on_device *d)
{
    struct cuda_seq seqs[2] = {{d->refs, w->tokens}, {d->refs, 1 + below(w->tokens)}};
    CUDA(cudaMemcpy(d->seqs, seqs, sizeof(seqs), cudaMemcpyHostToDevice));
    check_attend(w, d, false);
    check_query(gpu, scheme, w, d);
    check_weighed(w, d);
    check_gather(w, d);
    check_cache(w, d);
    check_attend(w, d, true);
    check_graph(w, d);
}

static void check_case(struct gpu *gpu)
{
    struct world w = world_random();
    struct on_device d;
    uint32_t kind = below(4);
    w.policy.rule = below(2) ? PKV_RULE_SOFTMAX : w.policy.rule;
    if (kind == PKV_SCHEME_CODE && w.g.sig_bits > 4 * w.g.head_dim)
        kind = PKV_SCHEME_SIGN;
    if (kind == PKV_SCHEME_HASH && w.g.sig_bits % pkv_geom_group(&w.g))
        kind = PKV_SCHEME_SIGN;
    struct gpu_scheme *scheme = scheme_of_kind(&w, kind);
    host_fill(gpu, scheme, &w);
    device_open(&w, scheme, &d);
    printf("  scheme %u parts %u splits %u team %u cache %u\n", kind, d.a.parts, d.a.splits, d.a.team, d.a.cache.sets);
    check_append(&w, &d);
    uint32_t team = d.a.team;
    d.a.team = 0;
    check_call(gpu, scheme, &w, &d);
    d.a.team = team;
    if (team)
        check_call(gpu, scheme, &w, &d);
    device_close(&d);
    gpu_scheme_close(scheme);
    world_free(&w);
}

int main(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1, cases = argc > 2 ? strtoull(argv[2], NULL, 0) : 60;
    struct gpu_options options = {.threads = 4};
    struct gpu *gpu;
    device_or_skip();
    table = gpu_cuda_table();
    MUST(table->version == CUDA_TABLE_VERSION && table->preload() == 0);
    MUST(gpu_open(&options, &gpu) == 0);
    for (uint64_t i = 0; i < cases; i++) {
        state = seed * 1000003 + i;
        printf("seed %" PRIu64 " case %" PRIu64 ": ", seed, i);
        check_case(gpu);
    }
    gpu_close(gpu);
    printf("%" PRIu64 " cases\n", cases);
    return 0;
}
