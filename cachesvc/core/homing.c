/* When the copy home of a sealed block starts. A prefill whose K and V come from the CPU's memory uses the link that copies
 * home use, the other way, and each disturbs the other (docs/performance.md). A copy home only makes room later, so it can give
 * way. Policy: a device's copies wait, first sealed first gone, as long as
 *
 *   blocks are sealed faster than hold_rate    a bucket that holds time: what is sealed puts in as long as it would take at
 *                                              that rate, and time takes it out; fast is more than BURST_NS in it, and it
 *                                              holds no more than PACE_NS, the pause after which a prefill is over
 *   the longest wait is below hold_ns
 *   there is room                              half of the device's pool is free, or holds copies of what is home
 *   no operation waits for places
 *   no writer has left a persistent sequence   what waits then goes
 *
 * Then they go, FLIGHT_MAX at a time, so that the next prefill finds few under way, and in bites of a quarter of that, for a
 * courier is slow with few. What nobody holds any more never goes. Mechanism: block_go_home. */
#include "cachesvc/core/internal.h"

#define BURST_NS   8000000ull   /* steps of decoding seal less at once: 64 MB at 8 GB/s */
#define PACE_NS    100000000ull /* steps of a prefill, each sealed whole, come within this */
#define HELD_NS    1000000ull   /* who waited less is not counted */
#define FLIGHT_MAX 2048u        /* ten milliseconds of blocks of 256 KiB; a courier has 256 under way */
#define FLIGHT_LOW (FLIGHT_MAX - FLIGHT_MAX / 4)

static void leak(struct device *d, uint64_t now_ns)
{
    uint64_t passed = now_ns > d->at_ns ? now_ns - d->at_ns : 0;
    d->pace_ns -= PKV_MIN(d->pace_ns, passed);
    d->at_ns = PKV_MAX(d->at_ns, now_ns);
}

void homing_add(struct core *core, uint64_t now_ns, uint32_t id)
{
    struct block *b = &core->blocks[id];
    struct device *d = device_of(core, b->rows);
    if (!core->config.hold_ns) {
        block_go_home(core, id);
        return;
    }
    leak(d, now_ns);
    d->pace_ns = PKV_MIN(d->pace_ns + b->row_bytes * 1000000000ull / core->config.hold_rate, PACE_NS);
    b->held = true, b->sealed_ns = now_ns;
    b->before = d->last, b->next = NONE;
    *(d->last == NONE ? &d->first : &core->blocks[d->last].next) = id;
    d->last = id;
    d->held++;
}

static void take_out(struct core *core, struct device *d, uint32_t id)
{
    struct block *b = &core->blocks[id];
    assert(b->held && d->held);
    *(b->before == NONE ? &d->first : &core->blocks[b->before].next) = b->next;
    *(b->next == NONE ? &d->last : &core->blocks[b->next].before) = b->before;
    b->held = false, b->next = b->before = NONE;
    d->held--;
    d->due = PKV_MIN(d->due, d->held); /* or one more goes early, where it was one of them */
}

void homing_drop(struct core *core, uint32_t id)
{
    take_out(core, device_of(core, core->blocks[id].rows), id);
}

void homing_hurry(struct core *core, uint32_t device)
{
    core->devices[device].due = core->devices[device].held;
}

static bool waits(const struct core *core, const struct device *d, uint64_t now_ns)
{
    uint64_t since = core->blocks[d->first].sealed_ns, room = d->capacity - d->taken + d->home_bytes;
    return !d->due && !core->waiting_count && d->pace_ns > BURST_NS && now_ns < since + core->config.hold_ns &&
           room >= d->capacity / 2;
}

void homing_turn(struct core *core, uint64_t now_ns)
{
    for (uint32_t i = 0; i < core->config.pool_devices; i++) {
        struct device *d = &core->devices[i];
        leak(d, now_ns);
        bool bite = d->flying <= FLIGHT_LOW;
        while (bite && d->held && d->flying < FLIGHT_MAX && !waits(core, d, now_ns)) {
            uint32_t id = d->first, due = d->due;
            core->totals.copies_held += now_ns - core->blocks[id].sealed_ns >= HELD_NS;
            take_out(core, d, id);
            d->due = due ? due - 1 : 0;
            block_go_home(core, id);
        }
    }
}

uint64_t homing_deadline(const struct core *core)
{
    uint64_t next = UINT64_MAX;
    for (uint32_t i = 0; i < core->config.pool_devices; i++) {
        const struct device *d = &core->devices[i];
        if (!d->held || d->flying > FLIGHT_LOW) /* a copy that ends is news by itself */
            continue;
        uint64_t slow = d->at_ns + (d->pace_ns > BURST_NS ? d->pace_ns - BURST_NS : 0);
        next = PKV_MIN(next, PKV_MIN(slow, core->blocks[d->first].sealed_ns + core->config.hold_ns));
    }
    return next;
}
