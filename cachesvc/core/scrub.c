/* Memory is looked at again: a clock over the blocks that are at home. Policy answers which is next; the shell says when, and
 * computes checksums. While it is looked at a block is pinned, so its place is not another's. What comes of a failure is in
 * blocks.c. */
#include "cachesvc/core/internal.h"

#define LOOK_MOST 4096u /* blocks in one call that are not at home */

bool core_scrub(struct core *core, uint64_t *ret_bytes)
{
    for (uint32_t n = 0; core->by_state[BLOCK_HOME] && n < PKV_MIN(core->block_count, LOOK_MOST); n++) {
        uint32_t id = core->scrub_hand++ % core->block_count;
        const struct block *b = &core->blocks[id];
        if (b->state != BLOCK_HOME || b->dying || b->damaged || b->looked_at)
            continue;
        *ret_bytes = b->row_bytes;
        block_look(core, id);
        return true;
    }
    return false;
}

void seq_damage(struct seq *s, bool joins)
{
    s->damaged += joins ? 1 : UINT32_MAX;
    __atomic_store_n(&s->table->err, (uint32_t)(s->damaged ? PKV_ERR_CHECKSUM : PKV_ERR_OK), __ATOMIC_RELEASE);
}
