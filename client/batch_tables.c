/* What of the block tables a batch's device does not know yet. Entries of blocks that were there are looked at again only when
 * the table says that one has changed (proto/table.h); entries of new blocks are read as they appear. */
#include "client/batch.h"

static int entry_add(struct pkv_batch *b, const struct gpu_batch_ref *entry)
{
    if (b->entries_count == b->entries_room) {
        uint64_t room = PKV_MAX(1024u, 2 * b->entries_room);
        struct gpu_batch_ref *more = realloc(b->entries, room * sizeof(*more));
        if (!more)
            return -PKV_ERR_NO_MEMORY;
        b->entries = more, b->entries_room = room;
    }
    b->entries[b->entries_count++] = *entry;
    return 0;
}

/* Blocks [first, last) of a layer: those that differ from what the device has. They may be the whole table of a million tokens,
 * of which little has changed. */
static int layer_update(struct pkv_batch *b, uint32_t index, uint32_t layer, uint32_t first, uint32_t last)
{
    struct batch_seq *s = &b->seqs[index];
    struct pkv_table *table = (struct pkv_table *)(uintptr_t)s->seq->table;
    const struct pkv_block_ref *from = pkv_table_layer(table, layer, table->blocks_max);
    struct pkv_block_ref *kept = s->refs + (uint64_t)layer * table->blocks_max;
    uint64_t before = b->entries_count;
    int r = last <= table->blocks_max ? 0 : -PKV_ERR_STALE;
    for (uint32_t i = first; i < last && !r; i++) {
        struct pkv_block_ref now = {__atomic_load_n(&from[i].rows, __ATOMIC_RELAXED),
                                    __atomic_load_n(&from[i].signatures, __ATOMIC_RELAXED)};
        if (now.rows && now.rows == kept[i].rows && now.signatures == kept[i].signatures)
            continue; /* nothing where a block should be is looked at below */
        kept[i] = now;
        r = entry_add(b, &(struct gpu_batch_ref){.seq = index, .layer = layer, .block = i, .ref = now});
    }
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (!r && pkv_load64(&table->seq) != s->seq->handle) /* see seq_refs: what was read may be another sequence's */
        r = -PKV_ERR_STALE;
    for (uint64_t e = before; e < b->entries_count && !r; e++) {
        r = region_map(b->kv, b->entries[e].ref.rows);
        r = r || !b->model->geom.sig_bits ? r : region_map(b->kv, b->entries[e].ref.signatures);
    }
    return r;
}

static int seq_update(struct pkv_batch *b, uint32_t index, void *stream)
{
    struct batch_seq *s = &b->seqs[index];
    uint32_t need = pkv_tokens_blocks(b->lengths[index]);
    uint64_t changes = pkv_load64(&s->seq->table->changes);
    if (pkv_load64(&s->seq->table->seq) != s->seq->handle)
        return -PKV_ERR_STALE;
    if (pkv_load32(&s->seq->table->err))
        return -PKV_ERR_CHECKSUM;
    if (s->cuts != s->seq->cuts) { /* rows that were kept of the tokens cut off are of other tokens now */
        int r = gpu_batch_forget(b->gpu, index, stream);
        if (r)
            return r;
        s->cuts = s->seq->cuts, s->asked = 0;
    }
    uint32_t first = s->known && changes == s->changes ? PKV_MIN(s->known, need) : 0;
    int r = 0;
    for (uint32_t l = 0; l < b->model->geom.layers && !r && first < need; l++)
        r = layer_update(b, index, l, first, need);
    if (!r)
        s->known = need, s->changes = changes;
    return r;
}

int batch_tables(struct pkv_batch *b, void *stream)
{
    int r = 0;
    b->entries_count = 0;
    for (uint32_t i = 0; i < b->count && !r; i++)
        r = seq_update(b, i, stream);
    if (!r && (b->maps != b->kv->maps || !b->maps)) {
        struct gpu_space readable = region_readable(b->kv), writable = region_writable(b->kv);
        r = gpu_batch_spaces(b->gpu, &readable, &writable);
        b->maps = r ? 0 : b->kv->maps;
    }
    if (r)
        batch_tables_forget(b);
    return r;
}

void batch_tables_forget(struct pkv_batch *b)
{
    for (uint32_t i = 0; i < b->count; i++) {
        struct batch_seq *s = &b->seqs[i];
        s->known = 0;
        memset(s->refs, 0, (uint64_t)b->model->geom.layers * s->seq->table->blocks_max * sizeof(*s->refs));
    }
}
