/* Kernels of a worker that misbehaves, for check_sharing. */
#ifndef TESTS_KERNELS_STRAY_H
#define TESTS_KERNELS_STRAY_H

#include "proto/base.h"

PKV_EXTERN_C_BEGIN

/* Writes one word at `to` and waits; the CUDA error, 0 if there was none. */
int stray_write(uint64_t to, uint32_t word);
/* Starts a kernel that adds to the words of `to` for about that long, over and over; does not wait. */
int stray_busy(uint64_t to, uint64_t words, uint32_t seconds);

PKV_EXTERN_C_END

#endif
