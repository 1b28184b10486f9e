/* Finding the CUDA module: what is no module, or none at all, is told in a sentence and costs nothing else. */
#include "gpu/module.h"
#include "tests/lib/test.h"

#include <stdlib.h>
#include <string.h>

static void assert_refused(const char *path, const char *word)
{
    const struct gpu_module *m = NULL;
    char why[512] = "";
    assert_false(gpu_module_load(path, &m, why, sizeof(why)));
    assert_null(m);
    if (!strstr(why, word))
        fail_msg("%s: %s", path, why);
}

static void test_no_module(void **state)
{
    (void)state;
    assert_refused("/nonexistent/libpivotkv-cuda.so", "No such file");
    assert_refused("/proc/self/maps", "invalid ELF header");
    assert_refused("libm.so.6", GPU_MODULE_SYMBOL);
    assert_refused(getenv("PIVOTKV_OTHER_MODULE"), "of another release");
}

/* As a program without the module meets it: the named file is the only one that is looked for. */
static void test_door_without_module(void **state)
{
    (void)state;
    uint32_t count = 77;
    struct gpu_device_info info;
    struct gpu_device *device = NULL;
    setenv("PIVOTKV_CUDA_MODULE", "/nonexistent/module.so", 1);
    assert_null(gpu_module_get());
    assert_non_null(strstr(gpu_module_why(), "/nonexistent/module.so"));
    assert_int_equal(gpu_device_count(&count), -PKV_ERR_GPU_MODULE);
    assert_int_equal(count, 77);
    assert_int_equal(gpu_device_probe(0, &info), -PKV_ERR_GPU_MODULE);
    assert_int_equal(gpu_device_open(0, &device), -PKV_ERR_GPU_MODULE);
    assert_int_equal(gpu_device_find((const uint8_t[PKV_UUID_BYTES]){1}, &count), -PKV_ERR_GPU_MODULE);
    gpu_device_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_module),
        cmocka_unit_test(test_door_without_module),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
