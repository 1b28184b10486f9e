/* The signature states of each model: sealed memfds that workers put, numbered from 1. The latest is kept for as long as the
 * daemon runs, whoever leaves: a model's next sequences, and its next workers, are calibrated from their first token. Older
 * ones are kept while sequences are signed with them.
 *
 *   nothing --PUT 1--> latest = 1 --alarm stands: `wanted` = 2 published--> --PUT 2--> latest = 2, wanted = 0
 *                                  \--alarm clears: wanted = 0 again
 *
 * Only the number after the latest is taken, and beyond the first only while it is wanted: of workers that learn at the same
 * time one is first, the others fetch its state. Bounds: STATES_KEPT memfds a model, of no more bytes than its geometry can
 * need. A recalibration is not asked for while all of them are in use, sooner than recalibrate-s after the last state, or
 * before the new signatures have been judged by as many samples as stand in audit.c. Owner: the loop's thread. */
#ifndef CACHESVC_STATES_H
#define CACHESVC_STATES_H

#include "proto/err.h"

#include <stdbool.h>
#include <stdint.h>

#define STATES_KEPT 4u

struct daemon;

struct state {
    int fd; /* -1: none */
    uint32_t number;
    uint64_t bytes;
};
struct states {
    struct state kept[STATES_KEPT];
    uint32_t latest;
    uint64_t put_ns; /* of the latest */
};

void states_init(struct states *states);  /* [PKV_MODELS_MAX] */
void states_close(struct states *states); /* [PKV_MODELS_MAX] */
/* number 0: the latest. NULL: not kept. Any model and number may be asked for. */
const struct state *states_find(const struct daemon *daemon, uint32_t model, uint32_t number);
/* *fd is a worker's: judged first, and -1 once it has been taken. The model exists. */
enum pkv_err states_put(struct daemon *daemon, uint32_t model, uint32_t number, int *fd);
/* Asks workers for a new state, or no longer. True: that is new. */
bool states_want(struct daemon *daemon, uint32_t model, bool wanted);

#endif
