/* Choosing devices: by number as this process counts them, or by UUID as nvidia-smi shows it; and how their memory is shared.
 *
 * By VMM descriptors where that works: what a device says of itself may not hold in a sandbox, so `auto` tries it. What cudaIpc
 * does not give (gpu/ipc.h) counts most between tenants, so without being told to the daemon lets one tenant map the pool; the
 * workers of the others are served (message.c). */
#include "cachesvc/devices.h"

#include "cachesvc/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void devices_uuid_text(const uint8_t u[PKV_UUID_BYTES], char ret[DEVICES_UUID_TEXT])
{
    char *at = ret + snprintf(ret, DEVICES_UUID_TEXT, "GPU-");
    for (uint32_t i = 0; i < PKV_UUID_BYTES; i++)
        at += snprintf(at, (size_t)(ret + DEVICES_UUID_TEXT - at), "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "",
                       u[i]);
}

/* Good for a pool: what it lacks is said where the operator asked for it. */
static int usable(const struct gpu_device_info *i, enum devices_share share)
{
    bool exports = (i->exports && share != DEVICES_SHARE_IPC) || (i->exports_ipc && share != DEVICES_SHARE_VMM);
    return !exports ? -PKV_ERR_GPU_EXPORT : !i->registers ? -PKV_ERR_GPU_REGISTER : 0;
}

static bool named(const struct gpu_device_info *i, const char *name, size_t length)
{
    char uuid[DEVICES_UUID_TEXT], number[16];
    devices_uuid_text(i->uuid, uuid);
    int n = snprintf(number, sizeof(number), "%u", i->ordinal);
    return (length == (size_t)n && !strncmp(number, name, length)) ||
           (length > 4 && length < sizeof(uuid) && !strncasecmp(uuid, name, length)); /* the start of a UUID, with GPU- */
}

static int add(struct devices *d, const struct gpu_device_info *i, enum devices_share share)
{
    int r = usable(i, share);
    for (uint32_t n = 0; n < d->count; n++)
        if (!memcmp(gpu_device_about(d->device[n])->uuid, i->uuid, PKV_UUID_BYTES))
            return 0; /* named twice */
    if (!r && d->count == DEVICES_MAX)
        r = -PKV_ERR_INVALID;
    r = r ? r : gpu_device_open(i->ordinal, &d->device[d->count]);
    d->count += !r;
    return r;
}

/* Those that one name stands for; -PKV_ERR_GPU_NONE: there is no such device. */
static int add_named(struct devices *d, uint32_t present, const char *name, size_t length, enum devices_share share)
{
    struct gpu_device_info i;
    bool all = length == 3 && !strncmp(name, "all", 3), first = !length, found = false;
    int r = 0;
    for (uint32_t n = 0; n < present && !r; n++) {
        if (gpu_device_probe(n, &i) || (first && (found || usable(&i, share))) || (!first && !all && !named(&i, name, length)))
            continue;
        found = true;
        r = add(d, &i, share);
    }
    return r ? r : found ? 0 : -PKV_ERR_GPU_NONE;
}

static int open_all(struct devices *d, const char *names, enum devices_share share)
{
    uint32_t present = 0;
    int r = gpu_device_count(&present);
    for (const char *at = names; !r; at++) {
        size_t length = strcspn(at, ",");
        r = add_named(d, present, at, length, share);
        at += length;
        if (!*at)
            break;
    }
    return r;
}

/* One small chunk shared in that way, on each device. */
static int try_share(const struct devices *d, enum gpu_share share)
{
    struct gpu_chunk c;
    int r = 0;
    for (uint32_t i = 0; i < d->count && !r; i++) {
        r = gpu_device_chunk_create(d->device[i], gpu_device_about(d->device[i])->grain, share, &c);
        if (!r)
            gpu_device_chunk_release(d->device[i], &c);
    }
    return r;
}

static int share_choose(struct devices *d, enum devices_share share)
{
    d->share = share == DEVICES_SHARE_IPC ? GPU_SHARE_IPC : GPU_SHARE_VMM;
    int r = try_share(d, d->share);
    if (r == -PKV_ERR_GPU_EXPORT && share == DEVICES_SHARE_AUTO) {
        d->share = GPU_SHARE_IPC, d->one_tenant = true;
        r = try_share(d, d->share);
    }
    if (!r && d->share == GPU_SHARE_IPC)
        log_warn(
            "GPU memory is shared by cudaIpc handles%s: stray writes of workers are not stopped, and the pool's memory goes "
            "with this process; %s",
            d->one_tenant ? ", as VMM descriptors are not to be had" : "",
            d->one_tenant ? "one tenant maps it, others are served; --share ipc lets all map it" : "all tenants map it");
    return r == -PKV_ERR_GPU_EXPORT ? r : 0; /* what else is wrong shows when the pool is made */
}

int devices_open(struct devices *d, const char *backend, const char *names, enum devices_share share)
{
    *d = (struct devices){.count = 0};
    if (!strcmp(backend, "host"))
        return 0;
    int r = open_all(d, names, share);
    r = r ? r : share_choose(d, share);
    if (!r)
        return 0;
    devices_close(d);
    const char *why = r == -PKV_ERR_GPU_MODULE ? gpu_module_why() : names;
    if (!strcmp(backend, "auto") && !names[0]) {
        log_info("no CUDA backend (%s%s%s): the pool is CPU memory", pkv_err_text((uint32_t)-r), why[0] ? ": " : "", why);
        return 0;
    }
    log_error("backend cuda: %s%s%s", pkv_err_text((uint32_t)-r), why[0] ? ": " : "", why);
    return pkv_err_status((uint32_t)-r);
}

void devices_close(struct devices *d)
{
    for (uint32_t i = 0; i < d->count; i++)
        gpu_device_close(d->device[i]);
    d->count = 0;
}

bool devices_lost(const struct devices *d)
{
    bool lost = false;
    for (uint32_t i = 0; i < d->count; i++)
        lost |= gpu_device_lost(d->device[i]);
    return lost;
}

uint32_t devices_find(const struct devices *d, const uint8_t uuid[PKV_UUID_BYTES])
{
    for (uint32_t i = 0; i < d->count; i++)
        if (!memcmp(gpu_device_about(d->device[i])->uuid, uuid, PKV_UUID_BYTES))
            return i;
    return DEVICES_MAX;
}
