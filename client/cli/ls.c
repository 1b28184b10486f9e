/* pivotkv ls */
#include "client/cli/cli.h"

int cli_ls(struct cli *cli)
{
    int code = CLI_GOOD;
    cli_no_more(cli);
    json_t *result = admin_request(cli, json_pack("{s:s}", "verb", "ls"), &code);
    if (!result)
        return code;
    if (cli->json)
        return format_json(result);
    struct table t = {0};
    size_t i;
    const json_t *s;
    table_row(
        &t, 10,
        (const char *const[]){"sequence", "label", "tenant", "model", "tokens", "of", "blocks", "in pool", "pool", "arena"});
    json_array_foreach(json_object_get(result, "sequences"), i, s)
    {
        const json_t *b = json_object_get(s, "blocks");
        char cells[4][32], pool[32], arena[32];
        uint64_t hot = format_number(b, "granted") + format_number(b, "sealed") + format_number(b, "home_pool");
        snprintf(cells[0], 32, "%llu", (unsigned long long)format_number(s, "tokens"));
        snprintf(cells[1], 32, "%llu", (unsigned long long)format_number(s, "max_tokens"));
        int n = snprintf(cells[2], 32, "%llu", (unsigned long long)(hot + format_number(b, "home_arena")));
        if (format_number(s, "damaged"))
            snprintf(cells[2] + n, (size_t)(32 - n), " (%llu lost)", (unsigned long long)format_number(s, "damaged"));
        snprintf(cells[3], 32, "%llu", (unsigned long long)hot);
        table_row(&t, 10,
                  (const char *const[]){format_text(s, "seq"), format_text(s, "label"), format_text(s, "tenant"),
                                        format_text(s, "model"), cells[0], cells[1], cells[2], cells[3],
                                        format_bytes(format_number(s, "pool_bytes"), pool),
                                        format_bytes(format_number(s, "arena_bytes"), arena)});
    }
    table_print(&t);
    json_decref(result);
    return CLI_GOOD;
}
