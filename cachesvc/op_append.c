/* Served append: rows and signatures from the data area into granted blocks. */
#include "cachesvc/optable.h"
#include "cachesvc/served.h"

static void write_signatures(struct served *s, const struct gpu_space *space, const char *from)
{
    const struct pkv_op_append *a = &s->submission.u.append;
    const struct pkv_geom *g = &s->geom;
    uint32_t words = pkv_geom_words(g);
    for (uint64_t t = a->first_token; t < a->first_token + a->tokens; t++) {
        uint64_t place = s->blocks[t / PKV_BLOCK_TOKENS].signatures;
        uint64_t base = space->base[pkv_place_tier(place)][pkv_place_chunk(place)];
        uint32_t *to = (uint32_t *)(uintptr_t)pkv_place_address(base, place, pkv_geom_sig_block_bytes(g));
        for (uint32_t h = 0; h < g->kv_heads; h++, from += words * 4ull)
            for (uint32_t w = 0; w < words; w++)
                memcpy(&to[pkv_geom_sig_index(g, h, (uint32_t)(t % PKV_BLOCK_TOKENS), w)], from + w * 4ull, 4);
    }
}

static void work(struct served *s)
{
    struct daemon *d = s->worker->daemon;
    const struct pkv_op_append *a = &s->submission.u.append;
    const char *data = worker_data(s->worker) + a->data_off;
    struct pkv_served_append at = pkv_served_append(&s->geom, a->tokens, a->flags);
    struct gpu_append_args args = {.geom = &s->geom,
                                   .space = memory_space(&d->memory),
                                   .blocks = s->blocks,
                                   .first_token = a->first_token,
                                   .tokens = a->tokens,
                                   .k = data + at.k,
                                   .v = data + at.v};
    int r = a->flags & PKV_APPEND_SIGNATURES ? 0 : gpu_append(d->gpu, &args);
    if (!r)
        write_signatures(s, &args.space, data + at.signatures);
    s->err = (enum pkv_err) - r;
}

void op_append(struct worker *w, const struct pkv_submission *s)
{
    const struct pkv_op_append *a = &s->u.append;
    struct served_span span = {.tokens = a->first_token + a->tokens,
                               .write = true,
                               .write_sealed = a->flags & PKV_APPEND_SIGNATURES,
                               .first_token = a->first_token};
    struct served *job = served_new(w, s, &span, work);
    if (!job)
        return;
    if (pkv_served_append(&job->geom, a->tokens, a->flags).bytes > a->data_bytes)
        served_refuse(job, PKV_ERR_DATA_SMALL);
    else
        served_submit(job);
}
