/* Schemes whose weights come from a safetensors file (docs/signatures.md has the tensors):
 *   sign    the mean and the channels' magnitudes that it would learn else (scheme_sign.c)
 *   linear  bits = signs of one learned projection per kv head; weights = the projected query, or its signs
 *   hash    bits = signs of an MLP per q head, a group's slices side by side; weights = +-1 on the head's own slice
 *           (HashAttention, arXiv 2412.14468)
 *   code    bits = uniform levels of a transformed key, as bit planes; weights = transformed query x step x place value */
#include "gpu/scheme.h"

#include "gpu/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- loading ---- */

/* "<prefix>weight" [layers, heads, out, in] and, if it is there, "<prefix>bias" [layers, heads, out]. */
static int load_map(const struct safetensors *st, const char *prefix, uint64_t layers, uint64_t heads, uint32_t out,
                    uint32_t in, struct scheme_map *map)
{
    char name[48];
    uint64_t shape[] = {layers, heads, out, in};
    map->out = out, map->in = in;
    snprintf(name, sizeof(name), "%sweight", prefix);
    int r = safetensors_floats(st, name, shape, 4, &map->weight);
    snprintf(name, sizeof(name), "%sbias", prefix);
    if (!r && safetensors_has(st, name))
        r = safetensors_floats(st, name, shape, 3, &map->bias);
    return r;
}

/* "<side>.0.weight", "<side>.1.weight", ...: an MLP per q head. */
static int load_mlp(const struct gpu_scheme *s, const struct safetensors *st, const char *side, struct scheme_map *maps,
                    uint32_t *ret_stages)
{
    const struct pkv_geom *g = &s->geom;
    uint32_t in = g->head_dim, stages = 0, bits = g->sig_bits / pkv_geom_group(g);
    char prefix[24], name[40];
    int r = 0;
    for (;; stages++) {
        snprintf(prefix, sizeof(prefix), "%s.%u.", side, stages);
        snprintf(name, sizeof(name), "%sweight", prefix);
        if (r || !safetensors_has(st, name))
            break;
        uint64_t out = safetensors_size(st, name, 2);
        if (stages == SCHEME_STAGES_MAX || !out || out > SCHEME_WIDTH_MAX || in % GPU_LANES)
            return -PKV_ERR_FILE_FIT;
        r = load_map(st, prefix, g->layers, g->q_heads, (uint32_t)out, in, &maps[stages]);
        in = (uint32_t)out;
    }
    *ret_stages = stages;
    return r ? r : !stages || in != bits ? -PKV_ERR_FILE_FIT : 0;
}

static int load_mean(struct gpu_scheme *s, const struct safetensors *st)
{
    uint64_t shape[] = {s->geom.layers, s->geom.kv_heads, s->geom.head_dim};
    return safetensors_has(st, "k.mean") ? safetensors_floats(st, "k.mean", shape, 3, &s->mean) : 0;
}

static int load_linear(struct gpu_scheme *s, const struct safetensors *st)
{
    const struct pkv_geom *g = &s->geom;
    const char *query = safetensors_meta(st, "query");
    s->k_stages = 1;
    s->q_signs = query && !strcmp(query, "sign");
    if (query && !s->q_signs && strcmp(query, "value"))
        return -PKV_ERR_FILE_FIT;
    int r = load_map(st, "k.", g->layers, g->kv_heads, g->sig_bits, g->head_dim, &s->k[0]);
    if (!r && safetensors_has(st, "q.weight")) {
        s->q_stages = 1;
        r = load_map(st, "q.", g->layers, g->q_heads, g->sig_bits, g->head_dim, &s->q[0]);
    }
    return r ? r : load_mean(s, st);
}

static int load_hash(struct gpu_scheme *s, const struct safetensors *st)
{
    s->q_signs = true;
    int r = load_mlp(s, st, "k", s->k, &s->k_stages);
    return r ? r : load_mlp(s, st, "q", s->q, &s->q_stages);
}

/* 0 to SCHEME_BITS_MAX bits a dimension, sig_bits in all, the same for every head of a layer or not. */
static int load_bits(struct gpu_scheme *s, const struct safetensors *st, const uint64_t shape[3])
{
    float *bits = NULL;
    int r = safetensors_floats(st, "k.bits", shape, 3, &bits);
    uint64_t heads = shape[0] * shape[1];
    s->bits = r ? NULL : malloc(heads * s->dims);
    if (!r && !s->bits)
        r = -PKV_ERR_NO_MEMORY;
    for (uint64_t h = 0; h < heads && !r; h++) {
        uint32_t total = 0;
        for (uint32_t i = 0; i < s->dims && !r; i++) {
            float b = bits[h * s->dims + i];
            if (b < 0 || b > SCHEME_BITS_MAX || b != floorf(b))
                r = -PKV_ERR_FILE_FIT;
            else
                total += s->bits[h * s->dims + i] = (uint8_t)b;
        }
        r = r ? r : total != s->geom.sig_bits ? -PKV_ERR_FILE_FIT : 0;
    }
    free(bits);
    return r;
}

static int load_code(struct gpu_scheme *s, const struct safetensors *st)
{
    const struct pkv_geom *g = &s->geom;
    uint64_t dims = safetensors_size(st, "k.weight", 2), shape[] = {g->layers, g->kv_heads, dims};
    if (!dims || dims > g->head_dim)
        return -PKV_ERR_FILE_FIT;
    s->dims = (uint32_t)dims, s->k_stages = s->q_stages = 1;
    int r = load_map(st, "k.", g->layers, g->kv_heads, s->dims, g->head_dim, &s->k[0]);
    r = r ? r : load_map(st, "q.", g->layers, g->kv_heads, s->dims, g->head_dim, &s->q[0]);
    r = r ? r : safetensors_floats(st, "k.low", shape, 3, &s->low);
    r = r ? r : safetensors_floats(st, "k.step", shape, 3, &s->step);
    r = r ? r : load_bits(s, st, shape);
    for (uint64_t i = 0; !r && i < shape[0] * shape[1] * dims; i++)
        r = s->step[i] > 0 ? 0 : -PKV_ERR_FILE_FIT;
    return r ? r : load_mean(s, st);
}

/* Without a state: there is nothing left to learn. */
static int load_sign(struct gpu_scheme *s, const struct safetensors *st)
{
    const struct pkv_geom *g = &s->geom;
    uint64_t shape[] = {g->layers, g->kv_heads, g->sig_bits};
    int r = scheme_sign_open(s);
    free(s->mean), free(s->deviation), free(s->learnt);
    s->mean = s->deviation = NULL, s->learnt = NULL;
    r = r ? r : safetensors_floats(st, "k.deviation", shape, 3, &s->deviation);
    r = r ? r : safetensors_has(st, "k.mean") ? load_mean(s, st) : -PKV_ERR_FILE_FIT;
    for (uint64_t i = 0; !r && i < shape[0] * shape[1] * shape[2]; i++)
        r = s->deviation[i] >= 0 ? 0 : -PKV_ERR_FILE_FIT;
    return r;
}

/* "unit" in the metadata: log2-score of one unit of weight, relative to what the scheme assumes. */
static int load_unit(struct gpu_scheme *s, const struct safetensors *st)
{
    const char *text = safetensors_meta(st, "unit");
    char *end = NULL;
    if (!text)
        return 0;
    s->unit = strtof(text, &end);
    return *end || !isfinite(s->unit) || s->unit <= 0 ? -PKV_ERR_FILE_FIT : 0;
}

/* What a file says of itself in its metadata, where it does, is what the model says: a file for another model of the same
 * shapes is refused too. */
static int check_meta(const struct gpu_scheme *s, const struct safetensors *st)
{
    static const char *const schemes[] = {"sign", "code", "linear", "hash"}; /* by enum pkv_scheme */
    const struct pkv_geom *g = &s->geom;
    const struct {
        const char *key;
        uint32_t want;
        int error;
    } numbers[] = {{"layers", g->layers, PKV_ERR_FILE_GEOMETRY},
                   {"q_heads", g->q_heads, PKV_ERR_FILE_GEOMETRY},
                   {"kv_heads", g->kv_heads, PKV_ERR_FILE_GEOMETRY},
                   {"head_dim", g->head_dim, PKV_ERR_FILE_GEOMETRY},
                   {"bits", g->sig_bits, PKV_ERR_FILE_BITS}};
    const char *scheme = safetensors_meta(st, "scheme");
    if (scheme && strcmp(scheme, schemes[s->kind]))
        return -PKV_ERR_FILE_SCHEME;
    for (uint32_t i = 0; i < PKV_ARRAY_LEN(numbers); i++) {
        const char *text = safetensors_meta(st, numbers[i].key);
        char *end = NULL;
        if (text && (strtoul(text, &end, 10) != numbers[i].want || *end))
            return -numbers[i].error;
    }
    return 0;
}

int scheme_file_open(struct gpu_scheme *s, const char *path, uint8_t ret_digest[PKV_DIGEST_BYTES])
{
    static const struct {
        const struct scheme_verbs *verbs;
        int (*load)(struct gpu_scheme *s, const struct safetensors *st);
    } kinds[] = {[PKV_SCHEME_SIGN] = {&scheme_sign_verbs, load_sign},
                 [PKV_SCHEME_CODE] = {&scheme_code_verbs, load_code},
                 [PKV_SCHEME_LINEAR] = {&scheme_linear_verbs, load_linear},
                 [PKV_SCHEME_HASH] = {&scheme_hash_verbs, load_hash}};
    struct safetensors st;
    int r = safetensors_open(path, &st, ret_digest);
    if (r)
        return r;
    s->verbs = kinds[s->kind].verbs;
    r = check_meta(s, &st);
    r = r ? r : kinds[s->kind].load(s, &st);
    r = r ? r : load_unit(s, &st);
    safetensors_close(&st);
    return r;
}
