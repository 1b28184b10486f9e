/* A whole call in one launch: a team of thread blocks takes a list from the query to the result.
 *
 *   weigh    every block for itself, the signatures of its part already on their way into shared memory; of shared maps each
 *            makes some outputs, which go to all by words
 *   bias     exact scores of the ends, the sinks and recent tokens, a share each block; estimates every block for itself
 *   scan     codes and their counts stay in shared memory
 *   choose   counts around the threshold of the step before go to all blocks, by words; a second round where it has moved far
 *   attend   each block takes what it has chosen; more than its share goes to others, by words. With a row cache, a gate
 *            between looking up and claiming
 *   merge    results by words; each block adds up its share of the outputs
 *
 * What does not fit (team_size) runs as the stages of table.c. */
#include "gpu/cuda/team_attend.cuh"
#include "gpu/cuda/team_select.cuh"

/* PLAIN: by softmax and `sign`, no row cache, nothing kept, k given. Code for the rest in between would cost such a call more
 * than a microsecond: it runs every instruction once, and each jump over some that are not run waits for others. MAPS: any call
 * by softmax whose weights are of shared maps. */
enum team_kind { TEAM_PLAIN, TEAM_ANY, TEAM_INTEGER, TEAM_MAPS };
#define TEAM_KINDS 4u

/* A thread block of sm_120 has 99 KiB of shared memory: no call fits, and no code is made for it. */
static_assert(sizeof(struct team_shared) + WARPS * tile_shape<__half, 64>::BYTES + sizeof(struct team_rows) > 99 * 1024, "");

#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200

template <typename T, uint32_t DIM, uint32_t SETS, enum team_kind KIND>
__global__ void __launch_bounds__(THREADS, 1) team_kernel(const __grid_constant__ struct team_call call)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const struct cuda_attend &a = call.a;
    struct team_shared *m = (struct team_shared *)shared;
    unsigned char *front = shared + call.at.front;
    struct team_rows *r = (struct team_rows *)(shared + call.at.rows);
    struct team t = team_of_block(call, KIND == TEAM_PLAIN);
    struct sign_query<DIM> sign;
    if constexpr (KIND == TEAM_MAPS)
        maps_ask<DIM>(call.maps, (struct weigh_shared<HEADS> *)front);
    else if (weighs_signs(call, t))
        sign_load<DIM>(call, t, sign);
    ((uint4 *)m->counts)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x < 8)
        m->counts[2048 + threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        m->outcomes[CUDA_HITS] = m->outcomes[CUDA_MISSES] = m->plan.found = 0;
        ((struct weigh_shared<HEADS> *)front)->write = t.part == 0 && keeps(call, t);
    }
    struct cuda_query where = a.query[t.query];
    wait_for_former();
    struct cuda_seq seq = a.seqs[where.seq];
    team_join(t);
    if (KIND != TEAM_MAPS && weighs_signs(call, t))
        sign_query_load<T, DIM>(a, t, sign);
    queries_take<T, DIM>(a, t, m);
    struct span span = span_in(a, seq.tokens, where.back);
    struct list_of l = {seq.blocks, where.seq, t.head, span.visible,
                        !t.plain && a.cache.entries && a.cache.sets && where.back == 0};
    t.blocks = seq.blocks;
    if (!span.dense)
        select_prepare<T, DIM, KIND != TEAM_MAPS>(call, t, m, span, l, sign);
    if constexpr (KIND == TEAM_MAPS)
        asm volatile("cp.async.wait_all;" ::: "memory"); /* maps_ask() */
    __syncthreads();
    constexpr enum weighing WHOSE = KIND == TEAM_PLAIN ? WEIGH_SIGNS : KIND == TEAM_MAPS ? WEIGH_MAPS : WEIGH_ANY;
    uint32_t k = 0, begin = 0;
    struct own_rows own = {0, 0};
    if (span.dense) {
        uint32_t per = (span.visible + t.size - 1) >> t.shift;
        begin = min(t.part * per, span.visible), own.count = min(per, span.visible - begin);
    } else {
        if constexpr (KIND == TEAM_MAPS)
            maps_share<T, DIM>(call.maps, t.group, t.words + call.maps.words, t.epoch, m,
                               (const struct weigh_shared<HEADS> *)front);
        if constexpr (KIND == TEAM_INTEGER)
            k = select_integers<T, DIM>(call, t, m, r, span, l, &own);
        else
            k = select_rows<T, DIM, SETS, WHOSE>(call, t, m, r, span, l, &own);
        if (l.cached) {
            rows_claim(a, t, l, r, own.count, m->outcomes);
            __syncthreads();
        }
    }
    uint32_t used =
        rows_attend<T, DIM, SETS>(a, t, m, r, front, shared + call.at.ends, own, begin, span.dense, l.cached && !span.dense);
    struct word *words = result_words(t, a.policy.k);
    merge_warps<T, DIM>(t, m, front, used, words);
    merge_blocks<DIM>(a, t, words);
    if (t.part == 0 && threadIdx.x == 0)
        a.work.chosen[t.list] = span.dense ? 0 : span.first + k + span.visible - span.last;
    team_leave(t);
}

#else
template <typename T, uint32_t DIM, uint32_t SETS, enum team_kind KIND>
__global__ void team_kernel(const __grid_constant__ struct team_call call)
{
    /* never launched: no words of 128 bits (cuda_team_preload), or no room (cuda_team_size) */
}
#endif

static uint32_t team_of(const struct cuda_attend *a, uint32_t processors, uint32_t shared)
{
    struct cuda_attend x = *a;
    uint32_t lists = PKV_MAX(a->queries * a->geom.kv_heads, 1u), size = 1;
    while (size < TEAM_MAX && 2 * size * lists <= processors)
        size *= 2;
    x.team = size;
    uint32_t rows = PKV_DIV_UP(a->policy.sinks + a->policy.recent, size) + PKV_DIV_UP(a->policy.k, size);
    bool fits = size > 1 && layout_of(&x).bytes <= shared && rows <= ROWS;
    return fits ? size : 0;
}

extern "C" uint32_t cuda_team_size(const struct cuda_attend *a, uint32_t processors, uint32_t shared)
{
    const struct pkv_geom &g = a->geom;
    bool able = g.dtype != PKV_F32 && (g.head_dim == 64 || g.head_dim == 128 || g.head_dim == 256) &&
                pkv_geom_group(&g) <= HEADS && g.sig_bits && g.sig_bits <= 128;
    return able ? team_of(a, processors, PKV_MIN(shared, SHARED_MAX)) : 0;
}

template <typename T, uint32_t DIM, enum team_kind KIND> static void (*kernel_of_group(uint32_t group))(const struct team_call)
{
    return group <= 4 ? team_kernel<T, DIM, 1, KIND> : team_kernel<T, DIM, 2, KIND>;
}

template <typename T, uint32_t DIM> static void (*kernel_of_kind(uint32_t group, enum team_kind kind))(const struct team_call)
{
    return kind == TEAM_PLAIN  ? kernel_of_group<T, DIM, TEAM_PLAIN>(group)
           : kind == TEAM_ANY  ? kernel_of_group<T, DIM, TEAM_ANY>(group)
           : kind == TEAM_MAPS ? kernel_of_group<T, DIM, TEAM_MAPS>(group)
                               : kernel_of_group<T, DIM, TEAM_INTEGER>(group);
}

template <typename T> static void (*kernel_of_dim(uint32_t dim, uint32_t group, enum team_kind kind))(const struct team_call)
{
    return dim == 64    ? kernel_of_kind<T, 64>(group, kind)
           : dim == 128 ? kernel_of_kind<T, 128>(group, kind)
                        : kernel_of_kind<T, 256>(group, kind);
}

static void (*kernel_of(uint32_t dtype, uint32_t dim, uint32_t group, enum team_kind kind))(const struct team_call)
{
    return dtype == PKV_F16 ? kernel_of_dim<__half>(dim, group, kind) : kernel_of_dim<__nv_bfloat16>(dim, group, kind);
}

extern "C" int cuda_team_preload(void)
{
    int device, major;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
        return -(int)PKV_ERR_SYSTEM;
    int most = 0;
    if (major < 9 || cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        return 0;
    most = PKV_MIN(most, (int)SHARED_MAX);
    for (uint32_t i = 0; i < 12 * TEAM_KINDS; i++)
        if (cudaFuncSetAttribute(kernel_of(i & 1 ? PKV_F16 : PKV_BF16, 64 << i / (4 * TEAM_KINDS), i & 2 ? 8 : 4,
                                           (enum team_kind)(i / 4 % TEAM_KINDS)),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, most) != cudaSuccess)
            return -(int)PKV_ERR_UNSUPPORTED;
    return 0;
}

/* The unit of `sign`, as in weigh.cuh; here by the CPU's IEEE operations. */
static float sign_unit(const struct cuda_attend *a)
{
    const struct pkv_geom *g = &a->geom;
    float partial = g->sig_bits < g->head_dim ? (float)g->head_dim / (float)g->sig_bits : 1.0f;
    return a->scheme.bases ? 2.0f * a->policy.scale * LOG2E * sqrtf(partial) / (float)a->scheme.bases : 0.0f;
}

/* Maps whose outputs are words. Units as in weigh.cuh. */
static struct team_maps maps_of(const struct cuda_attend *a)
{
    const struct cuda_scheme *s = &a->scheme;
    const struct pkv_geom *g = &a->geom;
    bool code = s->kind == PKV_SCHEME_CODE, own = !code && s->q_own;
    uint32_t outputs = code ? s->dims : g->sig_bits, group = pkv_geom_group(g);
    if (a->weighed || !(code || s->kind == PKV_SCHEME_LINEAR) || outputs > 2 * MAP_WORDS)
        return {};
    const struct cuda_map *map = code || own ? &s->q[0] : &s->k[0];
    uint64_t heads = (uint64_t)a->layer * g->kv_heads, first = heads * (own ? group : 1) * outputs;
    struct team_maps m = {};
    m.weight = map->weight + first * g->head_dim, m.bias = map->bias ? map->bias + first : NULL;
    m.step = code ? s->step + heads * outputs : NULL, m.bits = code ? s->bits + heads * outputs : NULL;
    m.outputs = outputs, m.each = own ? group : 1, m.signs = s->q_signs;
    m.unit = code ? s->unit * a->policy.scale * LOG2E : m.signs ? s->unit : s->unit * (2.0f * a->policy.scale * LOG2E);
    m.words = cuda_words(a) - (uint64_t)group * MAP_WORDS;
    return m;
}

/* Rows beside the ends that a block attends at most: what its warps take in a turn, if that leaves room for unevenness. */
static uint32_t rows_most(const struct cuda_attend *a)
{
    uint32_t ends = PKV_DIV_UP(a->policy.sinks + a->policy.recent, a->team), mean = PKV_DIV_UP(a->policy.k, a->team);
    uint32_t turn = (a->geom.head_dim > 128 ? WARPS / 2 : WARPS) * TILE_ROWS;
    return PKV_MIN(PKV_ALIGN_UP(mean + mean / 4 + ends, turn), ROWS) - ends;
}

static bool weighs_by_sign(const struct cuda_attend *a)
{
    return !a->weighed && a->scheme.kind == PKV_SCHEME_SIGN;
}

static enum team_kind kind_of(const struct cuda_attend *a)
{
    bool plain = weighs_by_sign(a) && !(a->flags & CUDA_KEEP) && !a->cache.entries && a->policy.top_p <= 0;
    return a->policy.rule != PKV_RULE_SOFTMAX ? TEAM_INTEGER : maps_of(a).outputs ? TEAM_MAPS : plain ? TEAM_PLAIN : TEAM_ANY;
}

extern "C" int cuda_team_launch(const struct cuda_attend *a, void *stream)
{
    const struct pkv_geom *g = &a->geom;
    uint32_t group = pkv_geom_group(g);
    uint64_t heads = (uint64_t)a->layer * g->kv_heads, lists = (uint64_t)a->queries * g->kv_heads;
    struct team_call call = {.list_words = (struct word *)a->work.words,
                             .gates = a->work.gates,
                             .hints = a->work.hints + a->layer * lists,
                             .signs = a->scheme.signs,
                             .deviation = a->scheme.deviation ? a->scheme.deviation + heads * g->sig_bits : NULL,
                             .at = layout_of(a),
                             .group = group,
                             .words = pkv_geom_words(g),
                             .rows_slot = (uint32_t)pkv_geom_block_bytes(g),
                             .signatures_slot = (uint32_t)pkv_geom_sig_block_bytes(g),
                             .rows_head = (uint32_t)(PKV_BLOCK_TOKENS * pkv_geom_row_bytes(g)),
                             .most = rows_most(a),
                             .each = (uint32_t)cuda_words(a),
                             .unit = sign_unit(a),
                             .bases = weighs_by_sign(a) ? a->scheme.bases : 0,
                             .a = *a,
                             .maps = maps_of(a)};
    return launch(kernel_of(g->dtype, g->head_dim, group, kind_of(a)), dim3(a->team, g->kv_heads, a->queries), THREADS,
                  call.at.bytes, call, stream, true, true);
}
