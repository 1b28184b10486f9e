/* Opening, choice of kernels, checks that every entry shares. */
#include "gpu/internal.h"
#include "gpu/module.h"

#include "proto/check.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool cpu_runs(const struct gpu_kernels *k)
{
#ifdef PKV_HOST_AVX512
    if (k == &gpu_kernels_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("avx512vpopcntdq");
#endif
#ifdef PKV_HOST_AVX2
    if (k == &gpu_kernels_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
               __builtin_cpu_supports("f16c");
#endif
    return k == &gpu_kernels_c;
}

const struct gpu_kernels *gpu_kernels_choose(const char *name)
{
    static const struct gpu_kernels *const tables[] = {
#ifdef PKV_HOST_AVX512
        &gpu_kernels_avx512,
#endif
#ifdef PKV_HOST_AVX2
        &gpu_kernels_avx2,
#endif
        &gpu_kernels_c,
    };
    for (size_t i = 0; i < PKV_ARRAY_LEN(tables); i++)
        if ((!name || !strcmp(name, tables[i]->name)) && cpu_runs(tables[i]))
            return tables[i];
    return NULL;
}

static uint32_t cpus(void)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof(set), &set) || CPU_COUNT(&set) < 1)
        return 1;
    return PKV_MIN((uint32_t)CPU_COUNT(&set), GPU_THREADS_MAX);
}

static int open_device(struct gpu *gpu, struct gpu_device *device)
{
    const struct gpu_module *m = gpu_module_get();
    if (!m)
        return -PKV_ERR_GPU_MODULE;
    if (!m->backend || !device)
        return -PKV_ERR_GPU_DEVICE;
    int r = m->backend->open(device, &gpu->device);
    if (r)
        return r;
    gpu->backend = m->backend;
    snprintf(gpu->description, sizeof(gpu->description), "cuda %s, host %s", gpu_device_about(device)->name,
             gpu->kernels->name);
    return 0;
}

int gpu_open(const struct gpu_options *options, struct gpu **ret)
{
    bool cuda = options->backend && !strcmp(options->backend, "cuda");
    if (options->backend && !cuda && strcmp(options->backend, "host"))
        return -PKV_ERR_UNSUPPORTED;
    const struct gpu_kernels *kernels = gpu_kernels_choose(options->isa);
    if (!kernels)
        return -PKV_ERR_UNSUPPORTED;
    if (options->threads > GPU_THREADS_MAX)
        return -PKV_ERR_INVALID;
    struct gpu *gpu = calloc(1, sizeof(*gpu));
    if (!gpu)
        return -PKV_ERR_NO_MEMORY;
    gpu->kernels = kernels;
    uint32_t threads = options->threads ? options->threads : cpus();
    snprintf(gpu->description, sizeof(gpu->description), "host %s, %u threads", kernels->name, threads);
    int r = cuda ? open_device(gpu, options->device) : 0;
    r = r ? r : gpu_team_start(&gpu->team, threads);
    if (r) {
        if (gpu->backend)
            gpu->backend->close(gpu->device);
        free(gpu);
        return r;
    }
    *ret = gpu;
    return 0;
}

void gpu_close(struct gpu *gpu)
{
    if (!gpu)
        return;
    gpu_team_stop(&gpu->team);
    if (gpu->backend)
        gpu->backend->close(gpu->device);
    for (uint32_t t = 0; t < GPU_THREADS_MAX; t++)
        for (uint32_t p = 0; p < GPU_BUF_PURPOSES; p++)
            free(gpu->buffers[t][p].data);
    for (uint32_t s = 0; s < GPU_SHARED_COUNT; s++)
        free(gpu->shared[s].data);
    free(gpu);
}

bool gpu_on_device(const struct gpu *gpu)
{
    return gpu->backend != NULL;
}

const char *gpu_describe(const struct gpu *gpu)
{
    return gpu->description;
}

static bool mapped(const struct gpu_space *space, uint64_t place)
{
    uint32_t tier = pkv_place_tier(place);
    return tier != PKV_TIER_NONE && tier < PKV_TIERS && pkv_place_chunk(place) < PKV_CHUNKS_MAX &&
           space->base[tier][pkv_place_chunk(place)];
}

bool gpu_places_mapped(const struct gpu_space *space, const struct pkv_block_ref *refs, uint32_t first, uint32_t blocks,
                       bool signatures)
{
    for (uint32_t b = first; b < first + blocks; b++)
        if (!mapped(space, refs[b].rows) || (signatures && !mapped(space, refs[b].signatures)))
            return false;
    return true;
}

uint32_t gpu_queries(const struct gpu_view *views, uint32_t seqs)
{
    uint32_t total = 0;
    for (uint32_t s = 0; s < seqs; s++)
        total += views[s].queries;
    return total;
}

struct gpu_query gpu_query_find(const struct gpu_view *views, uint32_t seqs, uint32_t query)
{
    uint32_t s = 0;
    while (s + 1 < seqs && query >= views[s].queries)
        query -= views[s++].queries;
    return (struct gpu_query){&views[s], (uint32_t)(views[s].tokens - views[s].queries + 1 + query)};
}

int gpu_check_views(struct gpu *gpu, const struct pkv_geom *geom, const struct gpu_space *space, uint32_t seqs,
                    const struct gpu_view *views, const void *q, bool signatures)
{
    enum pkv_err e = pkv_check_geom(geom);
    if (e != PKV_ERR_OK)
        return -(int)e;
    if (!seqs || seqs > PKV_BATCH_MAX)
        return -PKV_ERR_SHAPE;
    uint64_t total = 0;
    for (uint32_t s = 0; s < seqs; s++) {
        const struct gpu_view *v = &views[s];
        if (!v->queries || v->queries > v->tokens || v->queries > PKV_QUERIES_MAX)
            return -PKV_ERR_SHAPE;
        if (v->tokens > PKV_SEQ_TOKENS_MAX)
            return -PKV_ERR_LENGTH;
        if (!gpu_places_mapped(space, v->blocks, 0, pkv_tokens_blocks(v->tokens), signatures && geom->sig_bits))
            return -PKV_ERR_RANGE;
        total += v->queries;
    }
    if (total > PKV_QUERIES_MAX)
        return -PKV_ERR_SHAPE;
    if (!gpu->kernels->finite(q, geom->dtype, total * geom->q_heads * geom->head_dim))
        return -PKV_ERR_NOT_FINITE;
    return 0;
}
