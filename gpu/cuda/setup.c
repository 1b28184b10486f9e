/* Work areas, grids, schemes. */
#include "gpu/cuda/setup.h"

#include <cuda_runtime_api.h>

#define PART_TOKENS 2048u /* a part of fewer tokens costs more to start than to scan */

uint32_t cuda_parts(uint32_t lists, uint32_t tokens_max, uint32_t processors)
{
    uint32_t parts = PKV_MAX(2 * processors / PKV_MAX(lists, 1u), 1u), most = PKV_DIV_UP(tokens_max, PART_TOKENS);
    return PKV_MIN(PKV_MIN(parts, PKV_MAX(most, 1u)), CUDA_PARTS_MAX);
}

uint32_t cuda_splits(uint32_t items, uint32_t processors)
{
    return PKV_MIN(PKV_MAX(2 * processors / PKV_MAX(items, 1u), 1u), CUDA_SPLITS_MAX);
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
    w->counts = piece(&at, lists * a->parts * CUDA_COUNTS * 4);
    w->index = piece(&at, rows * 4);
    w->chosen = piece(&at, lists * 4);
    w->scores = piece(&at, rows * 2);
    w->partial = piece(&at, items * a->splits * CUDA_PARTIAL(g->head_dim) * 4);
    w->arrived = piece(&at, items * 4);
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

static uint64_t map_bytes(const struct scheme_map *m, uint64_t heads, bool bias)
{
    return heads * m->out * (bias ? 1ull : m->in) * sizeof(float);
}

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

int cuda_scheme_upload(const struct gpu_scheme *s, struct cuda_scheme *ret, void **ret_memory)
{
    const struct pkv_geom *g = &s->geom;
    uint64_t heads = (uint64_t)g->layers * g->kv_heads, q_heads = (uint64_t)g->layers * g->q_heads;
    uint64_t own = s->kind == PKV_SCHEME_LINEAR && s->q_stages ? q_heads : heads, dims = heads * s->dims;
    if (s->kind == PKV_SCHEME_HASH)
        return -PKV_ERR_UNSUPPORTED;
    *ret = (struct cuda_scheme){.kind = s->kind,
                                .bases = s->bases,
                                .dims = s->dims,
                                .q_signs = s->q_signs,
                                .q_own = s->kind == PKV_SCHEME_LINEAR && s->q_stages,
                                .unit = s->unit};
    struct copy copies[] = {
        {s->signs, 2ull * s->bases * g->head_dim * sizeof(float), (const void **)&ret->signs},
        {s->mean, heads * g->head_dim * sizeof(float), (const void **)&ret->mean},
        {s->deviation, heads * g->sig_bits * sizeof(float), (const void **)&ret->deviation},
        {s->k[0].weight, map_bytes(&s->k[0], heads, false), (const void **)&ret->k_weight},
        {s->k[0].bias, map_bytes(&s->k[0], heads, true), (const void **)&ret->k_bias},
        {s->q[0].weight, map_bytes(&s->q[0], own, false), (const void **)&ret->q_weight},
        {s->q[0].bias, map_bytes(&s->q[0], own, true), (const void **)&ret->q_bias},
        {s->low, dims * sizeof(float), (const void **)&ret->low},
        {s->step, dims * sizeof(float), (const void **)&ret->step},
        {s->bits, dims, (const void **)&ret->bits},
    };
    return upload(copies, PKV_ARRAY_LEN(copies), ret_memory);
}

void cuda_scheme_free(void *memory)
{
    cudaFree(memory);
}
