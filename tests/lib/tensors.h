/* Writes safetensors files for tests, good ones and bad ones. */
#ifndef TESTS_LIB_TENSORS_H
#define TESTS_LIB_TENSORS_H

#include <stdint.h>

struct test_tensor {
    const char *name;
    uint32_t axes;
    uint64_t shape[4];
    const float *values;
};

/* A file of F32 tensors in a new temporary file; `meta`: the members of __metadata__, or NULL. The caller unlinks and frees. */
char *test_tensors(const char *meta, const struct test_tensor *tensors, uint32_t count);
/* A file with this header and these bytes behind it. */
char *test_tensor_file(uint64_t header_bytes, const char *header, const void *data, uint64_t data_bytes);

#endif
