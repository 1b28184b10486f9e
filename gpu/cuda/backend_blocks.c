/* Rows and signatures into blocks, and blocks out of them. */
#include "gpu/cuda/backend.h"
#include "gpu/cuda/rows.h"

#include <string.h>

#define PIECE_BYTES (32ull << 20) /* through pinned memory at a time */

/* The references that a run of tokens needs, and the sequence that has them: what cuda_append reads. */
struct target {
    uint32_t first_block;
    uint64_t refs, seq; /* offsets in `in` */
};

static uint64_t target_bytes(uint64_t first_token, uint32_t tokens)
{
    uint64_t blocks = pkv_tokens_blocks(first_token + tokens) - first_token / PKV_BLOCK_TOKENS;
    return PKV_ALIGN_UP(blocks * sizeof(struct pkv_block_ref), 256ull) + 256;
}

static const struct pkv_block_ref *target_put(struct backend *b, const struct pkv_block_ref *blocks, uint64_t first_token,
                                              uint32_t tokens, struct target *t)
{
    uint32_t first = (uint32_t)(first_token / PKV_BLOCK_TOKENS), count = pkv_tokens_blocks(first_token + tokens) - first;
    t->first_block = first;
    t->refs = area_take(&b->in, count * sizeof(*blocks));
    t->seq = area_take(&b->in, sizeof(struct cuda_seq));
    memcpy(b->in.host + t->refs, blocks + first, count * sizeof(*blocks));
    /* As if the references before were there too. */
    const struct pkv_block_ref *on_device =
        (const struct pkv_block_ref *)((uintptr_t)b->in.device + t->refs - (uintptr_t)first * sizeof(*blocks));
    *(struct cuda_seq *)(void *)(b->in.host + t->seq) = (struct cuda_seq){on_device, first_token + tokens};
    return on_device;
}

static uint32_t bad_of(const struct backend *b)
{
    return *(const uint32_t *)(const void *)b->out.host;
}

static int append_piece(struct backend *b, const struct gpu_append_args *a, uint32_t done, uint32_t tokens)
{
    const struct pkv_geom *g = a->geom;
    uint64_t each = (uint64_t)g->kv_heads * g->head_dim * pkv_dtype_bytes(g->dtype), first = a->first_token + done;
    uint64_t k_stride = a->k_token_stride ? a->k_token_stride : each, v_stride = a->v_token_stride ? a->v_token_stride : each;
    struct cuda_append append = {.geom = *g, .bad = b->bad, .count = 1, .tokens = tokens};
    struct target t;
    int r = area_room(b, &b->in, 2 * PKV_ALIGN_UP(tokens * each, 256ull) + target_bytes(first, tokens), true, true);
    r = r ? r : area_room(b, &b->out, 256, true, false);
    r = r ? r : backend_bases(b, &a->space, append.base);
    if (r)
        return r;
    target_put(b, a->blocks, first, tokens, &t);
    uint64_t k = area_take(&b->in, tokens * each), v = area_take(&b->in, tokens * each);
    for (uint32_t i = 0; i < tokens; i++) {
        memcpy(b->in.host + k + i * each, (const char *)a->k + (uint64_t)(done + i) * k_stride, each);
        memcpy(b->in.host + v + i * each, (const char *)a->v + (uint64_t)(done + i) * v_stride, each);
    }
    append.scheme.kind = PKV_SCHEME_NONE;
    append.seqs = (const struct cuda_seq *)(const void *)(b->in.device + t.seq);
    append.k = b->in.device + k, append.v = b->in.device + v;
    r = area_send(b, &b->in);
    r = r ? r : backend_error(b, cudaMemsetAsync(b->bad, 0, sizeof(*b->bad), b->stream));
    r = r ? r : gpu_cuda_table()->append(&append, b->stream);
    r = r ? r : backend_error(b, cudaMemcpyAsync(b->out.host, b->bad, sizeof(*b->bad), cudaMemcpyDeviceToHost, b->stream));
    r = r ? r : backend_wait(b);
    return r ? r : bad_of(b) ? -PKV_ERR_NOT_FINITE : 0;
}

/* NaN is found while rows are written: behind the sequence's end, where nobody reads. */
int backend_append(void *backend, const struct gpu_append_args *a)
{
    struct backend *b = backend;
    uint64_t each = pkv_geom_row_bytes(a->geom) * a->geom->kv_heads;
    uint32_t most = (uint32_t)PKV_MAX(PIECE_BYTES / each, 1ull);
    int r = backend_enter(b);
    if (r)
        return r;
    for (uint32_t done = 0, n; done < a->tokens && !r; done += n) {
        n = PKV_MIN(most, a->tokens - done);
        r = append_piece(b, a, done, n);
    }
    return backend_leave(b, r);
}

static int sign(struct backend *b, const struct gpu_sign_args *a)
{
    struct cuda_append append = {.geom = *a->geom, .layer = a->layer, .count = 1, .tokens = a->tokens};
    struct target t;
    int r = area_room(b, &b->in, target_bytes(a->first_token, a->tokens), true, true);
    r = r ? r : backend_bases(b, &a->space, append.base);
    r = r ? r : backend_scheme(b, a->scheme, a->layer, &append.scheme);
    if (r)
        return r;
    target_put(b, a->blocks, a->first_token, a->tokens, &t);
    append.seqs = (const struct cuda_seq *)(const void *)(b->in.device + t.seq);
    r = area_send(b, &b->in);
    r = r ? r : gpu_cuda_table()->append(&append, b->stream);
    return r ? r : backend_wait(b);
}

int backend_sign(void *backend, const struct gpu_sign_args *a)
{
    struct backend *b = backend;
    int r = backend_enter(b);
    return r ? r : backend_leave(b, sign(b, a));
}

static int put_piece(struct backend *b, const struct gpu_signatures_args *a, uint32_t done, uint32_t tokens)
{
    uint64_t each = (uint64_t)a->geom->kv_heads * pkv_geom_words(a->geom) * 4, first = a->first_token + done;
    struct cuda_signatures put = {.geom = *a->geom, .first_token = first, .tokens = tokens};
    struct target t;
    int r = area_room(b, &b->in, tokens * each + 256 + target_bytes(first, tokens), true, true);
    r = r ? r : backend_bases(b, &a->space, put.base);
    if (r)
        return r;
    put.blocks = target_put(b, a->blocks, first, tokens, &t);
    uint64_t from = area_take(&b->in, tokens * each);
    memcpy(b->in.host + from, (const char *)a->signatures + done * each, tokens * each);
    put.from = (const uint32_t *)(const void *)(b->in.device + from);
    r = area_send(b, &b->in);
    r = r ? r : cuda_signatures_launch(&put, b->stream);
    return r ? r : backend_wait(b);
}

int backend_put_signatures(void *backend, const struct gpu_signatures_args *a)
{
    struct backend *b = backend;
    uint64_t each = (uint64_t)a->geom->kv_heads * pkv_geom_words(a->geom) * 4;
    uint32_t most = (uint32_t)(PIECE_BYTES / each);
    int r = backend_enter(b);
    if (r)
        return r;
    for (uint32_t done = 0, n; done < a->tokens && !r; done += n) {
        n = PKV_MIN(most, a->tokens - done);
        r = put_piece(b, a, done, n);
    }
    return backend_leave(b, r);
}

/* Slots of a tier to pinned memory, and on to `to`. */
static int read_slots(struct backend *b, const struct gpu_read_args *a, bool signatures, char *to)
{
    uint64_t bytes = signatures ? pkv_geom_sig_block_bytes(a->geom) : pkv_geom_block_bytes(a->geom);
    uint32_t most = (uint32_t)PKV_MAX(PIECE_BYTES / bytes, 1ull);
    int r = area_room(b, &b->out, PKV_MIN(most, a->count) * bytes, true, false);
    for (uint32_t done = 0, n; done < a->count && !r; done += n) {
        n = PKV_MIN(most, a->count - done);
        for (uint32_t i = 0; i < n && !r; i++) {
            const struct pkv_block_ref *ref = &a->blocks[a->first_block + done + i];
            uint64_t place = signatures ? ref->signatures : ref->rows;
            uint64_t base = a->space.base[pkv_place_tier(place)][pkv_place_chunk(place)];
            const void *from = (const void *)(uintptr_t)pkv_place_address(base, place, bytes);
            r = backend_error(b, cudaMemcpyAsync(b->out.host + i * bytes, from, bytes, cudaMemcpyDefault, b->stream));
        }
        r = r ? r : backend_wait(b);
        if (!r)
            memcpy(to + done * bytes, b->out.host, n * bytes);
    }
    return r;
}

int backend_read(void *backend, const struct gpu_read_args *a)
{
    struct backend *b = backend;
    int r = backend_enter(b);
    if (r)
        return r;
    if (a->ret_rows)
        r = read_slots(b, a, false, a->ret_rows);
    if (!r && a->ret_signatures)
        r = read_slots(b, a, true, a->ret_signatures);
    return backend_leave(b, r);
}
