/* A bench for a device: a stream, graphs, timed replays, random data, and the ceilings that figures are compared with. A door
 * of gpu, for benchmarks alone. Functions return 0 or -enum pkv_err. Owner: one thread. */
#ifndef GPU_LAB_H
#define GPU_LAB_H

#include "gpu/device.h"

PKV_EXTERN_C_BEGIN

struct gpu_lab;

/* -PKV_ERR_UNSUPPORTED: the module has none. */
int gpu_lab_open(struct gpu_device *device, struct gpu_lab **ret);
void gpu_lab_close(struct gpu_lab *lab); /* frees what it allocated; NULL is allowed */
void *gpu_lab_stream(struct gpu_lab *lab);

/* Device memory, freed with the lab. */
int gpu_lab_take(struct gpu_lab *lab, uint64_t bytes, void **ret);
/* `count` Gaussian bf16 numbers: of `seed`, plus `noise` times others of `noise_seed`. In the stream. */
int gpu_lab_fill(struct gpu_lab *lab, void *to, uint64_t count, uint32_t seed, uint32_t noise_seed, float noise);
int gpu_lab_wait(struct gpu_lab *lab);

/* What is launched into the stream between the two becomes a graph. */
int gpu_lab_capture(struct gpu_lab *lab);
int gpu_lab_captured(struct gpu_lab *lab, void **ret_graph);
/* Launches it and waits for it: microseconds on the device. */
int gpu_lab_replay(struct gpu_lab *lab, void *graph, double *ret_us);
void gpu_lab_graph_free(struct gpu_lab *lab, void *graph);

/* Ceilings, bytes per second: a plain read of device memory; copies between it and pinned CPU memory, alone or while as many go
 * the other way. */
int gpu_lab_read_peak(struct gpu_lab *lab, double *ret);
int gpu_lab_copy_peak(struct gpu_lab *lab, bool to_device, bool beside, double *ret);
/* A plain gather out of `span` bytes of pinned CPU memory: so many rows, ascending, in runs of `run` neighbours. */
int gpu_lab_gather(struct gpu_lab *lab, uint64_t span, uint32_t rows, uint32_t row_bytes, uint32_t run, double *ret);

PKV_EXTERN_C_END

#endif
