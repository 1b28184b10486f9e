/* The CUDA kernels on a Llama-3.1-8B layer (32 q / 8 kv heads x 128, bf16): whole calls in a replayed graph that rotates over
 * layers, medians of 31 replays, beside the read peak of the same run. Prints JSON lines:
 *   {"name", "tokens", "batch", "bits", "us", "gb_s", "peak_gb_s"}
 * usage: bench_cuda [LARGEST TOKENS]   (default 1048576) */
#include "gpu/cuda/fill.h"
#include "tests/kernels/device.h"
#include "tests/kernels/peak.h"
#include "tests/kernels/schemes.h"

#include <string.h>

#define REPLAYS    31
#define CHUNK      65536u /* tokens of one append */
#define CHUNK_SLOT (1ull << 30)

static const struct cuda_table *table;
static double peak;

struct layer {
    struct cuda_attend a;
    struct pkv_block_ref *refs;
    struct cuda_seq *seqs;
};

/* What the keys are and where the rows lie. */
enum kind {
    RANDOM,
    EQUAL,      /* all tokens have the same key */
    NEIGHBOURS, /* the keys of 2048 neighbouring tokens are the queries' */
    ARENA       /* random keys; rows in pinned memory of the CPU */
};

struct bench {
    enum kind kind;
    struct pkv_geom geom;
    uint32_t tokens, batch, layers, processors;
    char *pool, *signatures;
    uint64_t *bases;
    void *scheme_memory, *work, *k, *v, *q, *gathered;
    struct cuda_query *queries;
    struct cuda_scheme scheme;
    struct layer layer[64];
    cudaStream_t stream;
};

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef void work(struct bench *b, uint32_t layer);

/* Microseconds of one layer's share. */
static double timed(struct bench *b, work *launch)
{
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    cudaEvent_t from, to;
    double us[REPLAYS];
    CUDA(cudaEventCreate(&from));
    CUDA(cudaEventCreate(&to));
    CUDA(cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal));
    uint32_t rounds = b->layers < 8 ? 8 / b->layers : 1;
    for (uint32_t r = 0; r < rounds; r++)
        for (uint32_t l = 0; l < b->layers; l++)
            launch(b, l);
    CUDA(cudaStreamEndCapture(b->stream, &graph));
    CUDA(cudaGraphInstantiate(&replay, graph, 0));
    for (int i = -3; i < REPLAYS; i++) {
        float ms;
        CUDA(cudaEventRecord(from, b->stream));
        CUDA(cudaGraphLaunch(replay, b->stream));
        CUDA(cudaEventRecord(to, b->stream));
        CUDA(cudaStreamSynchronize(b->stream));
        CUDA(cudaEventElapsedTime(&ms, from, to));
        us[i < 0 ? 0 : i] = ms * 1e3 / (b->layers * rounds);
    }
    CUDA(cudaGraphExecDestroy(replay));
    CUDA(cudaGraphDestroy(graph));
    qsort(us, REPLAYS, sizeof(*us), by_size);
    return us[REPLAYS / 2];
}

static void report(const struct bench *b, const char *name, double us, double bytes)
{
    printf(
        "{\"name\": \"%s\", \"tokens\": %u, \"batch\": %u, \"bits\": %u, \"us\": %.2f, \"gb_s\": %.0f, \"peak_gb_s\": %.0f}\n",
        name, b->tokens, b->batch, b->geom.sig_bits, us, bytes / us * 1e-3, peak);
    fflush(stdout);
}

static void run_query(struct bench *b, uint32_t l)
{
    MUST(table->query(&b->layer[l].a, b->stream) == 0);
}
static void run_scan(struct bench *b, uint32_t l)
{
    MUST(table->scan(&b->layer[l].a, b->stream) == 0);
}
static void run_pick(struct bench *b, uint32_t l)
{
    MUST(table->pick(&b->layer[l].a, b->stream) == 0);
}
static void run_attend(struct bench *b, uint32_t l)
{
    MUST(table->attend(&b->layer[l].a, b->stream) == 0);
}
static void run_all(struct bench *b, uint32_t l)
{
    MUST(table->call(&b->layer[l].a, b->stream) == 0);
}
static void run_stages(struct bench *b, uint32_t l)
{
    struct cuda_attend a = b->layer[l].a;
    a.team = 0;
    MUST(table->call(&a, b->stream) == 0);
}
static void run_read(struct bench *b, uint32_t l)
{
    (void)l;
    MUST(cuda_read_launch(b->pool, 1ull << 30, b->work, b->stream) == 0);
}
static void append_tokens(struct bench *b, uint32_t l, uint32_t tokens)
{
    uint64_t from = (uint64_t)l * tokens % CHUNK * 2048; /* not what the call before has read, unless it is all */
    struct cuda_append append = {.geom = b->geom,
                                 .scheme = b->scheme,
                                 .base = {NULL, b->bases, b->bases},
                                 .seqs = b->layer[l].seqs,
                                 .k = (char *)b->k + (b->batch > 1 ? 0 : from),
                                 .v = (char *)b->v + (b->batch > 1 ? 0 : from),
                                 .count = b->batch,
                                 .tokens = tokens};
    MUST(table->append(&append, b->stream) == 0);
}
static void run_append(struct bench *b, uint32_t l)
{
    append_tokens(b, l, b->batch > 1 ? 1 : PKV_MIN(b->tokens, CHUNK));
}
static void run_append_4096(struct bench *b, uint32_t l)
{
    append_tokens(b, l, 4096);
}

/* Random bf16 of about unit size. */
static void *random_numbers(uint64_t count)
{
    uint16_t *host = take(count * 2);
    for (uint64_t i = 0; i < count; i++)
        put(host, PKV_BF16, i, gaussian());
    void *p = device_copy(host, count * 2);
    free(host);
    return p;
}

static void layer_open(struct bench *b, uint32_t l)
{
    struct layer *y = &b->layer[l];
    uint32_t blocks = pkv_tokens_blocks(b->tokens);
    struct pkv_block_ref *refs = take((uint64_t)b->batch * blocks * sizeof(*refs));
    struct cuda_seq *seqs = take(b->batch * sizeof(*seqs));
    uint64_t rows_slots = CHUNK_SLOT / pkv_geom_block_bytes(&b->geom),
             sig_slots = CHUNK_SLOT / pkv_geom_sig_block_bytes(&b->geom);
    for (uint64_t i = 0; i < (uint64_t)b->batch * blocks; i++) {
        uint64_t n = (uint64_t)l * b->batch * blocks + i;
        refs[i].rows = pkv_place(b->kind == ARENA ? PKV_TIER_ARENA : PKV_TIER_POOL, (uint32_t)(n / rows_slots),
                                 (uint32_t)(n % rows_slots), 1);
        refs[i].signatures = pkv_place(PKV_TIER_POOL, 1024 + (uint32_t)(n / sig_slots), (uint32_t)(n % sig_slots), 1);
    }
    y->refs = device_copy(refs, (uint64_t)b->batch * blocks * sizeof(*refs));
    for (uint32_t s = 0; s < b->batch; s++)
        seqs[s] = (struct cuda_seq){y->refs + (uint64_t)s * blocks, b->tokens};
    y->seqs = device_copy(seqs, b->batch * sizeof(*seqs));
    y->a = (struct cuda_attend){.geom = b->geom,
                                .policy = {.k = 2048, .sinks = 128, .recent = 128, .scale = 0.0883883476f},
                                .scheme = b->scheme,
                                .base = {NULL, b->bases, b->bases},
                                .seqs = y->seqs,
                                .query = b->queries,
                                .q = b->q,
                                .queries = b->batch,
                                .tokens_max = b->tokens};
    MUST(cuda_grid(&y->a) == 0);
    free(refs), free(seqs);
}

/* Tokens [first, first + count) of a layer's first sequence again, with these keys. */
static void layer_rekey(struct bench *b, uint32_t l, uint32_t first, uint32_t count, void *keys)
{
    struct cuda_seq seq = {b->layer[l].refs, first + count}, *one = device_copy(&seq, sizeof(seq));
    struct cuda_append append = {.geom = b->geom,
                                 .scheme = b->scheme,
                                 .base = {NULL, b->bases, b->bases},
                                 .seqs = one,
                                 .k = keys,
                                 .v = b->v,
                                 .count = 1,
                                 .tokens = count};
    MUST(table->append(&append, b->stream) == 0);
    CUDA(cudaStreamSynchronize(b->stream));
    CUDA(cudaFree(one));
}

/* Every head's key is the sum of its group's queries, the same for all tokens. */
static void layer_keys(struct bench *b, uint32_t l)
{
    uint32_t all = b->kind == EQUAL, count = all ? PKV_MIN(b->tokens, CHUNK) : 2048;
    uint16_t *q = host_copy(b->q, 32 * 128 * 2), *keys = take((uint64_t)count * 1024 * 2);
    for (uint32_t i = 0; i < 1024; i++) {
        float sum = 0;
        for (uint32_t h = 0; h < 4; h++)
            sum += (float)get(q, PKV_BF16, (i / 128 * 4ull + h) * 128 + i % 128);
        put(keys, PKV_BF16, i, sum / 4);
    }
    for (uint32_t t = 1; t < count; t++)
        memcpy(keys + t * 1024ull, keys, 2048);
    void *on_device = device_copy(keys, (uint64_t)count * 2048);
    for (uint32_t first = all ? 0 : b->tokens / 2; first < (all ? b->tokens : b->tokens / 2 + 1); first += count)
        layer_rekey(b, l, first, count, on_device);
    CUDA(cudaFree(on_device));
    free(q), free(keys);
}

/* Every layer's blocks filled by appends, each at another offset of the random numbers. */
static void layer_fill(struct bench *b, uint32_t l)
{
    uint32_t blocks = pkv_tokens_blocks(b->tokens);
    struct cuda_seq *one = device_take(sizeof(*one));
    for (uint32_t s = 0; s < b->batch; s++)
        for (uint32_t done = 0, n; done < b->tokens; done += n) {
            n = PKV_MIN(CHUNK, b->tokens - done);
            struct cuda_seq seq = {b->layer[l].refs + (uint64_t)s * blocks, done + n};
            uint64_t shift = below(512) * 1024ull * 2;
            struct cuda_append append = {.geom = b->geom,
                                         .scheme = b->scheme,
                                         .base = {NULL, b->bases, b->bases},
                                         .seqs = one,
                                         .k = (char *)b->k + shift,
                                         .v = (char *)b->v + shift,
                                         .count = 1,
                                         .tokens = n};
            CUDA(cudaMemcpy(one, &seq, sizeof(seq), cudaMemcpyHostToDevice));
            MUST(table->append(&append, b->stream) == 0);
            CUDA(cudaStreamSynchronize(b->stream));
        }
    CUDA(cudaFree(one));
}

static void bench_open(struct bench *b, uint32_t tokens, uint32_t batch, uint32_t bits, enum kind kind)
{
    *b = (struct bench){.kind = kind, .geom = {1, 32, 8, 128, PKV_BF16, (uint16_t)bits, 0}, .tokens = tokens, .batch = batch};
    struct gpu_scheme *scheme;
    uint8_t digest[PKV_DIGEST_BYTES];
    uint64_t blocks = (uint64_t)batch * pkv_tokens_blocks(tokens), rows = blocks * pkv_geom_block_bytes(&b->geom);
    uint64_t signatures = blocks * pkv_geom_sig_block_bytes(&b->geom), *bases = calloc(PKV_CHUNKS_MAX, 8);
    MUST(bases);
    b->processors = device_processors();
    /* Enough layers that no replay finds its input in the cache. */
    b->layers = (uint32_t)PKV_MIN(PKV_MAX((256ull << 20) / signatures, 1ull), PKV_MAX((24ull << 30) / rows, 1ull));
    b->layers = kind == ARENA ? 1 : PKV_MIN(b->layers, 32u);
    rows = PKV_ALIGN_UP(rows * b->layers, CHUNK_SLOT), signatures = PKV_ALIGN_UP(signatures * b->layers, CHUNK_SLOT);
    if (kind == ARENA)
        CUDA(cudaHostAlloc((void **)&b->pool, rows, cudaHostAllocMapped));
    else
        b->pool = device_take(rows);
    b->signatures = device_take(signatures);
    for (uint64_t i = 0; i < rows / CHUNK_SLOT; i++)
        bases[i] = (uintptr_t)b->pool + i * CHUNK_SLOT;
    for (uint64_t i = 0; i < signatures / CHUNK_SLOT; i++)
        bases[1024 + i] = (uintptr_t)b->signatures + i * CHUNK_SLOT;
    b->bases = device_copy(bases, PKV_CHUNKS_MAX * 8);
    free(bases);
    MUST(gpu_scheme_open(PKV_SCHEME_SIGN, &b->geom, NULL, &scheme, digest) == 0);
    MUST(cuda_scheme_upload(scheme, &b->scheme, &b->scheme_memory) == 0);
    gpu_scheme_close(scheme);
    static void *k, *v;
    k = k ? k : random_numbers((CHUNK + 512ull) * 1024), v = v ? v : random_numbers((CHUNK + 512ull) * 1024);
    b->k = k, b->v = v, b->q = random_numbers((uint64_t)batch * 32 * 128);
    CUDA(cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking));
    struct cuda_query *queries = take(batch * sizeof(*queries));
    for (uint32_t s = 0; s < batch; s++)
        queries[s] = (struct cuda_query){s, 0};
    b->queries = device_copy(queries, batch * sizeof(*queries));
    free(queries);
    for (uint32_t l = 0; l < b->layers; l++)
        layer_open(b, l);
    uint64_t bytes = cuda_work_bytes(&b->layer[0].a);
    b->work = device_take(bytes);
    CUDA(cudaMemset(b->work, 0, bytes));
    float *out = device_take((uint64_t)batch * 32 * 128 * 4), *lse = device_take((uint64_t)batch * 32 * 4);
    for (uint32_t l = 0; l < b->layers; l++) {
        cuda_work_bind(&b->layer[l].a, b->work);
        b->layer[l].a.out = out, b->layer[l].a.lse = lse;
        layer_fill(b, l);
        if (kind == EQUAL || kind == NEIGHBOURS)
            layer_keys(b, l);
    }
}

static void bench_close(struct bench *b)
{
    for (uint32_t l = 0; l < b->layers; l++) {
        CUDA(cudaFree(b->layer[l].refs));
        CUDA(cudaFree(b->layer[l].seqs));
    }
    CUDA(b->kind == ARENA ? cudaFreeHost(b->pool) : cudaFree(b->pool));
    void *all[] = {b->signatures, b->bases, b->work, b->q, b->queries, b->layer[0].a.out, b->layer[0].a.lse};
    for (size_t i = 0; i < PKV_ARRAY_LEN(all); i++)
        CUDA(cudaFree(all[i]));
    cuda_scheme_free(b->scheme_memory);
    CUDA(cudaStreamDestroy(b->stream));
}

static void bench_dense(struct bench *b)
{
    for (uint32_t l = 0; l < b->layers; l++)
        b->layer[l].a.policy.dense_below = UINT32_MAX;
    report(b, "dense", timed(b, run_all), (double)b->batch * b->tokens * 8 * 512);
}

/* Signed by a matrix: as many dimensions as bits, of one bit each. The calls find the signatures of `sign`. */
static void bench_code(struct bench *b, double moved, double read)
{
    struct world w = {.g = b->geom};
    struct cuda_scheme sign = b->scheme;
    struct gpu_scheme *scheme = scheme_of_kind(&w, PKV_SCHEME_CODE);
    void *memory;
    MUST(cuda_scheme_upload(scheme, &b->scheme, &memory) == 0);
    for (uint32_t l = 0; l < b->layers; l++)
        b->layer[l].a.scheme = b->scheme;
    report(b, "call, code", timed(b, run_all), read);
    if (b->batch == 1)
        report(b, "append, code", timed(b, run_append), moved);
    b->scheme = sign;
    for (uint32_t l = 0; l < b->layers; l++)
        b->layer[l].a.scheme = sign;
    cuda_scheme_free(memory);
    gpu_scheme_close(scheme);
}

/* Plain Hamming distances: rule `sum`, weights of +-1, a share of the bits for each head as a learned hash has it, given by the
 * caller. The last that is measured: work's weights are not the queries' any more. */
static void bench_hamming(struct bench *b, double signatures, double chosen)
{
    uint32_t bits = b->geom.sig_bits, heads = b->batch * 32;
    int8_t *weights = take((uint64_t)heads * bits);
    for (uint64_t i = 0; i < (uint64_t)heads * bits; i++)
        weights[i] = (int8_t)(i % bits / (bits / 4) != i / bits % 4 ? 0 : below(2) ? 1 : -1);
    CUDA(cudaMemcpy(b->layer[0].a.work.weights, weights, (uint64_t)heads * bits, cudaMemcpyHostToDevice));
    free(weights);
    for (uint32_t l = 0; l < b->layers; l++) {
        struct cuda_attend *a = &b->layer[l].a;
        a->policy.rule = PKV_RULE_SUM, a->scheme.kind = PKV_SCHEME_HASH, a->scheme.q_signs = 1, a->weighed = 1;
    }
    report(b, "call, plain Hamming", timed(b, run_all), signatures + chosen);
    report(b, "call in stages, plain Hamming", timed(b, run_stages), signatures + chosen);
    for (uint32_t l = 0; l < b->layers; l++)
        b->layer[l].a.weighed = 0; /* so that the launcher knows what the weights are */
    report(b, "scan, plain Hamming", timed(b, run_scan), signatures);
    for (uint32_t l = 0; l < b->layers; l++)
        b->layer[l].a.policy.rule = PKV_RULE_SOFTMAX, b->layer[l].a.scheme = b->scheme;
}

static void bench_shape(uint32_t tokens, uint32_t batch, uint32_t bits)
{
    static struct bench b;
    bench_open(&b, tokens, batch, bits, RANDOM);
    double signatures = (double)batch * tokens * 8 * bits / 8, chosen = (double)batch * 8 * 2304 * 512;
    if (b.tokens >= 262144 && !peak) {
        double us = timed(&b, run_read);
        peak = (double)(1ull << 30) / us * 1e-3;
        report(&b, "read 1 GiB", us, (double)(1ull << 30));
    }
    report(&b, "call", timed(&b, run_all), signatures + chosen);
    report(&b, "call in stages", timed(&b, run_stages), signatures + chosen);
    report(&b, "query", timed(&b, run_query), (double)batch * 8 * 256 * (256 + bits / 8));
    report(&b, "scan", timed(&b, run_scan), signatures);
    report(&b, "pick", timed(&b, run_pick), signatures / 8);
    report(&b, "attend", timed(&b, run_attend), chosen);
    double moved = (double)PKV_MIN(tokens, CHUNK) * 8 * (1024 + bits / 8);
    report(&b, batch > 1 ? "append 1 token each" : "append", timed(&b, run_append),
           batch > 1 ? (double)batch * 8 * 1024 : moved);
    if (batch == 1)
        report(&b, "append 4096", timed(&b, run_append_4096), 4096.0 * 8 * (1024 + bits / 8));
    bench_code(&b, moved, signatures + chosen);
    bench_hamming(&b, signatures, chosen);
    if (tokens <= 32768)
        bench_dense(&b);
    bench_close(&b);
}

static void run_gather(struct bench *b, uint32_t l)
{
    MUST(peak_gather(b->layer[l].a.work.address, 8 * 2304, b->gathered, b->stream) == 0);
}

/* Rows out of the CPU's memory: all of them, then beside a plain gather of the same rows, then out of the row cache. */
static void bench_arena(uint32_t tokens)
{
    static struct bench b;
    bench_open(&b, tokens, 1, 128, ARENA);
    struct cuda_attend *a = &b.layer[0].a;
    double bytes = 8.0 * 2304 * 512;
    b.gathered = device_take(8ull * 2304 * 512);
    a->flags = CUDA_KEEP;
    report(&b, "call, rows in the arena", timed(&b, run_all), bytes);
    report(&b, "plain gather of the same rows", timed(&b, run_gather), bytes);
    report(&b, "attend, rows in the arena", timed(&b, run_attend), bytes);
    uint32_t sets = 1024;
    uint64_t ways = 8ull * sets * CUDA_WAYS;
    a->cache = (struct cuda_cache){device_take(ways * 8), device_take(ways * 512), device_take(CUDA_COUNTERS * 8), sets, 0};
    CUDA(cudaMemset(a->cache.entries, 0, ways * 8));
    CUDA(cudaMemset(a->cache.counters, 0, CUDA_COUNTERS * 8));
    report(&b, "call, rows in the row cache", timed(&b, run_all), bytes);
    uint64_t *found = host_copy(a->cache.counters, CUDA_COUNTERS * 8);
    printf("{\"name\": \"row cache\", \"hits\": %llu, \"misses\": %llu}\n", (unsigned long long)found[CUDA_HITS],
           (unsigned long long)found[CUDA_MISSES]);
    free(found);
    CUDA(cudaFree(a->cache.entries));
    CUDA(cudaFree(a->cache.rows));
    CUDA(cudaFree(a->cache.counters));
    CUDA(cudaFree(b.gathered));
    bench_close(&b);
}

/* Inputs that a schedule could stumble over. */
static void bench_adversarial(uint32_t tokens)
{
    static struct bench b;
    for (enum kind kind = EQUAL; kind <= NEIGHBOURS; kind++) {
        bench_open(&b, tokens, 1, 128, kind);
        double bytes = tokens * 8.0 * 16 + 8.0 * 2304 * 512;
        report(&b, kind == EQUAL ? "call, all tokens equal" : "call, chosen rows neighbours", timed(&b, run_all), bytes);
        bench_close(&b);
    }
}

int main(int argc, char **argv)
{
    uint32_t largest = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 0) : 1048576;
    device_or_skip();
    table = gpu_cuda_table();
    MUST(table->preload() == 0);
    state = 7;
    const uint32_t lengths[] = {1048576, 524288, 262144, 131072, 32768, 16384, 8192};
    for (size_t i = 0; i < PKV_ARRAY_LEN(lengths); i++)
        if (lengths[i] <= largest)
            bench_shape(lengths[i], 1, 128);
    for (size_t i = 0; i < 4; i++)
        if (lengths[i] <= largest)
            bench_shape(lengths[i], 1, 64);
    bench_shape(32768, 64, 128);
    for (size_t i = 0; i < 4; i += 3)
        if (lengths[i] <= largest)
            bench_adversarial(lengths[i]);
    if (largest >= 131072)
        bench_arena(131072);
    return 0;
}
