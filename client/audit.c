/* The online audit: beside a sampled query token, layer and kv head of the calls of pkv_attend, exact attention is computed and
 * what the selection missed goes into the worker's counters, by model.
 *
 *   IDLE --`skip` sparse calls later--> DUE --the call succeeds, sparse there--> RUNNING --all blocks seen--> counted, IDLE
 *   IDLE --a step of a batch has kept what it did (batch_audit.c)--------------> RUNNING
 *
 * A sample runs in slices of blocks, one after each call, so that no call pays for a million tokens, and all of them together
 * take the share of attend's time that the daemon allows (control page, audit_ppm): time is earned by calls and spent on
 * slices (audit.h). Rows of a prefix do not change while it stands, wherever they move, so slices of different calls add up to
 * what one dense call would give, to the bit.
 *
 * Failures, and what becomes of them: the sequence is cut or closed here: audit_forget drops the sample; cut and written again
 * by another worker: the places of its signatures, which else never move, are others at the end: dropped; the sequence is
 * stale, no memory, the daemon does not answer a read: dropped. Samples never fail the call that they follow. Owner: the
 * connection's thread. */
#include "client/internal.h"

static float *lse_room(struct audit *a, uint64_t count)
{
    if (count > a->lse_room) {
        free(a->lse);
        a->lse = malloc(count * sizeof(*a->lse));
        a->lse_room = a->lse ? count : 0;
    }
    return a->lse;
}

/* Chooses a query token of the call; false: the call is none that can succeed. */
static bool choose(struct audit *a, struct pkv_seq *const *seqs, const uint32_t *queries, uint32_t count, uint32_t layer,
                   uint64_t *ret_total)
{
    uint64_t total = 0, at;
    for (uint32_t i = 0; i < count && count <= PKV_BATCH_MAX; i++) {
        if (seqs[i]->model != seqs[0]->model)
            return false;
        total += queries[i];
    }
    if (!total || total > PKV_QUERIES_MAX || layer >= seqs[0]->model->geom.layers)
        return false;
    a->query = (uint32_t)(at = audit_draw(a) % total);
    uint32_t i = 0;
    for (; at >= queries[i]; i++)
        at -= queries[i];
    a->seq = seqs[i], a->layer = layer, a->length = seq_layer_tokens(seqs[i], layer);
    a->tokens = a->length - queries[i] + 1 + at;
    a->head = (uint32_t)(audit_draw(a) % seqs[0]->model->geom.kv_heads);
    *ret_total = total;
    return queries[i] <= a->length;
}

uint64_t audit_draw(struct audit *a)
{
    if (!a->random)
        a->random = clock_ns() * 2 + 1;
    return audit_random(&a->random);
}

float *audit_begin(struct pkv_seq *const *seqs, const uint32_t *queries, uint32_t count, uint32_t layer, float *lse)
{
    struct pkv *kv = seqs[0]->model->kv;
    struct audit *a = &kv->audit;
    uint64_t total;
    a->begin_ns = clock_ns();
    a->due = !a->running && !a->skip && kv->control->audit_ppm && choose(a, seqs, queries, count, layer, &total);
    if (a->due && !lse) {
        lse = lse_room(a, total * seqs[0]->model->geom.q_heads);
        a->due = lse != NULL;
    }
    return lse;
}

/* ---- the sample ---- */

struct parts {
    char *q;
    float *out, *lse, *exact, *max, *sum, *exact_lse;
};

static uint64_t parts_of(const struct audit *a, const struct pkv_geom *g, struct parts *ret)
{
    uint64_t heads = g->q_heads, vectors = heads * g->head_dim;
    float *at = (float *)(void *)a->memory;
    *ret = (struct parts){.q = a->memory, .out = at + vectors}; /* q in any type takes no more than floats */
    ret->lse = ret->out + vectors, ret->exact = ret->lse + heads, ret->max = ret->exact + vectors;
    ret->sum = ret->max + heads, ret->exact_lse = ret->sum + heads;
    return (3 * vectors + 4 * heads) * sizeof(float);
}

static bool memory_get(struct audit *a, const struct pkv_geom *g)
{
    struct parts ignored;
    uint64_t bytes = parts_of(a, g, &ignored);
    if (bytes > a->memory_bytes) {
        free(a->memory);
        a->memory = malloc(bytes);
        a->memory_bytes = a->memory ? bytes : 0;
    }
    return a->memory;
}

static void drop(struct pkv *kv)
{
    kv->audit.running = false;
    kv->region->counters.samples_dropped++;
}

/* A sum over the places of the signatures of the sample's blocks: they stay where they are as long as the prefix stands. */
static int places_sum(const struct audit *a, uint64_t *ret)
{
    uint32_t blocks = pkv_tokens_blocks(a->tokens);
    struct pkv_block_ref *refs = region_refs(a->seq->model->kv, blocks);
    int r = refs ? seq_refs(a->seq, a->layer, 0, blocks, refs) : -PKV_ERR_NO_MEMORY;
    *ret = 0;
    for (uint32_t b = 0; b < blocks && !r; b++)
        *ret = *ret * 0x9e3779b97f4a7c15ull + refs[b].signatures;
    return r;
}

static bool take(struct audit *a, const struct audit_call *c)
{
    const struct pkv_geom *g = &a->seq->model->geom;
    uint64_t vectors = (uint64_t)g->q_heads * g->head_dim, first = a->query * vectors;
    struct parts p;
    const struct pkv *kv = a->seq->model->kv;
    if (policy_dense(c->policy, a->length) || seq_layer_tokens(a->seq, a->layer) != a->length || !memory_get(a, g) ||
        (kv->served && kv->data_bytes < pkv_geom_block_bytes(g)))
        return false;
    parts_of(a, g, &p);
    memcpy(p.q, (const char *)c->q + first * pkv_dtype_bytes(g->dtype), vectors * pkv_dtype_bytes(g->dtype));
    memcpy(p.out, c->out + first, vectors * sizeof(float));
    memcpy(p.lse, c->lse + (uint64_t)a->query * g->q_heads, g->q_heads * sizeof(float));
    a->scale = c->policy->scale, a->block = 0, a->state = a->seq->state;
    /* Without signatures nothing tells whether another worker's prefix still stands. */
    return a->seq->writer || (g->sig_bits && places_sum(a, &a->places) == 0);
}

/* Blocks [a->block, a->block + count) in an epoch; `last`: they are the sample's last ones. */
static int slice(struct pkv *kv, struct audit *a, uint32_t count, bool last)
{
    const struct pkv_geom *g = &a->seq->model->geom;
    uint32_t end = a->block + count;
    uint64_t data = (uint64_t)(uintptr_t)kv->data, first = (uint64_t)a->block * PKV_BLOCK_TOKENS;
    struct parts p;
    parts_of(a, g, &p);
    struct pkv_block_ref *refs = region_refs(kv, end);
    int r = refs ? seq_refs(a->seq, a->layer, a->block, end, refs) : -PKV_ERR_NO_MEMORY;
    r = r || !kv->served ? r : served_read(a->seq, a->layer, a->block, count);
    for (uint32_t i = 0; i < count && !r && kv->served; i++) /* where the read has put them */
        refs[a->block + i] = (struct pkv_block_ref){pkv_place(PKV_TIER_POOL, 0, i, 1), 0};
    if (r)
        return r;
    struct gpu_view view = {
        .blocks = refs + a->block, .tokens = PKV_MIN(a->tokens - first, (uint64_t)count * PKV_BLOCK_TOKENS), .queries = 1};
    struct gpu_dense_args args = {.geom = g,
                                  .space = kv->served ? (struct gpu_space){{NULL, &data, &data}} : region_readable(kv),
                                  .scale = a->scale,
                                  .seqs = 1,
                                  .views = &view,
                                  .q = p.q,
                                  .blocks = count,
                                  .first_head = a->head,
                                  .heads = 1,
                                  .start = a->block == 0,
                                  .finish = last,
                                  .out = p.exact,
                                  .max = p.max,
                                  .sum = p.sum,
                                  .lse = p.exact_lse};
    return gpu_dense(kv->gpu, &args);
}

static void count_sample(struct pkv *kv, const struct audit *a)
{
    const struct pkv_model *m = a->seq->model;
    uint32_t group = pkv_geom_group(&m->geom), dim = m->geom.head_dim, first = a->head * group;
    double mass = 0, error = 0;
    struct parts p;
    parts_of(a, &m->geom, &p);
    for (uint32_t h = first; h < first + group; h++) {
        mass += audit_mass(p.lse[h], p.exact_lse[h]) / group;
        error += audit_error(p.out + (uint64_t)h * dim, p.exact + (uint64_t)h * dim, dim) / group;
    }
    struct pkv_worker_counters *c = &kv->region->counters;
    struct pkv_model_quality *q = m->id < PKV_MODELS_MAX ? &kv->region->quality[m->id] : NULL;
    uint64_t mass_ppm = (uint64_t)(mass * 1e6), error_ppm = (uint64_t)(fmin(error, 1e3) * 1e6);
    ((uint64_t *)c)[offsetof(struct pkv_worker_counters, sample_error_to_1) / sizeof(uint64_t) + audit_bucket(error)]++;
    c->samples++, c->sample_mass_ppm += mass_ppm, c->sample_error_ppm += error_ppm;
    if (q && a->state > q->state) {
        pkv_store64(&q->samples, 0), pkv_store64(&q->mass_ppm, 0), pkv_store64(&q->error_ppm, 0);
        pkv_store64(&q->state, a->state);
    }
    if (q && a->state == q->state) { /* older sequences say nothing of how new ones are signed */
        pkv_store64(&q->mass_ppm, q->mass_ppm + mass_ppm);
        pkv_store64(&q->error_ppm, q->error_ppm + error_ppm);
        pkv_store64(&q->samples, q->samples + 1);
    }
}

static void step(struct pkv *kv, struct audit *a, uint64_t call_ns)
{
    uint32_t left = pkv_tokens_blocks(a->tokens) - a->block, count = audit_slice(&a->purse, call_ns, left);
    if (kv->served)
        count = (uint32_t)PKV_MIN(count, kv->data_bytes / pkv_geom_block_bytes(&a->seq->model->geom));
    if (!count)
        return;
    uint64_t begin = clock_ns(), places = a->places;
    pkv_epoch_enter(kv->region, kv->control);
    int r = slice(kv, a, count, count == left);
    r = r || count < left || a->seq->writer ? r : places_sum(a, &places);
    pkv_epoch_leave(kv->region);
    a->block += count;
    if (r || (count == left && places != a->places && !a->seq->writer)) {
        drop(kv);
    } else if (count == left) {
        count_sample(kv, a);
        a->running = false;
        a->skip = (uint32_t)(audit_draw(a) % (2u * a->seq->model->geom.layers)); /* whichever layer comes */
    }
    uint64_t took = clock_ns() - begin;
    audit_spend(&a->purse, took, count);
    kv->region->counters.sample_ns += took;
}

void audit_end(struct pkv *kv, const struct audit_call *c)
{
    struct audit *a = &kv->audit;
    uint64_t now = clock_ns(), call_ns = now - a->begin_ns;
    uint32_t ppm = kv->control->audit_ppm;
    kv->region->counters.attend_call_ns += call_ns;
    if (!ppm || !c->sparse)
        return;
    audit_earn(&a->purse, call_ns, ppm);
    a->skip -= a->skip && !a->running;
    if (a->due) {
        a->due = false, a->running = take(a, c);
        uint64_t took = clock_ns() - now;
        audit_spend(&a->purse, took, 0);
        kv->region->counters.sample_ns += took;
    }
    if (a->running)
        step(kv, a, call_ns);
}

void audit_adopt(struct pkv *kv, const struct audit_kept *kept)
{
    struct audit *a = &kv->audit;
    const struct pkv_geom *g = &kept->seq->model->geom;
    uint64_t group = pkv_geom_group(g), numbers = group * g->head_dim, first = kept->head * numbers;
    uint64_t bytes = pkv_dtype_bytes(g->dtype);
    struct parts p;
    if (a->running || a->due || !memory_get(a, g))
        return;
    memset(a->memory, 0, parts_of(a, g, &p)); /* the other heads' queries are looked at, and of no account */
    memcpy(p.q + first * bytes, kept->q, numbers * bytes);
    memcpy(p.out + first, kept->out, numbers * sizeof(float));
    memcpy(p.lse + kept->head * group, kept->lse, group * sizeof(float));
    a->seq = kept->seq, a->layer = kept->layer, a->head = kept->head, a->tokens = kept->tokens, a->scale = kept->scale;
    a->block = 0, a->state = kept->seq->state, a->running = true;
}

void audit_turn(struct pkv *kv, uint64_t attend_ns)
{
    kv->region->counters.attend_call_ns += attend_ns;
    audit_earn(&kv->audit.purse, attend_ns, kv->control->audit_ppm);
    if (kv->audit.running)
        step(kv, &kv->audit, attend_ns);
}

void audit_forget(const struct pkv_seq *seq)
{
    struct pkv *kv = seq->model->kv;
    if (kv->audit.running && kv->audit.seq == seq)
        drop(kv);
}

void audit_close(struct audit *a)
{
    free(a->lse);
    free(a->memory);
}
