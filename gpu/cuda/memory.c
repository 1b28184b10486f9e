/* Devices, their chunks (virtual memory management: an allocation that is mapped here and exported as a descriptor), registered
 * CPU memory. A chunk imported for writing is mapped twice, so that what only reads it faults when it writes. */
#include "gpu/cuda/driver.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ZERO_NS       10000000000ull
#define IPC_GRAIN     (2ull << 20)              /* smaller allocations share a block, and with it a cudaIpc handle */
#define IPC_SUPPORTED ((CUdevice_attribute)125) /* CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED, which older toolkits do not name \
                                                 */

static bool has(const struct cuda_driver *cu, CUdevice device, CUdevice_attribute what)
{
    int value = 0;
    return cu->cuDeviceGetAttribute(&value, what, device) == CUDA_SUCCESS && value;
}

static uint32_t number(const struct cuda_driver *cu, CUdevice device, CUdevice_attribute what)
{
    int value = 0;
    return cu->cuDeviceGetAttribute(&value, what, device) == CUDA_SUCCESS ? (uint32_t)value : 0;
}

/* Older drivers do not know the attribute; the first handle tells then. */
static bool has_ipc(const struct cuda_driver *cu, CUdevice device)
{
    int value = 0;
    bool refused = cu->cuDeviceGetAttribute(&value, IPC_SUPPORTED, device) == CUDA_SUCCESS && !value;
    return !refused && has(cu, device, CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING);
}

static CUmemAllocationProp properties(CUdevice device)
{
    CUmemAllocationProp p;
    memset(&p, 0, sizeof(p));
    p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    p.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    p.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    p.location.id = device;
    return p;
}

static int count(uint32_t *ret)
{
    const struct cuda_driver *cu = cuda_driver();
    int n = 0;
    if (!cu || cu->cuDeviceGetCount(&n) != CUDA_SUCCESS || n < 1)
        return -PKV_ERR_GPU_NONE;
    *ret = (uint32_t)n;
    return 0;
}

static int probe(uint32_t ordinal, struct gpu_device_info *ret)
{
    const struct cuda_driver *cu = cuda_driver();
    CUdevice device;
    CUuuid uuid;
    size_t bytes = 0, grain = 0;
    int version = 0;
    if (!cu)
        return -PKV_ERR_GPU_NONE;
    if (cu->cuDeviceGet(&device, (int)ordinal) != CUDA_SUCCESS || cu->cuDeviceGetUuid(&uuid, device) != CUDA_SUCCESS)
        return -PKV_ERR_GPU_DEVICE;
    struct gpu_device_info i = {.ordinal = ordinal,
                                .major = number(cu, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
                                .minor = number(cu, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
                                .processors = number(cu, device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)};
    memcpy(i.uuid, uuid.bytes, sizeof(i.uuid));
    cu->cuDeviceGetName(i.name, sizeof(i.name), device);
    cu->cuDeviceTotalMem(&bytes, device);
    cu->cuDriverGetVersion(&version);
    CUmemAllocationProp p = properties(device);
    bool vmm = has(cu, device, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) &&
               cu->cuMemGetAllocationGranularity(&grain, &p, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED) == CUDA_SUCCESS;
    i.bytes = bytes, i.driver = (uint32_t)version, i.grain = PKV_MAX(grain, IPC_GRAIN);
    i.exports = vmm && has(cu, device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
    i.exports_ipc = has_ipc(cu, device);
    i.registers = has(cu, device, CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED);
    i.registers_read_only = i.registers && has(cu, device, CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED);
    *ret = i;
    return 0;
}

static void device_close(struct gpu_device *base)
{
    struct cuda_device *d = cuda_device_of(base);
    if (d->context) {
        cuda_lanes_close(d);
        d->cu->cuDevicePrimaryCtxRelease(d->device);
    }
    free(d);
}

static int device_open(uint32_t ordinal, struct gpu_device **ret)
{
    struct cuda_device *d = calloc(1, sizeof(*d));
    if (!d)
        return -PKV_ERR_NO_MEMORY;
    int r = probe(ordinal, &d->base.info);
    if (!r) {
        d->base.verbs = &cuda_device_verbs, d->cu = cuda_driver();
        CUresult c = d->cu->cuDeviceGet(&d->device, (int)ordinal);
        c = c == CUDA_SUCCESS ? d->cu->cuDevicePrimaryCtxRetain(&d->context, d->device) : c;
        r = c == CUDA_SUCCESS ? cuda_lanes_open(d) : c == CUDA_ERROR_OUT_OF_MEMORY ? -PKV_ERR_GPU_MEMORY : -PKV_ERR_GPU_DEVICE;
    }
    if (r)
        device_close(&d->base);
    else
        *ret = &d->base;
    return r;
}

static bool lost(const struct gpu_device *d)
{
    return __atomic_load_n(&cuda_device_of(d)->lost, __ATOMIC_ACQUIRE);
}

/* ---- chunks ---- */

static int map(struct cuda_device *d, uint64_t handle, uint64_t bytes, bool writable, uint64_t *ret)
{
    CUdeviceptr at = 0;
    CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = d->device},
                              .flags = writable ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ};
    int r = cuda_device_error(d, d->cu->cuMemAddressReserve(&at, bytes, 0, 0, 0));
    if (r)
        return r;
    r = cuda_device_error(d, d->cu->cuMemMap(at, bytes, 0, handle, 0));
    if (r)
        goto free_address;
    r = cuda_device_error(d, d->cu->cuMemSetAccess(at, bytes, &access, 1));
    if (r)
        goto unmap;
    *ret = at;
    return 0;
unmap:
    d->cu->cuMemUnmap(at, bytes);
free_address:
    d->cu->cuMemAddressFree(at, bytes);
    return r;
}

static void unmap(struct cuda_device *d, uint64_t at, uint64_t bytes)
{
    if (!at)
        return;
    (void)cuda_device_error(d, d->cu->cuMemUnmap(at, bytes));
    (void)cuda_device_error(d, d->cu->cuMemAddressFree(at, bytes));
}

/* After a fault the driver takes everything back at the end of the process. */
static void chunk_release(struct gpu_device *base, struct gpu_chunk *c)
{
    struct cuda_device *d = cuda_device_of(base);
    if (!cuda_device_enter(d)) {
        if (c->writable != c->readable)
            unmap(d, c->writable, c->bytes);
        unmap(d, c->readable, c->bytes);
        (void)cuda_device_error(d, d->cu->cuMemRelease(c->handle));
        cuda_device_leave(d);
    }
    if (c->fd >= 0)
        close(c->fd);
}

static int create(struct cuda_device *d, uint64_t bytes, struct gpu_chunk *c)
{
    CUmemAllocationProp p = properties(d->device);
    CUmemGenericAllocationHandle handle;
    int r = cuda_device_error(d, d->cu->cuMemCreate(&handle, bytes, &p, 0));
    if (r)
        return r == -PKV_ERR_UNSUPPORTED ? -PKV_ERR_GPU_EXPORT : r;
    *c = (struct gpu_chunk){.bytes = bytes, .handle = handle, .fd = -1};
    r = map(d, handle, bytes, true, &c->writable);
    c->readable = c->writable;
    if (r)
        return r;
    r = cuda_device_error(d, d->cu->cuMemExportToShareableHandle(&c->fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    return r && r != -PKV_ERR_GPU_LOST ? -PKV_ERR_GPU_EXPORT : r; /* whatever it is called, the remedy is the same */
}

static int chunk_create(struct gpu_device *base, uint64_t bytes, struct gpu_chunk *ret)
{
    struct cuda_device *d = cuda_device_of(base);
    struct gpu_chunk c = {.fd = -1};
    uint64_t ticket;
    int r = cuda_device_enter(d);
    if (r)
        return r;
    r = create(d, bytes, &c);
    cuda_device_leave(d);
    /* The driver clears what comes from another process, not what this one has had before. */
    r = r ? r : cuda_zero(base, c.writable, bytes, &ticket);
    r = r ? r : gpu_device_wait(base, ticket, ZERO_NS);
    if (!r)
        *ret = c;
    else if (c.bytes)
        chunk_release(base, &c);
    return r;
}

static int chunk_import(struct gpu_device *base, int fd, uint64_t bytes, bool writable, struct gpu_chunk *ret)
{
    struct cuda_device *d = cuda_device_of(base);
    struct gpu_chunk c = {.bytes = bytes, .fd = -1};
    CUmemGenericAllocationHandle handle;
    int r = cuda_device_enter(d);
    if (r)
        return r;
    r = cuda_device_error(
        d, d->cu->cuMemImportFromShareableHandle(&handle, (void *)(uintptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    if (!r) {
        c.handle = handle;
        r = map(d, handle, bytes, false, &c.readable);
        r = r || !writable ? r : map(d, handle, bytes, true, &c.writable);
    }
    cuda_device_leave(d);
    if (!r)
        *ret = c;
    else if (c.handle)
        chunk_release(base, &c);
    return r;
}

/* ---- CPU memory ---- */

static int pin(struct gpu_device *base, const void *at, uint64_t bytes, bool read_only, uint64_t *ret)
{
    struct cuda_device *d = cuda_device_of(base);
    unsigned flags =
        CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP | (read_only ? CU_MEMHOSTREGISTER_READ_ONLY : 0);
    void *memory = (void *)(uintptr_t)at;
    CUdeviceptr address = 0;
    int r = cuda_device_enter(d);
    if (r)
        return r;
    CUresult c = d->cu->cuMemHostRegister(memory, bytes, flags);
    r = c == CUDA_SUCCESS ? 0 : cuda_device_error(d, c);
    if (!r) {
        r = cuda_device_error(d, d->cu->cuMemHostGetDevicePointer(&address, memory, 0));
        if (r)
            d->cu->cuMemHostUnregister(memory);
    } else if (r != -PKV_ERR_GPU_LOST) {
        r = -PKV_ERR_GPU_REGISTER; /* whatever it is called, the remedy is the same */
    }
    cuda_device_leave(d);
    if (!r)
        *ret = address;
    return r;
}

static void unpin(struct gpu_device *base, const void *at)
{
    struct cuda_device *d = cuda_device_of(base);
    if (cuda_device_enter(d))
        return;
    (void)cuda_device_error(d, d->cu->cuMemHostUnregister((void *)(uintptr_t)at));
    cuda_device_leave(d);
}

const struct gpu_device_verbs cuda_device_verbs = {
    .count = count,
    .probe = probe,
    .open = device_open,
    .close = device_close,
    .lost = lost,
    .chunk_create = chunk_create,
    .chunk_import = chunk_import,
    .chunk_release = chunk_release,
    .ipc_take = cuda_ipc_take,
    .ipc_open = cuda_ipc_open,
    .ipc_give = cuda_ipc_give,
    .pin = pin,
    .unpin = unpin,
    .copy = cuda_copy,
    .zero = cuda_zero,
    .poll = cuda_poll,
};
