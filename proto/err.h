/* Errors: one row each gives the id, the errno and the sentence that names the cause and the remedy. Ids cross the
 * wire; the errno is what functions return (negative). */
#ifndef PROTO_ERR_H
#define PROTO_ERR_H

#include "proto/base.h"

/* X(NAME, errno, sentence) */
#define PKV_ERRORS(X)                                                                                                        \
    X(OK, 0, "no error")                                                                                                     \
    X(INVALID, EINVAL, "an argument is out of its range; see the declaration in pivotkv.h")                                  \
    X(RESERVED, EINVAL, "a reserved field is not zero: client and daemon disagree about the protocol; use one version")      \
    X(UNKNOWN_OP, ENOSYS, "the daemon does not know this operation: upgrade the daemon")                                     \
    X(VERSION, EPROTO, "client and daemon speak different protocol versions: install the same version of both")              \
    X(FEATURE, EPROTO, "the other side needs a feature that this side lacks: upgrade the older one")                         \
    X(GEOMETRY, EINVAL, "unsupported geometry: head_dim 64, 96, 128 or 256; q_heads a multiple (1 to 16) of kv_heads")       \
    X(DTYPE, EINVAL, "unknown dtype: use f32, f16 or bf16")                                                                  \
    X(SCHEME, EINVAL, "unknown signature scheme: use sign, code, linear, hash or none")                                      \
    X(SIG_BITS, EINVAL, "signature bits must be a multiple of 32 between 32 and 256 that the scheme can make; with none, 0") \
    X(BUDGET, EINVAL, "k must be at least 1 and at most 65536")                                                              \
    X(BUDGET_LENGTH, ERANGE, "k is above the sequence's length: use a smaller k, or dense attention")                        \
    X(SHAPE, EINVAL, "the number of tokens, queries or sequences is zero or above its limit in limits.h")                    \
    X(NOT_FINITE, EDOM, "q or k holds NaN or infinity: nothing was written; find the layer that made it")                    \
    X(LENGTH, EOVERFLOW, "the sequence would grow beyond its max_tokens: create it with a larger max_tokens")                \
    X(SEQS_FULL, EMFILE, "too many sequences: close some, or start more daemons")                                            \
    X(WORKERS_FULL, EUSERS, "too many workers are attached: close some, or start more daemons")                              \
    X(MODELS_FULL, EMFILE, "too many models: restart the daemon without the old ones")                                       \
    X(TENANTS_FULL, EMFILE, "too many tenants for one daemon")                                                               \
    X(TABLE_FULL, ENOMEM, "no room for the block table: create sequences with a smaller max_tokens")                         \
    X(POOL_FULL, ENOSPC, "the pool is full and nothing in it can be dropped in time: raise pool-bytes, or close sequences")  \
    X(ARENA_FULL, ENOMEM, "the arena is full: raise arena-bytes, or close sequences")                                        \
    X(BLOCK_TOO_LARGE, E2BIG, "a block of this model is larger than a chunk: raise pool-bytes, arena-bytes or chunk-bytes")  \
    X(STALE, ESTALE, "the handle names a sequence that is gone: it was closed or destroyed")                                 \
    X(NO_SEQ, ENOENT, "no such sequence for this tenant")                                                                    \
    X(NOT_OPEN, EBADF, "this worker has not opened the sequence")                                                            \
    X(OPEN_TWICE, EALREADY, "this connection has the sequence open already: use that handle, or fork the sequence")          \
    X(NOT_WRITER, EACCES, "another worker writes this sequence: fork it to write")                                           \
    X(NOT_GRANTED, EPERM, "the block was not granted to this worker, or is sealed already")                                  \
    X(MODEL_MISMATCH, ENOTUNIQ, "the model's name is registered with another geometry, scheme or weights: use another name") \
    X(NO_MODEL, ENXIO, "no such model: open the model first")                                                                \
    X(STATE_EXISTS, EEXIST, "the model has its signature state already: fetch it and use that one")                          \
    X(NO_STATE, ENODATA, "the model has no signature state yet")                                                             \
    X(RANGE, EFAULT, "an offset or length lies outside the data area")                                                       \
    X(DATA_SMALL, EMSGSIZE, "the data area is too small for this call: connect with a larger data_bytes, or a smaller k")    \
    X(RING_FULL, EAGAIN, "the submission ring is full: reap completions first")                                              \
    X(TIMEOUT, ETIMEDOUT, "the daemon did not answer in time: see `pivotkv doctor`")                                         \
    X(DAEMON_GONE, ECONNRESET, "the daemon is gone: start it again and reconnect; unparked sequences are lost")              \
    X(REFUSED, ECONNREFUSED, "no daemon listens on the socket: start pivotkvd, or check the path")                           \
    X(SOCKET_PATH, ENAMETOOLONG, "the socket path is longer than a unix socket allows (107 bytes): use a shorter one")       \
    X(SOCKET_OWNER, EPERM, "the socket belongs to another user: use your own daemon's socket")                               \
    X(IN_USE, EADDRINUSE, "another daemon serves this socket: stop it, or choose another path")                              \
    X(TENANT, EPERM, "the object belongs to another tenant")                                                                 \
    X(CHECKSUM, EBADMSG, "a block of it failed its checksum: CPU memory is damaged; truncate before it, or prefill again")   \
    X(FILE_FORMAT, EBADMSG, "the weights file is damaged or not safetensors: make it again")                                 \
    X(FILE_FIT, EMEDIUMTYPE, "the weights file lacks a tensor of this scheme, or has one of another shape for this model")   \
    X(FILE_SCHEME, EMEDIUMTYPE, "the weights file is for another signature scheme: open the model with that one")            \
    X(FILE_GEOMETRY, EMEDIUMTYPE, "the weights file is for a model with other layers, heads or head_dim: make one for this") \
    X(FILE_BITS, EMEDIUMTYPE, "the weights file makes signatures of another size: open the model with the file's bits")      \
    X(FILE_OPEN, ENOENT, "the weights file cannot be opened: check the path and its permissions")                            \
    X(FILE_NEEDED, EDESTADDRREQ, "this signature scheme needs a file of weights: convert or train one, or use code")         \
    X(LAPACK, EOPNOTSUPP, "this build has no LAPACK, so code cannot calibrate itself: give a file, or build with OpenBLAS")  \
    X(UNSUPPORTED, EOPNOTSUPP, "this build or backend cannot do that")                                                       \
    X(SERVED_ONLY, EOPNOTSUPP, "the call needs the pool mapped: connect without PKV_CONNECT_SERVED")                         \
    X(BUSY, EBUSY, "the sequence has an operation in flight, or is shared: wait for it, or fork")                            \
    X(BATCH_STALE, ESTALE, "signatures of the batch's sequences are made in another way now: close it, open it again")       \
    X(NO_MEMORY, ENOMEM, "out of memory on this side")                                                                       \
    X(SYSTEM, EIO, "a system call failed; the daemon's log names it")                                                        \
    X(GPU_MODULE, ENOPKG, "libpivotkv-cuda.so was not found, or is of another release: see `pivotkv doctor`")                \
    X(GPU_NONE, ENODEV, "no CUDA device or driver: see `pivotkv doctor`, or use the host backend")                           \
    X(GPU_DEVICE, ENODEV, "no access to the GPU that holds the cache: see CUDA_VISIBLE_DEVICES, or use PKV_CONNECT_SERVED")  \
    X(GPU_MEMORY, ENOMEM, "the GPU has not enough free memory: lower pool-bytes, or end what else uses it")                  \
    X(GPU_EXPORT, EOPNOTSUPP, "this GPU cannot share memory that way (VMM, cudaIpc): see --share, or use the host one")      \
    X(GPU_REGISTER, EOPNOTSUPP, "the GPU's driver cannot pin this memory: raise the locked-memory limit; see the doctor")    \
    X(BACKEND, EPROTO, "the daemon's pool is not on that backend: start pivotkvd with another --backend, or name none")      \
    X(GPU_IPC, EOPNOTSUPP, "the daemon's GPU memory (cudaIpc) cannot be opened here: share its PID and IPC namespaces")      \
    X(GPU_TENANT, EPERM, "with cudaIpc one tenant maps the pool, not this one: be served, or start pivotkvd --share ipc")    \
    X(GPU_LOST, ENOTRECOVERABLE, "the GPU met a fault that ends all work on it: restart the process; the kernel log has more")

enum pkv_err {
#define PKV_ERR_ENUM(NAME, number, sentence) PKV_ERR_##NAME,
    PKV_ERRORS(PKV_ERR_ENUM)
#undef PKV_ERR_ENUM
        PKV_ERR_COUNT
};

PKV_EXTERN_C_BEGIN

/* -errno of an error id; -EIO for an id that this version does not know. */
int pkv_err_status(uint32_t err);

/* "POOL_FULL" and the sentence; never NULL. */
const char *pkv_err_name(uint32_t err);
const char *pkv_err_text(uint32_t err);

PKV_EXTERN_C_END

#endif
