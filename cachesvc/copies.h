/* The copies that the core asks for: blocks home, tails of forks; and checksums of what is home. Owner: the loop's thread. */
#ifndef CACHESVC_COPIES_H
#define CACHESVC_COPIES_H

#include "cachesvc/daemon.h"

/* -errno. */
int copies_start(struct daemon *daemon, uint32_t threads);
/* Ends the threads; what is done is left to be reaped from daemon->copies. */
void copies_stop(struct daemon *daemon);
/* Answered by core_copied in a later turn. */
void copies_act(struct daemon *daemon, const struct core_action *action, uint64_t now_ns);
void copies_flush(struct daemon *daemon); /* behind the last of several actions */

#endif
