/* Work areas, grids, schemes. */
#include "gpu/cuda/setup.h"

#include "gpu/cuda/launch.h"

#include <cuda_runtime_api.h>

#define PART_TOKENS 2048u /* a part of fewer tokens costs more to start than to scan */

static uint32_t parts_of(uint32_t lists, uint32_t tokens_max, uint32_t processors)
{
    uint32_t parts = PKV_MAX(2 * processors / lists, 1u), most = PKV_DIV_UP(tokens_max, PART_TOKENS);
    return PKV_MIN(PKV_MIN(parts, PKV_MAX(most, 1u)), CUDA_PARTS_MAX);
}

int cuda_grid(struct cuda_attend *a)
{
    int device, processors, major, shared, together;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device) != cudaSuccess)
        return -PKV_ERR_SYSTEM;
    uint32_t lists = PKV_MAX(a->queries * a->geom.kv_heads, 1u), items = lists * cuda_head_chunks(&a->geom);
    a->parts = parts_of(lists, a->tokens_max, (uint32_t)processors);
    a->splits = PKV_MIN(PKV_MAX(2 * (uint32_t)processors / items, 1u), CUDA_SPLITS_MAX);
    a->team = together && major >= 9 ? cuda_team_size(a, (uint32_t)processors, (uint32_t)shared) : 0;
    return 0;
}

uint32_t cuda_cache_sets(const struct pkv_geom *geom, uint64_t caches, uint64_t bytes)
{
    uint64_t set = CUDA_WAYS * (sizeof(uint64_t) + pkv_geom_row_bytes(geom));
    return (uint32_t)PKV_MIN(bytes / set / PKV_MAX(caches, 1u), UINT32_MAX / CUDA_WAYS);
}

/* Pieces one after the other; `base` 0 only counts. */
static void *piece(uint64_t *at, uint64_t bytes)
{
    uint64_t here = *at;
    *at += PKV_ALIGN_UP(bytes, 256u);
    return (void *)(uintptr_t)here;
}

static uint64_t bind(const struct cuda_attend *a, uint64_t base, struct cuda_work *w)
{
    const struct pkv_geom *g = &a->geom;
    uint64_t heads = (uint64_t)a->queries * g->q_heads, lists = (uint64_t)a->queries * g->kv_heads, at = base;
    uint64_t rows = lists * cuda_rows_max(&a->policy), items = lists * cuda_head_chunks(g);
    w->weights = piece(&at, heads * g->sig_bits);
    w->planes = piece(&at, heads * 8 * pkv_geom_words(g) * 4);
    w->scales = piece(&at, heads * 4);
    w->biases = piece(&at, heads * 4);
    w->codes = piece(&at, lists * PKV_ALIGN_UP((uint64_t)a->tokens_max, PKV_BLOCK_TOKENS) * 2);
    w->counts = piece(&at, lists * PKV_MAX(a->parts, a->team) * CUDA_COUNTS * 4);
    w->fine = piece(&at, lists * a->parts * CUDA_FINE * 4);
    w->index = piece(&at, rows * 4);
    w->address = piece(&at, rows * 8);
    w->chosen = piece(&at, lists * 4);
    w->scores = piece(&at, rows * 2);
    w->partial = piece(&at, items * a->splits * CUDA_PARTIAL(g->head_dim) * 4);
    w->arrived = piece(&at, items * 4);
    w->words = piece(&at, lists * cuda_words(a) * 16);
    w->hints = piece(&at, (a->team ? g->layers : 0) * lists * 4);
    w->gates = piece(&at, lists * CUDA_GATE * 4);
    return at - base;
}

uint64_t cuda_work_bytes(const struct cuda_attend *a)
{
    struct cuda_work ignored;
    return bind(a, 0, &ignored);
}

void cuda_work_bind(struct cuda_attend *a, void *base)
{
    bind(a, (uint64_t)(uintptr_t)base, &a->work);
}

/* One array of the upload: NULL stays NULL. */
struct copy {
    const void *from;
    uint64_t bytes;
    const void **to;
};

static int upload(const struct copy *copies, uint32_t count, void **ret_memory)
{
    uint64_t total = 0, at = 0;
    char *memory = NULL;
    for (uint32_t i = 0; i < count; i++)
        total += copies[i].from ? PKV_ALIGN_UP(copies[i].bytes, 256u) : 0;
    if (cudaMalloc((void **)&memory, PKV_MAX(total, 256u)) != cudaSuccess)
        return -PKV_ERR_NO_MEMORY;
    for (uint32_t i = 0; i < count; i++) {
        if (!copies[i].from)
            continue;
        if (cudaMemcpy(memory + at, copies[i].from, copies[i].bytes, cudaMemcpyHostToDevice) != cudaSuccess) {
            cudaFree(memory);
            return -PKV_ERR_SYSTEM;
        }
        *copies[i].to = memory + at;
        at += PKV_ALIGN_UP(copies[i].bytes, 256u);
    }
    *ret_memory = memory;
    return 0;
}

struct copies {
    struct copy at[10 + 4 * CUDA_STAGES];
    uint32_t count;
};

static void add(struct copies *c, const void *from, uint64_t bytes, const void *to)
{
    c->at[c->count++] = (struct copy){from, bytes, (const void **)(uintptr_t)to};
}

static void add_maps(struct copies *c, const struct scheme_map *from, uint32_t stages, uint64_t heads, struct cuda_map *to)
{
    for (uint32_t i = 0; i < stages; i++) {
        to[i].out = from[i].out, to[i].in = from[i].in;
        add(c, from[i].weight, heads * from[i].out * from[i].in * sizeof(float), &to[i].weight);
        add(c, from[i].bias, heads * from[i].out * sizeof(float), &to[i].bias);
    }
}

int cuda_scheme_upload(const struct gpu_scheme *s, struct cuda_scheme *ret, void **ret_memory)
{
    static_assert(CUDA_STAGES == SCHEME_STAGES_MAX, "one limit");
    const struct pkv_geom *g = &s->geom;
    uint64_t heads = (uint64_t)g->layers * g->kv_heads, q_heads = (uint64_t)g->layers * g->q_heads, dims = heads * s->dims;
    bool hash = s->kind == PKV_SCHEME_HASH, own = hash || (s->kind == PKV_SCHEME_LINEAR && s->q_stages);
    bool mapped = s->k[0].weight;
    *ret = (struct cuda_scheme){.kind = s->kind,
                                .bases = s->bases,
                                .dims = s->dims,
                                .q_signs = s->q_signs,
                                .q_own = own,
                                .unit = s->unit,
                                .k_stages = mapped ? s->k_stages : 0,
                                .q_stages = s->q_stages};
    struct copies c = {.count = 0};
    add(&c, s->signs, 2ull * s->bases * g->head_dim * sizeof(float), &ret->signs);
    add(&c, s->mean, heads * g->head_dim * sizeof(float), &ret->mean);
    add(&c, s->deviation, heads * g->sig_bits * sizeof(float), &ret->deviation);
    add(&c, s->low, dims * sizeof(float), &ret->low);
    add(&c, s->step, dims * sizeof(float), &ret->step);
    add(&c, s->bits, dims, &ret->bits);
    add_maps(&c, s->k, mapped ? PKV_MAX(s->k_stages, 1u) : 0, hash ? q_heads : heads, ret->k);
    add_maps(&c, s->q, s->q[0].weight ? PKV_MAX(s->q_stages, 1u) : 0, own ? q_heads : heads, ret->q);
    return upload(c.at, c.count, ret_memory);
}

uint32_t cuda_scheme_kind(const struct gpu_scheme *s, uint32_t layer)
{
    /* Not by its verbs: they are another address in whoever opened this module. */
    bool signs_yet = s->kind == PKV_SCHEME_CODE && s->learnt && s->learnt[layer] != SCHEME_SOLVED;
    return signs_yet ? PKV_SCHEME_SIGN : s->kind;
}

void cuda_scheme_free(void *memory)
{
    cudaFree(memory);
}
