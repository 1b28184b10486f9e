/* The core under random events: workers come, go and die, tenants share a pool that is far too small, copies end late, out of
 * order or not at all, readers hold epochs, memory of the arena loses bits. Memory is simulated: each slot holds the number of
 * the block that was written there. After each event every invariant of the core is walked, every block table names a place
 * that still holds its block, what a reader saw when it entered its epoch is still there, and copies of entries hold while
 * `changes` stands. What was lost never comes back into the pool, and when all has been looked at again, who has lost something
 * has been told, and nobody else. usage: sim_core [SEEDS [EVENTS [FIRST_SEED]]] */
#include "cachesvc/core/core.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    WORKERS = 6,
    SEQS = 12,
    LAYERS = 2,
    MODELS = 3, /* the last without signatures */
    BLOCKS = 24,
    CHUNKS = 8,
    ARENA = 8,
    SLOTS = 256,
    COPIES = 4096,
    HELD = 40,
    FORKS = 8
};
#define CHUNK_BYTES (1ull << 17)
#define LOST        (1ull << 63) /* of a cell: its bits are not what was written */

static uint64_t state, now, next_content;
static uint64_t memory[PKV_TIERS][ARENA][SLOTS];

struct reader {
    bool live, reads;
    uint32_t id;
    uint64_t epoch;
    uint32_t held;
    uint64_t place[HELD], content[HELD];
};
struct sequence {
    bool live;
    uint64_t handle;
    struct pkv_table *table;
    uint64_t content[LAYERS][BLOCKS];
    uint64_t changes; /* of the table when the entries were copied */
    struct pkv_block_ref copied[LAYERS][BLOCKS];
};
struct fork { /* under way; what the child must show */
    bool live;
    uint32_t tag;
    uint64_t tokens, content[LAYERS][BLOCKS];
};
static struct fork forks[FORKS];
static uint32_t next_tag = 1000;
static struct reader workers[WORKERS];
static struct sequence seqs[SEQS];
static struct core_action copies[COPIES];
static uint32_t copy_count, model[MODELS], devices;
static uint64_t waiting, answered, seen_home, seen_full, seen_arena_full, seen_dropped;
static uint64_t seen_kept, seen_moved, seen_forks, seen_bare, seen_cuts, seen_cow, seen_cow_failed;
static uint64_t seen_mended, seen_damaged, seen_told;
static uint64_t seen_held; /* blocks whose copies home waited */
static struct core *core;

static uint32_t below(uint32_t n)
{
    state += 0x9e3779b97f4a7c15ull; /* splitmix64 */
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (uint32_t)((z ^ (z >> 31)) >> 11) % n;
}

static void fail(const char *what)
{
    printf("FAILED: %s\n", what);
    exit(1);
}

static uint64_t *cell(uint64_t place)
{
    if (pkv_place_tier(place) == PKV_TIER_NONE || pkv_place_chunk(place) >= ARENA || pkv_place_slot(place) >= SLOTS)
        fail("a place outside of the memory");
    return &memory[pkv_place_tier(place)][pkv_place_chunk(place)][pkv_place_slot(place)];
}

/* In the pool every bit counts; in the arena bits are lost until somebody looks. */
static bool holds(uint64_t place, uint64_t content)
{
    uint64_t lost = pkv_place_tier(place) == PKV_TIER_ARENA ? LOST : 0;
    return (*cell(place) & ~lost) == content;
}

static struct pkv_table *table_alloc(void *context, uint32_t tenant, uint64_t bytes, uint64_t *ret_offset)
{
    (void)context, (void)tenant;
    struct pkv_table *t = below(50) ? calloc(1, bytes) : NULL; /* sometimes there is no room */
    *ret_offset = (uint64_t)(uintptr_t)t;
    return t;
}

static void table_free(void *context, uint32_t tenant, uint64_t offset, uint64_t bytes)
{
    (void)context, (void)tenant, (void)bytes;
    for (int i = 0; i < SEQS; i++)
        if ((uint64_t)(uintptr_t)seqs[i].table == offset)
            seqs[i] = (struct sequence){0};
    free((void *)(uintptr_t)offset);
}

/* The child shows what its parent showed when it was forked, the copied tail included. */
static void child_born(uint32_t worker, uint32_t tag, enum pkv_err err, uint64_t handle, uint64_t table)
{
    struct fork *f = NULL;
    for (int i = 0; i < FORKS; i++)
        f = forks[i].live && forks[i].tag == tag ? &forks[i] : f;
    if (!f)
        return;
    f->live = false;
    seen_cow_failed += err == PKV_ERR_SYSTEM;
    if (err != PKV_ERR_OK)
        return;
    struct sequence *s = NULL;
    for (int i = 0; i < SEQS && !s; i++)
        s = seqs[i].live ? NULL : &seqs[i];
    if (!s) {
        if (core_seq_destroy(core, worker, handle) != PKV_ERR_OK)
            fail("a child could not be destroyed");
        return;
    }
    *s = (struct sequence){.live = true, .handle = handle, .table = (struct pkv_table *)(uintptr_t)table};
    memcpy(s->content, f->content, sizeof(s->content));
    for (int l = 0; l < LAYERS; l++)
        for (uint32_t b = 0; b < BLOCKS; b++)
            if (b >= pkv_tokens_blocks(f->tokens))
                s->content[l][b] = 0;
            else if (!pkv_table_layer(s->table, (uint32_t)l, s->table->blocks_max)[b].rows)
                fail("a child lacks a block");
    const struct pkv_block_ref *first = pkv_table_layer(s->table, 0, s->table->blocks_max);
    seen_bare += f->tokens % PKV_BLOCK_TOKENS && first->rows && !first->signatures;
    seen_forks++;
}

static void take_actions(void)
{
    struct core_action a;
    while (core_next_action(core, &a)) {
        if (a.kind == CORE_COPY || a.kind == CORE_CHECK) {
            if (copy_count == COPIES)
                fail("more copies in flight than blocks");
            copies[copy_count++] = a;
        } else if (a.kind == CORE_COMPLETE) {
            answered++;
            seen_full += a.err == PKV_ERR_POOL_FULL;
            seen_arena_full += a.err == PKV_ERR_ARENA_FULL;
            child_born(a.worker, a.tag, a.err, a.value0, a.value1);
        } else {
            memset(memory[a.tier][a.chunk], 0, sizeof(memory[a.tier][a.chunk]));
        }
    }
}

/* Blocks that a grant made appear are written by their worker; the others must hold what they held. */
static void walk_tables(void)
{
    for (int i = 0; i < SEQS; i++) {
        for (int l = 0; seqs[i].live && l < LAYERS; l++) {
            const struct pkv_block_ref *refs = pkv_table_layer(seqs[i].table, (uint32_t)l, seqs[i].table->blocks_max);
            for (uint32_t b = 0; b < seqs[i].table->blocks_max; b++) {
                uint64_t *content = &seqs[i].content[l][b];
                if (!refs[b].rows)
                    *content = 0;
                else if (!*content)
                    *cell(refs[b].rows) = *content = ++next_content;
                else if (!holds(refs[b].rows, *content))
                    fail("a block table names a place that holds something else");
                seen_home += refs[b].rows && pkv_place_tier(refs[b].rows) == PKV_TIER_ARENA;
            }
        }
    }
    for (int w = 0; w < WORKERS; w++)
        for (uint32_t h = 0; workers[w].reads && h < workers[w].held; h++)
            if (!holds(workers[w].place[h], workers[w].content[h]))
                fail("a place was reused under a reader");
}

/* What a reader copied of the tables before is what they say, unless they say that they changed. */
static void walk_copies(void)
{
    for (int i = 0; i < SEQS; i++) {
        struct sequence *s = &seqs[i];
        bool same = s->live && s->changes == s->table->changes;
        for (uint32_t l = 0; s->live && l < LAYERS; l++) {
            const struct pkv_block_ref *refs = pkv_table_layer(s->table, l, s->table->blocks_max);
            for (uint32_t b = 0; b < s->table->blocks_max; b++) {
                struct pkv_block_ref *copy = &s->copied[l][b];
                bool equal = copy->rows == refs[b].rows && copy->signatures == refs[b].signatures;
                if (copy->rows && same && !equal)
                    fail("an entry changed and its table did not say so");
                seen_kept += copy->rows && same;
                seen_moved += copy->rows && !equal;
                if (!same || !copy->rows)
                    *copy = refs[b];
            }
        }
        if (s->live)
            s->changes = s->table->changes;
    }
}

static struct sequence *any_seq(void)
{
    struct sequence *s = &seqs[below(SEQS)];
    return s->live ? s : NULL;
}

static void event_worker(struct reader *w)
{
    if (!w->live) {
        if (core_worker_join(core, below(3) ? "a" : "b", &w->id) != PKV_ERR_OK)
            fail("a worker could not join");
        if (below(2))
            core_worker_device(core, w->id, below(devices));
        w->live = true;
    } else if (below(40) == 0) {
        w->live = w->reads = false; /* its process is gone: nothing of it reads any more */
        core_worker_leave(core, w->id);
    }
}

static void event_create(struct reader *w)
{
    struct sequence *s = &seqs[below(SEQS)];
    if (s->live || !w->live)
        return;
    struct pkv_op_create op = {.model = model[below(MODELS)],
                               .max_tokens = PKV_BLOCK_TOKENS * (1 + below(BLOCKS)),
                               .flags = below(3) ? 0 : PKV_SEQ_PERSISTENT};
    uint64_t handle, table;
    if (core_seq_create(core, w->id, &op, &handle, &table) == PKV_ERR_OK)
        *s = (struct sequence){.live = true, .handle = handle, .table = (struct pkv_table *)(uintptr_t)table};
}

static void event_grant(struct reader *w, struct sequence *s)
{
    enum pkv_err e;
    uint32_t layer = below(3) == 0 ? PKV_LAYER_ALL : below(LAYERS);
    if (!core_grant(core, now, w->id, 1, s->handle, layer, below(BLOCKS * PKV_BLOCK_TOKENS + 90), &e))
        waiting++;
    else
        seen_arena_full += e == PKV_ERR_ARENA_FULL;
}

static void event_seal(struct reader *w, struct sequence *s)
{
    uint32_t layer = below(LAYERS), first = below(BLOCKS);
    for (uint32_t f = 0; below(4) && f < BLOCKS; f++) /* mostly the right one */
        if (core_seal(core, now, w->id, s->handle, layer, f, 1 + below(2)) == PKV_ERR_OK)
            return;
    core_seal(core, now, w->id, s->handle, layer, first, below(5));
}

static void copied(uint32_t i, bool ok)
{
    struct core_action a = copies[i];
    copies[i] = copies[--copy_count];
    if (ok && a.kind == CORE_COPY)
        *cell(a.to) = *cell(a.from);
    uint64_t home = pkv_place_tier(a.from) == PKV_TIER_ARENA ? a.from : a.to;
    core_copied(core, a.copy, ok, *cell(home));
}

static void event_copied(void)
{
    if (!copy_count)
        return;
    uint32_t i = below(copy_count);
    copied(i, below(20) != 0);
}

static void event_lose(void)
{
    uint64_t *c = &memory[PKV_TIER_ARENA][below(ARENA)][below(8)]; /* slots of a block's rows are large */
    *c |= *c ? LOST : 0;
    const struct sequence *s = any_seq();
    for (uint32_t b = 0; s && b < s->table->blocks_max; b++) { /* those that lie there alone are few */
        uint64_t place = pkv_table_layer(s->table, 0, s->table->blocks_max)[b].rows;
        if (pkv_place_tier(place) == PKV_TIER_ARENA && below(4) == 0)
            *cell(place) |= LOST;
    }
}

static void event_scrub(void)
{
    uint64_t bytes = 0;
    if (core_scrub(core, &bytes) && !bytes)
        fail("a block of no bytes is looked at");
}

/* Some more is lost; then all that is at home is looked at, and all copies end well. */
static void look_at_all(void)
{
    for (int i = 0; i < 40; i++)
        event_lose();
    for (int i = 0; i < 4 * ARENA * SLOTS; i++) {
        event_scrub();
        take_actions();
        while (copy_count) {
            copied(0, true);
            take_actions();
        }
    }
    for (int i = 0; i < SEQS; i++) {
        bool lost = false;
        for (uint32_t l = 0; seqs[i].live && l < LAYERS; l++)
            for (uint32_t b = 0; b < seqs[i].table->blocks_max; b++) {
                uint64_t place = pkv_table_layer(seqs[i].table, l, seqs[i].table->blocks_max)[b].rows;
                lost |= place && *cell(place) & LOST;
            }
        if (seqs[i].live && seqs[i].table->err != (lost ? PKV_ERR_CHECKSUM : PKV_ERR_OK))
            fail("a sequence has lost rows and was not told, or was told and has not");
        seen_told += lost;
    }
}

static void event_read(struct reader *w, struct sequence *s)
{
    if (w->reads) {
        w->reads = false;
        return;
    }
    w->reads = true, w->epoch = core_epoch(core), w->held = 0;
    for (int l = 0; s && l < LAYERS; l++)
        for (uint32_t b = 0; b < s->table->blocks_max && w->held < HELD; b++) {
            uint64_t place = pkv_table_layer(s->table, (uint32_t)l, s->table->blocks_max)[b].rows;
            if (!place)
                continue;
            w->place[w->held] = place;
            w->content[w->held++] = *cell(place) & ~LOST;
        }
}

static void event_fork(struct reader *w, struct sequence *s)
{
    struct fork *f = &forks[below(FORKS)];
    struct pkv_op_fork op = {.tokens = below((uint32_t)s->table->tokens + PKV_BLOCK_TOKENS)};
    uint64_t handle, table;
    enum pkv_err e;
    if (f->live)
        return;
    if (below(3) == 0)
        op.tokens -= op.tokens % PKV_BLOCK_TOKENS;
    *f = (struct fork){.live = true, .tag = ++next_tag, .tokens = op.tokens};
    memcpy(f->content, s->content, sizeof(f->content));
    if (core_seq_fork(core, now, w->id, f->tag, s->handle, &op, &e, &handle, &table))
        child_born(w->id, f->tag, e, handle, table);
    if (below(8) == 0) /* what the child copies is nobody's then */
        (void)core_seq_destroy(core, w->id, s->handle);
}

static void event_truncate(struct reader *w, struct sequence *s)
{
    enum pkv_err e;
    uint32_t layer = below(3) ? PKV_LAYER_ALL : below(LAYERS);
    if (core_seq_truncate(core, now, w->id, 2, s->handle, layer, below(BLOCKS * PKV_BLOCK_TOKENS), &e))
        seen_cuts += e == PKV_ERR_OK;
}

static void event_quiesce(void)
{
    uint64_t epoch = core_epoch(core);
    for (int w = 0; w < WORKERS; w++)
        if (workers[w].reads && workers[w].epoch < epoch)
            epoch = workers[w].epoch;
    core_quiesce(core, now, epoch);
    struct core_stats stats;
    core_stats(core, &stats);
    seen_held += stats.held;
    if (stats.held && core_deadline(core) <= now)
        fail("a copy home waits longer than it may");
}

static void event(void)
{
    struct reader *w = &workers[below(WORKERS)];
    struct sequence *s = any_seq();
    uint64_t ignored;
    uint32_t kind = below(100);
    now += below(1000);
    if (kind < 4)
        event_worker(w);
    else if (kind < 8)
        event_create(w);
    else if (kind < 40)
        event_copied();
    else if (kind < 55)
        event_quiesce();
    else if (kind < 56)
        core_tick(core, now);
    else if (kind < 57)
        below(10) ? event_scrub() : event_lose();
    else if (!w->live)
        event_worker(w);
    else if (kind < 62)
        event_read(w, s);
    else if (!s)
        event_create(w);
    else if (kind < 64)
        (void)core_seq_open(core, w->id, s->handle, &ignored, &ignored);
    else if (kind < 66 && below(3) == 0)
        (void)core_seq_close(core, w->id, s->handle);
    else if (kind < 67 && below(4) == 0)
        (void)core_seq_destroy(core, w->id, s->handle);
    else if (kind < 68)
        (void)core_seq_close(core, w->id, s->handle + (1ull << 32));
    else if (kind < 70)
        event_fork(w, s);
    else if (kind < 71)
        event_truncate(w, s);
    else if (kind < 84)
        event_grant(w, s);
    else
        event_seal(w, s);
}

static void start(uint64_t seed)
{
    state = seed * 7919 + 1;
    memset(workers, 0, sizeof(workers)), memset(seqs, 0, sizeof(seqs)), memset(memory, 0, sizeof(memory));
    memset(forks, 0, sizeof(forks));
    copy_count = 0;
    struct core_config config = {.pool_chunks = CHUNKS,
                                 .arena_chunks = ARENA,
                                 .pool_devices = 1 + below(2),
                                 .chunk_bytes = CHUNK_BYTES,
                                 .grant_timeout_ns = 20000,
                                 .hold_ns = below(3) ? 1000 + below(20000) : 0,
                                 .hold_rate = below(2) ? 2047000 : 100000}; /* a block alone is just fast, or very */
    devices = config.pool_devices;
    core = core_create(&config, &(struct core_hooks){table_alloc, table_free, NULL});
    if (!core)
        fail("no core");
    for (uint16_t m = 0; m < MODELS; m++) {
        struct pkv_model_request r = {.scheme = m == 2 ? PKV_SCHEME_NONE : PKV_SCHEME_SIGN,
                                      .geom = {.layers = LAYERS,
                                               .q_heads = 1,
                                               .kv_heads = 1,
                                               .head_dim = 64,
                                               .dtype = m ? PKV_F32 : PKV_F16,
                                               .sig_bits = m == 2 ? 0 : 64}};
        r.name[0] = (char)('a' + m);
        if (core_model_add(core, &r, &model[m]) != PKV_ERR_OK)
            fail("no model");
    }
}

int main(int argc, char **argv)
{
    uint64_t seeds = argc > 1 ? strtoull(argv[1], NULL, 0) : 10, events = argc > 2 ? strtoull(argv[2], NULL, 0) : 100000;
    uint64_t first = argc > 3 ? strtoull(argv[3], NULL, 0) : 1;
    for (uint64_t seed = first; seed < first + seeds; seed++) {
        printf("seed %" PRIu64 "\n", seed);
        fflush(stdout);
        start(seed);
        for (uint64_t i = 0; i < events; i++) {
            event();
            take_actions();
            walk_tables();
            walk_copies();
            const char *wrong = core_check(core);
            if (wrong) {
                printf("event %" PRIu64 ": ", i);
                fail(wrong);
            }
        }
        look_at_all();
        if (core_check(core))
            fail(core_check(core));
        seen_mended += core_health(core)->blocks_mended, seen_damaged += core_health(core)->blocks_damaged;
        struct core_stats stats;
        core_stats(core, &stats);
        seen_dropped += stats.blocks_dropped;
        seen_cow += stats.blocks_cow;
        core_destroy(core);
    }
    printf("%" PRIu64 " forks, %" PRIu64 " truncates at once, %" PRIu64 " tails copied, %" PRIu64 " forks undone\n", seen_forks,
           seen_cuts, seen_cow, seen_cow_failed);
    printf("%" PRIu64 " events, %" PRIu64 " grants waited, %" PRIu64 " answered late, %" PRIu64 " of them refused, %" PRIu64
           " met a full arena, %" PRIu64 " blocks dropped\n",
           seeds * events, waiting, answered, seen_full, seen_arena_full, seen_dropped);
    printf("%" PRIu64 " times a copy home was seen to wait\n", seen_held);
    printf("%" PRIu64 " blocks mended, %" PRIu64 " damaged, %" PRIu64 " sequences told of them at the end\n", seen_mended,
           seen_damaged, seen_told);
    if (!seen_held || !seen_mended || !seen_damaged || !seen_told)
        fail("no copy home has waited, or no lost bit was found");
    if (!seen_kept || !seen_moved || !waiting || !seen_full || !seen_arena_full || !seen_dropped || !seen_home || !seen_forks ||
        !seen_bare || !seen_cuts || !seen_cow || !seen_cow_failed)
        fail("the events reached too little: this run proves nothing");
    return 0;
}
