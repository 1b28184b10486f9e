/* A model's signature states in this worker, and which of them signs a sequence.
 *
 * What is learnt crosses between workers whole, numbered by the daemon (cachesvc/states.h). A sequence's signatures are all of
 * one state, named by its table: its number only ever turns from 0 (only the writer's own learner knows how they were made) to
 * 1, and new sequences begin with the latest. So a reader that takes the state that the table names never scans with another
 * transform than the writer signed with, and a recalibration needs nobody to stop.
 *
 *   `sign`: all layers learnt, PUT 1 taken --> state 1; this worker's sequences with state 0 become SIGNED 1 as they are
 *   `code`: calibrated, by this worker or another --> its writer signs a sequence with state 0 again with state 1 (turn.c)
 *
 *   any state --pkv_seq_recalibrate, nobody shares it--> 0, cannot be forked --all signed--> the latest
 *
 * Signing again happens in place. From 0 it is always to 1: forks share blocks, and whoever shares them turns to the same
 * state. At once, within one call, where what is there cannot be told apart from what it should be: in a sequence that another
 * worker wrote, or whose blocks are shared with one. Failures: a state that cannot be fetched, or does not fit, fails the call
 * that needs it, and nothing has changed; a call that fails while it signs again leaves the number 0, and the next one signs
 * all again. */
#include "client/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

int model_scheme(struct pkv_model *m, struct gpu_scheme **ret)
{
    uint8_t digest[PKV_DIGEST_BYTES];
    *ret = NULL;
    return gpu_scheme_open(m->kind, &m->geom, NULL, ret, digest);
}

/* A sealed memfd of another worker into a scheme of its own. */
static int import_fd(struct pkv_model *m, int fd, uint64_t bytes, struct gpu_scheme **ret)
{
    int seals = fcntl(fd, F_GET_SEALS), want = F_SEAL_SHRINK | F_SEAL_WRITE;
    int r = model_scheme(m, ret);
    if (r)
        return r;
    void *state = MAP_FAILED;
    if (seals < 0 || (seals & want) != want || bytes != gpu_scheme_state_bytes(*ret))
        r = -PKV_ERR_FILE_FIT;
    else if ((state = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0)) == MAP_FAILED)
        r = -PKV_ERR_NO_MEMORY;
    r = r ? r : gpu_scheme_state_import(*ret, state, bytes);
    if (state != MAP_FAILED)
        munmap(state, bytes);
    if (r)
        gpu_scheme_close(*ret);
    return r;
}

static int remember(struct pkv_model *m, uint32_t number, struct gpu_scheme *scheme)
{
    struct model_state *s = malloc(sizeof(*s)), **at = &m->states;
    if (!s)
        return -PKV_ERR_NO_MEMORY;
    while (*at && (*at)->number > number)
        at = &(*at)->next;
    *s = (struct model_state){*at, number, scheme};
    *at = s;
    return 0;
}

/* `number` 0: the latest. */
static int fetch(struct pkv_model *m, uint32_t number)
{
    struct pkv_state_request request = {.magic = PKV_MAGIC, .message = PKV_MSG_STATE_GET, .model = m->id, .state = number};
    struct pkv_reply reply;
    struct gpu_scheme *scheme;
    int fd = -1, r = socket_call(m->kv, &request, sizeof(request), -1, &reply, &fd);
    r = r ? r : import_fd(m, fd, reply.bytes, &scheme);
    if (fd >= 0)
        close(fd);
    if (r)
        return r;
    r = remember(m, reply.id, scheme);
    if (r)
        gpu_scheme_close(scheme);
    return r;
}

static struct gpu_scheme *find(const struct pkv_model *m, uint32_t number)
{
    for (const struct model_state *s = m->states; s; s = s->next)
        if (s->number == number)
            return s->scheme;
    return NULL;
}

int model_state_get(struct pkv_model *m, uint32_t number, struct gpu_scheme **ret)
{
    int r = 0;
    if (!number && !m->scheme0)
        r = model_scheme(m, &m->scheme0);
    else if (number && !find(m, number))
        r = fetch(m, number);
    *ret = number ? find(m, number) : m->scheme0;
    return r ? r : *ret ? 0 : -PKV_ERR_NO_STATE;
}

static bool in_use(const struct pkv_model *m, const struct gpu_scheme *scheme)
{
    for (const struct pkv_seq *s = m->seqs; s; s = s->next)
        if (s->scheme == scheme)
            return true;
    return scheme == m->turn.to;
}

void model_trim(struct pkv_model *m)
{
    for (struct model_state **at = m->states ? &m->states->next : &m->states; *at;) {
        struct model_state *s = *at;
        if (in_use(m, s->scheme)) {
            at = &s->next;
            continue;
        }
        *at = s->next;
        gpu_scheme_close(s->scheme);
        free(s);
    }
    if (m->states && m->learns && m->scheme0 && !in_use(m, m->scheme0)) {
        gpu_scheme_close(m->scheme0);
        m->scheme0 = NULL;
    }
}

int model_latest(struct pkv_model *m, uint32_t *ret_number)
{
    uint32_t latest = m->learns ? model_published(m).latest : 0;
    int r = latest && (!m->states || m->states->number < latest) ? fetch(m, 0) : 0;
    *ret_number = m->states ? m->states->number : 0;
    model_trim(m);
    return r;
}

void model_states_close(struct pkv_model *m)
{
    calibration_close(m);
    if (m->turn.to && !m->turn.number)
        gpu_scheme_close(m->turn.to);
    while (m->states) {
        struct model_state *s = m->states;
        m->states = s->next;
        gpu_scheme_close(s->scheme);
        free(s);
    }
    gpu_scheme_close(m->scheme0);
}

/* ---- sharing ---- */

int state_export(const struct gpu_scheme *scheme, int *ret)
{
    uint64_t bytes = gpu_scheme_state_bytes(scheme);
    int fd = memfd_create("pivotkv-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    char *state = malloc(bytes);
    int r = fd < 0 || !state ? -PKV_ERR_NO_MEMORY : 0;
    if (!r) {
        gpu_scheme_state_export(scheme, state);
        for (uint64_t at = 0; at < bytes && !r;) {
            ssize_t n = write(fd, state + at, bytes - at);
            if (n < 0 && errno != EINTR)
                r = -PKV_ERR_NO_MEMORY;
            at += n > 0 ? (uint64_t)n : 0;
        }
    }
    if (!r && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL))
        r = -PKV_ERR_SYSTEM;
    free(state);
    if (r && fd >= 0)
        close(fd);
    *ret = r ? -1 : fd;
    return r;
}

int model_state_put(struct pkv_model *m, uint32_t number, struct gpu_scheme *scheme, int fd)
{
    struct pkv_state_request request = {.magic = PKV_MAGIC, .message = PKV_MSG_STATE_PUT, .model = m->id, .state = number};
    struct pkv_reply reply;
    int r = socket_call(m->kv, &request, sizeof(request), fd, &reply, NULL);
    return r ? r : remember(m, number, scheme);
}

int seq_say_signed(struct pkv_seq *seq, uint32_t number, struct gpu_scheme *scheme)
{
    struct pkv_submission s = {.op = PKV_OP_SIGNED, .seq = seq->handle};
    s.u.signed_.state = number;
    int r = ring_call(seq->model->kv, &s, NULL);
    if (!r)
        seq->state = number, seq->scheme = scheme, seq->foreign = seq->heir = false;
    return r;
}

int model_sign_share(struct pkv_model *m)
{
    struct gpu_scheme *scheme = m->scheme0;
    int fd = -1, r = state_export(scheme, &fd);
    r = r ? r : model_state_put(m, 1, scheme, fd);
    if (fd >= 0)
        close(fd);
    if (r)
        return r == -PKV_ERR_STATE_EXISTS ? 0 : r; /* seq_settle takes that one */
    m->scheme0 = NULL;
    for (struct pkv_seq *s = m->seqs; s && !r; s = s->next)
        if (s->scheme == scheme && s->writer && !s->foreign && !s->heir && !s->gone) {
            r = seq_say_signed(s, 1, scheme);
            s->gone = r == -PKV_ERR_STALE;
            r = s->gone ? 0 : r;
        }
    return r;
}

/* ---- sequences ---- */

int seq_adopt_state(struct pkv_seq *seq)
{
    uint32_t number = __atomic_load_n(&seq->table->state, __ATOMIC_ACQUIRE);
    int r = seq->scheme && seq->state == number ? 0 : model_state_get(seq->model, number, &seq->scheme);
    if (!r)
        seq->state = number;
    return r == -PKV_ERR_NO_STATE && pkv_load64(&seq->table->seq) != seq->handle ? -PKV_ERR_STALE : r;
}

/* All signatures with a state, or, number 0, as this worker's other sequences without one are signed. */
static int sign_all(struct pkv_seq *seq, uint32_t number)
{
    struct pkv_model *m = seq->model;
    struct gpu_scheme *scheme;
    int r = model_state_get(m, number, &scheme);
    for (uint32_t l = 0; l < m->geom.layers && !r; l++)
        r = seq_sign_again(seq, l, !number && m->turn.to && l < m->turn.layers ? m->turn.to : scheme);
    if (!r && number)
        r = seq_say_signed(seq, number, scheme);
    else if (!r)
        seq->scheme = scheme, seq->foreign = false, seq->staged = 0;
    seq->foreign |= r != 0;
    return r;
}

/* Without a state: what others have signed, or will. At once, for nothing tells what of it is signed how. */
static int sign_first(struct pkv_seq *seq, uint32_t latest)
{
    int r = sign_all(seq, latest ? 1 : 0);
    if (r == -PKV_ERR_NO_STATE) /* the first one is gone: somebody began to sign this sequence anew, and did not end */
        r = sign_all(seq, latest);
    model_trim(seq->model);
    return r;
}

int seq_settle(struct pkv_seq *seq, uint64_t tokens)
{
    struct pkv_model *m = seq->model;
    if (!m->learns)
        return 0;
    if (!seq->writer)
        return seq_adopt_state(seq);
    calibration_poll(m);
    uint32_t latest = model_published(m).latest;
    int r = 0;
    if (!seq->state && (seq->foreign || (seq->heir && latest)))
        r = sign_first(seq, latest);
    else if (!seq->state && latest)
        r = model_turn_begin(m);
    return r ? r : model_turn_some(m, tokens);
}

static int sign_anew(struct pkv_seq *seq)
{
    struct pkv_model *m = seq->model;
    uint32_t latest;
    int r = !seq->writer ? -PKV_ERR_NOT_WRITER : seq_check(seq, 0);
    r = r ? r : seq_settle(seq, 0);
    r = r ? r : model_latest(m, &latest);
    if (!r && !seq->state && latest)
        r = sign_first(seq, latest);
    if (r || seq->state == latest)
        return r;
    audit_forget(seq);
    r = seq_say_signed(seq, 0, seq->scheme);
    seq->foreign = !r; /* until all is signed */
    r = r ? r : sign_all(seq, latest);
    model_trim(m);
    return r;
}

int pkv_seq_recalibrate(struct pkv_seq *seq)
{
    return kv_done(seq->model->kv, sign_anew(seq));
}
