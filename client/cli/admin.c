/* Requests to the daemon: nanomsg REQ on ipc://FOLDER/admin, FOLDER being the socket's. Bounded by --timeout-ms. */
#include "client/cli/cli.h"

#include <errno.h>
#include <nanomsg/nn.h>
#include <nanomsg/reqrep.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

void admin_socket(const struct cli *c, char *ret, size_t room)
{
    const char *path = c->socket ? c->socket : getenv("PIVOTKV_SOCKET"), *run = getenv("XDG_RUNTIME_DIR");
    if (path && path[0])
        snprintf(ret, room, "%s", path);
    else if (run && run[0])
        snprintf(ret, room, "%s/pivotkv/socket", run);
    else
        snprintf(ret, room, "/tmp/pivotkv-%u/socket", (unsigned)geteuid());
}

static json_t *no_daemon(const char *path, const char *why, int *ret_exit)
{
    fprintf(stderr, "pivotkv: no daemon answers on %s: %s; start pivotkvd, or name its socket with --socket\n", path, why);
    *ret_exit = CLI_NO_DAEMON;
    return NULL;
}

/* The reply's text in nanomsg's memory, or NULL with the cause in *ret_why. */
static char *exchange(const char *url, const char *text, int timeout_ms, int *ret_bytes, const char **ret_why)
{
    char *reply = NULL;
    int resend = 600000, most = -1, s = nn_socket(AF_SP, NN_REQ);
    *ret_why = nn_strerror(nn_errno());
    if (s < 0)
        return NULL;
    nn_setsockopt(s, NN_SOL_SOCKET, NN_SNDTIMEO, &timeout_ms, sizeof(timeout_ms));
    nn_setsockopt(s, NN_SOL_SOCKET, NN_RCVTIMEO, &timeout_ms, sizeof(timeout_ms));
    nn_setsockopt(s, NN_SOL_SOCKET, NN_RCVMAXSIZE, &most, sizeof(most));
    nn_setsockopt(s, NN_REQ, NN_REQ_RESEND_IVL, &resend, sizeof(resend));
    if (nn_connect(s, url) < 0 || nn_send(s, text, strlen(text), 0) < 0 || (*ret_bytes = nn_recv(s, &reply, NN_MSG, 0)) < 0) {
        *ret_why = nn_errno() == ETIMEDOUT ? "it did not answer in time" : nn_strerror(nn_errno());
        reply = NULL;
    }
    nn_close(s);
    return reply;
}

json_t *admin_request(const struct cli *c, json_t *request, int *ret_exit)
{
    char path[512], url[600];
    struct stat s;
    admin_socket(c, path, sizeof(path));
    char *text = json_dumps(request, JSON_COMPACT), *slash = strrchr(path, '/');
    json_decref(request);
    snprintf(url, sizeof(url), "ipc://%.*s/admin", slash ? (int)(slash - path) : 1, slash ? path : ".");
    /* nanomsg would wait for a socket that is not there. */
    if (!text || stat(path, &s)) {
        free(text);
        return no_daemon(path, strerror(errno), ret_exit);
    }
    const char *why;
    int bytes = 0;
    char *reply = exchange(url, text, c->timeout_ms, &bytes, &why);
    free(text);
    if (!reply)
        return no_daemon(path, why, ret_exit);
    json_error_t error;
    json_t *answer = json_loadb(reply, (size_t)bytes, 0, &error), *result = json_incref(json_object_get(answer, "result"));
    nn_freemsg(reply);
    const json_t *refused = json_object_get(answer, "error");
    if (!json_is_true(json_object_get(answer, "ok")) || !result) {
        fprintf(stderr, "pivotkv: %s: %s\n", refused ? format_text(refused, "name") : "answer",
                refused ? format_text(refused, "message") : "not what this version understands: install one version of both");
        json_decref(result);
        result = NULL;
        *ret_exit = CLI_FAILED;
    }
    json_decref(answer);
    return result;
}
