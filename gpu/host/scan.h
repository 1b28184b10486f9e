/* Scans written for one instruction set; which one is compiled in, the including file's flags decide. Private to host/.
 *
 * AVX-512: 256 tokens at a time. A 16-bit lane holds 16 bits of one token's signature; their weights' sum is three look-ups in
 * tables of 5, 5 and 6 bits that lie in registers (vpermw, vpermi2w). Integer sums are exact, and the float part is the same
 * IEEE operations as code.h, so the codes equal plain C's. AVX2: bits become bytes, vpmaddubsw multiplies and adds pairs. */
#ifndef GPU_HOST_SCAN_H
#define GPU_HOST_SCAN_H

#include "gpu/code.h"
#include "gpu/kernel.h"

#include <stdbool.h>

#if defined(__AVX512BW__) && defined(__AVX512DQ__)
#define GPU_SCAN_WORDS
#include <immintrin.h>

#define TILE       256u         /* tokens: four blocks */
#define VECTORS    (TILE / 32u) /* of 32 tokens, 16 bits each */
#define HALVES_MAX (PKV_SIG_WORDS_MAX * 2)

struct scan_tile {
    __m512i bits[HALVES_MAX][3][VECTORS]; /* a half-word of each token, shifted by 0, 5 and 10 */
    __m512i sums[PKV_GROUP_MAX][VECTORS]; /* even lanes: tokens 0..15 of 32, odd lanes: 16..31 */
    uint16_t codes[TILE];
};

/* Tables of one half-word: 32 + 32 + 64 entries. */
static void scan_table(const int8_t *w, uint32_t bits, int16_t *table)
{
    table[0] = 0;
    for (uint32_t v = 1; v < 1u << bits; v++)
        table[v] = (int16_t)(table[v & (v - 1)] + w[__builtin_ctz(v)]);
}

static void scan_tables(const struct gpu_scan *a)
{
    for (uint32_t i = 0; i < a->group * a->words * 2; i++) {
        const int8_t *w = a->weights + (uint64_t)i * 16;
        int16_t *table = a->tables + (uint64_t)i * 128;
        scan_table(w, 5, table);
        scan_table(w + 5, 5, table + 32);
        scan_table(w + 10, 6, table + 64);
    }
}

/* Word `words apart` of 16 tokens: four groups of four. */
static inline __m512i scan_gather(const uint32_t *group, uint32_t words)
{
    __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)group));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, _mm_loadu_si128((const __m128i *)(const void *)(group + 4ull * words)));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, _mm_loadu_si128((const __m128i *)(const void *)(group + 8ull * words)));
    return _mm512_mask_broadcast_i32x4(v, 0xf000, _mm_loadu_si128((const __m128i *)(const void *)(group + 12ull * words)));
}

static inline void scan_store(struct scan_tile *t, uint32_t half, uint32_t vector, __m512i bits)
{
    t->bits[half][0][vector] = bits;
    t->bits[half][1][vector] = _mm512_srli_epi16(bits, 5);
    t->bits[half][2][vector] = _mm512_srli_epi16(bits, 10);
}

/* Blocks lie apart, so the processor does not see the next ones coming; a line now and then, for all at once would stop it. */
struct scan_ahead {
    uint32_t block, end, line; /* the next line to fetch, until `end` */
};

static inline void scan_fetch(const struct gpu_scan *a, struct scan_ahead *ahead, uint32_t lines)
{
    uint32_t each = a->words * PKV_BLOCK_TOKENS * 4 / PKV_CACHE_LINE;
    for (uint32_t i = 0; i < lines && ahead->block < ahead->end; i++) {
        __builtin_prefetch((const char *)a->signatures[ahead->block] + ahead->line * PKV_CACHE_LINE);
        if (++ahead->line == each)
            ahead->line = 0, ahead->block++;
    }
}

static void scan_load(const struct gpu_scan *a, uint32_t block, uint32_t blocks, struct scan_tile *t)
{
    for (uint32_t v = 0; v < VECTORS; v++) {
        /* Past the end the last block stands in; its codes are thrown away. */
        const uint32_t *s = a->signatures[PKV_MIN(block + v / 2, blocks - 1)] + (uint64_t)(v % 2) * 32 * a->words;
        for (uint32_t w = 0; w < a->words; w++) {
            __m512i low = scan_gather(s + w * 4, a->words), high = scan_gather(s + 16ull * a->words + w * 4, a->words);
            scan_store(t, 2 * w, v, _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16)));
            scan_store(t, 2 * w + 1, v, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high));
        }
    }
}

static void scan_sum(const struct gpu_scan *a, struct scan_tile *t, uint32_t ahead_block, uint32_t blocks)
{
    uint32_t halves = a->words * 2, steps = a->group * halves, lines = a->words * TILE * 4 / PKV_CACHE_LINE;
    struct scan_ahead ahead = {PKV_MIN(ahead_block, blocks), PKV_MIN(ahead_block + TILE / PKV_BLOCK_TOKENS, blocks), 0};
    for (uint32_t h = 0; h < a->group; h++) {
        __m512i sums[VECTORS];
#pragma GCC unroll 8
        for (uint32_t v = 0; v < VECTORS; v++)
            sums[v] = _mm512_setzero_si512();
        for (uint32_t i = 0; i < halves; i++) {
            const __m512i *table = (const __m512i *)(const void *)(a->tables + ((uint64_t)h * halves + i) * 128);
            __m512i t0 = table[0], t1 = table[1], t2 = table[2], t3 = table[3];
            scan_fetch(a, &ahead, PKV_DIV_UP(lines, steps));
#pragma GCC unroll 8
            for (uint32_t v = 0; v < VECTORS; v++) {
                __m512i x = _mm512_permutexvar_epi16(t->bits[i][0][v], t0);
                __m512i y = _mm512_permutexvar_epi16(t->bits[i][1][v], t1);
                __m512i z = _mm512_permutex2var_epi16(t2, t->bits[i][2][v], t3);
                sums[v] = _mm512_add_epi16(sums[v], _mm512_add_epi16(_mm512_add_epi16(x, y), z));
            }
        }
#pragma GCC unroll 8
        for (uint32_t v = 0; v < VECTORS; v++)
            t->sums[h][v] = sums[v];
    }
}

/* gpu_exp2 of scale x score + bias. */
static inline __m512 scan_exp2(__m512i score, float scale, float bias)
{
    __m512 s = _mm512_fmadd_ps(_mm512_cvtepi32_ps(score), _mm512_set1_ps(scale), _mm512_set1_ps(bias));
    s = _mm512_min_ps(_mm512_max_ps(s, _mm512_set1_ps(-60.0f)), _mm512_set1_ps(60.0f));
    __m512 f = _mm512_reduce_ps(s, 0x09); /* s - floor(s) */
    __m512 m = _mm512_fmadd_ps(f, _mm512_fmadd_ps(f, _mm512_set1_ps(0.3435f), _mm512_set1_ps(0.6565f)), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(m, s);
}

static inline __m512i scan_code(__m512 sum)
{
    __m512i code = _mm512_sub_epi32(_mm512_srai_epi32(_mm512_castps_si512(sum), 18), _mm512_set1_epi32(GPU_CODE_BASE));
    return _mm512_min_epi32(_mm512_max_epi32(code, _mm512_set1_epi32(1)), _mm512_set1_epi32(GPU_CODE_SOFTMAX_MAX));
}

static inline __m512i scan_even(__m512i v)
{
    return _mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16);
}

static void scan_codes_softmax(const struct gpu_scan *a, struct scan_tile *t)
{
    for (uint32_t v = 0; v < VECTORS; v++) {
        __m512 first = _mm512_setzero_ps(), second = first;
        for (uint32_t h = 0; h < a->group; h++) {
            __m512i s = t->sums[h][v];
            first = _mm512_add_ps(first, scan_exp2(scan_even(s), a->scales[h], a->biases[h]));
            second = _mm512_add_ps(second, scan_exp2(_mm512_srai_epi32(s, 16), a->scales[h], a->biases[h]));
        }
        _mm256_storeu_si256((__m256i *)(void *)(t->codes + v * 32), _mm512_cvtepi32_epi16(scan_code(first)));
        _mm256_storeu_si256((__m256i *)(void *)(t->codes + v * 32 + 16), _mm512_cvtepi32_epi16(scan_code(second)));
    }
}

static inline void scan_code_integer(const struct gpu_scan *a, __m512i score, uint16_t *to)
{
    __m512i code = _mm512_srl_epi32(_mm512_sub_epi32(score, _mm512_set1_epi32(a->low)), _mm_cvtsi32_si128((int)a->shift));
    _mm256_storeu_si256((__m256i *)(void *)to, _mm512_cvtepi32_epi16(_mm512_add_epi32(code, _mm512_set1_epi32(1))));
}

static void scan_codes_integer(const struct gpu_scan *a, struct scan_tile *t)
{
    bool sum = a->rule == PKV_RULE_SUM;
    for (uint32_t v = 0; v < VECTORS; v++) {
        __m512i first = scan_even(t->sums[0][v]), second = _mm512_srai_epi32(t->sums[0][v], 16);
        for (uint32_t h = 1; h < a->group; h++) {
            __m512i x = scan_even(t->sums[h][v]), y = _mm512_srai_epi32(t->sums[h][v], 16);
            first = sum ? _mm512_add_epi32(first, x) : _mm512_max_epi32(first, x);
            second = sum ? _mm512_add_epi32(second, y) : _mm512_max_epi32(second, y);
        }
        scan_code_integer(a, first, t->codes + v * 32);
        scan_code_integer(a, second, t->codes + v * 32 + 16);
    }
}

/* Counts codes of at least `floor`. */
static void scan_count(const uint16_t *codes, uint32_t count, uint32_t floor, uint32_t *histogram)
{
    uint32_t i = 0;
    __m512i least = _mm512_set1_epi16((short)(uint16_t)floor);
    for (; i + 32 <= count; i += 32) {
        __mmask32 m = _mm512_cmpge_epu16_mask(_mm512_loadu_si512(codes + i), least);
        for (; m; m &= m - 1)
            histogram[codes[i + (uint32_t)__builtin_ctz(m)]]++;
    }
    for (; i < count; i++)
        histogram[codes[i]] += codes[i] >= floor;
}

/* The k-th best code so far: what is below it cannot be among the k best any more. */
static uint32_t scan_floor(const struct gpu_scan *a)
{
    uint32_t code = a->rule == PKV_RULE_SOFTMAX ? GPU_CODE_SOFTMAX_MAX + 1 : GPU_CODES, seen = 0;
    while (code > 1 && seen < a->k)
        seen += a->histogram[--code];
    return code;
}

static void scan_words(const struct gpu_scan *a)
{
    struct scan_tile t;
    uint32_t blocks = pkv_tokens_blocks(a->last), floor = 1, next = 4096;
    if (a->first >= a->last)
        return;
    scan_tables(a);
    for (uint32_t at = a->first / TILE * TILE; at < a->last; at += TILE) {
        scan_load(a, at / PKV_BLOCK_TOKENS, blocks, &t);
        scan_sum(a, &t, at / PKV_BLOCK_TOKENS + 2 * TILE / PKV_BLOCK_TOKENS, blocks);
        if (a->rule == PKV_RULE_SOFTMAX)
            scan_codes_softmax(a, &t);
        else
            scan_codes_integer(a, &t);
        uint32_t from = PKV_MAX(at, a->first), to = PKV_MIN(at + TILE, a->last);
        memcpy(a->codes + from, t.codes + (from - at), (to - from) * sizeof(*t.codes));
        scan_count(t.codes + (from - at), to - from, floor, a->histogram);
        if (a->k && to - a->first >= next) {
            floor = scan_floor(a);
            next *= 2;
        }
    }
}

#undef TILE
#undef VECTORS
#undef HALVES_MAX
#endif

#endif
