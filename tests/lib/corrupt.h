/* Bits that the daemon's memory loses. */
#ifndef TESTS_LIB_CORRUPT_H
#define TESTS_LIB_CORRUPT_H

#include <stddef.h>
#include <sys/types.h>

/* Flips a bit of each place in the arena of a daemon that holds these bytes (its arena is what no worker may map writable):
 * how many there were; -1: this process may not write another one's memory. The daemon is this process's child. */
int test_corrupt_arena(pid_t daemon, const void *bytes, size_t count);

#endif
