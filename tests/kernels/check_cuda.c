/* The CUDA kernels against the host backend and against definitions, over random shapes with ragged tails:
 *   append, sign     rows and signatures equal the host's bit for bit
 *   query            weights and scales likewise
 *   scan             codes equal gpu/code.h's but for one step, where the exponential's rounding decides
 *   pick             exactly the k best of the device's own codes, ties to the lower index
 *   attend, gather   exact attention in double precision over the device's list; rows byte for byte
 *   cache            rows that a second call finds in the row cache are the arena's, and the counters say how many
 *   plain            a call that keeps nothing but its result, without a row cache, chooses and gives the same
 *   graph            a captured call, replayed while its sequences grow over block borders, equals a fresh call
 *   rules            `sum` and `max` over weights and signatures that are hard on them
 *   streams          calls of one launch each, in two streams at once beside one in stages, end, and give what each gives alone
 * usage: check_cuda [SEED [CASES [ROUNDS of all streams]]]; a sanitizer takes long for many rounds */
#include "tests/kernels/check_append.h"
#include "tests/kernels/check_lists.h"
#include "tests/kernels/check_rules.h"
#include "tests/kernels/check_streams.h"

#include <inttypes.h>

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
    for (uint32_t length = w->queries; length <= w->tokens; length += 1 + below(90 + w->tokens / 64)) {
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

struct given {
    float *out, *lse;
    uint32_t *chosen;
};

static struct given call_given(const struct world *w, const struct cuda_attend *a)
{
    uint64_t heads = (uint64_t)a->queries * w->g.q_heads;
    CUDA(cudaMemset(a->out, 0xff, heads * w->g.head_dim * 4));
    launch_all(a, NULL);
    CUDA(cudaDeviceSynchronize());
    return (struct given){host_copy(a->out, heads * w->g.head_dim * 4), host_copy(a->lse, heads * 4),
                          host_copy(a->work.chosen, (uint64_t)a->queries * w->g.kv_heads * 4)};
}

/* Kernels of their own may differ in which products they fuse, not in the rows: a row more or less shows. */
static void check_plain(const struct world *w, const struct on_device *d)
{
    struct cuda_attend a = d->a;
    uint64_t heads = (uint64_t)a.queries * w->g.q_heads;
    a.policy.dense_below = 0, a.cache = (struct cuda_cache){0};
    struct given kept = call_given(w, &a);
    a.flags = 0;
    struct given plain = call_given(w, &a);
    MUST(!memcmp(kept.chosen, plain.chosen, (uint64_t)a.queries * w->g.kv_heads * 4));
    for (uint64_t i = 0; i < heads * w->g.head_dim; i++)
        MUST(fabsf(kept.out[i] - plain.out[i]) <= 2e-5f * (1 + fabsf(kept.out[i])));
    for (uint64_t i = 0; i < heads; i++)
        MUST(fabsf(kept.lse[i] - plain.lse[i]) <= 2e-5f * (1 + fabsf(kept.lse[i])));
    free(kept.out), free(kept.lse), free(kept.chosen), free(plain.out), free(plain.lse), free(plain.chosen);
}

/* In stages, then by teams. */
static void check_call(struct gpu *gpu, struct gpu_scheme *scheme, const struct world *w, struct on_device *d)
{
    struct cuda_seq seqs[2] = {{d->refs, w->tokens}, {d->refs, 1 + below(w->tokens)}};
    CUDA(cudaMemcpy(d->seqs, seqs, sizeof(seqs), cudaMemcpyHostToDevice));
    check_attend(w, d, false);
    if (w->g.sig_bits) {
        check_query(gpu, scheme, w, d);
        check_weighed(w, d);
    }
    check_gather(w, d);
    check_cache(w, d);
    check_attend(w, d, true);
    check_plain(w, d);
    check_graph(w, d);
}

/* One case in eight has no signatures. */
static struct gpu_scheme *scheme_random(struct world *w)
{
    uint32_t kind = below(8) ? below(4) : PKV_SCHEME_NONE;
    w->policy.rule = below(2) ? PKV_RULE_SOFTMAX : w->policy.rule;
    if (kind == PKV_SCHEME_CODE && w->g.sig_bits > 4 * w->g.head_dim)
        kind = PKV_SCHEME_SIGN;
    if (kind == PKV_SCHEME_HASH && w->g.sig_bits % pkv_geom_group(&w->g))
        kind = PKV_SCHEME_SIGN;
    if (kind == PKV_SCHEME_NONE)
        world_drop_signatures(w);
    printf("  scheme %u", kind);
    return scheme_of_kind(w, kind);
}

static void check_case(struct gpu *gpu)
{
    struct world w = below(10) ? world_random() : world_long();
    struct on_device d;
    struct gpu_scheme *scheme = scheme_random(&w);
    host_fill(gpu, scheme, &w);
    device_open(&w, scheme, &d);
    printf(" parts %u splits %u team %u cache %u\n", d.a.parts, d.a.splits, d.a.team, d.a.cache.sets);
    check_append(&w, &d);
    uint32_t team = d.a.team;
    d.a.team = 0;
    check_call(gpu, scheme, &w, &d);
    d.a.team = team;
    if (team)
        check_call(gpu, scheme, &w, &d);
    check_rules(&w, &d, 4);
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
    state = seed;
    check_streams(gpu, argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 0) : 100);
    for (uint64_t i = 0; i < cases; i++) {
        state = seed * 1000003 + i;
        printf("seed %" PRIu64 " case %" PRIu64 ": ", seed, i);
        check_case(gpu);
    }
    gpu_close(gpu);
    printf("%" PRIu64 " cases\n", cases);
    return 0;
}
