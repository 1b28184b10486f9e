/* What the daemon does when a GPU is lost. Owner: the loop's thread. */
#ifndef CACHESVC_LOSS_H
#define CACHESVC_LOSS_H

#include "proto/err.h"

#include <stdbool.h>

struct daemon;

enum loss_state { LOSS_WELL, LOSS_TOLD, LOSS_ENDED };
struct loss {
    enum loss_state state;
    uint64_t told_ns;
};

/* The device's calls said so, or hang. Said once; more often is allowed. */
void loss_report(struct daemon *daemon, const char *what);
/* Looks at the devices, and goes on to the next state when it is time. True: the loop must end. */
bool loss_turn(struct daemon *daemon, uint64_t now_ns);
static inline bool loss_happened(const struct loss *loss)
{
    return loss->state != LOSS_WELL;
}

#endif
