/* The CUDA backend behind the door of gpu against the host backend, over random shapes: the same arrays in, the same arrays
 * out, but for what the kernels may round differently (tests/kernels/check_cuda.c). append, sign, put, read   the blocks'
 * bytes, wherever they lie select                    equal lists for integer rules; for softmax lists that select's definition
 * allows gather                    rows byte for byte, memory behind a list untouched attend, dense             exact attention
 * in double precision; dense also in pieces, and of some heads learning                  the device follows a scheme that
 * changes Without a GPU, or without the module, the test is skipped. usage: check_backend [SEED [CASES]] */
#include "tests/kernels/world.h"

#include "gpu/device.h"

#include <inttypes.h>
#include <string.h>
#include <unistd.h>

static struct gpu_device *device;
static struct gpu *host, *cuda;

/* The world's memory, once more, on the device. */
struct twin {
    struct gpu_chunk rows, signatures;
    char *arena;
    uint64_t *pool, *arena_bases, arena_bytes;
    struct gpu_space space;
};

static struct gpu_chunk chunk(uint64_t bytes)
{
    struct gpu_chunk c;
    MUST(gpu_device_chunk_create(device, PKV_ALIGN_UP(bytes, gpu_device_about(device)->grain), GPU_SHARE_VMM, &c) == 0);
    return c;
}

static void twin_open(const struct world *w, struct twin *t)
{
    uint64_t rows = w->blocks * pkv_geom_block_bytes(&w->g);
    *t = (struct twin){.rows = chunk(rows), .signatures = chunk(w->blocks * pkv_geom_sig_block_bytes(&w->g))};
    t->arena_bytes = PKV_ALIGN_UP(rows, 65536u);
    t->arena = aligned_alloc(65536, t->arena_bytes);
    t->pool = calloc(PKV_CHUNKS_MAX, 8), t->arena_bases = calloc(PKV_CHUNKS_MAX, 8);
    MUST(t->arena && t->pool && t->arena_bases);
    memset(t->arena, 0, t->arena_bytes);
    MUST(gpu_device_register(device, t->arena, t->arena_bytes, false, &t->arena_bases[7]) == 0);
    t->pool[3] = t->rows.writable, t->pool[5] = t->signatures.writable;
    t->space = (struct gpu_space){{NULL, t->pool, t->arena_bases}};
}

static void twin_close(struct twin *t)
{
    gpu_device_unregister(device, t->arena);
    gpu_device_chunk_release(device, &t->rows);
    gpu_device_chunk_release(device, &t->signatures);
    free(t->arena), free(t->pool), free(t->arena_bases);
}

/* ---- blocks ---- */

/* The words that differ, the first few by name. */
static void same_signatures(const struct world *w, const char *a, const char *b)
{
    uint32_t differ = 0, words = pkv_geom_words(&w->g);
    for (uint32_t t = 0; t < w->blocks * 64; t++)
        for (uint32_t h = 0; h < w->g.kv_heads; h++)
            for (uint32_t i = 0; i < words; i++) {
                uint64_t at = t / 64 * pkv_geom_sig_block_bytes(&w->g) + 4ull * pkv_geom_sig_index(&w->g, h, t % 64, i);
                uint32_t x, y;
                memcpy(&x, a + at, 4), memcpy(&y, b + at, 4);
                if (x != y && differ++ < 5)
                    printf("token %u head %u word %u: %08x on the host, %08x on the device\n", t, h, i, x, y);
            }
    if (differ)
        printf("%u words differ\n", differ);
    MUST(!differ);
}

static void same_blocks(const struct world *w, const struct twin *t, const char *when)
{
    printf("%s\n", when);
    uint64_t rows = pkv_geom_block_bytes(&w->g), signatures = pkv_geom_sig_block_bytes(&w->g);
    char *a = take(w->blocks * (rows + signatures)), *b = take(w->blocks * (rows + signatures));
    struct gpu_read_args read = {.geom = &w->g,
                                 .space = w->space,
                                 .blocks = w->refs,
                                 .count = w->blocks,
                                 .ret_rows = a,
                                 .ret_signatures = a + w->blocks * rows};
    MUST(gpu_read(host, &read) == 0);
    read.space = t->space, read.ret_rows = b, read.ret_signatures = b + w->blocks * rows;
    MUST(gpu_read(cuda, &read) == 0);
    same_signatures(w, a + w->blocks * rows, b + w->blocks * rows);
    for (uint32_t i = 0; i < w->tokens; i++)
        for (uint32_t h = 0; h < w->g.kv_heads; h++) {
            uint64_t at = i / 64 * rows + pkv_geom_row_offset(&w->g, h, i % 64);
            MUST(!memcmp(a + at, b + at, pkv_geom_row_bytes(&w->g)));
        }
    uint32_t some = below(w->blocks);
    read.first_block = some, read.count = w->blocks - some, read.ret_signatures = NULL;
    memset(b, 0, w->blocks * rows);
    MUST(gpu_read(cuda, &read) == 0); /* from the middle */
    MUST(!memcmp(a + some * rows, b, pkv_geom_row_bytes(&w->g)));
    free(a), free(b);
}

static void append(struct gpu *gpu, const struct gpu_space *space, const struct world *w, uint32_t first, uint32_t n)
{
    uint64_t bytes = (uint64_t)w->g.kv_heads * w->g.head_dim * pkv_dtype_bytes(w->g.dtype);
    struct gpu_append_args a = {&w->g, *space, w->refs, first, n, (char *)w->k + first * bytes, (char *)w->v + first * bytes,
                                0,     0};
    MUST(gpu_append(gpu, &a) == 0);
}

static void sign(struct gpu *gpu, const struct gpu_space *space, const struct world *w, const struct gpu_scheme *scheme,
                 uint32_t first, uint32_t n)
{
    struct gpu_sign_args s = {&w->g, *space, scheme, 1, w->refs, first, n};
    MUST(gpu_sign(gpu, &s) == 0);
}

static void check_blocks(const struct world *w, const struct twin *t, struct gpu_scheme *scheme)
{
    uint32_t cut = 1 + below(w->tokens);
    for (int side = 0; side < 2; side++) {
        struct gpu *gpu = side ? cuda : host;
        const struct gpu_space *space = side ? &t->space : &w->space;
        append(gpu, space, w, 0, cut);
        sign(gpu, space, w, scheme, 0, cut);
        if (cut < w->tokens) {
            append(gpu, space, w, cut, w->tokens - cut);
            sign(gpu, space, w, scheme, cut, w->tokens - cut);
        }
    }
    same_blocks(w, t, "  appended");
    /* What it learns changes the signatures on both sides alike. */
    gpu_scheme_observe(scheme, &(struct gpu_observation){.layer = 1, .tokens = w->tokens, .context = w->tokens, .k = w->k});
    sign(host, &w->space, w, scheme, 0, w->tokens);
    sign(cuda, &t->space, w, scheme, 0, w->tokens);
    same_blocks(w, t, "  learnt");
    /* Signatures from elsewhere, and back again. */
    uint64_t bytes = (uint64_t)w->tokens * w->g.kv_heads * pkv_geom_words(&w->g) * 4;
    char *list = take(bytes);
    gpu_signatures_list(&w->g, (const void *)(uintptr_t)w->pool[5], 0, w->tokens, list);
    sign(cuda, &t->space, w, scheme, 0, 1 + below(w->tokens));
    uint32_t first = below(w->tokens);
    uint64_t each = bytes / w->tokens;
    struct gpu_signatures_args put = {&w->g, t->space, w->refs, first, w->tokens - first, list + first * each};
    MUST(gpu_put_signatures(cuda, &put) == 0);
    same_blocks(w, t, "  put");
    free(list);
}

/* ---- lists ---- */

static void check_select(const struct world *w, const struct twin *t, struct gpu_scheme *scheme)
{
    uint64_t lists = (uint64_t)w->queries * w->g.kv_heads, row = pkv_geom_row_bytes(&w->g);
    uint32_t rows_max = w->policy.k + w->policy.sinks + w->policy.recent;
    uint64_t entries = lists * rows_max, heads = (uint64_t)w->queries * w->g.q_heads;
    struct gpu_rows a = {rows_max, take(entries * 4), take(lists * 4), take(entries * 2)}, b = a;
    b.index = take(entries * 4), b.count = take(lists * 4), b.score = take(entries * 2);
    struct gpu_weights_args weights = {&w->g, scheme, 1, w->queries, 0, w->q, w->weights, w->scales};
    MUST(gpu_weights(cuda, &weights) == 0);
    struct gpu_select_args here = {&w->g, w->space, w->policy, 1, &w->view, w->q, w->weights, w->scales, NULL}, there = here;
    there.space = t->space;
    memset(b.index, 0, entries * 4);
    MUST(gpu_select(host, &here, &a) == 0 && gpu_select(cuda, &there, &b) == 0);
    uint64_t same = 0, all = 0;
    for (uint64_t l = 0; l < lists; l++) {
        const uint32_t *x = a.index + l * rows_max, *y = b.index + l * rows_max;
        bool integer = w->policy.rule != PKV_RULE_SOFTMAX;
        if (integer)
            MUST(a.count[l] == b.count[l] && !memcmp(x, y, a.count[l] * 4ull));
        for (uint32_t i = 0, j = 0; i < a.count[l] && j < b.count[l];)
            x[i] == y[j] ? (same++, i++, j++) : x[i] < y[j] ? i++ : j++;
        all += PKV_MAX(a.count[l], b.count[l]);
    }
    MUST(same * 100 >= all * 95); /* rounding decides at the threshold */
    char *rows = take(entries * row), *expected = take(entries * row);
    memset(rows, 0x5a, entries * row), memset(expected, 0x5a, entries * row);
    MUST(gpu_gather(host, &here, &b, expected) == 0 && gpu_gather(cuda, &there, &b, rows) == 0);
    MUST(!memcmp(rows, expected, entries * row));
    float *out = take(heads * w->g.head_dim * 4), *lse = take(heads * 4);
    MUST(gpu_attend_rows(cuda, &there, &b, below(2) ? rows : NULL, out, lse) == 0);
    for (uint64_t h = 0; h < heads; h++) {
        uint64_t list = h / w->g.q_heads * w->g.kv_heads + h % w->g.q_heads / pkv_geom_group(&w->g);
        naive_attend(w, (uint32_t)(h / w->g.q_heads), (uint32_t)(h % w->g.q_heads), b.index + list * rows_max, b.count[list],
                     out + h * w->g.head_dim, lse[h]);
    }
    free(a.index), free(a.count), free(a.score), free(b.index), free(b.count), free(b.score);
    free(rows), free(expected), free(out), free(lse);
}

/* ---- attend ---- */

static void check_dense(const struct world *w, const struct twin *t)
{
    uint64_t heads = (uint64_t)w->queries * w->g.q_heads;
    float *out = take(heads * w->g.head_dim * 4), *lse = take(heads * 4), *states = take(heads * 8);
    struct gpu_explain e = {0};
    struct gpu_dense_args d = {.geom = &w->g,
                               .space = t->space,
                               .seqs = 1,
                               .views = &w->view,
                               .q = w->q,
                               .blocks = below(w->blocks + 1),
                               .start = true,
                               .out = out,
                               .max = states,
                               .sum = states + heads,
                               .lse = lse,
                               .explain = &e};
    MUST(gpu_dense(cuda, &d) == 0);
    d.first_block = d.blocks, d.blocks = UINT32_MAX, d.start = false, d.finish = true;
    for (uint32_t head = 0; head < w->g.kv_heads; head++) {
        d.first_head = head, d.heads = 1;
        MUST(gpu_dense(cuda, &d) == 0);
    }
    uint64_t seen = 0;
    for (uint32_t q = 0; q < w->queries; q++)
        seen += (uint64_t)w->g.kv_heads * (w->tokens - w->queries + 1 + q);
    MUST(e.seen == seen && e.rows_pool + e.rows_arena == seen);
    for (uint64_t h = 0; h < heads; h++)
        naive_attend(w, (uint32_t)(h / w->g.q_heads), (uint32_t)(h % w->g.q_heads), NULL,
                     w->tokens - w->queries + 1 + (uint32_t)(h / w->g.q_heads), out + h * w->g.head_dim, lse[h]);
    free(out), free(lse), free(states);
}

/* Two sequences over the same blocks, one shorter. Where everything is attended the result is exact; elsewhere near the host's.
 */
static void check_attend(const struct world *w, const struct twin *t, struct gpu_scheme *scheme)
{
    struct gpu_view views[2] = {w->view, w->view};
    views[1].tokens = w->queries + below(w->tokens - w->queries + 1);
    uint64_t heads = 2ull * w->queries * w->g.q_heads, bytes = heads * w->g.head_dim * 4;
    uint64_t q_bytes = (uint64_t)w->queries * w->g.q_heads * w->g.head_dim * pkv_dtype_bytes(w->g.dtype);
    float *out[2] = {take(bytes), take(bytes)}, *lse[2] = {take(heads * 4), take(heads * 4)};
    char *q = take(2 * q_bytes);
    memcpy(q, w->q, q_bytes), memcpy(q + q_bytes, w->q, q_bytes);
    struct gpu_explain e[2] = {{0}, {0}};
    int r[2];
    for (int side = 0; side < 2; side++) {
        struct gpu_attend_args a = {.geom = &w->g,
                                    .space = side ? t->space : w->space,
                                    .policy = w->policy,
                                    .scheme = scheme,
                                    .layer = 1,
                                    .seqs = 2,
                                    .views = views,
                                    .q = q,
                                    .out = out[side],
                                    .lse = lse[side],
                                    .explain = &e[side]};
        r[side] = gpu_attend(side ? cuda : host, &a);
    }
    MUST(r[0] == r[1]);
    if (r[0] == 0) {
        double difference = 0, norm = 0;
        for (uint64_t i = 0; i < heads * w->g.head_dim; i++) {
            difference += pow((double)out[0][i] - out[1][i], 2), norm += pow(out[0][i], 2);
            MUST(isfinite(out[1][i]));
        }
        MUST(sqrt(difference / norm) < 0.05);
        MUST(e[0].dense == e[1].dense && e[0].sparse == e[1].sparse && e[0].seen == e[1].seen);
        MUST(w->policy.top_p > 0 || e[0].attended == e[1].attended);
        MUST(e[1].rows_pool + e[1].rows_arena == e[1].attended);
    }
    for (int side = 0; side < 2; side++)
        free(out[side]), free(lse[side]);
    free(q);
}

static void check_not_finite(const struct world *w, const struct twin *t)
{
    uint64_t bytes = (uint64_t)w->tokens * w->g.kv_heads * w->g.head_dim * pkv_dtype_bytes(w->g.dtype);
    uint64_t bad = (uint64_t)below((uint32_t)(bytes / 4)) * 4;
    uint32_t before;
    struct gpu_append_args a = {&w->g, t->space, w->refs, 0, w->tokens, w->k, w->v, 0, 0};
    memcpy(&before, (char *)w->v + bad, 4);
    memset((char *)w->v + bad, 0xff, 4); /* NaN in every dtype */
    MUST(gpu_append(cuda, &a) == -PKV_ERR_NOT_FINITE);
    memcpy((char *)w->v + bad, &before, 4);
    MUST(gpu_append(cuda, &a) == 0);
    a.space.base[PKV_TIER_POOL] = t->arena_bases; /* where nothing of it is mapped */
    MUST(gpu_append(cuda, &a) == -PKV_ERR_RANGE);
}

static void check_case(void)
{
    struct world w = world_random();
    struct twin t;
    struct gpu_scheme *scheme;
    uint8_t digest[PKV_DIGEST_BYTES];
    uint32_t kind = below(3) ? PKV_SCHEME_SIGN : PKV_SCHEME_CODE; /* one that still learns signs as `sign` */
    if (gpu_scheme_open(kind, &w.g, NULL, &scheme, digest))
        MUST(gpu_scheme_open(PKV_SCHEME_SIGN, &w.g, NULL, &scheme, digest) == 0);
    twin_open(&w, &t);
    check_blocks(&w, &t, scheme);
    check_select(&w, &t, scheme);
    check_dense(&w, &t);
    check_attend(&w, &t, scheme);
    check_not_finite(&w, &t);
    twin_close(&t);
    gpu_scheme_close(scheme);
    world_free(&w);
}

int main(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1, cases = argc > 2 ? strtoull(argv[2], NULL, 0) : 40;
    uint32_t count = 0;
    int r = gpu_device_count(&count);
    if (r || !count) {
        printf("%s (%s): nothing was checked\n", pkv_err_text((uint32_t)-r), gpu_module_why());
        return 77;
    }
    MUST(gpu_open(&(struct gpu_options){.backend = "cuda"}, &cuda) == -PKV_ERR_GPU_DEVICE);
    MUST(gpu_device_open(count - 1, &device) == 0);
    MUST(gpu_open(&(struct gpu_options){.threads = 4}, &host) == 0);
    MUST(gpu_open(&(struct gpu_options){.backend = "cuda", .threads = 2, .device = device}, &cuda) == 0);
    printf("%s\n", gpu_describe(cuda));
    for (uint64_t i = 0; i < cases; i++) {
        state = seed * 1000003 + i;
        printf("seed %" PRIu64 " case %" PRIu64 ": ", seed, i);
        fflush(stdout);
        check_case();
    }
    gpu_close(cuda);
    gpu_close(host);
    gpu_device_close(device);
    printf("%" PRIu64 " cases\n", cases);
    return 0;
}
