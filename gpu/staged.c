/* What the device's kernels lack, on the CPU: the blocks are brought to memory of its own, and the host backend works there.
 * For sequences so short that a list holds all of them, and lists that somebody else made. */
#include "gpu/internal.h"

#include <stdlib.h>
#include <string.h>

/* Blocks of some views, as two chunks: rows and signatures. */
struct staged {
    void *memory;
    struct pkv_block_ref *refs; /* of all views, one after the other */
    struct gpu_view *views;
    uint64_t base[2];
};

static void staged_close(struct staged *s)
{
    free(s->memory), free(s->refs), free(s->views);
}

static struct gpu_space staged_space(const struct staged *s)
{
    return (struct gpu_space){{NULL, s->base, s->base}};
}

static int staged_open(struct gpu *gpu, const struct pkv_geom *g, const struct gpu_space *space, const struct gpu_view *views,
                       uint32_t seqs, struct staged *s)
{
    uint64_t blocks = 0, row_bytes = pkv_geom_block_bytes(g), sig_bytes = pkv_geom_sig_block_bytes(g);
    for (uint32_t v = 0; v < seqs; v++)
        blocks += pkv_tokens_blocks(views[v].tokens);
    *s = (struct staged){.memory = malloc(blocks * (row_bytes + sig_bytes)),
                         .refs = malloc(blocks * sizeof(*s->refs)),
                         .views = malloc(seqs * sizeof(*s->views))};
    int r = s->memory && s->refs && s->views ? 0 : -PKV_ERR_NO_MEMORY;
    s->base[0] = (uint64_t)(uintptr_t)s->memory, s->base[1] = s->base[0] + blocks * row_bytes;
    uint64_t at = 0;
    for (uint32_t v = 0; v < seqs && !r; v++) {
        uint32_t n = pkv_tokens_blocks(views[v].tokens);
        struct gpu_read_args read = {.geom = g,
                                     .space = *space,
                                     .blocks = views[v].blocks,
                                     .count = n,
                                     .ret_rows = (char *)s->memory + at * row_bytes,
                                     .ret_signatures = sig_bytes ? (char *)(uintptr_t)s->base[1] + at * sig_bytes : NULL};
        r = gpu_read(gpu, &read);
        s->views[v] = views[v], s->views[v].blocks = s->refs + at;
        for (uint32_t b = 0; b < n; b++, at++) /* the tier as it was: it is counted */
            s->refs[at] = (struct pkv_block_ref){pkv_place(pkv_place_tier(views[v].blocks[b].rows), 0, (uint32_t)at, 1),
                                                 pkv_place(PKV_TIER_POOL, 1, (uint32_t)at, 1)};
    }
    if (r)
        staged_close(s);
    return r;
}

int staged_select(struct gpu *gpu, const struct gpu_select_args *a, const struct gpu_rows *rows)
{
    struct staged s;
    int r = staged_open(gpu, a->geom, &a->space, a->views, a->seqs, &s);
    if (r)
        return r;
    struct gpu_select_args here = *a;
    here.space = staged_space(&s), here.views = s.views;
    r = host_select(gpu, &here, rows);
    staged_close(&s);
    return r;
}

int staged_attend_rows(struct gpu *gpu, const struct gpu_select_args *a, const struct gpu_rows *rows, float *out, float *lse)
{
    struct staged s;
    int r = staged_open(gpu, a->geom, &a->space, a->views, a->seqs, &s);
    if (r)
        return r;
    struct gpu_select_args here = *a;
    here.space = staged_space(&s), here.views = s.views;
    r = host_attend_rows(gpu, &here, rows, NULL, out, lse);
    staged_close(&s);
    return r;
}

void gpu_signatures_list(const struct pkv_geom *g, const void *blocks, uint32_t first, uint32_t tokens, void *ret)
{
    char *to = ret;
    for (uint32_t t = first; t < first + tokens; t++) {
        const char *block = (const char *)blocks + t / PKV_BLOCK_TOKENS * pkv_geom_sig_block_bytes(g);
        for (uint32_t h = 0; h < g->kv_heads; h++)
            for (uint32_t w = 0; w < pkv_geom_words(g); w++, to += 4)
                memcpy(to, block + 4ull * pkv_geom_sig_index(g, h, t % PKV_BLOCK_TOKENS, w), 4);
    }
}
