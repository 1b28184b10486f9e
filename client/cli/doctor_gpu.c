/* What pivotkv doctor says of GPUs: the module, the driver, each device and what a pool on it needs. Without a GPU all of it is
 * a warning: the host backend serves. */
#include "client/cli/cli.h"
#include "gpu/device.h"

#include <stdlib.h>
#include <string.h>

#define PIN_BYTES (4ull << 20)

static const char *uuid_text(const uint8_t u[PKV_UUID_BYTES], char ret[48])
{
    char *at = ret + snprintf(ret, 48, "GPU-");
    for (uint32_t i = 0; i < PKV_UUID_BYTES; i++)
        at += snprintf(at, (size_t)(ret + 48 - at), "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", u[i]);
    return ret;
}

static const char *what_lacks(const struct gpu_device_info *i)
{
    if (!i->exports && !i->exports_ipc)
        return "its memory cannot be shared between processes: no pool on it; use the host backend";
    if (!i->registers_read_only)
        return "it cannot read CPU memory that is mapped read-only: no pool on it; use the host backend";
    return i->major >= 8 ? NULL : "the kernels are built for compute capability 8.0 and later: use the host backend";
}

/* Makes what a daemon makes, once, small: a limit or a sandbox shows here. */
static int try_it(uint32_t ordinal, enum gpu_share *ret_share)
{
    struct gpu_device *device;
    struct gpu_chunk chunk;
    uint64_t address;
    int r = gpu_device_open(ordinal, &device);
    if (r)
        return r;
    uint64_t bytes = gpu_device_about(device)->grain;
    r = gpu_device_chunk_create(device, bytes, *ret_share = GPU_SHARE_VMM, &chunk);
    if (r == -PKV_ERR_GPU_EXPORT)
        r = gpu_device_chunk_create(device, bytes, *ret_share = GPU_SHARE_IPC, &chunk);
    void *memory = aligned_alloc(4096, PIN_BYTES);
    if (!r && memory) {
        memset(memory, 0, PIN_BYTES);
        r = gpu_device_register(device, memory, PIN_BYTES, false, &address);
        if (!r)
            gpu_device_unregister(device, memory);
        gpu_device_chunk_release(device, &chunk);
    }
    free(memory);
    gpu_device_close(device);
    return r;
}

static void check_device(json_t *list, uint32_t ordinal)
{
    struct gpu_device_info i;
    char check[32], found[256], bytes[32], uuid[48];
    snprintf(check, sizeof(check), "GPU %u", ordinal);
    if (gpu_device_probe(ordinal, &i))
        return;
    snprintf(found, sizeof(found), "%s, %s, compute capability %u.%u, %s", i.name, format_bytes(i.bytes, bytes), i.major,
             i.minor, uuid_text(i.uuid, uuid));
    const char *lack = what_lacks(&i);
    enum gpu_share share = GPU_SHARE_VMM;
    int r = lack ? 0 : try_it(ordinal, &share);
    if (!lack && !r && share == GPU_SHARE_IPC)
        lack = "no VMM descriptors: a pool on it is shared by cudaIpc handles, for one tenant, or for all with --share ipc";
    doctor_say(list, check, lack || r ? DOCTOR_WARN : DOCTOR_OK, found, lack ? lack : pkv_err_text((uint32_t)-r));
}

void doctor_gpu(json_t *list)
{
    struct gpu_device_info i;
    char found[128];
    uint32_t count = 0;
    int r = gpu_device_count(&count);
    doctor_say(
        list, "CUDA module", r == -PKV_ERR_GPU_MODULE ? DOCTOR_WARN : DOCTOR_OK, gpu_module_why(),
        "for a pool on a GPU: libpivotkv-cuda.so of this release, beside libpivotkv.so, or named by $PIVOTKV_CUDA_MODULE");
    if (r == -PKV_ERR_GPU_MODULE)
        return;
    if (r || gpu_device_probe(0, &i)) {
        doctor_say(list, "GPU", DOCTOR_WARN, "none",
                   "the host backend serves; for a GPU: its driver, and libcuda.so.1 where programs find it");
        return;
    }
    snprintf(found, sizeof(found), "CUDA %u.%u, %u device%s", i.driver / 1000, i.driver % 1000 / 10, count,
             count == 1 ? "" : "s");
    doctor_say(list, "CUDA driver", i.driver >= 12000 ? DOCTOR_OK : DOCTOR_WARN, found,
               "the module wants a driver for CUDA 12 or later");
    for (uint32_t n = 0; n < count; n++)
        check_device(list, n);
}
