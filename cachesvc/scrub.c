/* The rate. A few blocks are under way at a time, so that copies home wait for little; a daemon that has nothing else to do
 * wakes once a second, looks at what has come together, and sleeps. */
#include "cachesvc/scrub.h"

#include "cachesvc/daemon.h"

#define FLYING_MAX 4u
#define CREDIT_S   1.0 /* what may come together */

void scrub_turn(struct daemon *d, uint64_t now_ns)
{
    struct scrub *s = &d->scrub;
    double rate = (double)d->config.scrub_bytes_s, passed = (double)(now_ns - s->at_ns) * 1e-9;
    uint64_t bytes;
    s->credit = PKV_MIN(s->credit + rate * PKV_MIN(passed, CREDIT_S), rate * CREDIT_S);
    s->at_ns = now_ns;
    while (rate > 0 && s->credit > 0 && s->flying < FLYING_MAX && !loss_happened(&d->loss) && core_scrub(d->core, &bytes)) {
        s->credit -= (double)bytes;
        s->flying++;
    }
}

void scrub_looked(struct daemon *d)
{
    d->scrub.flying--;
    scrub_tell(d);
}

void scrub_tell(struct daemon *d)
{
    struct scrub *s = &d->scrub;
    const struct core_health *h = core_health(d->core);
    if (h->checksum_failures != s->failures)
        log_warn(
            "%llu blocks in the arena failed their checksum: CPU memory is damaged, or something writes where it should not",
            (unsigned long long)(h->checksum_failures - s->failures));
    if (h->blocks_mended != s->mended)
        log_info("%llu blocks that had failed are home again, from the pool",
                 (unsigned long long)(h->blocks_mended - s->mended));
    if (h->blocks_damaged != s->damaged)
        log_error("%llu blocks are lost: their rows were in the arena alone. Calls on their sequences say so (pivotkv ls)",
                  (unsigned long long)(h->blocks_damaged - s->damaged));
    s->failures = h->checksum_failures, s->mended = h->blocks_mended, s->damaged = h->blocks_damaged;
}
