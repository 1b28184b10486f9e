/* Peers: a plain sum, memcpy, and dense attention by OpenBLAS. Each does its best with the same threads. */
#include "client/cli/bench.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#ifdef PKV_OPENBLAS
#include <cblas.h>
#endif

#define THREADS_MAX 64u

struct part {
    pthread_t thread;
    bool started;
    void *to;
    const void *from;
    uint64_t bytes, sum;
};

typedef uint64_t lanes __attribute__((vector_size(64), aligned(8)));

static void *sum_part(void *arg)
{
    struct part *p = arg;
    lanes sum[4] = {{0}};
    const lanes *at = p->from;
    for (uint64_t i = 0; i + 4 <= p->bytes / sizeof(lanes); i += 4)
        for (int n = 0; n < 4; n++)
            sum[n] += at[i + n];
    lanes all = sum[0] + sum[1] + sum[2] + sum[3];
    for (int n = 0; n < 8; n++)
        p->sum += all[n];
    return NULL;
}

static void *copy_part(void *arg)
{
    struct part *p = arg;
    memcpy(p->to, p->from, p->bytes);
    return NULL;
}

static double run(void *(*work)(void *), void *to, const void *from, uint64_t bytes, uint32_t threads)
{
    struct part parts[THREADS_MAX] = {0};
    uint64_t step = bytes / threads / 256 * 256;
    double begin = bench_now();
    for (uint32_t i = 0; i < threads; i++) {
        struct part *p = &parts[i];
        p->to = to ? (char *)to + i * step : NULL, p->from = (const char *)from + i * step;
        p->bytes = i + 1 < threads ? step : bytes - i * step;
        p->started = i + 1 < threads && pthread_create(&p->thread, NULL, work, p) == 0;
        if (!p->started)
            work(p);
    }
    volatile uint64_t sink = 0;
    for (uint32_t i = 0; i < threads; i++) {
        if (parts[i].started)
            pthread_join(parts[i].thread, NULL);
        sink += parts[i].sum;
    }
    return bench_now() - begin;
}

double peer_sum(const void *data, uint64_t bytes, uint32_t threads)
{
    return run(sum_part, NULL, data, bytes, threads);
}

double peer_copy(void *to, const void *from, uint64_t bytes, uint32_t threads)
{
    return run(copy_part, to, from, bytes, threads);
}

#ifdef PKV_OPENBLAS
extern void openblas_set_num_threads(int threads);

const char *peer_dense_name(void)
{
    return "OpenBLAS sgemm, float K/V";
}

/* One kv head after the other over the same buffers: larger than any cache, they cost what distinct ones would. */
static void dense(const float *k, const float *v, const float *q, float *scores, float *out, uint32_t tokens, uint32_t group,
                  uint32_t dim)
{
    int t = (int)tokens, g = (int)group, d = (int)dim;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, g, t, d, 1.0f / sqrtf((float)dim), q, d, k, d, 0.0f, scores, t);
    for (uint32_t h = 0; h < group; h++) {
        float *s = scores + (uint64_t)h * tokens, most = s[0], sum = 0;
        for (uint32_t i = 1; i < tokens; i++)
            most = s[i] > most ? s[i] : most;
        for (uint32_t i = 0; i < tokens; i++)
            sum += s[i] = expf(s[i] - most);
        cblas_sscal(t, 1.0f / sum, s, 1);
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, g, d, t, 1.0f, scores, t, v, d, 0.0f, out, d);
}

double peer_dense(uint32_t tokens, uint32_t q_heads, uint32_t kv_heads, uint32_t head_dim, uint32_t threads)
{
    uint64_t count = (uint64_t)tokens * head_dim;
    uint32_t group = q_heads / kv_heads;
    float *k = malloc(count * sizeof(float)), *v = malloc(count * sizeof(float));
    float *q = malloc(group * head_dim * sizeof(float)), *out = malloc(group * head_dim * sizeof(float));
    float *scores = malloc((uint64_t)group * tokens * sizeof(float));
    double best = -1;
    if (k && v && q && out && scores) {
        openblas_set_num_threads((int)threads);
        for (uint64_t i = 0; i < count; i++)
            k[i] = (float)(i * 2654435761u % 1000) * 0.002f - 1, v[i] = k[i];
        for (uint32_t i = 0; i < group * head_dim; i++)
            q[i] = (float)(i % 17) * 0.1f - 0.8f;
        for (int n = 0; n < 3; n++) {
            double begin = bench_now();
            for (uint32_t h = 0; h < kv_heads; h++)
                dense(k, v, q, scores, out, tokens, group, head_dim);
            double seconds = bench_now() - begin;
            best = best < 0 || seconds < best ? seconds : best;
        }
    }
    free(k), free(v), free(q), free(out), free(scores);
    return best;
}
#else
const char *peer_dense_name(void)
{
    return "none";
}

double peer_dense(uint32_t tokens, uint32_t q_heads, uint32_t kv_heads, uint32_t head_dim, uint32_t threads)
{
    (void)tokens, (void)q_heads, (void)kv_heads, (void)head_dim, (void)threads;
    return -1;
}
#endif
