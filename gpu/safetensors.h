/* A reader of safetensors files: 8 bytes of header length (little endian), a JSON header, then the tensors' bytes. Everything
 * that the header says is checked against the file before anything is used. Private to gpu. */
#ifndef GPU_SAFETENSORS_H
#define GPU_SAFETENSORS_H

#include "gpu/gpu.h"

struct json_t;

struct safetensors {
    char *file; /* the whole file, in memory: it may change on disk */
    uint64_t bytes;
    const char *data; /* of the tensors */
    struct json_t *header;
};

/* -PKV_ERR_FILE_OPEN, _FILE_FORMAT (damaged, or it lies about its sizes), _NO_MEMORY. `ret_digest`: of the file's bytes;
 * two XXH3-128, an identity and no protection. */
int safetensors_open(const char *path, struct safetensors *ret, uint8_t ret_digest[PKV_DIGEST_BYTES]);
void safetensors_close(struct safetensors *st);

bool safetensors_has(const struct safetensors *st, const char *name);
/* Metadata, NULL if it is not there. */
const char *safetensors_meta(const struct safetensors *st, const char *key);
/* Dimension `axis` of a tensor, 0 if there is no such tensor or axis. */
uint64_t safetensors_size(const struct safetensors *st, const char *name, uint32_t axis);
/* A tensor of exactly this shape (F32, F16, BF16 or U8) as floats, owned by the caller. -PKV_ERR_FILE_FIT if it is missing or
 * shaped otherwise, -PKV_ERR_FILE_FORMAT if it holds NaN or infinity. */
int safetensors_floats(const struct safetensors *st, const char *name, const uint64_t *shape, uint32_t axes, float **ret);

#endif
