/* Compiler-neutral macros. C17, C++17 and nvcc read this header alike. */
#ifndef PROTO_BASE_H
#define PROTO_BASE_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define PKV_EXTERN_C_BEGIN extern "C" {
#define PKV_EXTERN_C_END   }
#else
#define PKV_EXTERN_C_BEGIN
#define PKV_EXTERN_C_END
#endif

/* Functions that device code calls too. */
#ifdef __CUDACC__
#define PKV_HD __host__ __device__
#else
#define PKV_HD
#endif

#define PKV_CACHE_LINE 64

#define PKV_DIV_UP(a, b)   (((a) + (b)-1) / (b))
#define PKV_ALIGN_UP(a, b) (PKV_DIV_UP(a, b) * (b))
#define PKV_ARRAY_LEN(a)   (sizeof(a) / sizeof((a)[0]))
#define PKV_MIN(a, b)      ((a) < (b) ? (a) : (b))
#define PKV_MAX(a, b)      ((a) > (b) ? (a) : (b))

/* The struct that embeds `member`, from a pointer to that member. */
#define PKV_CONTAINER_OF(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))

/* The four asserts of a wire struct. `members` is the sum of the members' sizes: equal to the size, there is no
 * hidden padding, so no byte of one process leaks into another. */
#define PKV_WIRE_ASSERT(type, bytes, align, members, last, last_offset)                  \
    static_assert(sizeof(type) == (bytes), #type " changed its size");                   \
    static_assert(sizeof(type) % (align) == 0, #type " breaks the alignment of arrays"); \
    static_assert(sizeof(type) == (members), #type " has padding");                      \
    static_assert(offsetof(type, last) == (last_offset), #type " moved its last field")

#endif
