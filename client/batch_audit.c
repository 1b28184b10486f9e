/* The audit of batches. The host cannot look at a call in a stream, so the device keeps what the audit needs: at begin the step
 * is told a wish, one query token of one sequence and a kv head, and the step's first attend call that keeps copies that head's
 * q, output and log-sum-exp to pinned memory. When the step has ended they become the audit's sample (audit.c), which is
 * compared in slices with exact attention over the tokens that the query saw: those stay as they are however far the sequence
 * has grown.
 *
 * Calls that keep cost two small launches, so of each pass over the layers one does, a random one, and of models with few
 * layers one call in PASS_LAYERS. A captured graph goes on with the layer that it was captured with; each graph draws its own.
 * A call that keeps also takes its time, from which follows what attending takes, of which the audit may take its share.
 *
 *   no wish --begin--> wished --the step ends--> kept: a sample; or not (no call kept, cancelled, NaN): no wish
 *
 * Failures: the sequence is cut or closed later: audit_forget; another sample is under way: it is not wished for. Owner: the
 * connection's thread. */
#include "client/batch.h"

#define PASS_LAYERS 32u

const struct gpu_batch_wish *batch_audit_wish(struct pkv_batch *b)
{
    struct batch_audit *a = &b->audit;
    struct audit *sampler = &b->kv->audit;
    const struct gpu_policy *p = &b->policy;
    if (!a->on || a->slot || sampler->running || sampler->due)
        return NULL;
    uint64_t at = audit_draw(sampler) % ((uint64_t)b->count * b->queries);
    a->seq = (uint32_t)(at / b->queries);
    a->tokens = b->lengths[a->seq] - b->queries + 1 + at % b->queries;
    if (a->tokens < p->dense_below || a->tokens <= (uint64_t)p->sinks + p->recent + p->k)
        return NULL; /* attended densely */
    a->wish = (struct gpu_batch_wish){(uint32_t)at, (uint32_t)(audit_draw(sampler) % b->model->geom.kv_heads)};
    a->slot = b->slot;
    return &a->wish;
}

bool batch_audit_keeps(struct pkv_batch *b, uint32_t layer)
{
    struct batch_audit *a = &b->audit;
    if (!a->on)
        return false;
    if (layer <= a->last)
        a->keeps = (uint32_t)(audit_draw(&b->kv->audit) % PKV_MAX(b->model->geom.layers, PASS_LAYERS));
    a->last = layer;
    return layer == a->keeps;
}

void batch_audit_ended(struct pkv_batch *b, uint32_t slot, bool good)
{
    struct batch_audit *a = &b->audit;
    if (a->slot != slot)
        return;
    a->slot = 0;
    struct gpu_batch_kept kept = gpu_batch_kept(b->gpu);
    if (!good || !kept.found)
        return;
    audit_adopt(b->kv, &(struct audit_kept){.seq = b->seqs[a->seq].seq,
                                            .layer = kept.layer,
                                            .head = a->wish.head,
                                            .tokens = a->tokens,
                                            .scale = b->policy.scale,
                                            .q = kept.q,
                                            .out = kept.out,
                                            .lse = kept.lse});
}

void batch_audit_turn(struct pkv_batch *b)
{
    if (b->audit.on)
        audit_turn(b->kv, gpu_batch_kept(b->gpu).ns * b->model->geom.layers);
}
