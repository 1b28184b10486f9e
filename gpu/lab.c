/* The door of benchmarks: the module's verbs. */
#include "gpu/lab.h"

#include "gpu/module.h"

static const struct gpu_lab_verbs *verbs(void)
{
    return gpu_module_get()->lab; /* there is a lab: there is a module */
}

int gpu_lab_open(struct gpu_device *device, struct gpu_lab **ret)
{
    const struct gpu_module *m = gpu_module_get();
    return m && m->lab ? m->lab->open(device, ret) : -PKV_ERR_UNSUPPORTED;
}

void gpu_lab_close(struct gpu_lab *l)
{
    if (l)
        verbs()->close(l);
}

void *gpu_lab_stream(struct gpu_lab *l)
{
    return verbs()->stream(l);
}

int gpu_lab_take(struct gpu_lab *l, uint64_t bytes, void **ret)
{
    return verbs()->take(l, bytes, ret);
}

int gpu_lab_fill(struct gpu_lab *l, void *to, uint64_t count, uint32_t seed, uint32_t noise_seed, float noise)
{
    return verbs()->fill(l, to, count, seed, noise_seed, noise);
}

int gpu_lab_wait(struct gpu_lab *l)
{
    return verbs()->wait(l);
}

int gpu_lab_capture(struct gpu_lab *l)
{
    return verbs()->capture(l);
}

int gpu_lab_captured(struct gpu_lab *l, void **ret_graph)
{
    return verbs()->captured(l, ret_graph);
}

int gpu_lab_replay(struct gpu_lab *l, void *graph, double *ret_us)
{
    return verbs()->replay(l, graph, ret_us);
}

void gpu_lab_graph_free(struct gpu_lab *l, void *graph)
{
    verbs()->graph_free(l, graph);
}

int gpu_lab_read_peak(struct gpu_lab *l, double *ret)
{
    return verbs()->read_peak(l, ret);
}

int gpu_lab_gather(struct gpu_lab *l, uint64_t span, uint32_t rows, uint32_t row_bytes, uint32_t run, double *ret)
{
    return verbs()->gather(l, span, rows, row_bytes, run, ret);
}

int gpu_lab_copy_peak(struct gpu_lab *l, bool to_device, bool beside, double *ret)
{
    return verbs()->copy_peak(l, to_device, beside, ret);
}
