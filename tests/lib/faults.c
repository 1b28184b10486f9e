/* The faults' file lives in memory: its name is that of a descriptor of this process. */
#include "tests/lib/faults.h"

#include "tests/lib/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

struct fake_faults *test_faults(void)
{
    static struct fake_faults *faults;
    if (faults)
        return faults;
    char path[64];
    int fd = memfd_create("faults", 0);
    const char *module = getenv("PIVOTKV_FAKE_MODULE");
    assert_true(fd >= 0 && ftruncate(fd, sizeof(*faults)) == 0 && module);
    void *p = mmap(NULL, sizeof(*faults), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(p != MAP_FAILED);
    faults = p;
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)getpid(), fd);
    setenv("PIVOTKV_FAKE_FAULTS", path, 1);
    setenv("PIVOTKV_CUDA_MODULE", module, 1);
    return faults;
}
