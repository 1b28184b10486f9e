/* The memory of a GPU: its chunks, which other processes map by descriptor; CPU memory that it reads; copies between them on
 * its copy engines. A door of gpu, beside gpu.h. The work is done by the CUDA module (gpu/module.h); where it or a device is
 * missing, the first call says so. Functions return 0 or -enum pkv_err.
 *
 * A struct gpu_device may be used by several threads; chunks and registrations belong to whoever made them. Addresses are the
 * device's. Nothing waits without a bound. Once a call has returned -PKV_ERR_GPU_LOST every later one does: this process can
 * use the device no more, and must end (a fault of the device ends all work of the process on it). */
#ifndef GPU_DEVICE_H
#define GPU_DEVICE_H

#include "proto/err.h"
#include "proto/limits.h"

#include <stdbool.h>

PKV_EXTERN_C_BEGIN

struct gpu_device;

struct gpu_device_info {
    uint8_t uuid[PKV_UUID_BYTES]; /* names the device in every process */
    char name[64];
    uint32_t ordinal; /* as this process counts its devices; means nothing elsewhere */
    uint32_t driver;  /* CUDA version that the driver speaks: 13000 is 13.0 */
    uint32_t major, minor, processors;
    uint64_t bytes;
    uint64_t grain;           /* chunks are multiples of it */
    bool exports;             /* chunks can be exported as descriptors of VMM */
    bool exports_ipc;         /* chunks can be shared by cudaIpc handles */
    bool registers;           /* CPU memory can be registered */
    bool registers_read_only; /* also memory that this process has mapped read-only */
};

/* Devices that this process sees. -PKV_ERR_GPU_MODULE: gpu_module_why() has the cause; -PKV_ERR_GPU_NONE: no driver, no device.
 */
int gpu_device_count(uint32_t *ret);
/* Costs no context. */
int gpu_device_probe(uint32_t ordinal, struct gpu_device_info *ret);
/* -PKV_ERR_GPU_DEVICE: this process does not see that device. */
int gpu_device_find(const uint8_t uuid[PKV_UUID_BYTES], uint32_t *ret_ordinal);
int gpu_device_open(uint32_t ordinal, struct gpu_device **ret);
void gpu_device_close(struct gpu_device *device); /* NULL is allowed */
const struct gpu_device_info *gpu_device_about(const struct gpu_device *device);
bool gpu_device_lost(const struct gpu_device *device);
/* Where libpivotkv-cuda.so was found, or why not; never NULL. */
const char *gpu_module_why(void);

/* ---- chunks ---- */

/* How other processes get a chunk. By either they get a descriptor, and import what it is. VMM: a mapping that reads can only
 * read, the memory lives as long as anybody has it. IPC, for devices without VMM export: mappings can always write, and the
 * memory is its maker's alone: who imported it must release it before the maker does, and lose it with the maker's process
 * (gpu/ipc.h). */
enum gpu_share { GPU_SHARE_VMM, GPU_SHARE_IPC };

struct gpu_chunk {
    uint64_t bytes;
    uint64_t readable; /* where kernels of this process read it */
    uint64_t writable; /* where they write it; 0: they must not, and with VMM fault if they try */
    uint64_t handle;   /* the device's own */
    int fd;            /* for other processes; -1 in those that imported it. Owned by the chunk */
    enum gpu_share share;
};

/* Zeroed, writable. -PKV_ERR_GPU_MEMORY: not enough; -PKV_ERR_GPU_EXPORT: the device cannot share memory like that. */
int gpu_device_chunk_create(struct gpu_device *device, uint64_t bytes, enum gpu_share share, struct gpu_chunk *ret);
/* `fd` stays the caller's. -PKV_ERR_GPU_IPC: a handle that cannot be opened here, for example because its maker is gone. */
int gpu_device_chunk_import(struct gpu_device *device, int fd, uint64_t bytes, bool writable, struct gpu_chunk *ret);
/* No copy or kernel may use it any more. */
void gpu_device_chunk_release(struct gpu_device *device, struct gpu_chunk *chunk);

/* ---- CPU memory ---- */

/* Pins [base, base + bytes) for all devices of the process, until it is unregistered. Pages that were not there come now,
 * slowly: touch them first. `read_only`: of a mapping without PROT_WRITE. -PKV_ERR_GPU_REGISTER. */
int gpu_device_register(struct gpu_device *device, const void *base, uint64_t bytes, bool read_only, uint64_t *ret_address);
void gpu_device_unregister(struct gpu_device *device, const void *base);

/* ---- copies ---- */

enum gpu_direction { GPU_TO_HOST, GPU_TO_DEVICE, GPU_ON_DEVICE, GPU_DIRECTIONS };
struct gpu_copy {
    uint64_t to, from, bytes; /* host addresses on the host's side */
};

/* Starts `count` copies, in their order, on the direction's copy engine and low-priority stream; neighbours become one copy.
 * Host memory should be registered: other memory makes the call wait for the copy. A ticket stands for all copies of its
 * direction up to this call. -PKV_ERR_RING_FULL: GPU_TICKETS calls are under way already; wait for one. On any failure nothing
 * is under way. */
#define GPU_TICKETS 64u
int gpu_device_copy(struct gpu_device *device, enum gpu_direction direction, const struct gpu_copy *copies, uint32_t count,
                    uint64_t *ret_ticket);
int gpu_device_zero(struct gpu_device *device, uint64_t address, uint64_t bytes, uint64_t *ret_ticket);
/* 1: done, 0: not yet. */
int gpu_device_poll(struct gpu_device *device, uint64_t ticket);
/* -PKV_ERR_TIMEOUT: still under way after that time. The memory must not be reused then. */
int gpu_device_wait(struct gpu_device *device, uint64_t ticket, uint64_t timeout_ns);
/* Copies and waits. */
int gpu_device_copy_now(struct gpu_device *device, enum gpu_direction direction, uint64_t to, uint64_t from, uint64_t bytes);

PKV_EXTERN_C_END

#endif
