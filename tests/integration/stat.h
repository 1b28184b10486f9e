/* What the CLI says of a test's daemon, as JSON. */
#ifndef TESTS_INTEGRATION_STAT_H
#define TESTS_INTEGRATION_STAT_H

#include "tests/integration/service.h"

#include <jansson.h>
#include <stdbool.h>

/* `verb`: stat or ls. The caller owns what is returned. */
static inline json_t *stat_json(const struct test_daemon *d, const char *verb)
{
    char command[512];
    const char *cli = getenv("PIVOTKV_CLI");
    assert_non_null(cli);
    snprintf(command, sizeof(command), "'%s' %s --format json --socket '%s'", cli, verb, d->socket);
    FILE *f = popen(command, "r");
    assert_non_null(f);
    json_t *o = json_loadf(f, 0, NULL);
    assert_int_equal(pclose(f), 0);
    assert_non_null(o);
    return o;
}

/* The number of the state that a sequence's signatures are made with, as ls says it; UINT64_MAX: ls does not have it. */
static inline uint64_t stat_state(const struct test_daemon *d, uint64_t seq)
{
    char handle[32];
    json_t *o = stat_json(d, "ls"), *s;
    uint64_t state = UINT64_MAX;
    size_t i;
    snprintf(handle, sizeof(handle), "0x%016llx", (unsigned long long)seq);
    json_array_foreach(json_object_get(o, "sequences"), i, s)
    {
        if (!strcmp(json_string_value(json_object_get(s, "seq")), handle))
            state = (uint64_t)json_integer_value(json_object_get(s, "state"));
    }
    json_decref(o);
    return state;
}

/* A number of stat: stat_number(d, "totals", "samples"). */
static inline uint64_t stat_number(const struct test_daemon *d, const char *group, const char *name)
{
    json_t *o = stat_json(d, "stat"), *n = json_object_get(json_object_get(o, group), name);
    assert_true(json_is_integer(n));
    uint64_t value = (uint64_t)json_integer_value(n);
    json_decref(o);
    return value;
}

/* What the samples say of a model. */
struct stat_quality {
    uint64_t samples, state;
    double mass, error;
    bool alarm, recalibrating;
};

static inline struct stat_quality stat_quality(const struct test_daemon *d, const char *model)
{
    json_t *o = stat_json(d, "stat"), *m;
    struct stat_quality q = {0};
    size_t i;
    json_array_foreach(json_object_get(o, "models"), i, m)
    {
        const json_t *x = json_object_get(m, "quality");
        if (!strcmp(json_string_value(json_object_get(m, "name")), model))
            q = (struct stat_quality){(uint64_t)json_integer_value(json_object_get(x, "samples")),
                                      (uint64_t)json_integer_value(json_object_get(m, "state")),
                                      json_number_value(json_object_get(x, "mass")),
                                      json_number_value(json_object_get(x, "error")),
                                      json_is_true(json_object_get(x, "alarm")),
                                      json_is_true(json_object_get(m, "recalibrating"))};
    }
    json_decref(o);
    return q;
}

#endif
