/* Calls of one launch each in two streams at once, beside one in stages: they end, and give what each gives alone. For
 * check_cuda. */
#ifndef TESTS_KERNELS_CHECK_STREAMS_H
#define TESTS_KERNELS_CHECK_STREAMS_H

#include "tests/kernels/check_append.h"

#include <stdio.h>
#include <unistd.h>

#define STREAMS 3u /* two by teams, one in stages */

struct beside {
    struct cuda_attend a;
    void *work;
    float *alone;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
};

static inline void beside_open(const struct on_device *d, uint32_t i, uint64_t bytes, struct beside *b)
{
    b->a = d->a, b->a.cache.entries = NULL, b->a.lse = NULL, b->a.policy.dense_below = 0;
    MUST(cuda_grid(&b->a) == 0);
    b->a.team = i + 1 < STREAMS ? b->a.team : 0;
    b->work = device_take(cuda_work_bytes(&b->a));
    CUDA(cudaMemset(b->work, 0, cuda_work_bytes(&b->a)));
    cuda_work_bind(&b->a, b->work);
    b->a.out = device_take(bytes);
    MUST(table->call(&b->a, NULL) == 0);
    CUDA(cudaDeviceSynchronize());
    b->alone = host_copy(b->a.out, bytes);
    CUDA(cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking));
    CUDA(cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t n = 0; n < 16; n++)
        MUST(table->call(&b->a, b->stream) == 0);
    CUDA(cudaStreamEndCapture(b->stream, &b->graph));
    CUDA(cudaGraphInstantiate(&b->replay, b->graph, 0));
}

/* A hang would outlast every wait: the process goes, and the device with it. */
static inline void ends_in_time(cudaStream_t stream, uint32_t seconds)
{
    cudaError_t e;
    for (uint32_t ms = 0; (e = cudaStreamQuery(stream)) == cudaErrorNotReady && ms < seconds * 1000; ms++)
        usleep(1000);
    if (e == cudaErrorNotReady) {
        printf("streams wait for each other\n");
        fflush(stdout);
        _exit(1);
    }
    CUDA(e);
}

/* Every team wants nearly all multiprocessors, and its blocks wait for each other: two may not keep each other out. */
static inline void check_streams(struct gpu *gpu, uint32_t rounds)
{
    struct world w = {.g = {2, 32, 8, 128, PKV_BF16, 128, 0},
                      .tokens = 3000,
                      .queries = 1,
                      .policy = {.k = 400, .sinks = 64, .recent = 64, .rule = PKV_RULE_SOFTMAX}};
    uint64_t bytes = 2ull * w.g.q_heads * w.g.head_dim * 4;
    struct on_device d;
    struct beside b[STREAMS];
    world_data(&w);
    world_places(&w);
    struct gpu_scheme *scheme = scheme_of_kind(&w, PKV_SCHEME_SIGN);
    host_fill(gpu, scheme, &w);
    device_open(&w, scheme, &d);
    check_append(&w, &d);
    struct cuda_seq seqs[2] = {{d.refs, w.tokens}, {d.refs, w.tokens - 500}};
    CUDA(cudaMemcpy(d.seqs, seqs, sizeof(seqs), cudaMemcpyHostToDevice));
    for (uint32_t i = 0; i < STREAMS; i++)
        beside_open(&d, i, bytes, &b[i]);
    printf("streams: teams of %u\n", b[0].a.team);
    for (uint32_t round = 0; round < rounds; round++)
        for (uint32_t i = 0; i < STREAMS; i++) {
            CUDA(cudaGraphLaunch(b[i].replay, b[i].stream));
            MUST(table->call(&b[i].a, b[i].stream) == 0);
        }
    for (uint32_t i = 0; i < STREAMS; i++)
        ends_in_time(b[i].stream, 60);
    for (uint32_t i = 0; i < STREAMS; i++) {
        float *now = host_copy(b[i].a.out, bytes);
        MUST(!memcmp(now, b[i].alone, bytes));
        CUDA(cudaGraphExecDestroy(b[i].replay));
        CUDA(cudaGraphDestroy(b[i].graph));
        CUDA(cudaStreamDestroy(b[i].stream));
        CUDA(cudaFree(b[i].a.out));
        CUDA(cudaFree(b[i].work));
        free(now), free(b[i].alone);
    }
    device_close(&d);
    gpu_scheme_close(scheme);
    world_free(&w);
}

#endif
