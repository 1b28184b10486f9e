/* The error table: every id has an errno, a name and a sentence; unknown ids are survived. */
#include "tests/lib/test.h"

#include "proto/err.h"

#include <errno.h>
#include <string.h>

static void test_every_error_is_whole(void **state)
{
    (void)state;
    assert_int_equal(pkv_err_status(PKV_ERR_OK), 0);
    for (uint32_t e = 1; e < PKV_ERR_COUNT; e++) {
        assert_true(pkv_err_status(e) < 0);
        assert_true(strlen(pkv_err_name(e)) > 1);
        assert_true(strlen(pkv_err_text(e)) > 10);
        for (uint32_t other = 0; other < e; other++)
            assert_string_not_equal(pkv_err_text(e), pkv_err_text(other));
    }
}

static void test_unknown_error(void **state)
{
    (void)state;
    assert_int_equal(pkv_err_status(PKV_ERR_COUNT), -EIO);
    assert_string_equal(pkv_err_name(UINT32_MAX), "UNKNOWN");
    assert_non_null(strstr(pkv_err_text(UINT32_MAX), "upgrade"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_error_is_whole),
        cmocka_unit_test(test_unknown_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
