/* What the files of `pivotkv bench gpu` share. */
#ifndef CLIENT_CLI_BENCH_GPU_H
#define CLIENT_CLI_BENCH_GPU_H

#include "client/cli/bench.h"
#include "gpu/lab.h"

enum {
    Q_HEADS = 32,
    KV_HEADS = 8,
    DIM = 128,
    K = 2048,
    SINKS = 128,
    RECENT = 128,
    PIECE = 4096,
    ROUNDS = 21,
    CALLS = 8,
    LAYERS_MAX = 8,
    SEQS_MAX = 64
};

#define ROW_BYTES  (2ull * KV_HEADS * DIM * 2) /* of a token and layer */
#define ALL_LAYERS (2u << 20)                  /* tokens of all layers together, at most */

struct lab {
    struct bench *bench;
    struct gpu_device *device;
    struct gpu_lab *lab;
    const char *socket;                   /* of the daemon at hand */
    double start_s;                       /* that it took to begin */
    double read_peak, to_device, to_host; /* bytes a second */
    double to_device_beside;              /* while as much comes from it */
    void *k, *v, *q, *out, *lse;          /* k, v [PIECE][KV_HEADS][DIM]; q [CALLS][SEQS_MAX][Q_HEADS][DIM] */
    void *equal, *near;                   /* keys as k: all the same; the first K what queries that drift around one look for */
    json_t *peers;
};

/* bench_text.c: sequences on a daemon, filled by batches in pieces of PIECE tokens, the same rows again and again. */
struct text {
    struct pkv *kv;
    struct pkv_seq *seqs[SEQS_MAX];
    struct pkv_model *model;
    struct pkv_batch *batch;
    uint32_t count, layers, tokens, bits;
    uint32_t signature; /* PKV_SIGN; PKV_CODE, PKV_LINEAR with weights of bench_weights.c, the latter by rule sum */
    const void *keys;   /* instead of the lab's, in piece `keys_piece` or in all (EVERY_PIECE); NULL: never */
    uint32_t keys_piece;
    const char *source;     /* k and v of piece after piece, in memory that the device reads; NULL: the lab's */
    uint32_t source_pieces; /* then begin again */
    bool moving;            /* leave the daemon's copies home under way */
    double prefill_s, begin_s, calls_s, end_s; /* all of it; the host's part, by call */
};
#define EVERY_PIECE UINT32_MAX

bool bench_good(struct pkv *kv, int r); /* says why not */
bool text_model(struct text *t);        /* opens the model of its layers and bits, on t->kv */
bool text_open(const struct lab *x, struct text *t);
void text_close(struct text *t);
bool text_batch(struct text *t, uint32_t queries, bool dense, uint64_t cache_bytes);
bool text_batch_close(struct text *t);
/* Bytes that append has moved. */
double text_moved(const struct text *t);
/* Until the daemon has copied home what was sealed: its copies would be measured too. */
void bench_settle(const struct lab *x);
bool fill_queries(const struct lab *x, uint32_t count, float noise);
/* A graph of attend calls (or appends), `calls` or more over the layers; every call with queries of its own. NULL: it failed.
 */
void *text_graph(const struct lab *x, struct text *t, bool append, uint32_t *calls);
/* Median microseconds of a call in such a graph of CALLS; 0: it failed. */
double text_timed(const struct lab *x, struct text *t, bool append);

/* A synchronous call with the queries of the lab's first call, several times: medians of what it says of itself. */
bool text_explained(const struct lab *x, struct text *t, double *ret_scan_ns, double *ret_attend_ns, double *ret_rows);

/* bench_gpu_scan.c */
void figures_scan(const struct lab *x, struct pkv *kv);
/* bench_weights.c: random weights of a PKV_CODE with a bit a dimension, or of a PKV_LINEAR with signs of the queries (plain
 * Hamming distances), as a file that only this process sees: its descriptor, or -1. */
int bench_weights(uint32_t signature, uint32_t layers, uint32_t bits);
/* bench_gpu_cost.c */
void figures_adversarial(const struct lab *x, struct pkv *kv);
void figure_prefill(const struct lab *x, const struct text *t, const char *name, const char *host_name);
void figures_audit(struct lab *x);
/* bench_gpu_memory.c */
void figures_memory(const struct lab *x, struct pkv *kv);

/* Runs `figures` with a daemon; `audit`: its audit-ppm. */
void with_daemon(struct lab *x, const char *pool, const char *arena, const char *audit,
                 void (*figures)(const struct lab *x, struct pkv *kv));

#endif
