/* libcuda and its errors. */
#include "gpu/cuda/driver.h"

#include <dlfcn.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct cuda_driver table;
static bool good;

#define TEXT(name)  #name
#define NAME(macro) TEXT(macro)

static void *symbol(void *library, const char *name)
{
    void *found = dlsym(library, name);
    good = good && found;
    return found;
}

static void load(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    good = library != NULL;
    if (!good)
        return;
#define LOAD(function) *(void **)(&table.function) = symbol(library, NAME(function));
    CUDA_DRIVER(LOAD)
#undef LOAD
#define LOAD(function) *(void **)(&table.function) = dlsym(library, NAME(function));
    CUDA_DRIVER_OPTIONAL(LOAD)
#undef LOAD
    good = good && table.cuInit(0) == CUDA_SUCCESS;
}

const struct cuda_driver *cuda_driver(void)
{
    pthread_once(&once, load);
    return good ? &table : NULL;
}

int cuda_device_enter(struct cuda_device *d)
{
    if (__atomic_load_n(&d->lost, __ATOMIC_ACQUIRE))
        return -PKV_ERR_GPU_LOST;
    return cuda_device_error(d, d->cu->cuCtxPushCurrent(d->context));
}

void cuda_device_leave(struct cuda_device *d)
{
    CUcontext ours;
    (void)d->cu->cuCtxPopCurrent(&ours); /* fails only once the context is lost */
}

/* Whether the context still answers: once it does not, it never will. */
static bool answers(struct cuda_device *d)
{
    CUresult c = d->cu->cuEventQuery(d->lanes[GPU_ON_DEVICE].events[0]);
    return c == CUDA_SUCCESS || c == CUDA_ERROR_NOT_READY;
}

int cuda_device_error(struct cuda_device *d, CUresult result)
{
    switch (result) {
    case CUDA_SUCCESS:
        return 0;
    case CUDA_ERROR_OUT_OF_MEMORY:
        return -PKV_ERR_GPU_MEMORY;
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_INVALID_HANDLE:
    case CUDA_ERROR_INVALID_DEVICE:
        return -PKV_ERR_INVALID;
    case CUDA_ERROR_NOT_SUPPORTED:
    case CUDA_ERROR_NOT_PERMITTED:
        return -PKV_ERR_UNSUPPORTED;
    case CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED:
    case CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED:
        return -PKV_ERR_GPU_REGISTER;
    case CUDA_ERROR_OPERATING_SYSTEM:
    case CUDA_ERROR_NOT_READY:
    case CUDA_ERROR_NOT_FOUND:
    case CUDA_ERROR_MAP_FAILED:
    case CUDA_ERROR_UNMAP_FAILED:
    case CUDA_ERROR_ALREADY_MAPPED:
        return -PKV_ERR_SYSTEM;
    default:
        /* Faults of kernels and of the memory, a driver that went, and oddities that pass: a descriptor that is no chunk's. */
        if (d->lanes[GPU_ON_DEVICE].events[0] && answers(d))
            return -PKV_ERR_SYSTEM;
        __atomic_store_n(&d->lost, 1, __ATOMIC_RELEASE);
        return -PKV_ERR_GPU_LOST;
    }
}
