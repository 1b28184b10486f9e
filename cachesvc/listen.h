/* The socket that workers attach to: mode 0600 in a directory of mode 0700, one daemon per path. */
#ifndef CACHESVC_LISTEN_H
#define CACHESVC_LISTEN_H

struct listener {
    int fd, lock;
    char path[108];   /* what a unix socket's address holds */
    char folder[108]; /* where it lies; the admin socket lies beside it */
};

/* `path` empty: this user's default. 0, or -errno after saying why. */
int listen_open(const char *path, struct listener *ret);
void listen_close(struct listener *listener);
/* A new connection of this user, close-on-exec and non-blocking; -EAGAIN none, -EPERM another user's (closed). */
int listen_accept(const struct listener *listener, int *ret_pid);

#endif
