/* The daemon: what its rooms share. One thread, the loop's, owns all of it; movers see only their jobs. */
#ifndef CACHESVC_DAEMON_H
#define CACHESVC_DAEMON_H

#include "cachesvc/admin.h"
#include "cachesvc/config.h"
#include "cachesvc/core/core.h"
#include "cachesvc/courier.h"
#include "cachesvc/devices.h"
#include "cachesvc/listen.h"
#include "cachesvc/loop.h"
#include "cachesvc/loss.h"
#include "cachesvc/memory.h"
#include "cachesvc/mover.h"
#include "cachesvc/quality.h"
#include "cachesvc/scrub.h"
#include "cachesvc/states.h"
#include "cachesvc/tables.h"
#include "proto/region.h"

/* Connections that have not said hello yet count too. */
#define DAEMON_CONNECTIONS_MAX (2 * PKV_WORKERS_MAX)

/* What the loop calls its own descriptors; workers' tokens come after. */
enum { TOKEN_LISTEN = 1, TOKEN_COPIES, TOKEN_SERVED, TOKEN_SIGNAL, TOKEN_ADMIN, TOKEN_WORKERS = 16 };

struct worker;

#define PKV_COUNTER_MEMBER(name, unit, help) uint64_t name;
struct daemon_counters {
    PKV_DAEMON_COUNTERS(PKV_COUNTER_MEMBER)
};

struct daemon {
    struct config config;
    struct devices devices;
    struct memory memory;
    struct tables tables;
    struct pkv_control *control;
    int control_fd;
    struct core *core;
    const struct loop_verbs *io;
    struct loop *loop;
    int copies_event, served_event, signals;
    struct mover copies, served;
    struct courier couriers[DEVICES_MAX];
    struct gpu *gpus[DEVICES_MAX]; /* one per device, or one on the host; of the served mover's thread */
    struct loss loss;
    struct listener listener;
    struct admin admin;
    struct worker *workers[DAEMON_CONNECTIONS_MAX];
    uint64_t next_token;
    uint32_t serving;            /* served jobs under way */
    char mapper[PKV_NAME_BYTES]; /* the tenant that maps the pool, where only one may; empty: none has yet */
    struct states states[PKV_MODELS_MAX];
    struct quality quality[PKV_MODELS_MAX];
    struct scrub scrub;
    uint64_t audited_ns; /* when workers' samples were last looked at */
    struct daemon_counters counters;
    struct pkv_worker_counters departed; /* of workers that are gone */
    uint64_t started_ns, epoch_published;
    bool stop;
};

/* 0, or -errno after saying why. */
int daemon_create(const struct config *config, struct daemon **ret);
/* Serves until SIGTERM or SIGINT; 0, or -errno after saying why. -ENOTRECOVERABLE: a GPU was lost. */
int daemon_run(struct daemon *daemon);
void daemon_destroy(struct daemon *daemon);

#define DAEMON_EXIT_GPU_LOST 3 /* exit status: start it again */

uint64_t daemon_now_ns(void);
/* Carries out what the core decided. */
void daemon_act(struct daemon *daemon);

#endif
