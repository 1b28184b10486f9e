/* What libpivotkv-cuda.so brings, and how it is found. One build serves machines with and without a GPU: nothing of CUDA is
 * linked; the module is opened when somebody asks for a device, and says what it has through one symbol. Private to gpu.
 *
 * Everything here is of one release: a module of another one is refused, so structs may change freely. */
#ifndef GPU_MODULE_H
#define GPU_MODULE_H

#include "gpu/batch.h"
#include "gpu/device.h"
#include "gpu/gpu.h"
#include "gpu/lab.h"

/* A device that the module opened; its own struct begins with this one. */
struct gpu_device {
    const struct gpu_device_verbs *verbs;
    struct gpu_device_info info;
};

/* gpu/device.h, without what device.c makes of it. */
struct gpu_device_verbs {
    int (*count)(uint32_t *ret);
    int (*probe)(uint32_t ordinal, struct gpu_device_info *ret);
    int (*open)(uint32_t ordinal, struct gpu_device **ret);
    void (*close)(struct gpu_device *device);
    bool (*lost)(const struct gpu_device *device);
    int (*chunk_create)(struct gpu_device *device, uint64_t bytes, struct gpu_chunk *ret);
    int (*chunk_import)(struct gpu_device *device, int fd, uint64_t bytes, bool writable, struct gpu_chunk *ret);
    void (*chunk_release)(struct gpu_device *device, struct gpu_chunk *chunk);
    /* Chunks of GPU_SHARE_IPC (gpu/ipc.c): memory and its handle; a handle opened, once per process and never in the one that
     * made it; memory freed if it is one's own, closed if it was opened. */
    int (*ipc_take)(struct gpu_device *device, uint64_t bytes, uint64_t *ret_at, uint8_t ret_handle[]);
    int (*ipc_open)(struct gpu_device *device, const uint8_t handle[], uint64_t bytes, uint64_t *ret_at);
    void (*ipc_give)(struct gpu_device *device, uint64_t at, bool own);
    int (*pin)(struct gpu_device *device, const void *base, uint64_t bytes, bool read_only, uint64_t *ret_address);
    void (*unpin)(struct gpu_device *device, const void *base);
    int (*copy)(struct gpu_device *device, enum gpu_direction direction, const struct gpu_copy *copies, uint32_t count,
                uint64_t *ret_ticket);
    int (*zero)(struct gpu_device *device, uint64_t address, uint64_t bytes, uint64_t *ret_ticket);
    int (*poll)(struct gpu_device *device, uint64_t ticket);
};

/* The door functions of gpu.h on a device; arrays that are the caller's are host memory, places are the device's. Arguments
 * have been checked, and what the kernels cannot do has been taken care of (gpu/staged.c). A backend embeds what it needs in a
 * struct of its own. Owner: as of struct gpu. */
struct gpu_backend {
    int (*open)(struct gpu_device *device, void **ret);
    void (*close)(void *backend);
    int (*append)(void *backend, const struct gpu_append_args *args);
    int (*sign)(void *backend, const struct gpu_sign_args *args);
    int (*put_signatures)(void *backend, const struct gpu_signatures_args *args);
    int (*read)(void *backend, const struct gpu_read_args *args);
    /* Every query has more tokens than its list holds. */
    int (*select)(void *backend, const struct gpu_select_args *args, const struct gpu_rows *ret_rows);
    int (*gather)(void *backend, const struct gpu_select_args *args, const struct gpu_rows *rows, void *ret);
    int (*dense)(void *backend, const struct gpu_dense_args *args);
    int (*attend)(void *backend, const struct gpu_attend_args *args);
    /* gpu/batch.h; batch_open NULL: there are none. */
    int (*batch_open)(void *backend, const struct gpu_batch_options *options, void **ret);
    void (*batch_close)(void *batch);
    int (*batch_spaces)(void *batch, const struct gpu_space *readable, const struct gpu_space *writable);
    int (*batch_forget)(void *batch, uint32_t seq, void *stream);
    int (*batch_step)(void *batch, const struct gpu_batch_step *step, void *stream);
    int (*batch_append)(void *batch, uint32_t layer, const void *k, const void *v, void *stream);
    int (*batch_attend)(void *batch, uint32_t layer, const void *q, float *out, float *lse, bool keeps, void *stream);
    struct gpu_batch_kept (*batch_kept)(const void *batch);
    int (*batch_end)(void *batch, uint32_t slot, uint64_t epoch, void *stream);
    bool (*batch_bad)(void *batch, uint32_t slot);
    int (*batch_reset)(void *batch);
    int (*batch_page)(void *batch, void *base, uint64_t *ret_address);
    bool (*batch_captures)(void *batch, void *stream);
    int (*batch_check)(void *batch);
    int (*batch_counters)(void *batch, uint64_t *ret_hits, uint64_t *ret_misses);
};

/* Without signatures the k latest candidates are selected: as if so many more were recent, and none searched for. */
static inline struct gpu_policy gpu_policy_by_age(const struct pkv_geom *geom, const struct gpu_policy *policy)
{
    struct gpu_policy p = *policy;
    if (!geom->sig_bits)
        p.recent += p.k, p.k = 0, p.top_p = 0;
    return p;
}

/* gpu/lab.h */
struct gpu_lab_verbs {
    int (*open)(struct gpu_device *device, struct gpu_lab **ret);
    void (*close)(struct gpu_lab *lab);
    void *(*stream)(struct gpu_lab *lab);
    int (*take)(struct gpu_lab *lab, uint64_t bytes, void **ret);
    int (*fill)(struct gpu_lab *lab, void *to, uint64_t count, uint32_t seed, uint32_t noise_seed, float noise);
    int (*wait)(struct gpu_lab *lab);
    int (*capture)(struct gpu_lab *lab);
    int (*captured)(struct gpu_lab *lab, void **ret_graph);
    int (*replay)(struct gpu_lab *lab, void *graph, double *ret_us);
    void (*graph_free)(struct gpu_lab *lab, void *graph);
    int (*read_peak)(struct gpu_lab *lab, double *ret);
    int (*copy_peak)(struct gpu_lab *lab, bool to_device, bool beside, double *ret);
    int (*gather)(struct gpu_lab *lab, uint64_t span, uint32_t rows, uint32_t row_bytes, uint32_t run, double *ret);
};

struct gpu_module {
    uint32_t version;    /* GPU_MODULE_VERSION; the first member, whatever follows */
    uint32_t bytes;      /* sizeof(struct gpu_module) */
    const char *release; /* of pivotkv */
    const struct gpu_device_verbs *device;
    const struct gpu_backend *backend; /* NULL: memory only */
    const struct gpu_lab_verbs *lab;   /* NULL: nothing to measure with */
};
#define GPU_MODULE_VERSION 1u
#define GPU_MODULE_FILE    "libpivotkv-cuda.so"
#define GPU_MODULE_SYMBOL  "pivotkv_cuda_module"
typedef const struct gpu_module *gpu_module_entry(void);

/* Opened once per process; NULL: gpu_module_why() (device.h) has the reason. */
const struct gpu_module *gpu_module_get(void);
/* One file. False: `ret_why` has the reason. What was opened stays open: threads of its libraries may run. */
bool gpu_module_load(const char *path, const struct gpu_module **ret, char *ret_why, size_t room);

#endif
