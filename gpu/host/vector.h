/* Sixteen floats as one value: a register with AVX-512, two with AVX2, four without. Operations are lane by lane, so every
 * instruction set gives the same bits. Private to host/. */
#ifndef GPU_HOST_VECTOR_H
#define GPU_HOST_VECTOR_H

#include <stdint.h>

typedef float lanes16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ints16 __attribute__((vector_size(64), aligned(4), may_alias));

/* Where `which` is -1 from a, where it is 0 from b. A macro: a vector that is returned changes the ABI with the CPU. */
#define PICK16(which, a, b) ((lanes16)(((which) & (ints16)(a)) | (~(which) & (ints16)(b))))

#endif
