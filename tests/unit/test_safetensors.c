/* Files that lie about themselves, each in its own way, and good files with one byte changed. */
#include "gpu/safetensors.h"
#include "tests/lib/tensors.h"
#include "tests/lib/test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int open_and_close(char *path)
{
    struct safetensors st;
    uint8_t digest[PKV_DIGEST_BYTES];
    int r = safetensors_open(path, &st, digest);
    if (!r)
        safetensors_close(&st);
    unlink(path);
    free(path);
    return r;
}

static int header(const char *text, uint64_t data_bytes)
{
    static const char zeros[4096];
    return open_and_close(test_tensor_file(strlen(text), text, zeros, data_bytes));
}

#define TENSOR(dtype, shape, begin, end) "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"

static void test_lies(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t bytes;
        int r;
    } cases[] = {
        {"{\"a\":" TENSOR("F32", "[2,3]", "0", "24") "}", 24, 0},
        {"{\"a\":" TENSOR("F16", "[2,3]", "0", "12") ",\"b\":" TENSOR("U8", "[3]", "12", "15") "}", 15, 0},
        {"{}", 0, 0},
        {"{\"a\":" TENSOR("F32", "[2,3]", "0", "24") "}", 23, -PKV_ERR_FILE_FORMAT},   /* truncated */
        {"{\"a\":" TENSOR("F32", "[2,3]", "0", "24") "}", 25, -PKV_ERR_FILE_FORMAT},   /* more than it says */
        {"{\"a\":" TENSOR("F32", "[2,4]", "0", "24") "}", 24, -PKV_ERR_FILE_FORMAT},   /* shape against offsets */
        {"{\"a\":" TENSOR("F16", "[2,3]", "0", "24") "}", 24, -PKV_ERR_FILE_FORMAT},   /* dtype against offsets */
        {"{\"a\":" TENSOR("I64", "[3]", "0", "24") "}", 24, -PKV_ERR_FILE_FORMAT},     /* a dtype we do not read */
        {"{\"a\":" TENSOR("F32", "[2,3]", "24", "0") "}", 24, -PKV_ERR_FILE_FORMAT},   /* backwards */
        {"{\"a\":" TENSOR("F32", "[2,3]", "-24", "0") "}", 24, -PKV_ERR_FILE_FORMAT},  /* below zero */
        {"{\"a\":" TENSOR("F32", "[-2,-3]", "0", "24") "}", 24, -PKV_ERR_FILE_FORMAT}, /* a negative shape */
        {"{\"a\":" TENSOR("F32", "[4294967296,4294967296]", "0", "0") "}", 0, -PKV_ERR_FILE_FORMAT}, /* overflow */
        {"{\"a\":" TENSOR("F32", "[1e3]", "0", "4000") "}", 4000, -PKV_ERR_FILE_FORMAT},             /* not an integer */
        {"{\"a\":" TENSOR("F32", "[2]", "0", "8") ",\"b\":" TENSOR("F32", "[2]", "4", "12") "}", 12, -PKV_ERR_FILE_FORMAT},
        {"{\"a\":" TENSOR("F32", "[1]", "0", "4") ",\"b\":" TENSOR("F32", "[1]", "8", "12") "}", 12, -PKV_ERR_FILE_FORMAT},
        {"{\"a\":" TENSOR("F32", "[1]", "0", "4") ",\"a\":" TENSOR("F32", "[1]", "4", "8") "}", 8, -PKV_ERR_FILE_FORMAT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, -PKV_ERR_FILE_FORMAT},
        {"{\"a\":7}", 0, -PKV_ERR_FILE_FORMAT},
        {"[]", 0, -PKV_ERR_FILE_FORMAT},
        {"{\"a\":", 0, -PKV_ERR_FILE_FORMAT},
        {"", 0, -PKV_ERR_FILE_FORMAT},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int r = header(cases[i].text, cases[i].bytes);
        if (r != cases[i].r)
            fail_msg("%s: %d, not %d", cases[i].text, r, cases[i].r);
    }
    struct safetensors st;
    uint8_t digest[PKV_DIGEST_BYTES];
    assert_int_equal(safetensors_open("/nonexistent/file", &st, digest), -PKV_ERR_FILE_OPEN);
    assert_int_equal(safetensors_open("/tmp", &st, digest), -PKV_ERR_FILE_OPEN);
    assert_int_equal(open_and_close(test_tensor_file(1000, "{}", NULL, 0)), -PKV_ERR_FILE_FORMAT); /* header beyond the file */
    assert_int_equal(open_and_close(test_tensor_file(UINT64_MAX, "{}", NULL, 0)), -PKV_ERR_FILE_FORMAT);
    char *small = test_tensor_file(2, "{}", NULL, 0);
    assert_int_equal(truncate(small, 5), 0);
    assert_int_equal(open_and_close(small), -PKV_ERR_FILE_FORMAT);
}

static void test_values(void **state)
{
    (void)state;
    float a[6] = {1, 2, 3, 4, 5, 6}, bad[2] = {1, NAN}, *read = NULL;
    struct test_tensor tensors[] = {{"a", 2, {2, 3}, a}, {"bad", 1, {2}, bad}};
    char *path = test_tensors("\"unit\":\"2\"", tensors, 2);
    struct safetensors st;
    uint8_t digest[PKV_DIGEST_BYTES], again[PKV_DIGEST_BYTES];
    assert_int_equal(safetensors_open(path, &st, digest), 0);
    assert_true(safetensors_has(&st, "a") && !safetensors_has(&st, "c") && !safetensors_has(&st, "__metadata__"));
    assert_string_equal(safetensors_meta(&st, "unit"), "2");
    assert_null(safetensors_meta(&st, "none"));
    assert_int_equal(safetensors_size(&st, "a", 1), 3);
    assert_int_equal(safetensors_size(&st, "a", 2), 0);
    assert_int_equal(safetensors_floats(&st, "a", (uint64_t[]){2, 3}, 2, &read), 0);
    assert_memory_equal(read, a, sizeof(a));
    free(read);
    assert_int_equal(safetensors_floats(&st, "a", (uint64_t[]){3, 2}, 2, &read), -PKV_ERR_FILE_FIT);
    assert_int_equal(safetensors_floats(&st, "a", (uint64_t[]){6}, 1, &read), -PKV_ERR_FILE_FIT);
    assert_int_equal(safetensors_floats(&st, "c", (uint64_t[]){6}, 1, &read), -PKV_ERR_FILE_FIT);
    assert_int_equal(safetensors_floats(&st, "bad", (uint64_t[]){2}, 1, &read), -PKV_ERR_FILE_FORMAT);
    safetensors_close(&st);
    assert_int_equal(safetensors_open(path, &st, again), 0);
    assert_memory_equal(digest, again, sizeof(digest));
    safetensors_close(&st);
    unlink(path), free(path);
}

/* Whatever one byte does, the reader stays inside of the file. */
static void test_every_byte(void **state)
{
    (void)state;
    const char *text = "{\"a\":" TENSOR("F32", "[2,3]", "0", "24") ",\"b\":" TENSOR("U8", "[4]", "24", "28") "}";
    char data[28] = {0}, changed[300];
    uint64_t seed = 4711, good = 0;
    size_t length = strlen(text);
    for (size_t i = 0; i < length; i++) {
        for (int n = 0; n < 6; n++) {
            memcpy(changed, text, length + 1);
            seed = seed * 6364136223846793005ull + 1442695040888963407ull;
            changed[i] = n < 3 ? (char)('0' + (seed >> 40) % 10) : (char)(1 + (seed >> 40) % 255);
            char *path = test_tensor_file(length, changed, data, sizeof(data));
            struct safetensors st;
            uint8_t digest[PKV_DIGEST_BYTES];
            if (safetensors_open(path, &st, digest) == 0) {
                float *read = NULL;
                good++;
                if (safetensors_floats(&st, "a", (uint64_t[]){2, 3}, 2, &read) == 0)
                    free(read);
                safetensors_close(&st);
            }
            unlink(path), free(path);
        }
    }
    assert_true(good > 0 && good < length * 6); /* names may change, sizes may not */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lies),
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_every_byte),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
