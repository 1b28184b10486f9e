/* One connection: its socket, its process, its shared region. Owner: the loop's thread.
 *
 *   NEW --hello--> JOINED --bye, end of socket or of process--> LEFT --last served job done--> freed
 *
 * NEW has no worker in the core. LEFT has given up everything in the core and in the loop; only the memory that a served job
 * still uses is kept. */
#ifndef CACHESVC_WORKER_H
#define CACHESVC_WORKER_H

#include "cachesvc/daemon.h"
#include "proto/ring.h"

/* Completions that a worker may leave unreaped beyond its ring before it is dropped. */
#define WORKER_BACKLOG_MAX 4096u
/* Submissions of one worker in one turn of the loop. */
#define WORKER_TURN 64u

enum worker_state { WORKER_NEW, WORKER_JOINED, WORKER_LEFT };

struct served;

struct worker {
    struct daemon *daemon;
    enum worker_state state;
    uint32_t slot, id;               /* in daemon->workers; in the core */
    int socket, process, event, pid; /* process: pidfd or -1; event: the worker writes it to wake the loop */
    uint64_t token;                  /* socket; + 1 process, + 2 event */
    uint64_t accepted_ns;
    char tenant[PKV_NAME_BYTES], label[PKV_NAME_BYTES];
    bool direct;     /* has mapped a chunk */
    uint32_t device; /* of daemon->devices that it runs on; DEVICES_MAX: none */
    uint64_t models; /* that it has opened, one bit each */
    struct pkv_model_quality audited[PKV_MODELS_MAX];
    bool doomed; /* the backlog is full: it is dropped at the end of the turn */
    struct pkv_region *region;
    int region_fd;
    bool pin_tried, pinned; /* the region, for a GPU; of the served mover's thread as long as a job is under way */
    uint64_t region_bytes, data_off, data_bytes;
    uint32_t sq_head, cq_tail; /* our own counts; the region's are hostile */
    struct pkv_completion *backlog;
    uint32_t backlog_count;
    struct served *served; /* the one job under way; until it is done no submission is taken */
};

int worker_accept(struct daemon *daemon, int socket, int pid);
/* `died`: without having said goodbye. The worker may be freed. */
void worker_leave(struct worker *worker, bool died, const char *why);
void worker_free(struct worker *worker);

/* A descriptor of the worker is readable: token - worker->token is 0 socket, 1 process, 2 event. */
void worker_ready(struct worker *worker, uint32_t which);
/* Takes up to WORKER_TURN submissions; whether there were any. */
bool worker_drain(struct worker *worker);
bool worker_has_work(const struct worker *worker);
void worker_complete(struct worker *worker, uint32_t tag, enum pkv_err err, uint64_t value0, uint64_t value1);
/* Lets the worker look around, if it sleeps over its completions. */
void worker_wake(struct worker *worker);
/* Pushes what did not fit before. */
void worker_flush(struct worker *worker);

/* message.c: reads and answers one message; false at the end of the socket. */
bool message_receive(struct worker *worker);

static inline char *worker_data(const struct worker *w)
{
    return (char *)w->region + w->data_off;
}

#endif
