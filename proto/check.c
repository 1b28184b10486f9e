/* The validators of check.h. Every one reads only its argument, a private copy. */
#include "proto/check.h"

#include <string.h>

static bool zero(const void *p, size_t bytes)
{
    const unsigned char *b = p;
    for (size_t i = 0; i < bytes; i++)
        if (b[i])
            return false;
    return true;
}

static bool terminated(const char *s, size_t bytes)
{
    return memchr(s, 0, bytes) != NULL;
}

/* False for NaN too. */
static bool within(float v, float low, float high)
{
    return v >= low && v <= high;
}

bool pkv_check_range(uint64_t off, uint64_t bytes, uint64_t total)
{
    return off <= total && bytes <= total - off;
}

enum pkv_err pkv_check_geom(const struct pkv_geom *g)
{
    if (g->reserved)
        return PKV_ERR_RESERVED;
    if (g->dtype >= PKV_DTYPES)
        return PKV_ERR_DTYPE;
    if (!g->layers || g->layers > PKV_LAYERS_MAX || !g->kv_heads || g->kv_heads > PKV_KV_HEADS_MAX || !g->q_heads ||
        g->q_heads > PKV_Q_HEADS_MAX || g->q_heads % g->kv_heads || g->q_heads / g->kv_heads > (int)PKV_GROUP_MAX)
        return PKV_ERR_GEOMETRY;
    if (g->head_dim != 64 && g->head_dim != 96 && g->head_dim != 128 && g->head_dim != 256)
        return PKV_ERR_GEOMETRY;
    if (g->sig_bits && (g->sig_bits < PKV_SIG_BITS_MIN || g->sig_bits > PKV_SIG_BITS_MAX || g->sig_bits % 32))
        return PKV_ERR_SIG_BITS;
    return PKV_ERR_OK;
}

enum pkv_err pkv_check_scheme(uint32_t scheme, const struct pkv_geom *g)
{
    if (scheme >= PKV_SCHEMES)
        return PKV_ERR_SCHEME;
    if ((scheme == PKV_SCHEME_NONE) != !g->sig_bits)
        return PKV_ERR_SIG_BITS;
    if (scheme == PKV_SCHEME_HASH && g->sig_bits % pkv_geom_group(g))
        return PKV_ERR_SIG_BITS;
    return PKV_ERR_OK;
}

enum pkv_err pkv_check_hello(const struct pkv_hello *h)
{
    if (h->magic != PKV_MAGIC || h->message != PKV_MSG_HELLO)
        return PKV_ERR_INVALID;
    /* The version comes first: of another version nothing else can be said. */
    if (h->version_major != PKV_VERSION_MAJOR || h->version_minor != PKV_VERSION_MINOR)
        return PKV_ERR_VERSION;
    if (h->reserved0 || h->reserved || (!(h->features & PKV_FEATURE_CUDA) && !zero(h->device, sizeof(h->device))))
        return PKV_ERR_RESERVED;
    if (h->required & ~PKV_FEATURES || h->required & ~h->features)
        return PKV_ERR_FEATURE;
    if (h->data_bytes < PKV_DATA_BYTES_MIN || h->data_bytes > PKV_DATA_BYTES_MAX || h->data_bytes % 4096)
        return PKV_ERR_INVALID;
    if (!terminated(h->tenant, sizeof(h->tenant)) || !terminated(h->label, sizeof(h->label)))
        return PKV_ERR_INVALID;
    return PKV_ERR_OK;
}

enum pkv_err pkv_check_welcome(const struct pkv_reply *r, uint64_t required)
{
    if (r->magic != PKV_MAGIC || r->message != PKV_MSG_HELLO)
        return PKV_ERR_INVALID;
    if (r->version_major != PKV_VERSION_MAJOR || r->version_minor != PKV_VERSION_MINOR)
        return PKV_ERR_VERSION;
    if (r->err != PKV_ERR_OK)
        return r->err < PKV_ERR_COUNT ? (enum pkv_err)r->err : PKV_ERR_INVALID;
    if (required & ~r->features)
        return PKV_ERR_FEATURE;
    bool device = !zero(r->device, sizeof(r->device));
    return r->reserved || device != !!(r->features & PKV_FEATURE_CUDA) ? PKV_ERR_RESERVED : PKV_ERR_OK;
}

enum pkv_err pkv_check_model(const struct pkv_model_request *m)
{
    if (m->magic != PKV_MAGIC || m->message != PKV_MSG_MODEL || !terminated(m->name, sizeof(m->name)) || !m->name[0])
        return PKV_ERR_INVALID;
    enum pkv_err e = pkv_check_geom(&m->geom);
    if (e == PKV_ERR_OK)
        e = pkv_check_scheme(m->scheme, &m->geom);
    if (e != PKV_ERR_OK)
        return e;
    if (m->rope_interleaved > 1 || m->rope_dims > m->geom.head_dim || m->rope_dims % 2 || !within(m->rope_base, 0.0f, 1e12f))
        return PKV_ERR_INVALID;
    return PKV_ERR_OK;
}

static enum pkv_err check_create(const struct pkv_op_create *c)
{
    if (c->flags & ~PKV_SEQ_PERSISTENT)
        return PKV_ERR_RESERVED;
    if (!c->max_tokens || c->max_tokens > PKV_SEQ_TOKENS_MAX || !terminated((const char *)c->label, sizeof(c->label)))
        return PKV_ERR_INVALID;
    return PKV_ERR_OK;
}

static enum pkv_err check_fork(const struct pkv_op_fork *f)
{
    if (!zero(f->reserved, sizeof(f->reserved)) || f->flags & ~PKV_SEQ_PERSISTENT)
        return PKV_ERR_RESERVED;
    if (f->tokens > PKV_SEQ_TOKENS_MAX || f->max_tokens > PKV_SEQ_TOKENS_MAX)
        return PKV_ERR_LENGTH;
    return PKV_ERR_OK;
}

static enum pkv_err check_blocks(uint32_t first, uint32_t count)
{
    return count && pkv_check_range(first, count, PKV_SEQ_BLOCKS_MAX) ? PKV_ERR_OK : PKV_ERR_INVALID;
}

static enum pkv_err check_append(const struct pkv_op_append *a, uint64_t data_bytes)
{
    if (a->flags & ~PKV_APPEND_SIGNATURES || a->reserved)
        return PKV_ERR_RESERVED;
    if (!a->tokens || !pkv_check_range(a->first_token, a->tokens, PKV_SEQ_TOKENS_MAX))
        return PKV_ERR_LENGTH;
    return pkv_check_range(a->data_off, a->data_bytes, data_bytes) && a->data_off % 64 == 0 ? PKV_ERR_OK : PKV_ERR_RANGE;
}

static enum pkv_err check_select(const struct pkv_op_select *s, uint64_t data_bytes)
{
    if (s->reserved)
        return PKV_ERR_RESERVED;
    if (s->data_off % 64 || s->out_off % 64 || s->data_bytes < sizeof(struct pkv_select_args) ||
        !pkv_check_range(s->data_off, s->data_bytes, data_bytes) || !pkv_check_range(s->out_off, s->out_bytes, data_bytes))
        return PKV_ERR_RANGE;
    return PKV_ERR_OK;
}

static enum pkv_err check_read(const struct pkv_op_read *r, uint64_t data_bytes)
{
    if (!zero(r->reserved, sizeof(r->reserved)))
        return PKV_ERR_RESERVED;
    if (r->out_off % 64 || !pkv_check_range(r->out_off, r->out_bytes, data_bytes))
        return PKV_ERR_RANGE;
    return check_blocks(r->first_block, r->count);
}

/* A length in a payload whose other words are reserved. */
static enum pkv_err check_tokens(uint64_t tokens, const uint64_t *reserved)
{
    if (!zero(reserved, 4 * sizeof(*reserved)))
        return PKV_ERR_RESERVED;
    return tokens <= PKV_SEQ_TOKENS_MAX ? PKV_ERR_OK : PKV_ERR_LENGTH;
}

enum pkv_err pkv_check_submission(const struct pkv_submission *s, uint64_t data_bytes)
{
    if (s->flags || s->reserved)
        return PKV_ERR_RESERVED;
    bool all = s->layer == PKV_LAYER_ALL && (s->op == PKV_OP_GRANT || s->op == PKV_OP_TRUNCATE);
    if (s->layer >= PKV_LAYERS_MAX && !all)
        return PKV_ERR_INVALID;
    switch (s->op) {
    case PKV_OP_NOP:
    case PKV_OP_SEQ_OPEN:
    case PKV_OP_SEQ_CLOSE:
    case PKV_OP_SEQ_DESTROY:
        return zero(&s->u.nop, sizeof(s->u.nop)) ? PKV_ERR_OK : PKV_ERR_RESERVED;
    case PKV_OP_SEQ_CREATE:
        return check_create(&s->u.create);
    case PKV_OP_FORK:
        return check_fork(&s->u.fork);
    case PKV_OP_TRUNCATE:
        return check_tokens(s->u.truncate.tokens, s->u.truncate.reserved);
    case PKV_OP_GRANT:
        return check_tokens(s->u.grant.tokens, s->u.grant.reserved);
    case PKV_OP_SEAL:
        if (!zero(s->u.seal.reserved, sizeof(s->u.seal.reserved)))
            return PKV_ERR_RESERVED;
        return check_blocks(s->u.seal.first_block, s->u.seal.count);
    case PKV_OP_APPEND:
        return check_append(&s->u.append, data_bytes);
    case PKV_OP_SELECT:
        return check_select(&s->u.select, data_bytes);
    case PKV_OP_READ:
        return check_read(&s->u.read, data_bytes);
    case PKV_OP_SIGNED:
        if (s->u.signed_.reserved0 || !zero(s->u.signed_.reserved, sizeof(s->u.signed_.reserved)))
            return PKV_ERR_RESERVED;
        return PKV_ERR_OK;
    default:
        return PKV_ERR_UNKNOWN_OP;
    }
}

enum pkv_err pkv_check_select(const struct pkv_select_args *a)
{
    if (a->flags & ~PKV_SELECT_NO_ROWS || !zero(a->reserved, sizeof(a->reserved)))
        return PKV_ERR_RESERVED;
    if (!a->queries || a->queries > PKV_QUERIES_MAX || a->tokens < a->queries || a->sinks > PKV_SINKS_MAX ||
        a->recent > PKV_RECENT_MAX)
        return PKV_ERR_SHAPE;
    if (a->tokens > PKV_SEQ_TOKENS_MAX)
        return PKV_ERR_LENGTH;
    if (!a->k || a->k > PKV_SELECT_MAX)
        return PKV_ERR_BUDGET;
    if (a->k > a->tokens)
        return PKV_ERR_BUDGET_LENGTH;
    if (a->rule >= PKV_RULES || !within(a->scale, 1e-6f, 1e6f) || !within(a->top_p, 0.0f, 1.0f) ||
        (a->top_p > 0 && (a->rule != PKV_RULE_SOFTMAX || !(a->sinks + a->recent)))) /* mass is measured by theirs */
        return PKV_ERR_INVALID;
    return PKV_ERR_OK;
}
