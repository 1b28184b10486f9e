/* Numbers and tables for people, JSON for programs. */
#include "client/cli/cli.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

const char *format_bytes(uint64_t bytes, char ret[32])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    size_t unit = 0;
    while (value >= 1024 && unit + 1 < sizeof(units) / sizeof(units[0]))
        value /= 1024, unit++;
    snprintf(ret, 32, unit ? "%.1f %s" : "%.0f %s", value, units[unit]);
    return ret;
}

uint64_t format_number(const json_t *object, const char *key)
{
    return (uint64_t)json_integer_value(json_object_get(object, key));
}

const char *format_text(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : "";
}

int format_json(json_t *value)
{
    json_dumpf(value, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(value);
    return CLI_GOOD;
}

void table_row(struct table *t, uint32_t columns, const char *const *cells)
{
    char **more = realloc(t->cells, (t->rows + 1ull) * columns * sizeof(*more));
    if (!more)
        abort();
    t->columns = columns, t->cells = more;
    for (uint32_t c = 0; c < columns; c++)
        if (!(t->cells[t->rows * columns + c] = strdup(cells[c])))
            abort();
    t->rows++;
}

static bool numeric(const char *text)
{
    return isdigit((unsigned char)text[0]) || (text[0] == '-' && !text[1]);
}

void table_print(struct table *t)
{
    size_t width[TABLE_COLUMNS] = {0};
    bool right[TABLE_COLUMNS] = {0};
    for (uint32_t i = 0; i < t->rows * t->columns; i++) {
        size_t n = strlen(t->cells[i]);
        width[i % t->columns] = n > width[i % t->columns] ? n : width[i % t->columns];
        if (i / t->columns == 1) /* heads stand as the first row below them */
            right[i % t->columns] = numeric(t->cells[i]);
    }
    for (uint32_t i = 0; i < t->rows * t->columns; i++) {
        uint32_t column = i % t->columns;
        bool last = column + 1 == t->columns;
        int room = right[column] ? (int)width[column] : last ? 0 : -(int)width[column];
        printf("%*s%s", room, t->cells[i], last ? "\n" : "  ");
        free(t->cells[i]);
    }
    free(t->cells);
    *t = (struct table){0};
}
