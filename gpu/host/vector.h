/* Sixteen floats as one value: a register with AVX-512, two with AVX2, four without. Operations are lane by lane, so every
 * instruction set gives the same bits. Private to host/. */
#ifndef GPU_HOST_VECTOR_H
#define GPU_HOST_VECTOR_H

typedef float lanes16 __attribute__((vector_size(64), aligned(4), may_alias));

#endif
