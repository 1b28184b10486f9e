/* A ceiling for bench_cuda. */
#ifndef TESTS_KERNELS_PEAK_H
#define TESTS_KERNELS_PEAK_H

#include "proto/base.h"

PKV_EXTERN_C_BEGIN

/* Rows of 512 bytes at listed addresses (bit 0 is ignored), side by side to `to`. */
int peak_gather(const uint64_t *address, uint32_t rows, void *to, void *stream);

PKV_EXTERN_C_END

#endif
