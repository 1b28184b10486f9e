/* Exact attention over sixteen rows at a time on the tensor cores, for half-precision rows: a warp copies a tile of rows into
 * its shared memory, scores them for eight columns and adds up their values.
 *
 * Scores: A is the keys (rows x dimensions), B the queries. Values: A is V turned by the load (dimensions x rows), B the
 * probabilities. A probability is the sum of two half-precision numbers, high and low, so nothing is lost of it: a group of up
 * to four heads has the high parts in columns 0..3 and the low ones in 4..7, a larger one takes two products. */
#ifndef GPU_CUDA_TILE_CUH
#define GPU_CUDA_TILE_CUH

#include "gpu/cuda/device.cuh"

#define TILE_ROWS    16u
#define TILE_COLUMNS 8u /* q heads that a tile serves at most */

template <typename T, uint32_t DIM> struct tile_shape {
    static constexpr uint32_t ROW = 2 * DIM * sizeof(T), PITCH = ROW + 16, BYTES = TILE_ROWS * PITCH, HALF = DIM * sizeof(T);
    static constexpr uint32_t QUERY = DIM * sizeof(T) + 16; /* bytes between queries, so that lanes meet different banks */
};

template <typename T> struct two;
template <> struct two<__half> {
    static __device__ __forceinline__ uint32_t pack(float x, float y)
    {
        __half2 h = __floats2half2_rn(x, y);
        return *(uint32_t *)&h;
    }
    static __device__ __forceinline__ float2 unpack(uint32_t p)
    {
        return __half22float2(*(__half2 *)&p);
    }
};
template <> struct two<__nv_bfloat16> {
    static __device__ __forceinline__ uint32_t pack(float x, float y)
    {
        __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
        return *(uint32_t *)&h;
    }
    static __device__ __forceinline__ float2 unpack(uint32_t p)
    {
        return __bfloat1622float2(*(__nv_bfloat162 *)&p);
    }
};

/* d += A [16 x 16] B [16 x 8]. */
template <typename T>
static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ __forceinline__ void multiply<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ void load_matrix(uint32_t (&a)[4], uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(at)
                 : "memory");
}
static __device__ __forceinline__ void load_matrix_turned(uint32_t (&a)[4], uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(at)
                 : "memory");
}
static __device__ __forceinline__ uint32_t turn(uint32_t x)
{
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
    return y;
}

static __device__ __forceinline__ uint4 load_row_piece(uint64_t address)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

static __device__ __forceinline__ uint4 load_shared_piece(uint32_t at)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}

/* Sixteen rows, or their keys alone (BYTES of each), into a warp's tile, PITCH bytes apart; those beyond `rows` are zero.
 * Loads, not asynchronous copies: out of the CPU's memory those reach half the rate. keep: NULL, or where rows are stored as
 * well. */
template <uint32_t BYTES, uint32_t PITCH>
static __device__ __forceinline__ void load_tile(unsigned char *tile, const uint64_t *address, const uint64_t *keep,
                                                 uint32_t first, uint32_t rows, uint32_t lane)
{
    constexpr uint32_t PIECES = BYTES / 16, EACH = TILE_ROWS * PIECES / WARP, BATCH = EACH > 16 ? 8 : EACH;
#pragma unroll 1
    for (uint32_t begin = 0; begin < EACH; begin += BATCH) {
        uint4 v[BATCH];
#pragma unroll
        for (uint32_t n = 0; n < BATCH; n++) {
            uint32_t piece = (begin + n) * WARP + lane;
            uint32_t row = first + piece / PIECES;
            v[n] = row < rows ? load_row_piece(address[row] + piece % PIECES * 16) : make_uint4(0, 0, 0, 0);
        }
        if (keep)
#pragma unroll
            for (uint32_t n = 0; n < BATCH; n++) {
                uint32_t piece = (begin + n) * WARP + lane, row = first + piece / PIECES;
                if (row < rows && keep[row])
                    *(uint4 *)(keep[row] + piece % PIECES * 16) = v[n];
            }
#pragma unroll
        for (uint32_t n = 0; n < BATCH; n++) {
            uint32_t piece = (begin + n) * WARP + lane;
            *(uint4 *)(tile + piece / PIECES * PITCH + piece % PIECES * 16) = v[n];
        }
    }
    __syncwarp();
}

/* d: scores of rows lane / 4 and + 8 for columns 2 (lane % 4) and + 1, unscaled. */
template <typename T, uint32_t DIM, uint32_t PITCH>
static __device__ __forceinline__ void tile_scores(uint32_t tile, uint32_t queries, uint32_t lane, float (&d)[4])
{
    float odd[4] = {0, 0, 0, 0};
    d[0] = d[1] = d[2] = d[3] = 0;
#pragma unroll
    for (uint32_t k = 0; k < DIM / 16; k++) {
        uint32_t a[4], b0, b1, q = queries + lane / 4 * tile_shape<T, DIM>::QUERY + k * 32 + lane % 4 * 4;
        load_matrix(a, tile + lane % 16 * PITCH + k * 32 + lane / 16 * 16);
        asm volatile("ld.shared.u32 %0,[%1];" : "=r"(b0) : "r"(q) : "memory");
        asm volatile("ld.shared.u32 %0,[%1];" : "=r"(b1) : "r"(q + 16) : "memory");
        multiply<T>(k % 2 ? odd : d, a, b0, b1);
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; i++)
        d[i] += odd[i];
}

/* A warp's running softmax: columns 2 (lane % 4) and + 1; out: dimensions 16 t + lane / 4 and + 8 of those columns. Base 2. */
template <uint32_t DIM> struct tile_state {
    float out[DIM / 16][4], max[2], sum[2];
};

template <uint32_t DIM> static __device__ __forceinline__ void tile_reset(struct tile_state<DIM> &s)
{
#pragma unroll
    for (uint32_t t = 0; t < DIM / 16; t++)
        s.out[t][0] = s.out[t][1] = s.out[t][2] = s.out[t][3] = 0;
    s.max[0] = s.max[1] = NOTHING, s.sum[0] = s.sum[1] = 0;
}

/* WIDE: more than four heads, two products a step. rows: how many of the tile's rows there are. */
template <typename T, uint32_t DIM, bool WIDE>
static __device__ __forceinline__ void tile_attend(uint32_t tile, uint32_t queries, uint32_t rows, float scale, uint32_t lane,
                                                   struct tile_state<DIM> &s)
{
    float p[4], keep[2];
    tile_scores<T, DIM, tile_shape<T, DIM>::PITCH>(tile, queries, lane, p);
    bool low = lane / 4 < rows, high = lane / 4 + 8 < rows;
#pragma unroll
    for (uint32_t c = 0; c < 2; c++) {
        p[c] = low ? p[c] * scale : NOTHING, p[c + 2] = high ? p[c + 2] * scale : NOTHING;
        float most = fmaxf(p[c], p[c + 2]);
#pragma unroll
        for (uint32_t apart = 4; apart < WARP; apart *= 2)
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, apart));
        most = fmaxf(s.max[c], most);
        keep[c] = exp2_fast(s.max[c] - most), s.max[c] = most;
        p[c] = exp2_fast(p[c] - most), p[c + 2] = exp2_fast(p[c + 2] - most);
        s.sum[c] = s.sum[c] * keep[c] + p[c] + p[c + 2];
    }
    uint32_t first[2], rest[2], b[2][2];
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        first[i] = two<T>::pack(p[2 * i], p[2 * i + 1]);
        float2 taken = two<T>::unpack(first[i]);
        rest[i] = two<T>::pack(p[2 * i] - taken.x, p[2 * i + 1] - taken.y);
        b[0][i] = turn(WIDE || lane % 4 < 2 ? first[i] : rest[i]);
        b[1][i] = WIDE ? turn(rest[i]) : 0;
    }
#pragma unroll
    for (uint32_t t = 0; t < DIM / 16; t++) {
        uint32_t a[4];
        load_matrix_turned(a, tile + (lane % 8 + lane / 16 * 8) * tile_shape<T, DIM>::PITCH + tile_shape<T, DIM>::HALF +
                                  t * 32 + lane / 8 % 2 * 16);
        s.out[t][0] *= keep[0], s.out[t][1] *= keep[1], s.out[t][2] *= keep[0], s.out[t][3] *= keep[1];
        multiply<T>(s.out[t], a, b[0][0], b[0][1]);
        if (WIDE)
            multiply<T>(s.out[t], a, b[1][0], b[1][1]);
    }
    __syncwarp();
}

/* A warp's result: to [columns][RESULT_PITCH(DIM)]; maxima and sums of columns `stride` apart. */
#define RESULT_PITCH(dim) ((dim) + 8) /* so that lanes meet different banks */
template <uint32_t DIM, bool WIDE>
static __device__ __forceinline__ void tile_result(struct tile_state<DIM> &s, float *to, float *maxima, float *sums,
                                                   uint32_t stride, uint32_t lane)
{
    uint32_t c = lane % 4 * 2, d = lane / 4;
    bool mine = WIDE || lane % 4 < 2;
#pragma unroll
    for (uint32_t i = 0; i < 2; i++)
#pragma unroll
        for (uint32_t apart = 4; apart < WARP; apart *= 2)
            s.sum[i] += __shfl_xor_sync(ALL_LANES, s.sum[i], apart);
#pragma unroll
    for (uint32_t t = 0; t < DIM / 16; t++)
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            float v = s.out[t][i];
            if (!WIDE)
                v += __shfl_xor_sync(ALL_LANES, v, 2);
            if (mine)
                to[(c + i % 2) * RESULT_PITCH(DIM) + t * 16 + d + i / 2 * 8] = v;
        }
    if (mine && d == 0)
#pragma unroll
        for (uint32_t i = 0; i < 2; i++)
            maxima[(c + i) * stride] = s.max[i], sums[(c + i) * stride] = s.sum[i];
}

#endif
