/* Models: geometry and signature scheme, registered with the daemon; and the scheme's learnt state, which all workers share. */
#include "client/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

static int geom_of(const struct pkv_model_desc *d, struct pkv_geom *ret)
{
    uint32_t bits = d->sig_bits ? d->sig_bits : PKV_ALIGN_UP(d->head_dim, 32);
    if (d->layers > UINT16_MAX || d->q_heads > UINT16_MAX || d->kv_heads > UINT16_MAX || d->head_dim > UINT16_MAX)
        return -PKV_ERR_GEOMETRY;
    if (d->type >= PKV_DTYPES)
        return -PKV_ERR_DTYPE;
    if (bits > PKV_SIG_BITS_MAX)
        return -PKV_ERR_SIG_BITS;
    *ret = (struct pkv_geom){.layers = (uint16_t)d->layers,
                             .q_heads = (uint16_t)d->q_heads,
                             .kv_heads = (uint16_t)d->kv_heads,
                             .head_dim = (uint16_t)d->head_dim,
                             .dtype = (uint16_t)d->type,
                             .sig_bits = (uint16_t)bits};
    return 0;
}

static int request_of(const struct pkv_model_desc *d, const struct pkv_geom *geom, struct pkv_model_request *ret)
{
    size_t name = d->name ? strlen(d->name) : 0;
    if (d->size != sizeof(*d) || !name || name >= PKV_MODEL_NAME_BYTES || d->rope_dims > UINT16_MAX || d->rope_interleaved > 1)
        return -PKV_ERR_INVALID;
    if (d->signature >= PKV_SCHEMES)
        return -PKV_ERR_SCHEME;
    *ret = (struct pkv_model_request){.magic = PKV_MAGIC,
                                      .message = PKV_MSG_MODEL,
                                      .scheme = (uint16_t)d->signature,
                                      .geom = *geom,
                                      .rope_base = d->rope_base,
                                      .rope_dims = (uint16_t)(d->rope_dims ? d->rope_dims : d->head_dim),
                                      .rope_interleaved = (uint16_t)d->rope_interleaved};
    memcpy(ret->name, d->name, name);
    return 0;
}

int pkv_model_open(struct pkv *kv, const struct pkv_model_desc *desc, struct pkv_model **ret)
{
    struct pkv_model_request request;
    struct pkv_reply reply;
    struct pkv_model *m = calloc(1, sizeof(*m));
    int r = m ? geom_of(desc, &m->geom) : -PKV_ERR_NO_MEMORY;
    r = r ? r : request_of(desc, &m->geom, &request);
    r = r ? r : -(int)pkv_check_model(&request);
    r = r ? r : gpu_scheme_open(desc->signature, &m->geom, desc->weights, &m->scheme, request.weights_digest);
    r = r ? r : socket_call(kv, &request, sizeof(request), -1, &reply, NULL);
    if (!r) {
        bool changed;
        gpu_scheme_rope(m->scheme, request.rope_base, request.rope_dims, request.rope_interleaved);
        m->kv = kv, m->id = reply.id;
        r = model_state_fetch(m, &changed);
    }
    if (r) {
        if (m)
            gpu_scheme_close(m->scheme);
        free(m);
        return kv_done(kv, r);
    }
    m->next = kv->models;
    kv->models = m;
    *ret = m;
    return 0;
}

int pkv_model_close(struct pkv_model *model)
{
    if (!model)
        return 0;
    if (model->seqs)
        return kv_done(model->kv, -PKV_ERR_BUSY);
    struct pkv_model **at = &model->kv->models;
    while (*at != model)
        at = &(*at)->next;
    *at = model->next;
    gpu_scheme_close(model->scheme);
    free(model);
    return 0;
}

static int import_fd(struct pkv_model *m, int fd, uint64_t bytes)
{
    int seals = fcntl(fd, F_GET_SEALS), want = F_SEAL_SHRINK | F_SEAL_WRITE;
    if (seals < 0 || (seals & want) != want || bytes != gpu_scheme_state_bytes(m->scheme))
        return -PKV_ERR_FILE_FIT;
    void *state = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (state == MAP_FAILED)
        return -PKV_ERR_NO_MEMORY;
    int r = gpu_scheme_state_import(m->scheme, state, bytes);
    munmap(state, bytes);
    return r;
}

int model_state_fetch(struct pkv_model *m, bool *ret_changed)
{
    struct pkv_state_request request = {.magic = PKV_MAGIC, .message = PKV_MSG_STATE_GET, .model = m->id};
    struct pkv_reply reply;
    int fd = -1;
    *ret_changed = false;
    if (gpu_scheme_settled(m->scheme))
        return 0;
    int r = socket_call(m->kv, &request, sizeof(request), -1, &reply, &fd);
    if (r == -PKV_ERR_NO_STATE)
        return 0;
    if (!r) {
        r = import_fd(m, fd, reply.bytes);
        *ret_changed = !r;
    }
    if (fd >= 0)
        close(fd);
    return r;
}

static int export_fd(const struct pkv_model *m, int *ret)
{
    uint64_t bytes = gpu_scheme_state_bytes(m->scheme);
    int fd = memfd_create("pivotkv-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    char *state = malloc(bytes);
    int r = fd < 0 || !state ? -PKV_ERR_NO_MEMORY : 0;
    if (!r) {
        gpu_scheme_state_export(m->scheme, state);
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
    *ret = fd;
    return r;
}

/* What was learnt, not yet settled, gives way to what the daemon has. */
static int take_other(struct pkv_model *m, bool *ret_changed)
{
    struct pkv_state_request request = {.magic = PKV_MAGIC, .message = PKV_MSG_STATE_GET, .model = m->id};
    struct pkv_reply reply;
    int fd = -1, r = socket_call(m->kv, &request, sizeof(request), -1, &reply, &fd);
    if (!r) {
        r = import_fd(m, fd, reply.bytes);
        close(fd);
        *ret_changed = !r;
    }
    return r;
}

int model_state_share(struct pkv_model *m, bool *ret_changed)
{
    struct pkv_state_request request = {.magic = PKV_MAGIC, .message = PKV_MSG_STATE_PUT, .model = m->id};
    struct pkv_reply reply;
    int fd = -1, r = export_fd(m, &fd);
    *ret_changed = false;
    if (r)
        return r;
    r = socket_call(m->kv, &request, sizeof(request), fd, &reply, NULL);
    close(fd);
    return r == -PKV_ERR_STATE_EXISTS ? take_other(m, ret_changed) : r;
}
