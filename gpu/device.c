/* The door of device memory: the module's verbs, and what they have in common. */
#include "gpu/internal.h"
#include "gpu/ipc.h"
#include "gpu/module.h"

#include <string.h>
#include <time.h>

#define WAIT_NS  10000000000ull /* a copy that takes longer hangs */
#define SPIN_NS  50000ull
#define SLEEP_NS 20000

static const struct gpu_device_verbs *verbs(void)
{
    const struct gpu_module *m = gpu_module_get();
    return m ? m->device : NULL;
}

int gpu_device_count(uint32_t *ret)
{
    const struct gpu_device_verbs *v = verbs();
    return v ? v->count(ret) : -PKV_ERR_GPU_MODULE;
}

int gpu_device_probe(uint32_t ordinal, struct gpu_device_info *ret)
{
    const struct gpu_device_verbs *v = verbs();
    return v ? v->probe(ordinal, ret) : -PKV_ERR_GPU_MODULE;
}

int gpu_device_find(const uint8_t uuid[PKV_UUID_BYTES], uint32_t *ret_ordinal)
{
    struct gpu_device_info info;
    uint32_t count = 0;
    int r = gpu_device_count(&count);
    for (uint32_t i = 0; i < count && !r; i++) {
        if (gpu_device_probe(i, &info) || memcmp(info.uuid, uuid, PKV_UUID_BYTES))
            continue;
        *ret_ordinal = i;
        return 0;
    }
    return r ? r : -PKV_ERR_GPU_DEVICE;
}

int gpu_device_open(uint32_t ordinal, struct gpu_device **ret)
{
    const struct gpu_device_verbs *v = verbs();
    return v ? v->open(ordinal, ret) : -PKV_ERR_GPU_MODULE;
}

void gpu_device_close(struct gpu_device *d)
{
    if (d)
        d->verbs->close(d);
}

const struct gpu_device_info *gpu_device_about(const struct gpu_device *d)
{
    return &d->info;
}

bool gpu_device_lost(const struct gpu_device *d)
{
    return d->verbs->lost(d);
}

int gpu_device_chunk_create(struct gpu_device *d, uint64_t bytes, enum gpu_share share, struct gpu_chunk *ret)
{
    if (!bytes || bytes % d->info.grain)
        return -PKV_ERR_INVALID;
    if (share == GPU_SHARE_IPC)
        return d->info.exports_ipc ? gpu_ipc_create(d, bytes, ret) : -PKV_ERR_GPU_EXPORT;
    return d->info.exports ? d->verbs->chunk_create(d, bytes, ret) : -PKV_ERR_GPU_EXPORT;
}

int gpu_device_chunk_import(struct gpu_device *d, int fd, uint64_t bytes, bool writable, struct gpu_chunk *ret)
{
    if (!bytes || bytes % d->info.grain || fd < 0)
        return -PKV_ERR_INVALID;
    if (gpu_ipc_is_token(fd))
        return d->info.exports_ipc ? gpu_ipc_import(d, fd, bytes, writable, ret) : -PKV_ERR_GPU_EXPORT;
    return d->info.exports ? d->verbs->chunk_import(d, fd, bytes, writable, ret) : -PKV_ERR_GPU_EXPORT;
}

void gpu_device_chunk_release(struct gpu_device *d, struct gpu_chunk *chunk)
{
    if (chunk->bytes && chunk->share == GPU_SHARE_IPC)
        gpu_ipc_release(d, chunk);
    else if (chunk->bytes)
        d->verbs->chunk_release(d, chunk);
    *chunk = (struct gpu_chunk){.fd = -1};
}

int gpu_device_register(struct gpu_device *d, const void *base, uint64_t bytes, bool read_only, uint64_t *ret_address)
{
    bool can = read_only ? d->info.registers_read_only : d->info.registers;
    return can ? d->verbs->pin(d, base, bytes, read_only, ret_address) : -PKV_ERR_GPU_REGISTER;
}

void gpu_device_unregister(struct gpu_device *d, const void *base)
{
    d->verbs->unpin(d, base);
}

int gpu_device_copy(struct gpu_device *d, enum gpu_direction direction, const struct gpu_copy *copies, uint32_t count,
                    uint64_t *ret_ticket)
{
    return direction < GPU_DIRECTIONS && count ? d->verbs->copy(d, direction, copies, count, ret_ticket) : -PKV_ERR_INVALID;
}

int gpu_device_zero(struct gpu_device *d, uint64_t address, uint64_t bytes, uint64_t *ret_ticket)
{
    return d->verbs->zero(d, address, bytes, ret_ticket);
}

int gpu_device_poll(struct gpu_device *d, uint64_t ticket)
{
    return d->verbs->poll(d, ticket);
}

int gpu_device_wait(struct gpu_device *d, uint64_t ticket, uint64_t timeout_ns)
{
    uint64_t begin = gpu_now_ns();
    for (;;) {
        int r = d->verbs->poll(d, ticket);
        uint64_t waited = gpu_now_ns() - begin;
        if (r)
            return r < 0 ? r : 0;
        if (waited >= timeout_ns)
            return -PKV_ERR_TIMEOUT;
        if (waited > SPIN_NS)
            nanosleep(&(struct timespec){0, SLEEP_NS}, NULL);
    }
}

int gpu_device_copy_now(struct gpu_device *d, enum gpu_direction direction, uint64_t to, uint64_t from, uint64_t bytes)
{
    struct gpu_copy copy = {.to = to, .from = from, .bytes = bytes};
    uint64_t ticket;
    int r = gpu_device_copy(d, direction, &copy, 1, &ticket);
    return r ? r : gpu_device_wait(d, ticket, WAIT_NS);
}
