/* Choosing devices: by number as this process counts them, or by UUID as nvidia-smi shows it. */
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
static int usable(const struct gpu_device_info *i)
{
    return !i->exports ? -PKV_ERR_GPU_EXPORT : !i->registers ? -PKV_ERR_GPU_REGISTER : 0;
}

static bool named(const struct gpu_device_info *i, const char *name, size_t length)
{
    char uuid[DEVICES_UUID_TEXT], number[16];
    devices_uuid_text(i->uuid, uuid);
    int n = snprintf(number, sizeof(number), "%u", i->ordinal);
    return (length == (size_t)n && !strncmp(number, name, length)) ||
           (length > 4 && length < sizeof(uuid) && !strncasecmp(uuid, name, length)); /* the start of a UUID, with GPU- */
}

static int add(struct devices *d, const struct gpu_device_info *i)
{
    int r = usable(i);
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
static int add_named(struct devices *d, uint32_t present, const char *name, size_t length)
{
    struct gpu_device_info i;
    bool all = length == 3 && !strncmp(name, "all", 3), first = !length, found = false;
    int r = 0;
    for (uint32_t n = 0; n < present && !r; n++) {
        if (gpu_device_probe(n, &i) || (first && (found || usable(&i))) || (!first && !all && !named(&i, name, length)))
            continue;
        found = true;
        r = add(d, &i);
    }
    return r ? r : found ? 0 : -PKV_ERR_GPU_NONE;
}

static int open_all(struct devices *d, const char *names)
{
    uint32_t present = 0;
    int r = gpu_device_count(&present);
    for (const char *at = names; !r; at++) {
        size_t length = strcspn(at, ",");
        r = add_named(d, present, at, length);
        at += length;
        if (!*at)
            break;
    }
    return r;
}

int devices_open(struct devices *d, const char *backend, const char *names)
{
    *d = (struct devices){.count = 0};
    if (!strcmp(backend, "host"))
        return 0;
    int r = open_all(d, names);
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
