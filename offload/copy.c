/* Copies that checksum in passing. The checksum is XXH3-64 over pieces of 64 KiB, each seeded with the one before: pieces stay
 * in the second-level cache between copy and checksum, and no state is kept. */
#include "offload/offload.h"

#include <errno.h>
#include <string.h>
#include <xxhash.h>
#ifdef PKV_WIDE_XXHASH
#include <xxh_x86dispatch.h> /* puts functions that look at the CPU in the place of the others */
#endif

#define PIECE (64u << 10)

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

uint64_t offload_checksum(const void *data, uint64_t bytes)
{
    uint64_t checksum = 0;
    for (uint64_t at = 0; at < bytes; at += PIECE)
        checksum = XXH3_64bits_withSeed((const char *)data + at, PKV_MIN(PIECE, bytes - at), checksum);
    return checksum;
}

int offload_verify(const void *data, uint64_t bytes, uint64_t checksum)
{
    return offload_checksum(data, bytes) == checksum ? 0 : -EBADMSG;
}
