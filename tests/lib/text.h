/* Keys, values and queries for tests: seeded numbers, and exact attention in double precision to compare with. */
#ifndef TESTS_LIB_TEXT_H
#define TESTS_LIB_TEXT_H

#include <stdint.h>

/* `count` floats, roughly Gaussian, from a seed. The caller frees. */
float *test_floats(uint64_t seed, uint64_t count);

/* Exact attention of the last query of `tokens` tokens: k, v [tokens][kv_heads][dim], q [q_heads][dim], out [q_heads][dim]. */
void test_attention(const float *k, const float *v, const float *q, uint32_t tokens, uint32_t q_heads, uint32_t kv_heads,
                    uint32_t dim, double *ret_out);

#endif
