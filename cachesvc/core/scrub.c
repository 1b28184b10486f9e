/* Memory is looked at again: a clock over the blocks that are at home. Policy answers which is next; the shell says when, and
 * computes checksums. While it is looked at a block is pinned, so its place is not another's. What comes of a failure is in
 * blocks.c. */
#include "cachesvc/core/internal.h"

static bool can_look(const struct block *b)
{
    return b->state == BLOCK_HOME && !b->dying && !b->damaged && !b->looked_at;
}

void scrub_mark(struct core *core, uint32_t id)
{
    bool can = can_look(&core->blocks[id]);
    if (can == set_has(&core->to_look, id))
        return;
    core->to_look.word[id / 64] ^= 1ull << id % 64;
    core->to_look_count += can ? 1 : UINT32_MAX;
}

bool core_scrub(struct core *core, uint64_t *ret_bytes)
{
    if (!core->to_look_count)
        return false;
    uint32_t at = core->scrub_hand < core->block_count ? core->scrub_hand : 0;
    uint64_t word = core->to_look.word[at / 64] >> at % 64 << at % 64; /* from the hand on */
    while (!word) {
        at = at / 64 * 64 + 64 < core->block_count ? at / 64 * 64 + 64 : 0;
        word = core->to_look.word[at / 64];
    }
    uint32_t id = at / 64 * 64 + (uint32_t)__builtin_ctzll(word);
    core->scrub_hand = id + 1;
    *ret_bytes = core->blocks[id].row_bytes;
    block_look(core, id);
    return true;
}

const char *scrub_check(const struct core *core)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < core->block_count; i++) {
        if (can_look(&core->blocks[i]) != set_has(&core->to_look, i))
            return "a block at home is never looked at, or another is";
        count += set_has(&core->to_look, i);
    }
    return count != core->to_look_count ? "the count of blocks to be looked at is wrong" : NULL;
}

void seq_damage(struct seq *s, bool joins)
{
    s->damaged += joins ? 1 : UINT32_MAX;
    __atomic_store_n(&s->table->err, (uint32_t)(s->damaged ? PKV_ERR_CHECKSUM : PKV_ERR_OK), __ATOMIC_RELEASE);
}
