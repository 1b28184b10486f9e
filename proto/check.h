/* Validators of everything that crosses a process border; the daemon runs them on its own copy, the client runs them to
 * refuse early with the same sentence, the fuzzers run them on anything. All return an enum pkv_err. */
#ifndef PROTO_CHECK_H
#define PROTO_CHECK_H

#include "proto/err.h"
#include "proto/wire.h"

#include <stdbool.h>

PKV_EXTERN_C_BEGIN

enum pkv_err pkv_check_geom(const struct pkv_geom *g);
enum pkv_err pkv_check_scheme(uint32_t scheme, const struct pkv_geom *g);

/* Version and features of a hello as the daemon sees it, of a reply as the client sees it. */
enum pkv_err pkv_check_hello(const struct pkv_hello *h);
enum pkv_err pkv_check_welcome(const struct pkv_reply *r, uint64_t required);

enum pkv_err pkv_check_model(const struct pkv_model_request *m);

/* Everything that can be said of a submission without knowing its sequence. `data_bytes` is the worker's data area. */
enum pkv_err pkv_check_submission(const struct pkv_submission *s, uint64_t data_bytes);

/* [off, off + bytes) lies within `total`, without overflow. */
bool pkv_check_range(uint64_t off, uint64_t bytes, uint64_t total);

/* Budget and shape of a selection over `tokens` tokens. */
enum pkv_err pkv_check_select(const struct pkv_select_args *a);

PKV_EXTERN_C_END

#endif
