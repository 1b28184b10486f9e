/* A region whose every shared byte is a worker's to write: the daemon's accessors stay inside it, take what they take in
 * bounded time, and believe no index but their own. */
#include "proto/check.h"
#include "proto/ring.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void must(bool holds)
{
    if (!holds)
        abort();
}

/* Repeats the input over `to`, so that small inputs reach the far fields too. */
static void fill(void *to, size_t total, const uint8_t *data, size_t bytes)
{
    for (size_t at = 0; at < total; at += bytes)
        memcpy((char *)to + at, data, total - at < bytes ? total - at : bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes < 8)
        return 0;
    struct pkv_region *r = malloc(sizeof(*r)); /* exactly: a sanitizer sees a step outside */
    must(r != NULL);
    fill(r, sizeof(*r), data, bytes);
    uint32_t head, tail;
    memcpy(&head, data, sizeof(head));
    memcpy(&tail, data + 4, sizeof(tail));
    for (int i = 0; i < 300; i++) {
        struct pkv_submission s;
        uint32_t before = head;
        if (!pkv_sq_pop(r, &head, &s)) {
            must(head == before);
            break;
        }
        must(head == before + 1);
        (void)pkv_check_submission(&s, PKV_DATA_BYTES_MIN);
    }
    for (int i = 0; i < 300; i++) {
        struct pkv_completion c = {.tag = (uint32_t)i};
        uint32_t before = tail;
        bool pushed = pkv_cq_push(r, &tail, &c);
        must(tail == before + (pushed ? 1 : 0));
        if (!pushed)
            break;
    }
    free(r);
    return 0;
}
