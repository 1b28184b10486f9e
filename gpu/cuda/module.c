/* The module's one symbol. */
#include "gpu/cuda/backend.h"

__attribute__((visibility("default"))) gpu_module_entry pivotkv_cuda_module;

const struct gpu_module *pivotkv_cuda_module(void)
{
    static const struct gpu_module module = {
        .version = GPU_MODULE_VERSION,
        .bytes = sizeof(struct gpu_module),
        .release = PKV_VERSION,
        .device = &cuda_device_verbs,
        .backend = &gpu_cuda_backend,
        .lab = &gpu_cuda_lab,
    };
    return &module;
}
