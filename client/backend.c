/* Which backend a connection has. The daemon's pool decides: on a GPU, direct mode needs that GPU in this process; where it is
 * not to be had, served mode does the same through the daemon. */
#include "client/internal.h"

#include <stdio.h>
#include <string.h>

static bool is(const char *backend, const char *name)
{
    return backend && !strcmp(backend, name);
}

int backend_offer(const struct pkv *kv, const struct pkv_options *o, struct pkv_hello *hello)
{
    if (o->backend && !is(o->backend, "host") && !is(o->backend, "cuda"))
        return -PKV_ERR_UNSUPPORTED;
    bool cuda = !kv->served && !is(o->backend, "host");
    hello->features = cuda ? PKV_FEATURES : PKV_FEATURES & ~PKV_FEATURE_CUDA;
    hello->required = is(o->backend, "cuda") && cuda ? PKV_FEATURE_CUDA : PKV_FEATURE_SERVED;
    struct gpu_device_info info;
    if (!cuda || !o->device)
        return 0;
    int r = gpu_device_probe(o->device - 1, &info);
    if (!r)
        memcpy(hello->device, info.uuid, sizeof(info.uuid));
    return r;
}

static int open_device(struct pkv *kv, const uint8_t uuid[PKV_UUID_BYTES], struct gpu_options *options)
{
    uint32_t ordinal = 0;
    kv->arena = calloc(PKV_CHUNKS_MAX, sizeof(*kv->arena));
    kv->imported = calloc(PKV_CHUNKS_MAX, sizeof(*kv->imported));
    int r = kv->arena && kv->imported ? gpu_device_find(uuid, &ordinal) : -PKV_ERR_NO_MEMORY;
    r = r ? r : gpu_device_open(ordinal, &kv->device);
    const struct gpu_device_info *i = r ? NULL : gpu_device_about(kv->device);
    r = r ? r : !i->exports && !i->exports_ipc ? -PKV_ERR_GPU_EXPORT : !i->registers_read_only ? -PKV_ERR_GPU_REGISTER : 0;
    options->backend = "cuda", options->device = kv->device;
    r = r ? r : gpu_open(options, &kv->gpu);
    if (!r)
        return 0;
    gpu_device_close(kv->device);
    kv->device = NULL;
    return r;
}

static void describe(struct pkv *kv, int why)
{
    const char *kernels = gpu_describe(kv->gpu);
    if (!kv->served)
        snprintf(kv->description, sizeof(kv->description), "direct on %s", kernels);
    else if (why)
        snprintf(kv->description, sizeof(kv->description), "served: %s; %s", pkv_err_text((uint32_t)-why), kernels);
    else
        snprintf(kv->description, sizeof(kv->description), "served; %s", kernels);
}

int backend_settle(struct pkv *kv, const struct pkv_options *o, const struct pkv_reply *reply)
{
    struct gpu_options options = {.isa = o->isa, .threads = o->threads};
    bool direct = reply->features & PKV_FEATURE_DIRECT, cuda = !kv->served && direct && reply->features & PKV_FEATURE_CUDA;
    int r = cuda ? open_device(kv, reply->device, &options) : 0, why = r;
    if (r && o->backend)
        return r;
    if (!cuda && !kv->served && !direct)
        why = reply->features & PKV_FEATURE_CUDA ? -PKV_ERR_GPU_TENANT : -PKV_ERR_BACKEND;
    if (why)
        kv->served = true;
    if (!kv->device) {
        options.backend = "host", options.device = NULL;
        r = gpu_open(&options, &kv->gpu);
    }
    if (!r)
        describe(kv, why);
    return r;
}

/* After the last chunk has been unmapped. */
void backend_close(struct pkv *kv)
{
    gpu_close(kv->gpu);
    gpu_device_close(kv->device);
    free(kv->arena);
    free(kv->imported);
}

const char *pkv_describe(const struct pkv *kv)
{
    return kv->description;
}
