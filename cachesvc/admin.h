/* The operator's door: JSON requests over nanomsg (REP on ipc://FOLDER/admin), answered in the loop's thread. The only file
 * that knows nanomsg. */
#ifndef CACHESVC_ADMIN_H
#define CACHESVC_ADMIN_H

struct daemon;

struct admin {
    int socket, ready; /* nanomsg's socket; the descriptor that tells of a request */
    char path[128];
};

/* -errno after saying why. */
int admin_open(const char *folder, struct admin *ret);
void admin_close(struct admin *admin);
/* Answers the requests that have come. */
void admin_answer(struct daemon *daemon);

#endif
