/* Models: geometry and signature scheme, registered with the daemon. */
#include "client/internal.h"

static int geom_of(const struct pkv_model_desc *d, struct pkv_geom *ret)
{
    uint32_t bits = d->sig_bits || d->signature == PKV_NONE ? d->sig_bits : PKV_ALIGN_UP(d->head_dim, 32);
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

void pkv_model_defaults(struct pkv_model_desc *ret)
{
    *ret = (struct pkv_model_desc){.size = sizeof(*ret), .signature = gpu_scheme_calibrates() ? PKV_CODE : PKV_SIGN};
}

int pkv_model_open(struct pkv *kv, const struct pkv_model_desc *desc, struct pkv_model **ret)
{
    struct pkv_model_request request;
    struct pkv_reply reply;
    struct pkv_model *m = calloc(1, sizeof(*m));
    int r = m ? geom_of(desc, &m->geom) : -PKV_ERR_NO_MEMORY;
    r = r ? r : request_of(desc, &m->geom, &request);
    r = r ? r : -(int)pkv_check_model(&request);
    r = r ? r : gpu_scheme_open(desc->signature, &m->geom, desc->weights, &m->scheme0, request.weights_digest);
    r = r ? r : socket_call(kv, &request, sizeof(request), -1, &reply, NULL);
    if (!r) {
        uint32_t latest;
        m->kv = kv, m->id = reply.id, m->kind = desc->signature, m->learns = !desc->weights && desc->signature != PKV_NONE;
        m->rope_base = request.rope_base, m->rope_dims = request.rope_dims, m->rope_interleaved = request.rope_interleaved;
        r = model_latest(m, &latest);
    }
    if (r) {
        if (m)
            model_states_close(m);
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
    model_states_close(model);
    free(model);
    return 0;
}
