/* Served read: the rows of whole blocks into the data area, one block after the other. */
#include "cachesvc/optable.h"
#include "cachesvc/served.h"

static void work(struct served *s)
{
    const struct pkv_op_read *r = &s->submission.u.read;
    uint64_t bytes = pkv_geom_block_bytes(&s->geom);
    struct gpu_space space = memory_space(&s->worker->daemon->memory);
    char *to = worker_data(s->worker) + r->out_off;
    for (uint32_t b = r->first_block; b < r->first_block + r->count; b++, to += bytes) {
        uint64_t place = s->blocks[b].rows, base = space.base[pkv_place_tier(place)][pkv_place_chunk(place)];
        memcpy(to, (const void *)(uintptr_t)pkv_place_address(base, place, bytes), bytes);
    }
}

void op_read(struct worker *w, const struct pkv_submission *s)
{
    const struct pkv_op_read *r = &s->u.read;
    struct served_span span = {.tokens = ((uint64_t)r->first_block + r->count) * PKV_BLOCK_TOKENS};
    struct served *job = served_new(w, s, &span, work);
    if (!job)
        return;
    if (r->count * pkv_geom_block_bytes(&job->geom) > r->out_bytes)
        served_refuse(job, PKV_ERR_DATA_SMALL);
    else
        served_submit(job);
}
