/* The CUDA backend's table of launchers. Every launcher takes one struct and a stream, checks what it can check without the
 * device, launches, and returns 0 or -enum pkv_err: no synchronisation, no allocation, no decision of the host that depends on
 * lengths. Lengths and block tables are read on the device, so a captured graph replays with sequences that have grown since.
 * Private to gpu; C and CUDA C++ read it alike.
 *
 * All pointers are device-visible addresses, owned by the caller. */
#ifndef GPU_CUDA_CUDA_H
#define GPU_CUDA_CUDA_H

#include "proto/table.h"
#include "proto/wire.h"

PKV_EXTERN_C_BEGIN

/* One sequence in one layer. The stream (or the host between launches) writes the length. */
struct cuda_seq {
    const struct pkv_block_ref *blocks; /* [blocks of the longest length] */
    uint64_t tokens;                    /* the queries' own tokens included */
};

/* A query token sees the first seqs[seq].tokens - back tokens of its sequence. */
struct cuda_query {
    uint32_t seq, back;
};

/* One linear map per head: weight [layers][heads][out][in], bias [layers][heads][out] or NULL. */
struct cuda_map {
    const float *weight, *bias;
    uint32_t out, in;
};
#define CUDA_STAGES 4u

/* A signature scheme in device memory; arrays as in gpu/scheme.h. Unused ones are NULL. */
struct cuda_scheme {
    uint32_t kind; /* enum pkv_scheme; PKV_SCHEME_NONE: append writes rows alone */
    uint32_t bases, dims;
    uint32_t q_signs, q_own; /* q_own: the queries' map is per q head and its own, else the keys' map (linear) */
    float unit;
    const float *signs, *mean, *deviation;
    struct cuda_map k[CUDA_STAGES], q[CUDA_STAGES]; /* stages of `hash`'s MLPs; the others have one */
    uint32_t k_stages, q_stages;
    const float *low, *step;
    const uint8_t *bits;
};

/* What a call writes on its way; sizes by cuda_work_bytes. Zeroed once, before the first call. */
struct cuda_work {
    int8_t *weights;   /* [queries][q_heads][sig_bits] */
    uint32_t *planes;  /* [queries][q_heads][8][words]: bit p of each weight */
    float *scales;     /* [queries][q_heads] */
    float *biases;     /* [queries][q_heads] */
    uint16_t *codes;   /* [lists][tokens_max, to a multiple of 64] */
    uint32_t *counts;  /* [lists][parts or team][CUDA_COUNTS]: how many tokens of a part have at least this code */
    uint32_t *fine;    /* [lists][parts][CUDA_FINE]: of the codes at the threshold; rules `sum` and `max` */
    uint32_t *index;   /* [lists][rows_max] ascending */
    uint64_t *address; /* [lists][rows_max] where the row lies; bit 0: in the arena, and to be kept in the row cache */
    uint32_t *chosen;  /* [lists] entries in index */
    uint16_t *scores;  /* [lists][rows_max] codes, 0 for sinks and recent */
    float *partial;    /* [lists][head chunks][splits]: out [4][head_dim], max [4], sum [4] */
    uint32_t *arrived; /* [lists][head chunks] splits that are done; zero between calls */
    uint32_t *words;   /* [lists][cuda_words()][4] what the blocks of a team tell each other: values, epoch of the call */
    uint32_t *hints;   /* [layers][lists] the threshold of the call before */
    uint32_t *gates;   /* [lists][CUDA_GATE] arrivals, generation, epoch, each in its own 128 bytes */
};
#define CUDA_COUNTS            2128u /* 2049 fine, at CUDA_COARSE 64 coarse (every 32nd), rest padding */
#define CUDA_COARSE            2056u
#define CUDA_LOW_BITS          2120u /* rules `sum` and `max`: how many low bits of the codes are not counted */
#define CUDA_FINE              64u   /* 33, rest padding */
#define CUDA_PARTS_MAX         64u
#define CUDA_SPLITS_MAX        64u                              /* two a lane of the warp that weighs them */
#define CUDA_HEADS             4u                               /* q heads that attend takes together: a chunk */
#define CUDA_PARTIAL(head_dim) (CUDA_HEADS * ((head_dim) + 2u)) /* floats of a split's result */

/* A row cache: copies of rows of the arena in device memory, set-associative, apart for each sequence and kv head; one such
 * struct a layer. A query whose `back` is 0 looks rows up and keeps what it had to fetch; of a call's queries at most one per
 * sequence has back 0. No way that a call has chosen is evicted by it; else the one that was used at the shortest length goes.
 * The caller zeroes a sequence's entries before its first call, and again when tokens were cut off or the slot in seqs was
 * given to another sequence. */
struct cuda_cache {
    uint64_t *entries;  /* [seqs][kv_heads][sets][CUDA_WAYS]: token + 1 << 32 | length at its last use; NULL: no cache */
    void *rows;         /* [seqs][kv_heads][sets][CUDA_WAYS][2][head_dim] */
    uint64_t *counters; /* [CUDA_COUNTERS], added to */
    uint32_t sets, reserved;
};
#define CUDA_WAYS 8u
enum cuda_counter { CUDA_HITS, CUDA_MISSES, CUDA_COUNTERS }; /* rows of the arena that were chosen; a miss reads a row */

struct cuda_policy {
    uint32_t k, sinks, recent, rule, dense_below; /* as in gpu_policy; without signatures k is 0 */
    float top_p;
    float scale; /* of the softmax, resolved: never 0 */
};

/* What kernels read at their beginning comes first: arguments arrive a line of 64 bytes at a time. */
struct cuda_attend {
    struct pkv_geom geom;
    struct cuda_policy policy;
    uint32_t layer, queries;
    uint32_t tokens_max; /* no length exceeds it while this launch, or a graph that captured it, is used */
    uint32_t parts;      /* thread blocks that share a list's scan; these four by cuda_grid() */
    uint32_t splits;     /* thread blocks that share a list's attention */
    uint32_t team;       /* thread blocks that take a list from query to result in one launch; 0: a launch a stage */
    uint32_t flags;      /* CUDA_KEEP: a team leaves codes, index and scores in work, as the stages do */
    uint32_t weighed;    /* work.weights and work.scales are given: the scheme has no say */
    const struct cuda_seq *seqs;
    const struct cuda_query *query;  /* [queries]; no kernel writes them */
    const void *q;                   /* [queries][q_heads][head_dim] in the model's dtype */
    const uint64_t *base[PKV_TIERS]; /* [PKV_CHUNKS_MAX] device-visible addresses of chunks; base[0] unused */
    float *out;                      /* [queries][q_heads][head_dim] */
    float *lse;                      /* [queries][q_heads]; may be NULL */
    struct cuda_work work;
    struct cuda_cache cache;
    struct cuda_scheme scheme;
};
#define CUDA_KEEP 1u

/* New tokens of several sequences: token i of sequence s becomes number seqs[s].tokens - tokens + i. With k and v NULL the rows
 * are there already and are signed where they lie, pool or arena. */
struct cuda_append {
    struct pkv_geom geom;
    struct cuda_scheme scheme;
    const uint64_t *base[PKV_TIERS]; /* the pool's mappings are writable */
    const struct cuda_seq *seqs;
    const void *k, *v; /* [seqs][tokens][kv_heads][head_dim]; both or neither */
    uint32_t *bad;     /* becomes 1 if a number is NaN or infinite; what was written then does not count */
    uint32_t layer, count, tokens;
};

/* Rows of the lists that select left in work, side by side: to [lists][rows_max][2][head_dim]. */
struct cuda_gather {
    const struct cuda_attend *attend;
    void *to;
};

/* A list is one query token and kv head. Figures of a geometry and policy that size the work area and the grids. */
static inline PKV_HD uint32_t cuda_rows_max(const struct cuda_policy *p)
{
    return p->sinks + p->recent + p->k;
}
static inline PKV_HD uint32_t cuda_head_chunks(const struct pkv_geom *g)
{
    return PKV_DIV_UP(pkv_geom_group(g), CUDA_HEADS);
}

/* No length that tokens_max allows needs selection. Today's lengths have no say: a replay may find others. */
static inline int cuda_dense_only(const struct cuda_attend *a)
{
    return a->tokens_max < a->policy.dense_below || a->tokens_max <= cuda_rows_max(&a->policy);
}

/* Words of a list in work.words: of biases and counts, of rows that another block attends, of results, of maps' outputs. */
#define CUDA_COUNT_WORDS 128u
#define CUDA_MAP_WORDS   64u
static inline PKV_HD uint64_t cuda_words(const struct cuda_attend *a)
{
    uint64_t group = pkv_geom_group(&a->geom), outputs = group * a->geom.head_dim;
    return a->team ? a->team * (CUDA_COUNT_WORDS + outputs) + a->policy.k + group * CUDA_MAP_WORDS : 0;
}
#define CUDA_GATE 96u

typedef void *cuda_stream; /* CUstream */

struct cuda_table {
    uint32_t version;
    /* 0 when the device of the current context can run the kernels; loads them all, so that none loads behind a wait. */
    int (*preload)(void);
    int (*query)(const struct cuda_attend *a, cuda_stream stream);  /* weights, scales, biases */
    int (*scan)(const struct cuda_attend *a, cuda_stream stream);   /* codes and counts */
    int (*pick)(const struct cuda_attend *a, cuda_stream stream);   /* index, chosen, scores */
    int (*attend)(const struct cuda_attend *a, cuda_stream stream); /* out, lse over the lists, or over all where dense */
    int (*call)(const struct cuda_attend *a, cuda_stream stream);   /* the four above, as far as tokens_max needs them */
    int (*gather)(const struct cuda_gather *g, cuda_stream stream);
    int (*append)(const struct cuda_append *a, cuda_stream stream); /* rows, then signatures */
};
#define CUDA_TABLE_VERSION 1u

const struct cuda_table *gpu_cuda_table(void);

PKV_EXTERN_C_END

#endif
