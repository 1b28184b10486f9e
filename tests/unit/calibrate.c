/* What the library learns from a recording, as a file: client/python/tests/test_calibrate.py compares it with
 * pivotkv.calibrate.
 *
 * calibrate RECORDING SCHEME BITS CONTEXT PIECE BASE INTERLEAVED
 * RECORDING has q.<layer> and k.<layer> for layers 0, 1, ..; tokens are shown PIECE at a time. Prints the name of the file that
 * it wrote: k.mean, k.deviation and, for scheme 1 (`code`), k.weight, q.weight, k.low, k.step, k.bits. */
#include "gpu/safetensors.h"
#include "gpu/scheme.h"
#include "tests/lib/tensors.h"

#include <stdio.h>
#include <stdlib.h>

static struct pkv_geom geom_of(const struct safetensors *st, uint32_t bits)
{
    char name[16];
    uint32_t layers = 0;
    do
        snprintf(name, sizeof(name), "k.%u", layers);
    while (safetensors_has(st, name) && ++layers);
    return (struct pkv_geom){.layers = (uint16_t)layers,
                             .q_heads = (uint16_t)safetensors_size(st, "q.0", 1),
                             .kv_heads = (uint16_t)safetensors_size(st, "k.0", 1),
                             .head_dim = (uint16_t)safetensors_size(st, "k.0", 2),
                             .dtype = PKV_F32,
                             .sig_bits = (uint16_t)bits};
}

static float *side_of(const struct safetensors *st, const char *side, uint32_t layer, uint64_t tokens, uint64_t heads,
                      uint64_t dim)
{
    char name[16];
    float *values = NULL;
    snprintf(name, sizeof(name), "%s.%u", side, layer);
    return safetensors_floats(st, name, (uint64_t[]){tokens, heads, dim}, 3, &values) ? NULL : values;
}

static int learn(struct gpu_scheme *s, const struct safetensors *st, uint32_t piece, uint32_t context)
{
    const struct pkv_geom *g = &s->geom;
    uint64_t tokens = safetensors_size(st, "k.0", 0);
    for (uint32_t l = 0; l < g->layers; l++) {
        float *k = side_of(st, "k", l, tokens, g->kv_heads, g->head_dim),
              *q = side_of(st, "q", l, tokens, g->q_heads, g->head_dim);
        for (uint64_t at = 0; k && q && at < tokens; at += piece) {
            struct gpu_observation o = {.layer = l,
                                        .tokens = (uint32_t)PKV_MIN(piece, tokens - at),
                                        .first_token = at,
                                        .context = context,
                                        .k = k + at * g->kv_heads * g->head_dim,
                                        .q = q + at * g->q_heads * g->head_dim};
            gpu_scheme_observe(s, &o);
        }
        free(k), free(q);
        if (!k || !q)
            return 1;
    }
    if (s->kind == PKV_SCHEME_CODE && gpu_scheme_solve(s, true, NULL))
        return 1;
    return gpu_scheme_settled(s) ? 0 : 1;
}

static void put(struct gpu_scheme *s)
{
    const struct pkv_geom *g = &s->geom;
    uint64_t l = g->layers, h = g->kv_heads, d = g->head_dim;
    float *bits = calloc(l * h * d, sizeof(*bits));
    for (uint64_t i = 0; s->bits && i < l * h * d; i++)
        bits[i] = s->bits[i];
    struct test_tensor tensors[] = {{"k.mean", 3, {l, h, d}, s->mean},
                                    {"k.deviation", 3, {l, h, g->sig_bits}, s->deviation},
                                    {"k.weight", 4, {l, h, d, d}, s->k[0].weight},
                                    {"q.weight", 4, {l, h, d, d}, s->q[0].weight},
                                    {"k.low", 3, {l, h, d}, s->low},
                                    {"k.step", 3, {l, h, d}, s->step},
                                    {"k.bits", 3, {l, h, d}, bits}};
    char *path = test_tensors(NULL, tensors, s->kind == PKV_SCHEME_CODE ? 7 : 2);
    puts(path);
    free(path), free(bits);
}

int main(int argc, char **argv)
{
    struct safetensors st;
    struct gpu_scheme *s = NULL;
    uint8_t digest[PKV_DIGEST_BYTES];
    if (argc != 8 || safetensors_open(argv[1], &st, digest))
        return 2;
    uint32_t numbers[5];
    for (int i = 0; i < 5; i++)
        numbers[i] = (uint32_t)strtoul(argv[i < 4 ? i + 2 : 7], NULL, 10);
    struct pkv_geom geom = geom_of(&st, numbers[1]);
    int r = gpu_scheme_open(numbers[0], &geom, NULL, &s, digest);
    if (r)
        return r == -PKV_ERR_LAPACK ? 77 : 2;
    r = numbers[0] == PKV_SCHEME_CODE ? gpu_scheme_gather(s, strtof(argv[6], NULL), geom.head_dim, numbers[4]) : 0;
    r = r ? r : learn(s, &st, numbers[3], numbers[2]);
    if (!r)
        put(s);
    gpu_scheme_close(s);
    safetensors_close(&st);
    return r;
}
