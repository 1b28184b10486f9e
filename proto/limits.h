/* Every maximum of the protocol in one place, with asserts that they fit together. */
#ifndef PROTO_LIMITS_H
#define PROTO_LIMITS_H

#include "proto/base.h"

#define PKV_VERSION_MAJOR 0u
#define PKV_VERSION_MINOR 1u

/* A block: the tokens of one layer that move together. */
#define PKV_BLOCK_TOKENS 64u

#define PKV_LAYERS_MAX    256u
#define PKV_KV_HEADS_MAX  128u
#define PKV_GROUP_MAX     16u /* q heads that share one kv head */
#define PKV_Q_HEADS_MAX   256u
#define PKV_HEAD_DIM_MAX  256u
#define PKV_SIG_BITS_MIN  32u
#define PKV_SIG_BITS_MAX  256u
#define PKV_SIG_WORDS_MAX (PKV_SIG_BITS_MAX / 32u)

#define PKV_SEQ_TOKENS_MAX (1u << 24) /* tokens of one sequence */
#define PKV_SEQ_BLOCKS_MAX (PKV_SEQ_TOKENS_MAX / PKV_BLOCK_TOKENS)

#define PKV_WORKERS_MAX     64u
#define PKV_TENANTS_MAX     32u
#define PKV_MODELS_MAX      64u
#define PKV_SEQS_MAX        4096u
#define PKV_WORKER_SEQS_MAX 1024u /* sequences that one worker has open */

/* Pool and arena are made of chunks: one memfd or VMM allocation each, of one tenant at a time. */
#define PKV_CHUNKS_MAX      4096u /* per tier */
#define PKV_CHUNK_BYTES_MIN (1ull << 20)
#define PKV_CHUNK_BYTES_MAX (1ull << 30)

#define PKV_EPOCH_SLOTS    8u   /* reads that one worker has in flight: its thread's own, and steps on a GPU */
#define PKV_RING_ENTRIES   256u /* submissions and completions of one worker; a power of two */
#define PKV_DATA_BYTES_MIN (1ull << 20)
#define PKV_DATA_BYTES_MAX (1ull << 32)
#define PKV_TABLE_BYTES    (1ull << 34) /* address space of one tenant's block tables; sparse */

#define PKV_BATCH_MAX   256u   /* sequences in one attend or append */
#define PKV_QUERIES_MAX 4096u  /* query tokens of one attend, all sequences together */
#define PKV_SELECT_MAX  65536u /* k */
#define PKV_SINKS_MAX   4096u
#define PKV_RECENT_MAX  4096u
#define PKV_CODE_BITS   16u /* of a token's group score */

#define PKV_NAME_BYTES       32u /* tenant, label; NUL included */
#define PKV_MODEL_NAME_BYTES 64u
#define PKV_DIGEST_BYTES     32u
#define PKV_UUID_BYTES       16u /* of a GPU */

/* Blocks pinned in the pool at each end of a sequence: they hold the usual 128 sinks, and 128 recent tokens however
 * full the tail block is. */
#define PKV_PIN_FIRST_BLOCKS 2u
#define PKV_PIN_LAST_BLOCKS  3u

static_assert((PKV_RING_ENTRIES & (PKV_RING_ENTRIES - 1)) == 0, "ring indices are masked");
static_assert(PKV_SEQ_TOKENS_MAX % PKV_BLOCK_TOKENS == 0, "a sequence ends on a block border");
static_assert(PKV_Q_HEADS_MAX <= PKV_KV_HEADS_MAX * PKV_GROUP_MAX, "the group rule covers the q heads");
static_assert(PKV_SIG_BITS_MAX % 32 == 0, "signatures are whole words");
static_assert(PKV_CHUNKS_MAX <= 1u << 14, "a place has 14 bits for its chunk");

#endif
