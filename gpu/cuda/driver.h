/* The driver API, opened at run time, so that the module loads where no driver is; and what its errors mean. Private to gpu. */
#ifndef GPU_CUDA_DRIVER_H
#define GPU_CUDA_DRIVER_H

#include "gpu/module.h"

#include <cuda.h>
#include <pthread.h>

#define CUDA_DRIVER(X)                \
    X(cuInit)                         \
    X(cuDriverGetVersion)             \
    X(cuDeviceGetCount)               \
    X(cuDeviceGet)                    \
    X(cuDeviceGetName)                \
    X(cuDeviceGetUuid)                \
    X(cuDeviceTotalMem)               \
    X(cuDeviceGetAttribute)           \
    X(cuDevicePrimaryCtxRetain)       \
    X(cuDevicePrimaryCtxRelease)      \
    X(cuCtxPushCurrent)               \
    X(cuCtxPopCurrent)                \
    X(cuCtxGetStreamPriorityRange)    \
    X(cuStreamCreateWithPriority)     \
    X(cuStreamDestroy)                \
    X(cuEventCreate)                  \
    X(cuEventDestroy)                 \
    X(cuEventRecord)                  \
    X(cuEventQuery)                   \
    X(cuMemGetAllocationGranularity)  \
    X(cuMemAddressReserve)            \
    X(cuMemAddressFree)               \
    X(cuMemCreate)                    \
    X(cuMemRelease)                   \
    X(cuMemMap)                       \
    X(cuMemUnmap)                     \
    X(cuMemSetAccess)                 \
    X(cuMemExportToShareableHandle)   \
    X(cuMemImportFromShareableHandle) \
    X(cuMemAlloc)                     \
    X(cuMemFree)                      \
    X(cuMemGetAddressRange)           \
    X(cuIpcGetMemHandle)              \
    X(cuIpcOpenMemHandle)             \
    X(cuIpcCloseMemHandle)            \
    X(cuMemHostRegister)              \
    X(cuMemHostUnregister)            \
    X(cuMemHostGetDevicePointer)      \
    X(cuMemcpyDtoHAsync)              \
    X(cuMemcpyHtoDAsync)              \
    X(cuMemcpyDtoDAsync)              \
    X(cuMemsetD8Async)

/* Not in every driver that will do. */
#define CUDA_DRIVER_OPTIONAL(X) X(cuMemcpyBatchAsync)

/* The names are macros of cuda.h that end in a version: each names the member and the symbol alike. */
struct cuda_driver {
#define CUDA_DRIVER_MEMBER(function) __typeof__(function) *function;
    CUDA_DRIVER(CUDA_DRIVER_MEMBER)
    CUDA_DRIVER_OPTIONAL(CUDA_DRIVER_MEMBER) /* may be NULL */
#undef CUDA_DRIVER_MEMBER
};

/* NULL: no driver, or one that is too old. Initialised. */
const struct cuda_driver *cuda_driver(void);

/* A stream of copies in one direction. Ticket n of it is event n % GPU_TICKETS; all up to `finished` are done. */
struct cuda_lane {
    pthread_mutex_t lock; /* a leaf: nothing is taken under it */
    CUstream stream;
    CUevent events[GPU_TICKETS];
    uint64_t issued, finished;
};

struct cuda_device {
    struct gpu_device base;
    const struct cuda_driver *cu;
    CUdevice device;
    CUcontext context; /* the primary one, which the runtime uses too */
    struct cuda_lane lanes[GPU_DIRECTIONS];
    int lost; /* atomic */
};

static inline struct cuda_device *cuda_device_of(const struct gpu_device *d)
{
    return (struct cuda_device *)(uintptr_t)d;
}

/* Makes the device's context this thread's, which may have another one: leave gives that back. */
int cuda_device_enter(struct cuda_device *device);
void cuda_device_leave(struct cuda_device *device);

/* 0 or -enum pkv_err of what the driver said. The one place that tells what can be tried again from what has ended the
 * context: after that the device is lost to this process. */
int cuda_device_error(struct cuda_device *device, CUresult result);

/* copy.c */
int cuda_lanes_open(struct cuda_device *device);
void cuda_lanes_close(struct cuda_device *device);
int cuda_copy(struct gpu_device *device, enum gpu_direction direction, const struct gpu_copy *copies, uint32_t count,
              uint64_t *ret_ticket);
int cuda_zero(struct gpu_device *device, uint64_t address, uint64_t bytes, uint64_t *ret_ticket);
int cuda_poll(struct gpu_device *device, uint64_t ticket);

/* ipc.c */
int cuda_ipc_take(struct gpu_device *device, uint64_t bytes, uint64_t *ret_at, uint8_t ret_handle[]);
int cuda_ipc_open(struct gpu_device *device, const uint8_t handle[], uint64_t bytes, uint64_t *ret_at);
void cuda_ipc_give(struct gpu_device *device, uint64_t at, bool own);

extern const struct gpu_device_verbs cuda_device_verbs;

#endif
