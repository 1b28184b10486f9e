/* Any bytes as a message or submission: a validator that says yes has promised what its caller relies on. The first byte
 * chooses the struct. */
#include "proto/check.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

#define DATA_BYTES (1ull << 20)

static void must(bool holds)
{
    if (!holds)
        abort();
}

static void fuzz_submission(const struct pkv_submission *s)
{
    if (pkv_check_submission(s, DATA_BYTES) != PKV_ERR_OK)
        return;
    must(s->op < PKV_OP_COUNT && !s->flags && !s->reserved);
    must(s->layer < PKV_LAYERS_MAX ||
         (s->layer == PKV_LAYER_ALL && (s->op == PKV_OP_GRANT || s->op == PKV_OP_TRUNCATE)));
    const union pkv_payload *u = &s->u;
    if (s->op == PKV_OP_APPEND)
        must(u->append.data_off + u->append.data_bytes <= DATA_BYTES &&
             u->append.first_token + u->append.tokens <= PKV_SEQ_TOKENS_MAX);
    if (s->op == PKV_OP_SELECT)
        must(u->select.data_off + u->select.data_bytes <= DATA_BYTES && u->select.out_off + u->select.out_bytes <= DATA_BYTES &&
             u->select.data_bytes >= sizeof(struct pkv_select_args));
    if (s->op == PKV_OP_READ)
        must(u->read.out_off + u->read.out_bytes <= DATA_BYTES &&
             (uint64_t)u->read.first_block + u->read.count <= PKV_SEQ_BLOCKS_MAX);
    if (s->op == PKV_OP_SEAL)
        must(u->seal.count && (uint64_t)u->seal.first_block + u->seal.count <= PKV_SEQ_BLOCKS_MAX);
    if (s->op == PKV_OP_SIGNED)
        must(!u->signed_.reserved0);
    if (s->op == PKV_OP_SEQ_CREATE)
        must(u->create.max_tokens && u->create.max_tokens <= PKV_SEQ_TOKENS_MAX &&
             memchr(u->create.label, 0, sizeof(u->create.label)));
}

static void fuzz_model(const struct pkv_model_request *m)
{
    if (pkv_check_model(m) != PKV_ERR_OK)
        return;
    must(m->geom.q_heads % m->geom.kv_heads == 0 && pkv_geom_group(&m->geom) <= PKV_GROUP_MAX);
    must((pkv_geom_words(&m->geom) == 0) == (m->scheme == PKV_SCHEME_NONE) && pkv_geom_words(&m->geom) <= PKV_SIG_WORDS_MAX);
    must(pkv_geom_block_bytes(&m->geom) % 64 == 0 && pkv_geom_sig_block_bytes(&m->geom) % 64 == 0);
    must(strlen(m->name) < PKV_MODEL_NAME_BYTES && m->rope_base == m->rope_base);
}

static void fuzz_select(const struct pkv_select_args *a)
{
    if (pkv_check_select(a) != PKV_ERR_OK)
        return;
    must(a->k && a->k <= PKV_SELECT_MAX && a->k <= a->tokens && a->tokens <= PKV_SEQ_TOKENS_MAX);
    must(a->queries && a->queries <= a->tokens && a->scale > 0 && a->top_p >= 0 && a->top_p <= 1);
}

static void fuzz_hello(const struct pkv_hello *h)
{
    if (pkv_check_hello(h) == PKV_ERR_OK)
        must(strlen(h->tenant) < PKV_NAME_BYTES && h->data_bytes <= PKV_DATA_BYTES_MAX && !(h->required & ~PKV_FEATURES));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    union {
        struct pkv_submission submission;
        struct pkv_model_request model;
        struct pkv_select_args select;
        struct pkv_hello hello;
        struct pkv_reply reply;
    } in;
    if (!bytes)
        return 0;
    memset(&in, 0, sizeof(in));
    memcpy(&in, data + 1, bytes - 1 < sizeof(in) ? bytes - 1 : sizeof(in));
    switch (data[0] % 5) {
    case 0:
        fuzz_submission(&in.submission);
        break;
    case 1:
        fuzz_model(&in.model);
        break;
    case 2:
        fuzz_select(&in.select);
        break;
    case 3:
        fuzz_hello(&in.hello);
        break;
    default:
        if (pkv_check_welcome(&in.reply, PKV_FEATURE_SERVED) == PKV_ERR_OK)
            must(in.reply.features & PKV_FEATURE_SERVED);
    }
    return 0;
}
