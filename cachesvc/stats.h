/* What the daemon tells its operator, as JSON (docs/operating.md describes the fields). The caller owns what is returned. */
#ifndef CACHESVC_STATS_H
#define CACHESVC_STATS_H

#include <jansson.h>
#include <stdint.h>

struct daemon;

json_t *stats_stat(struct daemon *daemon);
json_t *stats_ls(struct daemon *daemon);
/* NULL: no such sequence. */
json_t *stats_inspect(struct daemon *daemon, uint64_t handle);

#endif
