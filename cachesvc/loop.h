/* Waiting for descriptors to become readable: io_uring, or epoll where the kernel refuses it. Owner: the loop's thread. */
#ifndef CACHESVC_LOOP_H
#define CACHESVC_LOOP_H

#include <stdint.h>

struct loop;

struct loop_verbs {
    const char *name; /* "io_uring", "epoll" */
    int (*open)(struct loop **ret);
    void (*close)(struct loop *loop);
    /* Reports `token` (not zero) whenever fd is readable, until unwatch. */
    int (*watch)(struct loop *loop, int fd, uint64_t token);
    void (*unwatch)(struct loop *loop, int fd, uint64_t token);
    /* Up to `room` tokens; waits at most timeout_ns (0: only looks). How many, or -errno. */
    int (*wait)(struct loop *loop, uint64_t timeout_ns, uint64_t *ret_tokens, int room);
};

extern const struct loop_verbs loop_uring, loop_epoll;

#endif
