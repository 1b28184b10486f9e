/* What the fake module's files share. */
#ifndef TESTS_FAKE_FAKE_H
#define TESTS_FAKE_FAKE_H

#include "gpu/ipc.h"
#include "gpu/module.h"
#include "tests/fake/faults.h"

#define FAKE_CHUNK_MAX (1ull << 30)

/* The faults of this process and of those beside it; never NULL. */
struct fake_faults *fake_faults(void);
static inline uint32_t fake_get(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline void fake_add(uint32_t *word, uint32_t n)
{
    __atomic_fetch_add(word, n, __ATOMIC_ACQ_REL);
}

/* ipc.c */
int fake_ipc_take(struct gpu_device *device, uint64_t bytes, uint64_t *ret_at, uint8_t ret_handle[]);
int fake_ipc_open(struct gpu_device *device, const uint8_t handle[], uint64_t bytes, uint64_t *ret_at);
void fake_ipc_give(struct gpu_device *device, uint64_t at, bool own);

extern const struct gpu_device_verbs fake_device_verbs;

#endif
