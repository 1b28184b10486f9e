/* Finding the module: $PIVOTKV_CUDA_MODULE alone where it is set; else beside the file that this code lies in (libpivotkv.so, a
 * program); there in the build tree; the folder that libraries were configured to be installed in, seen from bin/; at last
 * wherever the dynamic linker looks.
 *
 * Failures, each with its sentence: no such file; a file without the symbol; another release; no libcuda behind it (then the
 * module is there and counts no devices). */
#include "gpu/module.h"

#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const struct gpu_module *module;
static char why[512];

bool gpu_module_load(const char *path, const struct gpu_module **ret, char *ret_why, size_t room)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(ret_why, room, "%s", dlerror());
        return false;
    }
    gpu_module_entry *entry;
    *(void **)(&entry) = dlsym(library, GPU_MODULE_SYMBOL);
    const struct gpu_module *m = entry ? entry() : NULL;
    if (!m) {
        snprintf(ret_why, room, "%s is no module of pivotkv: it has no %s", path, GPU_MODULE_SYMBOL);
        return false;
    }
    if (m->version != GPU_MODULE_VERSION || m->bytes != sizeof(*m) || strcmp(m->release, PKV_VERSION)) {
        snprintf(ret_why, room, "%s is of another release than this library (%s): install both from one build", path,
                 PKV_VERSION);
        return false;
    }
    snprintf(ret_why, room, "%s", path);
    *ret = m;
    return true;
}

/* The folder of `file`, resolved; false where it has none. */
static bool folder_of(const char *file, char ret[PATH_MAX])
{
    if (!file || !realpath(file, ret))
        return false;
    char *slash = strrchr(ret, '/');
    if (!slash)
        return false;
    *slash = 0;
    return true;
}

static bool try_in(const char *file)
{
    static const char *const places[] = {"", PKV_LIBDIR_FROM_BIN, "../gpu/cuda/", "../../gpu/cuda/"};
    char folder[PATH_MAX], path[PATH_MAX + 64];
    if (!folder_of(file, folder))
        return false;
    for (size_t i = 0; i < PKV_ARRAY_LEN(places); i++) {
        snprintf(path, sizeof(path), "%s/%s%s", folder, places[i], GPU_MODULE_FILE);
        if (access(path, R_OK) == 0)
            return gpu_module_load(path, &module, why, sizeof(why));
    }
    return false;
}

static void find(void)
{
    const char *named = getenv("PIVOTKV_CUDA_MODULE");
    Dl_info here = {0};
    if (named && named[0]) {
        gpu_module_load(named, &module, why, sizeof(why));
        return;
    }
    if (dladdr((const void *)&once, &here) && try_in(here.dli_fname))
        return;
    if (why[0] || try_in("/proc/self/exe") || why[0])
        return;
    gpu_module_load(GPU_MODULE_FILE, &module, why, sizeof(why));
}

const struct gpu_module *gpu_module_get(void)
{
    pthread_once(&once, find);
    return module;
}

const char *gpu_module_why(void)
{
    pthread_once(&once, find);
    return why;
}
