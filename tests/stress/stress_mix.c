/* A long mix: workers append, fork, truncate, attend and close at random, direct and served, in a pool that is too small, and
 * are killed at random. Each keeps a mirror of what its sequences must hold and compares exact attention with it; at the end
 * all of the pool can be had again. usage: stress_mix [ROUNDS [SEED]]; a round is a quarter of a second */
#include "proto/base.h"
#include "tests/integration/service.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { WORKERS = 3, SEQS = 4, TOKENS = 1500 };

static uint64_t state;

static uint32_t below(uint32_t n)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33) % n;
}

/* Keys and values of a token are a function of its number. */
struct mirror {
    struct pkv_seq *seq;
    uint32_t tokens, ids[TOKENS];
};
static struct mirror mirrors[SEQS];
static float k[TOKENS * ROW], v[TOKENS * ROW];

static void token_of(uint32_t id, float *key, float *value)
{
    uint64_t s = id * 2654435761ull + 17;
    for (int i = 0; i < ROW; i++) {
        s = s * 6364136223846793005ull + 1442695040888963407ull;
        key[i] = (float)(s >> 40) * 0x1p-23f - 1;
        value[i] = (float)(s >> 20 & 0xfffff) * 0x1p-19f - 1;
    }
}

static void tokens_of(const uint32_t *ids, uint32_t count)
{
    for (uint32_t t = 0; t < count; t++)
        token_of(ids[t], k + (uint64_t)t * ROW, v + (uint64_t)t * ROW);
}

static void wrong(struct pkv *kv, const char *what, int r)
{
    printf("FAILED: %s: %d, %s\n", what, r, pkv_error(kv));
    fflush(stdout);
    _exit(1);
}

static bool full(int r)
{
    return r == -ENOSPC || r == -ENOMEM;
}

static void append(struct pkv *kv, struct mirror *m)
{
    uint32_t n = 1 + below(below(4) ? 20 : 400), ids[TOKENS];
    n = PKV_MIN(n, TOKENS - m->tokens);
    for (uint32_t t = 0; t < n; t++)
        ids[t] = below(1u << 30);
    tokens_of(ids, n);
    for (uint32_t l = 0; l < LAYERS && n; l++) {
        int r = pkv_append(m->seq, l, n, k, v);
        if (r && !full(r))
            wrong(kv, "append", r);
        if (r) { /* the layers before have grown: all back */
            /* The tail may want a copy, for which there is room again within the bound of others' waits. */
            for (int i = 0; full(r) && i < 100; i++)
                r = pkv_seq_truncate(m->seq, m->tokens);
            if (r)
                wrong(kv, "truncate after a full pool", r);
            return;
        }
    }
    memcpy(m->ids + m->tokens, ids, n * sizeof(*ids));
    m->tokens += n;
}

static void truncate_(struct pkv *kv, struct mirror *m)
{
    uint32_t to = below(m->tokens + 1);
    int r = pkv_seq_truncate(m->seq, to);
    if (r && !full(r))
        wrong(kv, "truncate", r);
    m->tokens = (uint32_t)pkv_seq_tokens(m->seq);
    if (m->tokens < to || m->tokens > (r ? to + 63 : to))
        wrong(kv, "length after truncate", (int)m->tokens);
}

static void fork_(struct pkv *kv, const struct mirror *m)
{
    struct mirror *child = &mirrors[below(SEQS)];
    if (child->seq)
        return;
    uint32_t tokens = below(m->tokens + 1);
    int r = pkv_seq_fork(m->seq, tokens, 0, &child->seq);
    if (r) {
        child->seq = NULL;
        if (!full(r))
            wrong(kv, "fork", r);
        return;
    }
    memcpy(child->ids, m->ids, sizeof(m->ids));
    child->tokens = tokens;
}

static void attend(struct pkv *kv, const struct mirror *m)
{
    float q[QUERY], out[QUERY], fork_value[ROW];
    double exact[QUERY];
    uint32_t one = 1;
    struct pkv_budget b = budget(0), sparse = budget(40);
    if (!m->tokens)
        return;
    token_of(below(1000), q, fork_value);
    token_of(below(1000), q + ROW, fork_value);
    tokens_of(m->ids, m->tokens);
    test_attention(k, v, q, m->tokens, Q_HEADS, KV_HEADS, DIM, exact);
    uint32_t layer = below(LAYERS);
    int r = pkv_attend(&m->seq, &one, 1, layer, q, &b, out, NULL, NULL);
    if (r)
        wrong(kv, "attend", r);
    for (int i = 0; i < QUERY; i++)
        if (out[i] - exact[i] > 1e-4 || exact[i] - out[i] > 1e-4)
            wrong(kv, "the output is not what was appended", i);
    if (m->tokens > 200 && (r = pkv_attend(&m->seq, &one, 1, layer, q, &sparse, out, NULL, NULL)))
        wrong(kv, "sparse attend", r);
}

static void step(struct pkv *kv, struct pkv_model *model)
{
    struct mirror *m = &mirrors[below(SEQS)];
    uint32_t what = below(100);
    if (!m->seq) {
        int r = pkv_seq_create(model, TOKENS, 0, "stress", &m->seq);
        if (r)
            wrong(kv, "create", r);
        m->tokens = 0;
    } else if (what < 45) {
        append(kv, m);
    } else if (what < 75) {
        attend(kv, m);
    } else if (what < 83) {
        truncate_(kv, m);
    } else if (what < 93) {
        fork_(kv, m);
    } else {
        int r = what < 97 ? pkv_seq_close(m->seq) : pkv_seq_destroy(m->seq);
        if (r)
            wrong(kv, "close", r);
        m->seq = NULL;
    }
}

static pid_t worker(const struct test_daemon *d, uint64_t seed)
{
    pid_t pid = fork();
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    state = seed;
    struct pkv *kv = attach(d, seed % 2);
    struct pkv_model *model = open_model(kv);
    for (;;)
        step(kv, model);
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 24, good = 1;
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    struct test_daemon d;
    pid_t pids[WORKERS];
    test_daemon_start(&d, (const char *const[]){"--pool-bytes", "12M", "--arena-bytes", "24M", "--threads", "1", "--log-level",
                                                "error", "--grant-timeout-ms", "50", NULL});
    printf("seed %llu\n", (unsigned long long)seed);
    fflush(stdout);
    for (int i = 0; i < WORKERS; i++)
        pids[i] = worker(&d, seed * 1000 + (uint64_t)i);
    for (int round = 0; round < rounds && good; round++) {
        int status, i = round % WORKERS;
        usleep(250000);
        kill(pids[i], SIGKILL);
        waitpid(pids[i], &status, 0);
        good = WIFSIGNALED(status); /* one that ended by itself has found something */
        pids[i] = worker(&d, seed * 1000 + WORKERS + (uint64_t)round);
    }
    for (int i = 0; i < WORKERS; i++) {
        int status;
        good = good && waitpid(pids[i], &status, WNOHANG) == 0;
        kill(pids[i], SIGKILL);
        waitpid(pids[i], &status, 0);
    }
    struct pkv *kv = attach(&d, 0);
    struct pkv_seq *all;
    if (good && (pkv_seq_create(open_model(kv), 40000, 0, NULL, &all) || pkv_seq_reserve(all, 5000))) {
        printf("FAILED: the pool is not free again: %s\n", pkv_error(kv));
        good = 0;
    }
    pkv_close(kv);
    test_daemon_stop(&d);
    return good ? 0 : 1;
}
