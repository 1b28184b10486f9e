/* pivotkv inspect SEQ */
#include "client/cli/cli.h"

#include <stdlib.h>

static void layers(const json_t *list)
{
    static const char *const keys[] = {"layer", "granted", "sealed", "home_pool", "home_arena", "shared"};
    struct table t = {0};
    size_t i;
    const json_t *l;
    table_row(&t, 6, (const char *const[]){"layer", "writing", "going home", "home, in pool", "home, arena only", "shared"});
    json_array_foreach((json_t *)(uintptr_t)list, i, l)
    {
        char cells[6][32];
        const char *row[6];
        for (int c = 0; c < 6; c++) {
            snprintf(cells[c], 32, "%llu", (unsigned long long)format_number(l, keys[c]));
            row[c] = cells[c];
        }
        table_row(&t, 6, row);
    }
    table_print(&t);
}

int cli_inspect(struct cli *cli)
{
    int code = CLI_GOOD;
    if (!cli->count) {
        fprintf(stderr, "pivotkv: inspect needs a sequence: pivotkv ls shows them\n");
        return CLI_USAGE;
    }
    const char *handle = *cli->arguments++;
    cli->count--;
    cli_no_more(cli);
    json_t *s = admin_request(cli, json_pack("{s:s, s:s}", "verb", "inspect", "seq", handle), &code);
    if (!s)
        return code;
    if (cli->json)
        return format_json(s);
    const json_t *g = json_object_get(s, "geometry"), *writer = json_object_get(s, "writer");
    char pool[32], arena[32], rows[32], signatures[32], by[32] = "nobody";
    if (json_is_integer(writer))
        snprintf(by, sizeof(by), "worker %lld", (long long)json_integer_value(writer));
    printf("%s \"%s\" of tenant %s%s, written by %s\n", format_text(s, "seq"), format_text(s, "label"),
           format_text(s, "tenant"), json_is_true(json_object_get(s, "persistent")) ? ", persistent" : "", by);
    printf("model %s: %llu layers, %llu q heads, %llu kv heads x %llu, %s, %llu bit %s\n", format_text(s, "model"),
           (unsigned long long)format_number(g, "layers"), (unsigned long long)format_number(g, "q_heads"),
           (unsigned long long)format_number(g, "kv_heads"), (unsigned long long)format_number(g, "head_dim"),
           format_text(g, "dtype"), (unsigned long long)format_number(g, "sig_bits"), format_text(s, "scheme"));
    printf("%llu tokens sealed of at most %llu; a block is %s of rows and %s of signatures\n",
           (unsigned long long)format_number(s, "tokens"), (unsigned long long)format_number(s, "max_tokens"),
           format_bytes(format_number(s, "block_bytes"), rows),
           format_bytes(format_number(s, "signature_block_bytes"), signatures));
    printf("%s in the pool, %s in the arena\n", format_bytes(format_number(s, "pool_bytes"), pool),
           format_bytes(format_number(s, "arena_bytes"), arena));
    if (format_number(s, "damaged"))
        printf("%llu blocks are lost: their memory is damaged. Truncate before them, or prefill again\n",
               (unsigned long long)format_number(s, "damaged"));
    printf("\n");
    layers(json_object_get(s, "layer"));
    json_decref(s);
    return CLI_GOOD;
}
