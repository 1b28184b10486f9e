/* io_uring: one poll request per descriptor, armed again after each report, so that reports are level-triggered like epoll's.
 * A request is named by its token; cancelling one leaves its last completion to be skipped (token 0). */
#include "cachesvc/loop.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>

#define ENTRIES 512u
#define FDS_MAX 4096

struct watch {
    int fd;
    uint64_t token; /* 0: free */
};

struct loop {
    struct io_uring ring;
    struct watch watches[FDS_MAX];
    int count; /* watches used so far */
};

static int uring_open(struct loop **ret)
{
    struct loop *l = calloc(1, sizeof(*l));
    if (!l)
        return -ENOMEM;
    int r = io_uring_queue_init(ENTRIES, &l->ring, 0);
    if (r) {
        free(l);
        return r;
    }
    if (!(l->ring.features & IORING_FEAT_EXT_ARG)) { /* a wait with a timeout, Linux 5.11 */
        io_uring_queue_exit(&l->ring);
        free(l);
        return -EOPNOTSUPP;
    }
    *ret = l;
    return 0;
}

static void uring_close(struct loop *l)
{
    io_uring_queue_exit(&l->ring);
    free(l);
}

static struct io_uring_sqe *sqe_get(struct loop *l)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&l->ring);
    if (!sqe) {
        io_uring_submit(&l->ring);
        sqe = io_uring_get_sqe(&l->ring);
    }
    return sqe;
}

static int arm(struct loop *l, const struct watch *w)
{
    struct io_uring_sqe *sqe = sqe_get(l);
    if (!sqe)
        return -EBUSY;
    io_uring_prep_poll_add(sqe, w->fd, POLLIN);
    io_uring_sqe_set_data64(sqe, w->token);
    return 0;
}

static struct watch *find(struct loop *l, uint64_t token)
{
    for (int i = 0; i < l->count; i++)
        if (l->watches[i].token == token)
            return &l->watches[i];
    return NULL;
}

static int uring_watch(struct loop *l, int fd, uint64_t token)
{
    struct watch *w = find(l, 0);
    if (!w && l->count == FDS_MAX)
        return -EMFILE;
    w = w ? w : &l->watches[l->count++];
    *w = (struct watch){fd, token};
    return arm(l, w);
}

static void uring_unwatch(struct loop *l, int fd, uint64_t token)
{
    (void)fd;
    struct watch *w = find(l, token);
    struct io_uring_sqe *sqe = w ? sqe_get(l) : NULL;
    if (w)
        w->token = 0;
    if (!sqe)
        return;
    io_uring_prep_poll_remove(sqe, token);
    io_uring_sqe_set_data64(sqe, 0);
    io_uring_submit(&l->ring); /* before the caller closes the descriptor */
}

static int uring_wait(struct loop *l, uint64_t timeout_ns, uint64_t *ret, int room)
{
    struct io_uring_cqe *cqe = NULL;
    if (timeout_ns && !io_uring_cq_ready(&l->ring)) {
        struct __kernel_timespec t = {(long long)(timeout_ns / 1000000000u), (long long)(timeout_ns % 1000000000u)};
        int r = io_uring_submit_and_wait_timeout(&l->ring, &cqe, 1, &t, NULL);
        if (r < 0 && r != -ETIME && r != -EINTR && r != -EAGAIN)
            return r;
    } else {
        io_uring_submit(&l->ring);
    }
    int n = 0;
    while (n < room && io_uring_peek_cqe(&l->ring, &cqe) == 0 && cqe) {
        uint64_t token = io_uring_cqe_get_data64(cqe);
        int result = cqe->res;
        io_uring_cqe_seen(&l->ring, cqe);
        struct watch *w = token ? find(l, token) : NULL;
        if (!w || result == -ECANCELED)
            continue;
        ret[n++] = token;
        (void)arm(l, w);
    }
    return n;
}

const struct loop_verbs loop_uring = {"io_uring", uring_open, uring_close, uring_watch, uring_unwatch, uring_wait};
