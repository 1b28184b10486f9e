/* What crosses between worker and daemon: messages on the socket, entries in the rings. Fixed width, named padding,
 * reserved fields zero and checked. All integers are little endian (the machine's own: both sides share memory). */
#ifndef PROTO_WIRE_H
#define PROTO_WIRE_H

#include "proto/geom.h"
#include "proto/op.h"

#define PKV_MAGIC     0x564b5650u /* "PVKV" */
#define PKV_LAYER_ALL 0xffffu

/* Handle of a sequence: index in the low half, generation in the high half; zero is no sequence. */
static inline uint64_t pkv_handle(uint32_t index, uint32_t gen)
{
    return (uint64_t)gen << 32 | index;
}
static inline uint32_t pkv_handle_index(uint64_t handle)
{
    return (uint32_t)handle;
}
static inline uint32_t pkv_handle_gen(uint64_t handle)
{
    return (uint32_t)(handle >> 32);
}

/* Feature bits of hello. A side refuses a peer that requires what it lacks. */
#define PKV_FEATURE_DIRECT (1ull << 0) /* pool and arena are mapped by the worker */
#define PKV_FEATURE_SERVED (1ull << 1) /* select, append and read through the data area */
#define PKV_FEATURE_CUDA   (1ull << 2) /* the pool lies on a GPU: its chunks are VMM descriptors, see `device` */
#define PKV_FEATURES       (PKV_FEATURE_DIRECT | PKV_FEATURE_SERVED | PKV_FEATURE_CUDA)

/* Messages on the socket (SOCK_SEQPACKET). A worker has one request outstanding; the daemon answers each with a reply
 * of the same kind. File descriptors travel beside the reply (SCM_RIGHTS). */
enum pkv_message {
    PKV_MSG_HELLO = 1,
    PKV_MSG_MODEL = 2,
    PKV_MSG_MAP = 3,
    PKV_MSG_STATE_PUT = 4,
    PKV_MSG_STATE_GET = 5,
    PKV_MSG_BYE = 6
};

struct pkv_hello {
    uint32_t magic;
    uint16_t message; /* PKV_MSG_HELLO */
    uint16_t reserved0;
    uint32_t version_major, version_minor;
    uint64_t features;              /* offered */
    uint64_t required;              /* subset of offered that the daemon must have too */
    uint64_t data_bytes;            /* wanted data area */
    char tenant[PKV_NAME_BYTES];    /* NUL-terminated; empty is "default" */
    char label[PKV_NAME_BYTES];     /* shown to the operator */
    uint8_t device[PKV_UUID_BYTES]; /* CUDA: the GPU that the worker runs on; zero: one that the daemon chooses */
    uint64_t reserved;
};
PKV_WIRE_ASSERT(struct pkv_hello, 128, 8, 4 + 2 * 2 + 2 * 4 + 3 * 8 + 2 * 32 + 16 + 8, reserved, 120);

/* Registers a model, or finds it by name; geometry, scheme and weights' digest must agree with the first. */
struct pkv_model_request {
    uint32_t magic;
    uint16_t message; /* PKV_MSG_MODEL */
    uint16_t scheme;  /* enum pkv_scheme */
    struct pkv_geom geom;
    float rope_base;
    uint16_t rope_dims;
    uint16_t rope_interleaved; /* 0 half-split pairs, 1 interleaved pairs */
    char name[PKV_MODEL_NAME_BYTES];
    uint8_t weights_digest[PKV_DIGEST_BYTES]; /* of the scheme's weights file; zero without one */
};
PKV_WIRE_ASSERT(struct pkv_model_request, 128, 4, 8 + 16 + 8 + 64 + 32, weights_digest, 96);

enum pkv_scheme {
    PKV_SCHEME_SIGN = 0,
    PKV_SCHEME_CODE = 1,
    PKV_SCHEME_LINEAR = 2,
    PKV_SCHEME_HASH = 3,
    PKV_SCHEME_NONE = 4, /* sig_bits 0: the latest tokens are selected */
    PKV_SCHEMES = 5
};

/* Asks for the fd of a chunk of the worker's tenant. */
struct pkv_map_request {
    uint32_t magic;
    uint16_t message; /* PKV_MSG_MAP */
    uint16_t tier;
    uint32_t chunk;
    uint32_t reserved;
};
PKV_WIRE_ASSERT(struct pkv_map_request, 16, 4, 4 + 2 + 2 + 4 + 4, reserved, 12);

/* The signature states of a model (means, transforms): a sealed memfd each, numbered from 1, fetched by everybody. A sequence's
 * signatures are all of one state; 0: of none yet, only its writer knows how they were made. */
struct pkv_state_request {
    uint32_t magic;
    uint16_t message; /* PKV_MSG_STATE_PUT with the memfd beside it, or PKV_MSG_STATE_GET */
    uint16_t reserved0;
    uint32_t model;
    uint32_t state; /* PUT: the number that it is to have, the latest one plus 1. GET: which; 0: the latest */
};
PKV_WIRE_ASSERT(struct pkv_state_request, 16, 4, 4 + 2 + 2 + 4 + 4, state, 12);

/* The worker has unmapped everything and leaves; not answered. A socket that closes without it is a death. */
struct pkv_bye {
    uint32_t magic;
    uint16_t message; /* PKV_MSG_BYE */
    uint16_t reserved0;
    uint64_t reserved;
};
PKV_WIRE_ASSERT(struct pkv_bye, 16, 8, 4 + 2 + 2 + 8, reserved, 8);

struct pkv_reply {
    uint32_t magic;
    uint16_t message;
    uint16_t fds; /* beside this reply: HELLO region, eventfd, control page, block tables; MAP one; STATE_GET one */
    uint32_t err; /* enum pkv_err */
    uint32_t version_major, version_minor;
    uint32_t id;                    /* HELLO: worker; MODEL: model; STATE_PUT, STATE_GET: number of the state */
    uint64_t features;              /* common to both sides */
    uint64_t bytes;                 /* HELLO: of the region; MAP: of the chunk; STATE_GET: of the memfd */
    uint8_t device[PKV_UUID_BYTES]; /* HELLO with CUDA: the GPU that the worker's sequences live on; else zero */
    uint64_t reserved;
};
PKV_WIRE_ASSERT(struct pkv_reply, 64, 8, 4 + 2 * 2 + 4 * 4 + 2 * 8 + 16 + 8, reserved, 56);

/* Payloads of ring operations: 40 bytes each. */
struct pkv_op_nop {
    uint64_t reserved[5];
};
struct pkv_op_create {
    uint32_t model;
    uint32_t max_tokens;
    uint8_t label[24];
    uint32_t flags; /* PKV_SEQ_PERSISTENT */
    uint32_t state; /* that its signatures will be made with; 0: none yet */
};
#define PKV_SEQ_PERSISTENT 1u
struct pkv_op_open {
    uint64_t reserved[5];
};
struct pkv_op_fork {
    uint64_t tokens;     /* of the parent, that the child keeps */
    uint32_t max_tokens; /* of the child; 0 as the parent */
    uint32_t flags;
    uint64_t reserved[3];
};
struct pkv_op_truncate {
    uint64_t tokens;
    uint64_t reserved[4];
};
struct pkv_op_grant {
    uint64_t tokens; /* places for all blocks below this length */
    uint64_t reserved[4];
};
struct pkv_op_seal {
    uint32_t first_block, count;
    uint64_t reserved[4];
};
struct pkv_op_append {
    uint64_t first_token;
    uint32_t tokens;
    uint32_t flags;    /* PKV_APPEND_* */
    uint64_t data_off; /* laid out by pkv_served_append (served.h) */
    uint64_t data_bytes;
    uint64_t reserved;
};
#define PKV_APPEND_SIGNATURES 1u /* k and v are there already: only the signatures are written, anew */
struct pkv_op_select {
    uint64_t data_off; /* struct pkv_select_args and what follows it */
    uint64_t data_bytes;
    uint64_t out_off; /* laid out by pkv_served_result (served.h) */
    uint64_t out_bytes;
    uint64_t reserved;
};
struct pkv_op_read {
    uint32_t first_block, count;
    uint64_t out_off; /* blocks as in geom.h, one after the other */
    uint64_t out_bytes;
    uint64_t reserved[2];
};
struct pkv_op_signed {
    uint32_t state; /* 0: they are about to be made anew; refused while others look at them */
    uint32_t reserved0;
    uint64_t reserved[4];
};

union pkv_payload {
    struct pkv_op_nop nop;
    struct pkv_op_create create;
    struct pkv_op_open open;
    struct pkv_op_fork fork;
    struct pkv_op_truncate truncate;
    struct pkv_op_grant grant;
    struct pkv_op_seal seal;
    struct pkv_op_append append;
    struct pkv_op_select select;
    struct pkv_op_read read;
    struct pkv_op_signed signed_;
};

struct pkv_submission {
    uint8_t op;     /* enum pkv_op */
    uint8_t flags;  /* zero */
    uint16_t layer; /* or PKV_LAYER_ALL where the operation says so */
    uint32_t tag;   /* returned with the completion */
    uint64_t seq;   /* handle; zero for operations without one */
    union pkv_payload u;
    uint64_t reserved;
};
PKV_WIRE_ASSERT(struct pkv_submission, 64, 8, 1 + 1 + 2 + 4 + 8 + 40 + 8, reserved, 56);

struct pkv_completion {
    uint32_t tag;
    uint32_t err; /* enum pkv_err */
    uint64_t value0, value1;
    uint64_t reserved;
};
PKV_WIRE_ASSERT(struct pkv_completion, 32, 8, 4 + 4 + 3 * 8, reserved, 24);

/* How a token's group score is made of its q heads' scores. */
enum pkv_rule { PKV_RULE_SOFTMAX = 0, PKV_RULE_SUM = 1, PKV_RULE_MAX = 2, PKV_RULES = 3 };

/* Head of a served select in the data area; what follows it lies as pkv_served_query (served.h) says. */
struct pkv_select_args {
    uint64_t tokens; /* length of the sequence, the queries' own tokens included; query i sees tokens - queries + 1 + i */
    uint32_t queries;
    uint32_t k;
    float top_p; /* 0: fixed k */
    float scale; /* of the softmax */
    uint32_t sinks, recent;
    uint32_t rule;
    uint32_t flags; /* PKV_SELECT_* */
    uint64_t reserved[3];
};
#define PKV_SELECT_NO_ROWS 1u /* indices and scores only */
PKV_WIRE_ASSERT(struct pkv_select_args, 64, 8, 8 + 2 * 4 + 2 * 4 + 2 * 4 + 2 * 4 + 3 * 8, reserved, 40);

#endif
