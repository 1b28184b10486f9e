/* A worker without the library: messages, rings and data area as the protocol has them. */
#ifndef TESTS_INTEGRATION_RAW_H
#define TESTS_INTEGRATION_RAW_H

#include "tests/integration/service.h"

#include "proto/err.h"
#include "proto/ring.h"
#include "proto/served.h"
#include "proto/wire.h"

#include <sys/mman.h>
#include <sys/socket.h>

static inline struct pkv_hello hello(void)
{
    return (struct pkv_hello){.magic = PKV_MAGIC,
                              .message = PKV_MSG_HELLO,
                              .version_major = PKV_VERSION_MAJOR,
                              .version_minor = PKV_VERSION_MINOR,
                              .features = PKV_FEATURES,
                              .data_bytes = PKV_DATA_BYTES_MIN,
                              .label = "hostile"};
}

/* The reply's error, PKV_ERR_COUNT where the daemon hung up; the first descriptor beside it. */
static inline uint32_t ask(int fd, const void *message, size_t bytes, struct pkv_reply *reply, int fds[4])
{
    union {
        char bytes[CMSG_SPACE(4 * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec io = {reply, sizeof(*reply)};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    for (int i = 0; i < 4; i++)
        fds[i] = -1;
    assert_true(send(fd, message, bytes, MSG_NOSIGNAL) == (ssize_t)bytes);
    if (recvmsg(fd, &m, 0) != (ssize_t)sizeof(*reply))
        return PKV_ERR_COUNT;
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    if (c)
        memcpy(fds, CMSG_DATA(c), c->cmsg_len - CMSG_LEN(0));
    return reply->err;
}

struct raw {
    int fd, event;
    struct pkv_region *region;
    uint64_t bytes;
    uint32_t model, tail, head; /* its own counts of what it has pushed and popped */
    struct pkv_geom geom;
};

/* Of that tenant; "" the default one. */
static inline struct raw raw_worker(const struct test_daemon *d, const char *tenant)
{
    struct raw r = {.fd = test_dial(d)};
    struct pkv_hello h = hello();
    memcpy(h.tenant, tenant, strlen(tenant));
    struct pkv_reply reply;
    int fds[4], none[4];
    assert_int_equal(ask(r.fd, &h, sizeof(h), &reply, fds), PKV_ERR_OK);
    r.bytes = reply.bytes, r.event = fds[1];
    r.region = mmap(NULL, r.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    assert_true(r.region != MAP_FAILED);
    assert_int_not_equal(ftruncate(fds[0], 0), 0); /* sealed: nobody can take it away under the daemon */
    assert_true(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fds[2], 0) == MAP_FAILED);
    assert_true(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fds[3], 0) == MAP_FAILED);
    close(fds[0]), close(fds[2]), close(fds[3]);
    struct pkv_model_request m = {.magic = PKV_MAGIC, .message = PKV_MSG_MODEL, .name = "hostile"};
    m.geom = (struct pkv_geom){.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 64, .dtype = PKV_F16, .sig_bits = 64};
    assert_int_equal(ask(r.fd, &m, sizeof(m), &reply, none), PKV_ERR_OK);
    r.model = reply.id, r.geom = m.geom;
    return r;
}

static inline void raw_close(struct raw *r)
{
    munmap(r->region, r->bytes);
    close(r->fd), close(r->event);
}

static inline void kick(const struct raw *r)
{
    uint64_t one = 1;
    assert_true(write(r->event, &one, sizeof(one)) == sizeof(one));
}

/* The next completion, within 5 s. */
static inline enum pkv_err reap(struct raw *r, uint64_t *ret_value)
{
    struct pkv_completion c = {.err = PKV_ERR_COUNT};
    for (int i = 0; i < 5000 && !pkv_cq_pop(r->region, &r->head, &c); i++)
        usleep(1000);
    pkv_store32(&r->region->cq_head.value, r->head);
    *ret_value = c.value0;
    return c.err;
}

static inline enum pkv_err answer(struct raw *r, struct pkv_submission s, uint64_t *ret_value)
{
    assert_true(pkv_sq_push(r->region, &r->tail, &s));
    kick(r);
    return reap(r, ret_value);
}

#endif
