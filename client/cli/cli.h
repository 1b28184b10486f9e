/* What the verbs of the CLI share. Exit codes: 0 good, 1 what was asked for failed, 2 wrong usage, 3 no daemon answers. */
#ifndef CLIENT_CLI_CLI_H
#define CLIENT_CLI_CLI_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum cli_exit { CLI_GOOD, CLI_FAILED, CLI_USAGE, CLI_NO_DAEMON };

struct cli {
    const char *socket; /* NULL: the default */
    bool json;
    int timeout_ms;
    char **arguments; /* what is left for the verb */
    int count;
};

int cli_stat(struct cli *cli);
int cli_ls(struct cli *cli);
int cli_inspect(struct cli *cli);
int cli_doctor(struct cli *cli);

/* doctor_gpu.c adds its rows by doctor_say; `advice` is dropped where all is well. */
enum doctor_status { DOCTOR_OK, DOCTOR_WARN, DOCTOR_FAIL };
void doctor_say(json_t *list, const char *check, enum doctor_status status, const char *found, const char *advice);
void doctor_gpu(json_t *list);
int cli_bench(struct cli *cli);

/* Takes "--name value" or "--name=value" out of the arguments; false: not there. A missing value ends the program (CLI_USAGE).
 */
bool cli_option(struct cli *cli, const char *name, const char **ret_value);
/* Ends with CLI_USAGE if arguments are left. */
void cli_no_more(const struct cli *cli);

/* admin.c: the daemon's result, owned by the caller. NULL after the cause was said; then *ret_exit. */
json_t *admin_request(const struct cli *cli, json_t *request, int *ret_exit);
/* The socket's path: --socket, $PIVOTKV_SOCKET, this user's default. */
void admin_socket(const struct cli *cli, char *ret, size_t room);

/* format.c */
const char *format_bytes(uint64_t bytes, char ret[32]); /* "1.5 GiB" */
uint64_t format_number(const json_t *object, const char *key);
const char *format_text(const json_t *object, const char *key);
int format_json(json_t *value); /* prints, releases, CLI_GOOD */

/* Rows of a table: columns are as wide as their widest cell, numbers to the right. */
#define TABLE_COLUMNS 16
struct table {
    uint32_t columns, rows;
    char **cells;
};
void table_row(struct table *table, uint32_t columns, const char *const *cells);
void table_print(struct table *table); /* and frees */

#endif
