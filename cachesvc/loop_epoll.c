/* The fallback: level-triggered epoll. */
#include "cachesvc/loop.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

struct loop {
    int fd;
};

static int epoll_open(struct loop **ret)
{
    struct loop *l = malloc(sizeof(*l));
    if (!l)
        return -ENOMEM;
    l->fd = epoll_create1(EPOLL_CLOEXEC);
    if (l->fd < 0) {
        free(l);
        return -errno;
    }
    *ret = l;
    return 0;
}

static void epoll_close(struct loop *l)
{
    close(l->fd);
    free(l);
}

static int epoll_watch(struct loop *l, int fd, uint64_t token)
{
    struct epoll_event e = {.events = EPOLLIN, .data.u64 = token};
    return epoll_ctl(l->fd, EPOLL_CTL_ADD, fd, &e) ? -errno : 0;
}

static void epoll_unwatch(struct loop *l, int fd, uint64_t token)
{
    (void)token;
    (void)epoll_ctl(l->fd, EPOLL_CTL_DEL, fd, NULL); /* fails only for one that is not watched */
}

static int epoll_wait_tokens(struct loop *l, uint64_t timeout_ns, uint64_t *ret, int room)
{
    struct epoll_event events[64];
    room = room < 64 ? room : 64;
    /* Rounded up to milliseconds: a timer that fires early would spin. */
    uint64_t ms = timeout_ns / 1000000 + (timeout_ns % 1000000 != 0);
    int n = epoll_wait(l->fd, events, room, ms > 60000 ? 60000 : (int)ms);
    if (n < 0)
        return errno == EINTR ? 0 : -errno;
    for (int i = 0; i < n; i++)
        ret[i] = events[i].data.u64;
    return n;
}

const struct loop_verbs loop_epoll = {"epoll", epoll_open, epoll_close, epoll_watch, epoll_unwatch, epoll_wait_tokens};
