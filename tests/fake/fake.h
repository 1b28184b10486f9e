/* What the fake module's files share. */
#ifndef TESTS_FAKE_FAKE_H
#define TESTS_FAKE_FAKE_H

#include "gpu/module.h"
#include "tests/fake/faults.h"

/* The faults of this process and of those beside it; never NULL. */
struct fake_faults *fake_faults(void);
static inline uint32_t fake_get(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

extern const struct gpu_device_verbs fake_device_verbs;

#endif
