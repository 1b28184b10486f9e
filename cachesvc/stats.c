/* Numbers come from the core, the daemon's counters and the workers' regions. A region is hostile: its counters are read once
 * and shown as they are. */
#include "cachesvc/stats.h"

#include "cachesvc/worker.h"

#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#ifdef PKV_JEMALLOC
#include <jemalloc/jemalloc.h>
#else
#include <malloc.h>
#endif

static const char *const dtypes[] = {"f32", "f16", "bf16"};
static const char *const schemes[] = {"sign", "code", "linear", "hash", "none"};

static uint64_t heap_bytes(void)
{
#ifdef PKV_JEMALLOC
    uint64_t epoch = 1;
    size_t bytes = 0, size = sizeof(epoch);
    mallctl("epoch", &epoch, &size, &epoch, size);
    size = sizeof(bytes);
    mallctl("stats.allocated", &bytes, &size, NULL, 0);
    return bytes;
#else
    return mallinfo2().uordblks;
#endif
}

static const char *heap_name(void)
{
#ifdef PKV_JEMALLOC
    return "jemalloc";
#else
    return "libc";
#endif
}

static uint64_t rss_bytes(void)
{
    unsigned long long total = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f && fscanf(f, "%llu %llu", &total, &resident) != 2)
        resident = 0;
    if (f)
        fclose(f);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

static json_t *number(uint64_t n)
{
    return json_integer((json_int_t)n);
}

static json_t *tier_json(struct daemon *d, const struct core_stats *s, uint32_t tier)
{
    return json_pack("{s:o, s:o, s:o, s:o, s:o, s:s}", "capacity", number(s->capacity[tier]), "used", number(s->used[tier]),
                     "retired", number(s->retired[tier]), "chunk_bytes", number(d->memory.chunk_bytes), "chunks",
                     number(d->memory.count[tier]), "pages", memory_pages(&d->memory, tier));
}

static json_t *gpus_json(struct daemon *d)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < d->devices.count; i++) {
        const struct gpu_device_info *info = gpu_device_about(d->devices.device[i]);
        char uuid[DEVICES_UUID_TEXT];
        int workers = 0;
        devices_uuid_text(info->uuid, uuid);
        for (uint32_t w = 0; w < DAEMON_CONNECTIONS_MAX; w++)
            workers += d->workers[w] && d->workers[w]->state == WORKER_JOINED && d->workers[w]->device == i;
        json_array_append_new(list, json_pack("{s:s, s:s, s:i}", "name", info->name, "uuid", uuid, "workers", workers));
    }
    return list;
}

#define PKV_COUNTER_JSON(name, unit, help) json_object_set_new(o, #name, number(c->name));
static json_t *worker_counters_json(const struct pkv_worker_counters *c)
{
    json_t *o = json_object();
    PKV_WORKER_COUNTERS(PKV_COUNTER_JSON)
    return o;
}

static json_t *daemon_counters_json(const struct daemon_counters *c)
{
    json_t *o = json_object();
    PKV_DAEMON_COUNTERS(PKV_COUNTER_JSON)
    return o;
}
#undef PKV_COUNTER_JSON

static json_t *model_json(const struct pkv_model_request *m)
{
    const struct pkv_geom *g = &m->geom;
    return json_pack("{s:s, s:i, s:i, s:i, s:i, s:s, s:i, s:s}", "name", m->name, "layers", g->layers, "q_heads", g->q_heads,
                     "kv_heads", g->kv_heads, "head_dim", g->head_dim, "dtype", dtypes[g->dtype], "sig_bits", g->sig_bits,
                     "scheme", schemes[m->scheme]);
}

/* Means of the samples of a model's selections. */
static json_t *quality_json(const struct quality *q)
{
    if (!q->samples)
        return json_pack("{s:i, s:n, s:n, s:b}", "samples", 0, "mass", "error", "alarm", (int)q->alarm);
    return json_pack("{s:o, s:f, s:f, s:b}", "samples", number(q->samples), "mass", q->mass, "error", q->error, "alarm",
                     (int)q->alarm);
}

static json_t *audit_json(const struct daemon *d)
{
    uint32_t alarms = 0;
    for (uint32_t m = 0; m < PKV_MODELS_MAX; m++)
        alarms += d->quality[m].alarm;
    return json_pack("{s:o, s:o, s:i}", "share_ppm", number(d->config.audit_ppm), "alarm_ppm",
                     number(d->config.audit_alarm_ppm), "alarms", (int)alarms);
}

static uint32_t sequences_open(struct daemon *d, uint32_t worker)
{
    struct core_seq_info info;
    uint32_t n = 0;
    for (uint32_t i = 0; i < PKV_SEQS_MAX; i++)
        n += core_seq_info(d->core, i, &info) && info.open >> worker & 1;
    return n;
}

static void counters_add(struct pkv_worker_counters *to, const struct pkv_worker_counters *from)
{
    for (size_t i = 0; i < sizeof(*to) / sizeof(uint64_t); i++)
        ((uint64_t *)to)[i] += ((const uint64_t *)from)[i];
}

static json_t *workers_json(struct daemon *d, struct pkv_worker_counters *total)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < DAEMON_CONNECTIONS_MAX; i++) {
        const struct worker *w = d->workers[i];
        if (!w || w->state != WORKER_JOINED)
            continue;
        struct pkv_worker_counters c;
        for (size_t n = 0; n < sizeof(c) / sizeof(uint64_t); n++)
            ((uint64_t *)&c)[n] = pkv_load64((const uint64_t *)&w->region->counters + n);
        counters_add(total, &c);
        json_array_append_new(list,
                              json_pack("{s:i, s:i, s:s, s:s, s:s, s:i, s:o}", "worker", (int)w->id, "pid", w->pid, "tenant",
                                        w->tenant, "label", w->label, "mode", w->direct ? "direct" : "served", "sequences",
                                        (int)sequences_open(d, w->id), "counters", worker_counters_json(&c)));
    }
    return list;
}

/* The core counts what it decides; the loop counts the rest. */
static void counters_refresh(struct daemon *d, const struct core_stats *s)
{
    const struct core_health *h = core_health(d->core);
    d->counters.blocks_checked = h->blocks_checked;
    d->counters.checksum_failures = h->checksum_failures;
    d->counters.blocks_mended = h->blocks_mended;
    d->counters.blocks_damaged = h->blocks_damaged;
    d->counters.blocks_granted = s->blocks_granted;
    d->counters.blocks_sealed = s->blocks_sealed;
    d->counters.blocks_home = s->blocks_home;
    d->counters.blocks_dropped = s->blocks_dropped;
    d->counters.blocks_freed = s->blocks_freed;
    d->counters.blocks_cow = s->blocks_cow;
    d->counters.copies_held = s->copies_held;
    d->counters.grants_delayed = s->grants_delayed;
    d->counters.grants_refused = s->grants_refused;
}

json_t *stats_stat(struct daemon *d)
{
    struct core_stats s;
    core_stats(d->core, &s);
    counters_refresh(d, &s);
    struct pkv_worker_counters total = d->departed;
    json_t *workers = workers_json(d, &total), *models = json_array();
    for (uint32_t m = 0; core_model(d->core, m); m++) {
        json_t *model = model_json(core_model(d->core, m));
        json_object_set_new(model, "state", number(d->states[m].latest));
        json_object_set_new(model, "recalibrating", json_boolean(d->control->models[m].wanted));
        json_object_set_new(model, "quality", quality_json(&d->quality[m]));
        json_array_append_new(models, model);
    }
    json_t *o = json_pack("{s:s, s:i, s:o, s:s, s:s, s:s, s:s}", "version", PKV_VERSION, "pid", (int)getpid(), "uptime_s",
                          number((daemon_now_ns() - d->started_ns) / 1000000000u), "socket", d->listener.path, "backend",
                          gpu_describe(d->gpus[0]), "io", d->io->name, "heap", heap_name());
    json_object_set_new(o, "pool", tier_json(d, &s, PKV_TIER_POOL));
    json_object_set_new(o, "arena", tier_json(d, &s, PKV_TIER_ARENA));
    json_object_set_new(o, "gpus", gpus_json(d));
    bool ipc = d->devices.share == GPU_SHARE_IPC;
    json_object_set_new(o, "share", !d->devices.count ? json_null() : json_string(ipc ? "ipc" : "vmm"));
    json_object_set_new(o, "mapper", d->mapper[0] ? json_string(d->mapper) : json_null());
    json_object_set_new(o, "pinned", number(__atomic_load_n(&d->memory.pins.done, __ATOMIC_ACQUIRE)));
    json_object_set_new(o, "blocks",
                        json_pack("{s:o, s:o, s:o, s:o}", "granted", number(s.granted), "sealed", number(s.sealed), "held",
                                  number(s.held), "home", number(s.home)));
    json_object_set_new(o, "sequences", number(s.seqs));
    json_object_set_new(o, "models", models);
    json_object_set_new(o, "workers", workers);
    json_object_set_new(o, "audit", audit_json(d));
    json_object_set_new(o, "counters", daemon_counters_json(&d->counters));
    json_object_set_new(o, "totals", worker_counters_json(&total));
    json_object_set_new(o, "memory", json_pack("{s:o, s:o}", "rss", number(rss_bytes()), "heap", number(heap_bytes())));
    return o;
}

static json_t *seq_json(const struct core_seq_info *s)
{
    char handle[32];
    snprintf(handle, sizeof(handle), "0x%016" PRIx64, s->handle);
    json_t *open = json_array();
    for (uint32_t w = 0; w < PKV_WORKERS_MAX; w++)
        if (s->open >> w & 1)
            json_array_append_new(open, number(w));
    json_t *o = json_pack("{s:s, s:s, s:s, s:s, s:i, s:o, s:o, s:b, s:o, s:o}", "seq", handle, "label", s->label, "tenant",
                          s->tenant, "model", s->model->name, "layers", (int)s->model->geom.layers, "tokens", number(s->tokens),
                          "max_tokens", number(s->max_tokens), "persistent", (int)s->persistent, "writer",
                          s->writer == UINT32_MAX ? json_null() : number(s->writer), "open", open);
    json_object_set_new(o, "blocks",
                        json_pack("{s:o, s:o, s:o, s:o, s:o}", "granted", number(s->blocks.granted), "sealed",
                                  number(s->blocks.sealed), "home_pool", number(s->blocks.home_pool), "home_arena",
                                  number(s->blocks.home_arena), "shared", number(s->blocks.shared)));
    json_object_set_new(o, "damaged", number(s->damaged));
    json_object_set_new(o, "state", number(s->state));
    json_object_set_new(o, "pool_bytes", number(s->pool_bytes));
    json_object_set_new(o, "arena_bytes", number(s->arena_bytes));
    return o;
}

json_t *stats_ls(struct daemon *d)
{
    json_t *list = json_array();
    struct core_seq_info info;
    for (uint32_t i = 0; i < PKV_SEQS_MAX; i++)
        if (core_seq_info(d->core, i, &info))
            json_array_append_new(list, seq_json(&info));
    return json_pack("{s:o}", "sequences", list);
}

json_t *stats_inspect(struct daemon *d, uint64_t handle)
{
    struct core_seq_info info;
    uint32_t index = pkv_handle_index(handle);
    if (index >= PKV_SEQS_MAX || !core_seq_info(d->core, index, &info) || info.handle != handle)
        return NULL;
    const struct pkv_geom *g = &info.model->geom;
    json_t *o = seq_json(&info), *layers = json_array(), *geometry = model_json(info.model);
    json_object_del(geometry, "name");
    json_object_del(geometry, "scheme");
    json_object_set_new(o, "geometry", geometry);
    json_object_set_new(o, "scheme", json_string(schemes[info.model->scheme]));
    json_object_set_new(o, "row_bytes", number(pkv_geom_row_bytes(g)));
    json_object_set_new(o, "block_bytes", number(pkv_geom_block_bytes(g)));
    json_object_set_new(o, "signature_block_bytes", number(pkv_geom_sig_block_bytes(g)));
    struct core_layer_info n;
    for (uint32_t l = 0; core_layer_info(d->core, index, l, &n); l++)
        json_array_append_new(layers, json_pack("{s:i, s:i, s:i, s:i, s:i, s:i}", "layer", (int)l, "granted", (int)n.granted,
                                                "sealed", (int)n.sealed, "home_pool", (int)n.home_pool, "home_arena",
                                                (int)n.home_arena, "shared", (int)n.shared));
    json_object_set_new(o, "layer", layers);
    return o;
}
