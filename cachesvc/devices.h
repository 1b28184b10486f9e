/* The GPUs that the daemon serves, as its settings name them. Owner: the loop's thread; the devices may be used by all. */
#ifndef CACHESVC_DEVICES_H
#define CACHESVC_DEVICES_H

#include "gpu/device.h"

#define DEVICES_MAX       8u
#define DEVICES_UUID_TEXT 41u /* "GPU-" and 36 characters, NUL included */

struct devices {
    struct gpu_device *device[DEVICES_MAX];
    uint32_t count; /* 0: the pool is CPU memory */
    enum gpu_share share;
    bool one_tenant; /* only one may map what is shared so */
};

/* auto: VMM; where a device cannot, IPC for one tenant. */
enum devices_share { DEVICES_SHARE_AUTO, DEVICES_SHARE_VMM, DEVICES_SHARE_IPC };

/* `backend`: "host" opens none; "cuda" opens those that `names` says, or fails after saying why (-errno); "auto" as cuda where
 * that can be had, else as host. `names`: "" the first one that can be used, "all", or ordinals and UUIDs with commas between.
 */
int devices_open(struct devices *devices, const char *backend, const char *names, enum devices_share share);
void devices_close(struct devices *devices);
bool devices_lost(const struct devices *devices);
/* DEVICES_MAX: none of them. */
uint32_t devices_find(const struct devices *devices, const uint8_t uuid[PKV_UUID_BYTES]);
void devices_uuid_text(const uint8_t uuid[PKV_UUID_BYTES], char ret[DEVICES_UUID_TEXT]);

#endif
