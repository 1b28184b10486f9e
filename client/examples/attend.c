/* A worked example: one layer of decoding through pivotkv, with the installed header alone.
 *
 *     cc attend.c $(pkg-config --cflags --libs pivotkv) -lm -o attend && ./attend [SOCKET]
 *
 * It fills a cache with a prompt, then decodes: every step appends one token's K and V and attends over the 256 tokens that
 * matter. An engine does this in each layer with its own K, V and q; here they are made up, with one token planted that every
 * query looks for. */
#include "client/pivotkv.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { LAYERS = 1, Q_HEADS = 8, KV_HEADS = 2, DIM = 64, PROMPT = 20000, STEPS = 40, PLANTED = 12345 };

static float noise(void)
{
    static unsigned long long state = 42;
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (float)(state >> 40) / (1 << 24) - 0.5f;
}

static void make(float *to, int count)
{
    for (int i = 0; i < count; i++)
        to[i] = noise();
}

/* Says what went wrong, in the library's words. */
static int failed(const char *what, const struct pkv *kv)
{
    fprintf(stderr, "%s: %s\n", what, pkv_error(kv));
    return 1;
}

static int decode(struct pkv *kv, struct pkv_seq *seq)
{
    static float k[PROMPT * KV_HEADS * DIM], v[PROMPT * KV_HEADS * DIM], q[Q_HEADS * DIM], out[Q_HEADS * DIM];
    make(k, PROMPT * KV_HEADS * DIM);
    make(v, PROMPT * KV_HEADS * DIM);
    /* Prefill: any number of tokens a call. K comes after RoPE. */
    for (int layer = 0; layer < LAYERS; layer++)
        if (pkv_append(seq, (uint32_t)layer, PROMPT, k, v))
            return failed("append", kv);
    struct pkv_budget budget = {.size = sizeof(budget), .k = 256, .sinks = 128, .recent = 128};
    struct pkv_budget all = {.size = sizeof(all), .dense = 1};
    for (int step = 0; step < STEPS; step++) {
        uint32_t one = 1;
        struct pkv_explain explain;
        float exact[Q_HEADS * DIM];
        /* Every q head looks for the planted token. */
        for (int h = 0; h < Q_HEADS; h++)
            for (int d = 0; d < DIM; d++)
                q[h * DIM + d] = 30 * k[(PLANTED * KV_HEADS + h / (Q_HEADS / KV_HEADS)) * DIM + d] + noise();
        for (int layer = 0; layer < LAYERS; layer++) {
            if (pkv_append(seq, (uint32_t)layer, 1, k + step * KV_HEADS * DIM, v + step * KV_HEADS * DIM) ||
                pkv_attend(&seq, &one, 1, (uint32_t)layer, q, &budget, out, NULL, &explain) ||
                pkv_attend(&seq, &one, 1, (uint32_t)layer, q, &all, exact, NULL, NULL))
                return failed("attend", kv);
        }
        double difference = 0, norm = 0;
        for (int i = 0; i < Q_HEADS * DIM; i++) {
            difference += (out[i] - exact[i]) * (out[i] - exact[i]);
            norm += exact[i] * exact[i];
        }
        printf("step %d: %llu tokens, attended %.1f %% of them, error %.4f of the exact output\n", step,
               (unsigned long long)pkv_seq_tokens(seq), 100.0 * (double)explain.tokens_attended / (double)explain.tokens_seen,
               sqrt(difference / norm));
        fflush(stdout);
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct pkv *kv;
    struct pkv_model *model;
    struct pkv_seq *seq;
    if (pkv_connect(argc > 1 ? argv[1] : NULL, NULL, &kv))
        return failed("connect", NULL);
    struct pkv_model_desc desc;
    pkv_model_defaults(&desc); /* signatures that calibrate themselves, one bit per head dimension */
    desc.name = "example", desc.type = PKV_TYPE_F32;
    desc.layers = LAYERS, desc.q_heads = Q_HEADS, desc.kv_heads = KV_HEADS, desc.head_dim = DIM;
    /* An engine says here how positions turn its keys: desc.rope_base. These are not turned. */
    int code = pkv_model_open(kv, &desc, &model) || pkv_seq_create(model, PROMPT + STEPS, 0, "example", &seq)
                   ? failed("open", kv)
                   : decode(kv, seq);
    pkv_close(kv); /* closes the sequence and the model too */
    return code;
}
