/* cudaIpc: what the driver does of gpu/ipc.h. An allocation of a multiple of 2 MiB is a block of its own: a handle names the
 * block, so nothing else is shared with it. */
#include "gpu/cuda/driver.h"
#include "gpu/ipc.h"

#include <string.h>

static_assert(sizeof(CUipcMemHandle) == GPU_IPC_HANDLE, "the handle is carried as it is");

int cuda_ipc_take(struct gpu_device *base, uint64_t bytes, uint64_t *ret_at, uint8_t ret_handle[])
{
    struct cuda_device *d = cuda_device_of(base);
    CUdeviceptr at = 0;
    CUipcMemHandle handle;
    int r = cuda_device_enter(d);
    if (r)
        return r;
    r = cuda_device_error(d, d->cu->cuMemAlloc(&at, bytes));
    if (!r) {
        r = cuda_device_error(d, d->cu->cuIpcGetMemHandle(&handle, at));
        if (r)
            d->cu->cuMemFree(at);
        r = r && r != -PKV_ERR_GPU_LOST ? -PKV_ERR_GPU_EXPORT : r; /* whatever it is called, the remedy is the same */
    }
    cuda_device_leave(d);
    if (!r) {
        *ret_at = at;
        memcpy(ret_handle, &handle, sizeof(handle));
    }
    return r;
}

/* A handle of another allocation than the token's would let kernels run over its end. */
static bool is_whole(const struct cuda_device *d, CUdeviceptr at, uint64_t bytes)
{
    CUdeviceptr base = 0;
    size_t size = 0;
    return d->cu->cuMemGetAddressRange(&base, &size, at) == CUDA_SUCCESS && base == at && size >= bytes;
}

int cuda_ipc_open(struct gpu_device *base, const uint8_t bytes_of_handle[], uint64_t bytes, uint64_t *ret_at)
{
    struct cuda_device *d = cuda_device_of(base);
    CUdeviceptr at = 0;
    CUipcMemHandle handle;
    memcpy(&handle, bytes_of_handle, sizeof(handle));
    int r = cuda_device_enter(d);
    if (r)
        return r;
    r = cuda_device_error(d, d->cu->cuIpcOpenMemHandle(&at, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS));
    if (!r && !is_whole(d, at, bytes)) {
        d->cu->cuIpcCloseMemHandle(at);
        r = -PKV_ERR_INVALID;
    } else if (r && r != -PKV_ERR_GPU_LOST && r != -PKV_ERR_GPU_MEMORY) {
        r = -PKV_ERR_GPU_IPC;
    }
    cuda_device_leave(d);
    if (!r)
        *ret_at = at;
    return r;
}

/* Both wait for what runs on the device in this process. After a fault the driver takes everything back at the process's end.
 */
void cuda_ipc_give(struct gpu_device *base, uint64_t at, bool own)
{
    struct cuda_device *d = cuda_device_of(base);
    if (cuda_device_enter(d))
        return;
    (void)cuda_device_error(d, own ? d->cu->cuMemFree(at) : d->cu->cuIpcCloseMemHandle(at));
    cuda_device_leave(d);
}
