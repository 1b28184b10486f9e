/* Collects what the workers' samples say (struct pkv_model_quality in their regions) into the models' means and alarms. */
#ifndef CACHESVC_AUDIT_H
#define CACHESVC_AUDIT_H

#include <stdint.h>

struct daemon;
struct worker;

/* Looks at all workers, a few times a second. */
void audit_turn(struct daemon *daemon, uint64_t now_ns);
/* The last look at one. */
void audit_worker(struct worker *worker);

#endif
