/* Requests are at most REQUEST_BYTES; anything that is no known verb is answered with an error, never dropped: the other side
 * waits. */
#include "cachesvc/admin.h"

#include "cachesvc/daemon.h"
#include "cachesvc/stats.h"

#include <errno.h>
#include <nanomsg/nn.h>
#include <nanomsg/reqrep.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REQUEST_BYTES 4096
#define TURN          8

int admin_open(const char *folder, struct admin *a)
{
    char url[sizeof(a->path) + 8];
    snprintf(a->path, sizeof(a->path), "%s/admin", folder);
    snprintf(url, sizeof(url), "ipc://%s", a->path);
    (void)unlink(a->path); /* of a daemon that died; the socket's lock says that none lives */
    a->socket = nn_socket(AF_SP, NN_REP);
    size_t size = sizeof(a->ready);
    int bytes = REQUEST_BYTES;
    mode_t mask = umask(0177);
    if (a->socket < 0 || nn_setsockopt(a->socket, NN_SOL_SOCKET, NN_RCVMAXSIZE, &bytes, sizeof(bytes)) < 0 ||
        nn_bind(a->socket, url) < 0 || nn_getsockopt(a->socket, NN_SOL_SOCKET, NN_RCVFD, &a->ready, &size) < 0) {
        int e = nn_errno();
        log_error("cannot serve admin requests on %s: %s", a->path, nn_strerror(e));
        if (a->socket >= 0)
            nn_close(a->socket);
        umask(mask);
        return -EIO;
    }
    umask(mask);
    return 0;
}

void admin_close(struct admin *a)
{
    nn_close(a->socket);
    (void)unlink(a->path);
}

static json_t *refuse(const char *name, int number, const char *message)
{
    return json_pack("{s:b, s:{s:s, s:i, s:s}}", "ok", 0, "error", "name", name, "errno", number, "message", message);
}

static json_t *refuse_err(enum pkv_err e)
{
    return refuse(pkv_err_name(e), -pkv_err_status(e), pkv_err_text(e));
}

static json_t *inspect(struct daemon *d, const json_t *request)
{
    const char *text = json_string_value(json_object_get(request, "seq"));
    char *end = NULL;
    uint64_t handle = text ? strtoull(text, &end, 0) : 0;
    if (!text || end == text || *end)
        return refuse("INVALID", EINVAL, "inspect needs \"seq\": the handle that ls shows");
    json_t *found = stats_inspect(d, handle);
    return found ? json_pack("{s:b, s:o}", "ok", 1, "result", found) : refuse_err(PKV_ERR_STALE);
}

static json_t *answer(struct daemon *d, const char *text, size_t bytes)
{
    json_error_t error;
    json_t *request = json_loadb(text, bytes, 0, &error), *reply;
    const char *verb = json_string_value(json_object_get(request, "verb"));
    if (verb && !strcmp(verb, "stat"))
        reply = json_pack("{s:b, s:o}", "ok", 1, "result", stats_stat(d));
    else if (verb && !strcmp(verb, "ls"))
        reply = json_pack("{s:b, s:o}", "ok", 1, "result", stats_ls(d));
    else if (verb && !strcmp(verb, "inspect"))
        reply = inspect(d, request);
    else
        reply = refuse("UNKNOWN_OP", ENOSYS, "not a request that this daemon knows: stat, ls, inspect");
    json_decref(request);
    return reply ? reply : refuse_err(PKV_ERR_NO_MEMORY);
}

void admin_answer(struct daemon *d)
{
    for (int i = 0; i < TURN; i++) {
        void *text = NULL;
        int n = nn_recv(d->admin.socket, &text, NN_MSG, NN_DONTWAIT);
        if (n < 0)
            return;
        json_t *reply = answer(d, text, (size_t)n);
        nn_freemsg(text);
        char *out = reply ? json_dumps(reply, JSON_COMPACT) : NULL;
        json_decref(reply);
        if (out)
            nn_send(d->admin.socket, out, strlen(out), NN_DONTWAIT); /* a client that is gone needs no answer */
        free(out);
    }
}
