/* The transform of `code` from two moments: whiten by the queries' second moment, principal axes of the keys there, bits to the
 * dimension that gains most, uniform levels.
 *   C  the queries' second moment, shrunk (below); S  the keys' covariance, as it is
 *   H = C^(1/2);  V, w: eigenvectors and values of H S H, largest first
 *   key side A = V' H, query side B = V' H^-1: (A (k - mean)) . (B q) = q . (k - mean), and the keys' channels are uncorrelated
 * Shrinking C gives rare directions of the queries some bits, without which single facts are not found again; shrinking S would
 * only widen the steps of the fine dimensions. At half a bit a dimension or more C shrinks toward the identity. Fewer bits
 * retrieve only with far more shrinkage, which takes the common directions' bits if toward the identity, and few if toward
 * S^(-1/2). */
#include "gpu/scheme.h"

#ifdef PKV_LAPACK
#include <cblas.h>

#include <stdlib.h>
#include <string.h>

#define SHRINK     0.6  /* of the queries' moment, at half a bit a dimension and more */
#define SHRINK_FEW 0.95 /* at fewer bits */
#define FLOOR      1e-6 /* eigenvalues of C, relative to the largest */
#define FLOOR_KEYS 1e-4 /* of S where it is what C shrinks toward */

extern void dsyevd_(const char *jobz, const char *uplo, const int *n, double *a, const int *lda, double *w, double *work,
                    const int *lwork, int *iwork, const int *liwork, int *info);

/* Mean squared error of a unit Gaussian under the best uniform quantizer of 0..6 bits, and its step (Max 1960). */
static const double distortion[SCHEME_BITS_MAX + 1] = {1, .3634, .1188, .03744, .01154, .003495, .00104};
static const double steps[SCHEME_BITS_MAX + 1] = {1, 1.5956, .9957, .5860, .3352, .1881, .1041};

struct solve {
    uint32_t dim;
    double *c, *s, *h, *inverse, *v, *w, *work; /* [dim][dim]; w [dim] */
    int *iwork;
    int lwork, liwork;
};

static int solve_open(struct solve *x, uint32_t dim)
{
    uint64_t square = (uint64_t)dim * dim;
    x->dim = dim, x->lwork = (int)(1 + 6 * dim + 2 * square), x->liwork = (int)(3 + 5 * dim);
    x->c = malloc((5 * square + dim + (uint64_t)x->lwork) * sizeof(double));
    x->iwork = malloc((uint64_t)x->liwork * sizeof(int));
    if (!x->c || !x->iwork)
        return -PKV_ERR_NO_MEMORY;
    x->s = x->c + square, x->h = x->s + square, x->inverse = x->h + square, x->v = x->inverse + square;
    x->w = x->v + square, x->work = x->w + dim;
    return 0;
}

/* Eigenvectors of the symmetric `a` in place (one per row as we index it, ascending values in x->w). */
static int eigen(struct solve *x, double *a)
{
    int n = (int)x->dim, info = 0;
    dsyevd_("V", "L", &n, a, &n, x->w, x->work, &x->lwork, x->iwork, &x->liwork, &info);
    return info || !isfinite(x->w[0]) || !isfinite(x->w[n - 1]) ? -PKV_ERR_NOT_FINITE : 0;
}

/* to = a b, or a' b; row by row. A symmetric matrix, and what dsyevd_ makes of one, reads the same as its transpose's columns:
 * eigenvectors are the rows. */
static void product(uint32_t dim, bool turned, const double *a, const double *b, double *to)
{
    int n = (int)dim;
    cblas_dgemm(CblasRowMajor, turned ? CblasTrans : CblasNoTrans, CblasNoTrans, n, n, n, 1, a, n, b, n, 0, to, n);
}

/* to = sum over i of f[i] v_i v_i', v_i being row i of v. */
static void compose(struct solve *x, const double *v, const double *f, double *to)
{
    for (uint32_t i = 0; i < x->dim; i++)
        for (uint32_t c = 0; c < x->dim; c++)
            x->v[(uint64_t)i * x->dim + c] = f[i] * v[(uint64_t)i * x->dim + c];
    product(x->dim, true, v, x->v, to);
}

/* Lower triangles of sums into C and S. */
static void moments(const struct gpu_scheme *s, uint64_t at, uint32_t layer, struct solve *x)
{
    const struct scheme_moments *m = s->moments;
    uint32_t dim = x->dim, group = pkv_geom_group(&s->geom);
    double keys = m->k_tokens[layer], queries = (double)m->q_tokens[layer] * group;
    const float *k = m->k + at * dim * dim, *q = m->q + at * dim * dim;
    const double *sum = m->k_sum + at * dim;
    for (uint32_t c = 0; c < dim; c++)
        for (uint32_t r = c; r < dim; r++) {
            uint64_t low = (uint64_t)c * dim + r, high = (uint64_t)r * dim + c;
            x->c[low] = x->c[high] = q[low] / queries;
            x->s[low] = x->s[high] = k[low] / keys - sum[r] / keys * (sum[c] / keys);
        }
}

static double trace(const double *a, uint32_t dim)
{
    double sum = 0;
    for (uint32_t d = 0; d < dim; d++)
        sum += a[(uint64_t)d * dim + d];
    return sum;
}

/* What C shrinks toward, into x->h: the identity, or S^(-1/2). */
static int target(struct solve *x, bool few)
{
    uint32_t dim = x->dim;
    double f[PKV_HEAD_DIM_MAX];
    if (few) {
        memcpy(x->inverse, x->s, (uint64_t)dim * dim * sizeof(double));
        int r = eigen(x, x->inverse);
        if (r || x->w[dim - 1] <= 0)
            return -PKV_ERR_NOT_FINITE;
        for (uint32_t i = 0; i < dim; i++)
            f[i] = 1 / sqrt(x->w[i] > FLOOR_KEYS * x->w[dim - 1] ? x->w[i] : FLOOR_KEYS * x->w[dim - 1]);
        compose(x, x->inverse, f, x->h);
        return 0;
    }
    memset(x->h, 0, (uint64_t)dim * dim * sizeof(double));
    for (uint32_t d = 0; d < dim; d++)
        x->h[(uint64_t)d * dim + d] = 1;
    return 0;
}

static int shrink(struct solve *x, uint32_t bits)
{
    bool few = 2 * bits < x->dim;
    int r = target(x, few);
    double share = few ? SHRINK_FEW : SHRINK, scale = r ? 0 : share * trace(x->c, x->dim) / trace(x->h, x->dim);
    for (uint64_t i = 0; i < (uint64_t)x->dim * x->dim && !r; i++)
        x->c[i] = (1 - share) * x->c[i] + scale * x->h[i];
    return r;
}

/* H and its inverse from C. */
static int roots(struct solve *x)
{
    uint32_t dim = x->dim;
    double up[PKV_HEAD_DIM_MAX], down[PKV_HEAD_DIM_MAX];
    int r = eigen(x, x->c);
    if (r || x->w[dim - 1] <= 0)
        return -PKV_ERR_NOT_FINITE;
    for (uint32_t i = 0; i < dim; i++) {
        double root = sqrt(x->w[i] > FLOOR * x->w[dim - 1] ? x->w[i] : FLOOR * x->w[dim - 1]);
        up[i] = root, down[i] = 1 / root;
    }
    compose(x, x->c, up, x->h);
    compose(x, x->c, down, x->inverse);
    return 0;
}

/* Greedily to the dimension whose distortion falls most; w descending, so used dimensions come first. */
static void give_bits(const double *w, uint32_t dim, uint32_t total, uint8_t *bits)
{
    memset(bits, 0, dim);
    for (uint32_t given = 0; given < total; given++) {
        uint32_t best = dim;
        double most = -1;
        for (uint32_t i = 0; i < dim; i++) {
            double gain = bits[i] < SCHEME_BITS_MAX ? w[i] * (distortion[bits[i]] - distortion[bits[i] + 1]) : -1;
            if (gain > most)
                most = gain, best = i;
        }
        bits[best]++; /* sig_bits are at most 6 a dimension: some dimension has room */
    }
}

static void write_head(struct gpu_scheme *s, uint64_t at, uint32_t layer, struct solve *x)
{
    uint32_t dim = x->dim;
    double w[PKV_HEAD_DIM_MAX];
    product(dim, false, x->v, x->h, x->c);
    product(dim, false, x->v, x->inverse, x->s);
    for (uint32_t i = 0; i < dim; i++) {
        uint64_t from = (uint64_t)(dim - 1 - i) * dim, to = (at * dim + i) * dim; /* largest first */
        w[i] = x->w[dim - 1 - i] > 0 ? x->w[dim - 1 - i] : 0;
        for (uint32_t c = 0; c < dim; c++)
            s->k[0].weight[to + c] = (float)x->c[from + c], s->q[0].weight[to + c] = (float)x->s[from + c];
        s->mean[at * dim + i] = (float)(s->moments->k_sum[at * dim + i] / s->moments->k_tokens[layer]);
    }
    uint8_t *bits = s->bits + at * dim;
    give_bits(w, dim, s->geom.sig_bits, bits);
    for (uint32_t i = 0; i < dim; i++) {
        double step = steps[bits[i]] * sqrt(w[i]);
        s->step[at * dim + i] = step > 0 ? (float)step : 1.0f;
        s->low[at * dim + i] = bits[i] ? -s->step[at * dim + i] * (float)(1u << (bits[i] - 1)) : 0;
    }
}

int scheme_solve_layer(struct gpu_scheme *s, uint32_t layer)
{
    struct solve x = {0};
    int r = solve_open(&x, s->geom.head_dim);
    for (uint32_t h = 0; h < s->geom.kv_heads && !r; h++) {
        uint64_t at = (uint64_t)layer * s->geom.kv_heads + h;
        moments(s, at, layer, &x);
        r = shrink(&x, s->geom.sig_bits);
        r = r ? r : roots(&x);
        if (r)
            break;
        product(x.dim, false, x.h, x.s, x.c);
        product(x.dim, false, x.c, x.h, x.v);
        r = eigen(&x, x.v);
        if (!r)
            write_head(s, at, layer, &x);
    }
    free(x.c), free(x.iwork);
    return r;
}

#endif
