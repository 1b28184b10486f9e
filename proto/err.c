/* The table behind err.h. */
#include "proto/err.h"

#include <errno.h>

static const struct {
    int number;
    const char *name;
    const char *text;
} errors[] = {
#define ROW(NAME, number, sentence) [PKV_ERR_##NAME] = {number, #NAME, sentence},
    PKV_ERRORS(ROW)
#undef ROW
};

int pkv_err_status(uint32_t err)
{
    return err < PKV_ERR_COUNT ? -errors[err].number : -EIO;
}

const char *pkv_err_name(uint32_t err)
{
    return err < PKV_ERR_COUNT ? errors[err].name : "UNKNOWN";
}

const char *pkv_err_text(uint32_t err)
{
    return err < PKV_ERR_COUNT ? errors[err].text : "an error that this version does not know: upgrade it";
}
