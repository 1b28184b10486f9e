/* Chunks that are shared by cudaIpc handles, where a device cannot export memory as descriptors. Private to gpu.
 *
 * A handle is 64 bytes. It travels as a sealed memfd that holds it (struct gpu_ipc_token), so a chunk is a descriptor here too,
 * and who has none has no chunk.
 *
 * What is weaker than with descriptors of VMM, by nature of the driver's interface:
 *   one mapping, always writable    a worker's stray write into a chunk that it has is not stopped by the MMU
 *   the memory is its maker's       it may go with the maker's process, or when the maker frees it, under readers
 *   a handle is no capability       what it holds can be copied, and guessed by processes of the same user
 * What can go wrong, and what becomes of it (each is tested; tests/kernels/check_ipc.c):
 *   the maker imports its own chunk      the driver refuses that; the maker's own address is given, and counted
 *   a chunk is imported twice by one process (two connections)    older drivers refuse that; it is opened once, and counted
 *   closed in any order                  the last user closes, or frees if it is the maker
 *   the maker is gone                    -PKV_ERR_GPU_IPC for who comes late; who has it mapped must not use it any more
 *   the descriptor is no token of this release, or can still be written, or is of another size    -PKV_ERR_INVALID
 *   the device is another one, or not seen (CUDA_VISIBLE_DEVICES)    found out before, by UUID; else -PKV_ERR_GPU_IPC
 *   another PID or IPC namespace, a sandbox    -PKV_ERR_GPU_IPC
 *   the device is lost                   users are counted down, the driver is not called any more */
#ifndef GPU_IPC_H
#define GPU_IPC_H

#include "gpu/device.h"

#define GPU_IPC_HANDLE 64u

/* -PKV_ERR_GPU_EXPORT: the device has no such handles, or refuses to make one. */
int gpu_ipc_create(struct gpu_device *device, uint64_t bytes, struct gpu_chunk *ret);
/* Whether a descriptor claims to be a token. */
bool gpu_ipc_is_token(int fd);
int gpu_ipc_import(struct gpu_device *device, int fd, uint64_t bytes, bool writable, struct gpu_chunk *ret);
void gpu_ipc_release(struct gpu_device *device, struct gpu_chunk *chunk);

#endif
