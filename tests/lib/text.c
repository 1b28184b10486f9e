/* The oracle is written to be read: loops over everything, in double precision. */
#include "tests/lib/text.h"

#include "tests/lib/test.h"

#include <math.h>
#include <stdlib.h>

float *test_floats(uint64_t seed, uint64_t count)
{
    float *to = malloc((count ? count : 1) * sizeof(*to));
    assert_non_null(to);
    for (uint64_t i = 0; i < count; i++) {
        float sum = 0;
        for (int n = 0; n < 4; n++) { /* a sum of uniforms is near enough to a Gaussian */
            seed = seed * 6364136223846793005ull + 1442695040888963407ull;
            sum += (float)(seed >> 40) * 0x1p-24f - 0.5f;
        }
        to[i] = sum * 1.7f;
    }
    return to;
}

void test_attention(const float *k, const float *v, const float *q, uint32_t tokens, uint32_t q_heads, uint32_t kv_heads,
                    uint32_t dim, double *out)
{
    double *score = malloc(tokens * sizeof(*score));
    assert_non_null(score);
    for (uint32_t h = 0; h < q_heads; h++) {
        uint32_t kv = h / (q_heads / kv_heads);
        double most = -1e300, sum = 0;
        for (uint32_t t = 0; t < tokens; t++) {
            score[t] = 0;
            for (uint32_t d = 0; d < dim; d++)
                score[t] += (double)q[h * dim + d] * k[((uint64_t)t * kv_heads + kv) * dim + d];
            score[t] /= sqrt(dim);
            most = score[t] > most ? score[t] : most;
        }
        for (uint32_t d = 0; d < dim; d++)
            out[h * dim + d] = 0;
        for (uint32_t t = 0; t < tokens; t++) {
            double weight = exp(score[t] - most);
            sum += weight;
            for (uint32_t d = 0; d < dim; d++)
                out[h * dim + d] += weight * v[((uint64_t)t * kv_heads + kv) * dim + d];
        }
        for (uint32_t d = 0; d < dim; d++)
            out[h * dim + d] /= sum;
    }
    free(score);
}
