/* Copies that checksum in passing. The checksum is XXH3-64 over pieces of 64 KiB, each seeded with the one before: pieces stay
 * in the second-level cache between copy and checksum, and no state is kept. */
#include "offload/offload.h"

#include <errno.h>
#include <string.h>
#define XXH_STATIC_LINKING_ONLY /* the state's size */
#include <xxhash.h>
#ifdef PKV_WIDE_XXHASH
#include <xxh_x86dispatch.h> /* puts functions that look at the CPU in the place of the others */
#endif

#define PIECE (64u << 10)
#define STEP  1024u
#define AHEAD 4096u

uint64_t offload_copy(void *to, const void *from, uint64_t bytes)
{
    uint64_t checksum = 0;
    for (uint64_t at = 0; at < bytes; at += PIECE) {
        uint64_t n = PKV_MIN(PIECE, bytes - at);
        memcpy((char *)to + at, (const char *)from + at, n);
        /* Of the copy, not of the source: what is at home is what the checksum speaks of. */
        checksum = XXH3_64bits_withSeed((const char *)to + at, n, checksum);
    }
    return checksum;
}

/* The same as in one call, with memory fetched ahead, over the borders of pages and pieces: where the CPU's own prefetching
 * ends, and what a device writes meanwhile has made loads slow (docs/performance.md). */
static uint64_t piece(const char *from, uint64_t bytes, uint64_t seed)
{
    XXH3_state_t state;
    XXH3_64bits_reset_withSeed(&state, seed);
    for (uint64_t at = 0, n; at < bytes; at += n) {
        n = PKV_MIN(STEP, bytes - at);
        for (uint64_t line = 0; line < n; line += 64)
            __builtin_prefetch(from + at + AHEAD + line, 0, 2);
        XXH3_64bits_update(&state, from + at, n);
    }
    return XXH3_64bits_digest(&state);
}

uint64_t offload_checksum(const void *data, uint64_t bytes)
{
    const char *from = data;
    uint64_t checksum = 0;
    for (uint64_t at = 0; at < bytes; at += PIECE)
        checksum = piece(from + at, PKV_MIN(PIECE, bytes - at), checksum);
    return checksum;
}

int offload_verify(const void *data, uint64_t bytes, uint64_t checksum)
{
    return offload_checksum(data, bytes) == checksum ? 0 : -EBADMSG;
}
