/* Append: rows into granted blocks, then their signatures; and blocks as they lie. */
#include "gpu/module.h"
#include "gpu/scheme.h"

#include "proto/check.h"

#include <string.h>

struct append {
    struct gpu *gpu;
    const struct gpu_append_args *a;
    uint64_t k_stride, v_stride, head_bytes;
    int bad;
};

static uint64_t first_of(uint64_t first_token, uint64_t block)
{
    return PKV_MAX(first_token, block * PKV_BLOCK_TOKENS);
}

static void check_token(void *context, uint64_t i, uint32_t thread)
{
    (void)thread;
    struct append *p = context;
    const struct pkv_geom *g = p->a->geom;
    uint64_t count = (uint64_t)g->kv_heads * g->head_dim;
    for (uint64_t t = i * PKV_BLOCK_TOKENS; t < PKV_MIN((i + 1) * PKV_BLOCK_TOKENS, p->a->tokens); t++)
        if (!p->gpu->kernels->finite((const char *)p->a->k + t * p->k_stride, g->dtype, count) ||
            !p->gpu->kernels->finite((const char *)p->a->v + t * p->v_stride, g->dtype, count))
            __atomic_store_n(&p->bad, 1, __ATOMIC_RELAXED);
}

static void copy_block(void *context, uint64_t i, uint32_t thread)
{
    (void)thread;
    struct append *p = context;
    const struct gpu_append_args *a = p->a;
    const struct pkv_geom *g = a->geom;
    uint64_t block = a->first_token / PKV_BLOCK_TOKENS + i, end = a->first_token + a->tokens;
    char *to = (char *)(uintptr_t)gpu_place(&a->space, a->blocks[block].rows, pkv_geom_block_bytes(g));
    for (uint32_t h = 0; h < g->kv_heads; h++) {
        for (uint64_t t = first_of(a->first_token, block); t < PKV_MIN(end, (block + 1) * PKV_BLOCK_TOKENS); t++) {
            char *row = to + pkv_geom_row_offset(g, h, (uint32_t)(t % PKV_BLOCK_TOKENS));
            uint64_t from = t - a->first_token;
            memcpy(row, (const char *)a->k + from * p->k_stride + h * p->head_bytes, p->head_bytes);
            memcpy(row + p->head_bytes, (const char *)a->v + from * p->v_stride + h * p->head_bytes, p->head_bytes);
        }
    }
}

static int check_append(const struct pkv_geom *g, const struct gpu_space *space, const struct pkv_block_ref *blocks,
                        uint64_t first_token, uint32_t tokens, bool signatures)
{
    enum pkv_err e = pkv_check_geom(g);
    if (e != PKV_ERR_OK)
        return -(int)e;
    if (!tokens)
        return -PKV_ERR_SHAPE;
    if (!pkv_check_range(first_token, tokens, PKV_SEQ_TOKENS_MAX))
        return -PKV_ERR_LENGTH;
    uint32_t first = (uint32_t)(first_token / PKV_BLOCK_TOKENS), last = pkv_tokens_blocks(first_token + tokens);
    return gpu_places_mapped(space, blocks, first, last - first, signatures && g->sig_bits) ? 0 : -PKV_ERR_RANGE;
}

static uint32_t blocks_of(uint64_t first_token, uint32_t tokens)
{
    return pkv_tokens_blocks(first_token + tokens) - (uint32_t)(first_token / PKV_BLOCK_TOKENS);
}

int gpu_append(struct gpu *gpu, const struct gpu_append_args *a)
{
    int r = check_append(a->geom, &a->space, a->blocks, a->first_token, a->tokens, false);
    if (r)
        return r;
    if (gpu->backend)
        return gpu->backend->append(gpu->device, a);
    uint64_t head_bytes = (uint64_t)a->geom->head_dim * pkv_dtype_bytes(a->geom->dtype);
    uint64_t dense = head_bytes * a->geom->kv_heads;
    struct append p = {
        gpu, a, a->k_token_stride ? a->k_token_stride : dense, a->v_token_stride ? a->v_token_stride : dense, head_bytes, 0};
    gpu_team_run(&gpu->team, check_token, &p, pkv_tokens_blocks(a->tokens));
    if (p.bad)
        return -PKV_ERR_NOT_FINITE;
    gpu_team_run(&gpu->team, copy_block, &p, blocks_of(a->first_token, a->tokens));
    return 0;
}

struct sign {
    struct gpu *gpu;
    const struct gpu_sign_args *a;
    char *list; /* [tokens][kv_heads][words]; NULL: into the blocks */
};

static void sign_head(const struct sign *p, const char *rows, uint32_t head, uint64_t first, uint32_t count, uint32_t *to)
{
    const struct gpu_sign_args *a = p->a;
    const struct pkv_geom *g = a->geom;
    uint32_t each = pkv_geom_words(g), words[GPU_COLUMNS * PKV_SIG_WORDS_MAX];
    float keys[GPU_COLUMNS * PKV_HEAD_DIM_MAX];
    for (uint32_t i = 0; i < count; i++) {
        const char *row = rows + pkv_geom_row_offset(g, head, (uint32_t)((first + i) % PKV_BLOCK_TOKENS));
        p->gpu->kernels->to_float(row, g->dtype, keys + (uint64_t)i * g->head_dim, g->head_dim);
    }
    a->scheme->verbs->sign(a->scheme, p->gpu->kernels, a->layer, head, keys, count, words);
    for (uint32_t i = 0; i < count; i++) {
        for (uint32_t w = 0; w < each && to; w++)
            to[pkv_geom_sig_index(g, head, (uint32_t)((first + i) % PKV_BLOCK_TOKENS), w)] = words[i * each + w];
        if (!to)
            memcpy(p->list + ((first + i - a->first_token) * g->kv_heads + head) * each * 4, words + i * each, each * 4ull);
    }
}

static void sign_block(void *context, uint64_t i, uint32_t thread)
{
    (void)thread;
    struct sign *p = context;
    const struct gpu_sign_args *a = p->a;
    const struct pkv_geom *g = a->geom;
    uint64_t block = a->first_token / PKV_BLOCK_TOKENS + i;
    uint64_t end = PKV_MIN(a->first_token + a->tokens, (block + 1) * PKV_BLOCK_TOKENS);
    const char *rows = gpu_place(&a->space, a->blocks[block].rows, pkv_geom_block_bytes(g));
    uint32_t *to = NULL;
    if (!p->list)
        to = (uint32_t *)(uintptr_t)gpu_place(&a->space, a->blocks[block].signatures, pkv_geom_sig_block_bytes(g));
    for (uint32_t h = 0; h < g->kv_heads; h++)
        for (uint64_t t = first_of(a->first_token, block), n; t < end; t += n) {
            n = PKV_MIN(end - t, (uint64_t)GPU_COLUMNS);
            sign_head(p, rows, h, t, (uint32_t)n, to);
        }
}

static int sign_all(struct gpu *gpu, const struct gpu_sign_args *a, void *list)
{
    struct sign p = {gpu, a, list};
    gpu_team_run(&gpu->team, sign_block, &p, blocks_of(a->first_token, a->tokens));
    return 0;
}

int gpu_sign(struct gpu *gpu, const struct gpu_sign_args *a)
{
    int r = check_append(a->geom, &a->space, a->blocks, a->first_token, a->tokens, true);
    if (r)
        return r;
    if (a->layer >= a->geom->layers)
        return -PKV_ERR_INVALID;
    if (!a->geom->sig_bits)
        return 0;
    return gpu->backend ? gpu->backend->sign(gpu->device, a) : sign_all(gpu, a, NULL);
}

int gpu_sign_list(struct gpu *gpu, const struct gpu_sign_args *a, void *ret)
{
    int r = check_append(a->geom, &a->space, a->blocks, a->first_token, a->tokens, false);
    if (!r && a->layer >= a->geom->layers)
        r = -PKV_ERR_INVALID;
    if (r || !a->geom->sig_bits)
        return r;
    return gpu->backend ? -PKV_ERR_UNSUPPORTED : sign_all(gpu, a, ret);
}

int gpu_put_signatures(struct gpu *gpu, const struct gpu_signatures_args *a)
{
    const struct pkv_geom *g = a->geom;
    int r = check_append(g, &a->space, a->blocks, a->first_token, a->tokens, true);
    if (r || !g->sig_bits)
        return r;
    if (gpu->backend)
        return gpu->backend->put_signatures(gpu->device, a);
    const char *from = a->signatures;
    for (uint64_t t = a->first_token; t < a->first_token + a->tokens; t++) {
        uint64_t place = a->blocks[t / PKV_BLOCK_TOKENS].signatures;
        uint32_t *to = (uint32_t *)(uintptr_t)gpu_place(&a->space, place, pkv_geom_sig_block_bytes(g));
        for (uint32_t h = 0; h < g->kv_heads; h++)
            for (uint32_t w = 0; w < pkv_geom_words(g); w++, from += 4)
                memcpy(&to[pkv_geom_sig_index(g, h, (uint32_t)(t % PKV_BLOCK_TOKENS), w)], from, 4);
    }
    return 0;
}

int gpu_read(struct gpu *gpu, const struct gpu_read_args *a)
{
    uint64_t rows = pkv_geom_block_bytes(a->geom), signatures = pkv_geom_sig_block_bytes(a->geom);
    if (!gpu_places_mapped(&a->space, a->blocks, a->first_block, a->count, a->ret_signatures != NULL))
        return -PKV_ERR_RANGE;
    if (gpu->backend)
        return gpu->backend->read(gpu->device, a);
    for (uint32_t i = 0; i < a->count; i++) {
        const struct pkv_block_ref *ref = &a->blocks[a->first_block + i];
        if (a->ret_rows)
            memcpy((char *)a->ret_rows + i * rows, gpu_place(&a->space, ref->rows, rows), rows);
        if (a->ret_signatures)
            memcpy((char *)a->ret_signatures + i * signatures, gpu_place(&a->space, ref->signatures, signatures), signatures);
    }
    return 0;
}
