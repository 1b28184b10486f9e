/* Happy path: folder made or checked, lock taken, stale socket removed, bound, listening.
 * Failures: path too long; the folder is another's or open to others; the lock is held by a live daemon (a dead one's lock is
 * gone with it, its socket file is not, hence the unlink). */
#include "cachesvc/listen.h"

#include "cachesvc/log.h"
#include "proto/err.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static int path_choose(const char *path, struct listener *l)
{
    const char *run = getenv("XDG_RUNTIME_DIR");
    int n;
    if (path[0])
        n = snprintf(l->path, sizeof(l->path), "%s", path);
    else if (run && run[0])
        n = snprintf(l->path, sizeof(l->path), "%s/pivotkv/socket", run);
    else
        n = snprintf(l->path, sizeof(l->path), "/tmp/pivotkv-%u/socket", (unsigned)geteuid());
    if (n >= (int)sizeof(l->path)) {
        log_error("%s", pkv_err_text(PKV_ERR_SOCKET_PATH));
        return -ENAMETOOLONG;
    }
    const char *slash = strrchr(l->path, '/');
    if (!slash)
        snprintf(l->folder, sizeof(l->folder), ".");
    else
        snprintf(l->folder, sizeof(l->folder), "%.*s", slash == l->path ? 1 : (int)(slash - l->path), l->path);
    return 0;
}

static int folder_check(const struct listener *l)
{
    if (mkdir(l->folder, 0700) && errno != EEXIST) {
        int r = -errno;
        log_error("cannot make the folder %s: %s", l->folder, strerror(-r));
        return r;
    }
    struct stat s;
    if (lstat(l->folder, &s))
        return -errno;
    if (!S_ISDIR(s.st_mode) || s.st_uid != geteuid() || s.st_mode & 077) {
        log_error("%s must be a folder of yours with mode 0700: choose another socket path, or chmod 700 it", l->folder);
        return -EPERM;
    }
    return 0;
}

static int lock_take(struct listener *l)
{
    char name[sizeof(l->path) + 8];
    snprintf(name, sizeof(name), "%s.lock", l->path);
    l->lock = open(name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (l->lock < 0) {
        int r = -errno;
        log_error("cannot open %s: %s", name, strerror(-r));
        return r;
    }
    if (flock(l->lock, LOCK_EX | LOCK_NB)) {
        log_error("%s: %s", l->path, pkv_err_text(PKV_ERR_IN_USE));
        close(l->lock);
        return -EADDRINUSE;
    }
    return 0;
}

int listen_open(const char *path, struct listener *l)
{
    *l = (struct listener){.fd = -1, .lock = -1};
    int r = path_choose(path, l);
    if (!r)
        r = folder_check(l);
    if (!r)
        r = lock_take(l);
    if (r)
        return r;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, l->path, sizeof(l->path));
    (void)unlink(l->path);
    l->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t mask = umask(0177);
    if (l->fd < 0 || bind(l->fd, (const struct sockaddr *)&address, sizeof(address)) || listen(l->fd, 64))
        r = -errno;
    umask(mask);
    if (r) {
        log_error("cannot listen on %s: %s", l->path, strerror(-r));
        if (l->fd >= 0)
            close(l->fd);
        close(l->lock);
    }
    return r;
}

void listen_close(struct listener *l)
{
    (void)unlink(l->path);
    close(l->fd);
    close(l->lock);
}

int listen_accept(const struct listener *l, int *ret_pid)
{
    int fd = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return -errno;
    struct ucred peer;
    socklen_t size = sizeof(peer);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) || peer.uid != geteuid()) {
        log_warn("refused a connection of another user");
        close(fd);
        return -EPERM;
    }
    *ret_pid = peer.pid;
    return fd;
}
