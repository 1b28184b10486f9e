/* Signing again beside the serving: this worker's sequences without a state turn together, layer by layer, to another way to
 * make signatures. Together, for they may share blocks.
 *
 *   STILL --an early calibration (calibrate.c), or the model's first state--> layer 0 --> .. --> last layer --> STILL
 *   a layer: new signatures of all its tokens are made beside the old ones, a slice at each call; then all are put in place
 *
 * Until a layer is put in place it is scanned, and new tokens are signed, in the old way. A call brings a slice of as many
 * tokens as itself, at least SLICE operations (about a millisecond of one thread); only putting in place, a copy of some bytes
 * a token, depends on the sequences' lengths. On a device a slice is a layer, signed in place: that takes microseconds.
 *
 * Failures: a sequence is gone, or damaged: the others go on without it, and its own calls say so, which sign all of it once
 * what is damaged has been cut off; a batch's step is open or in flight: the layer waits, and the batch's next begin says
 * BATCH_STALE; a call fails in between: the next one goes on where it stopped; this worker dies: tables still say 0, and
 * whoever writes such a sequence next signs all of it again. Owner: the connection's thread. */
#include "client/internal.h"

#define SLICE (16u << 20) /* multiplications of a call's slice, at least */

static bool turns(const struct pkv_seq *s)
{
    return s->writer && !s->state && !s->foreign && !s->gone;
}

bool model_turn_early(struct pkv_model *m, struct gpu_scheme *scheme)
{
    struct turn *t = &m->turn;
    if (t->to || model_published(m).latest)
        return false;
    *t = (struct turn){.to = scheme};
    return true;
}

int model_turn_begin(struct pkv_model *m)
{
    struct gpu_scheme *scheme;
    uint32_t number = 1, latest = model_published(m).latest;
    if (m->turn.to || !latest)
        return 0;
    int r = model_state_get(m, number, &scheme);
    if (r == -PKV_ERR_NO_STATE) /* the first one is gone: only sequences being signed anew were without a state */
        r = model_state_get(m, number = latest, &scheme);
    if (!r)
        m->turn = (struct turn){.to = scheme, .number = number};
    return r;
}

/* ---- a layer ---- */

static bool staged_all(const struct pkv_seq *s, uint32_t layer)
{
    return s->staged >= s->tokens[layer];
}

/* A sequence whose layer is not ready to be put in place. */
static struct pkv_seq *unstaged(const struct pkv_model *m)
{
    for (struct pkv_seq *s = m->seqs; s; s = s->next)
        if (turns(s) && !staged_all(s, m->turn.layers))
            return s;
    return NULL;
}

static uint64_t each(const struct pkv_model *m)
{
    return pkv_geom_words(&m->geom) * 4ull * m->geom.kv_heads;
}

static int stage_room(struct pkv_seq *s, uint64_t tokens)
{
    uint64_t bytes = PKV_ALIGN_UP(tokens, 1024u) * each(s->model);
    char *to = bytes > s->stage_bytes ? realloc(s->stage, bytes) : s->stage;
    if (!to)
        return -PKV_ERR_NO_MEMORY;
    s->stage = to, s->stage_bytes = PKV_MAX(bytes, s->stage_bytes);
    return 0;
}

/* What becomes of a sequence that cannot turn. */
static int left_behind(struct pkv_seq *s, int r)
{
    s->gone |= r == -PKV_ERR_STALE;
    s->foreign |= r == -PKV_ERR_CHECKSUM;
    return r == -PKV_ERR_STALE || r == -PKV_ERR_CHECKSUM ? 0 : r;
}

static int stage(struct pkv_seq *s, uint64_t *budget)
{
    struct pkv_model *m = s->model;
    uint32_t layer = m->turn.layers;
    uint32_t tokens = (uint32_t)PKV_MIN(s->tokens[layer] - s->staged, *budget);
    int r = gpu_on_device(m->kv->gpu) ? 0 : stage_room(s, s->tokens[layer]);
    if (!r && !gpu_on_device(m->kv->gpu))
        r = seq_sign_list(s, layer, m->turn.to, s->staged, tokens, s->stage + s->staged * each(m));
    if (r)
        return left_behind(s, r);
    s->staged += tokens, *budget -= tokens;
    return 0;
}

static int put_in_place(struct pkv_seq *s)
{
    struct pkv_model *m = s->model;
    uint32_t layer = m->turn.layers;
    if (s->heir && !m->turn.number && model_published(m).latest)
        return 0; /* others may say by now that these blocks are of the first state; seq_settle signs so before any use */
    int r = gpu_on_device(m->kv->gpu) ? seq_sign_again(s, layer, m->turn.to)
                                      : seq_put_signatures(s, layer, (uint32_t)s->tokens[layer], s->stage);
    return left_behind(s, r);
}

/* After a failure part of them is in place, and all are put again. */
static int layer_turn(struct pkv_model *m)
{
    int r = 0;
    for (struct pkv_seq *s = m->seqs; s && !r; s = s->next)
        r = turns(s) && s->tokens[m->turn.layers] ? put_in_place(s) : 0;
    if (r)
        return r;
    m->turn.layers++;
    for (struct pkv_seq *s = m->seqs; s; s = s->next)
        s->staged = 0;
    return 0;
}

/* ---- all of them ---- */

static void ended(struct pkv_model *m)
{
    m->turn = (struct turn){0};
    for (struct pkv_seq *s = m->seqs; s; s = s->next) {
        free(s->stage);
        s->stage = NULL, s->stage_bytes = s->staged = 0;
    }
    model_trim(m);
}

static int finish(struct pkv_model *m)
{
    struct gpu_scheme *old = m->scheme0, *to = m->turn.to;
    int r = 0;
    if (!m->turn.number) {
        for (struct pkv_seq *s = m->seqs; s; s = s->next)
            s->scheme = s->scheme == old ? to : s->scheme;
        m->scheme0 = to;
        gpu_scheme_close(old);
    }
    for (struct pkv_seq *s = m->seqs; s && !r && m->turn.number; s = s->next) {
        r = turns(s) ? seq_say_signed(s, m->turn.number, to) : 0;
        s->gone |= r == -PKV_ERR_STALE;
        r = s->gone ? 0 : r;
    }
    if (!r)
        ended(m);
    return r;
}

static bool held_by_batches(const struct pkv_model *m)
{
    for (const struct pkv_seq *s = m->seqs; s; s = s->next)
        if (s->batch && turns(s) && batch_busy(s->batch))
            return true;
    return false;
}

static int turn_some(struct pkv_model *m, uint64_t budget)
{
    bool all = budget == UINT64_MAX, device = gpu_on_device(m->kv->gpu);
    int r = 0;
    while (!r && m->turn.to) {
        struct pkv_seq *s = m->turn.layers < m->geom.layers ? unstaged(m) : NULL;
        if (s && !budget)
            break;
        if (s) {
            r = stage(s, &budget);
        } else if (held_by_batches(m)) {
            if (!all)
                break;
            r = batch_quiet(m);
        } else if (m->turn.layers < m->geom.layers) {
            r = layer_turn(m);
            budget = device && !all ? 0 : budget;
        } else {
            r = finish(m);
        }
    }
    return r;
}

int model_turn_some(struct pkv_model *m, uint64_t tokens)
{
    uint64_t key = (uint64_t)m->geom.kv_heads * m->geom.head_dim * m->geom.head_dim;
    if (!m->turn.to)
        return 0;
    return turn_some(m, gpu_on_device(m->kv->gpu) ? UINT32_MAX : PKV_MAX(tokens, PKV_ALIGN_UP(SLICE / key, PKV_BLOCK_TOKENS)));
}

bool model_turns(struct pkv_model *m)
{
    if (m->learns) {
        calibration_poll(m);
        (void)model_turn_begin(m); /* who needs it says why it cannot be had */
    }
    return m->turn.to;
}

int model_turn_all(struct pkv_model *m)
{
    int r = 0;
    for (const struct pkv_seq *s = m->seqs; s && !r && !m->turn.to; s = s->next)
        r = turns(s) ? model_turn_begin(m) : 0;
    return r || !m->turn.to ? r : turn_some(m, UINT64_MAX);
}

int pkv_model_settle(struct pkv_model *m)
{
    int r = daemon_check(m->kv);
    do {
        r = r ? r : calibration_wait(m);
        r = r ? r : model_turn_all(m);
    } while (!r && m->calibration.solver.running);
    return kv_done(m->kv, r);
}
