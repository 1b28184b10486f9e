"""The C library as ctypes sees it: structs and prototypes of client/pivotkv.h, nothing more."""
from __future__ import annotations

import ctypes as c
import ctypes.util
import os
import pathlib

VOID, U32, U64, F32 = c.c_void_p, c.c_uint32, c.c_uint64, c.c_float


class Options(c.Structure):
    _fields_ = [("size", U32), ("flags", U32), ("tenant", c.c_char_p), ("label", c.c_char_p), ("threads", U32),
                ("timeout_ms", U32), ("spin_us", U32), ("device", U32), ("data_bytes", U64), ("backend", c.c_char_p),
                ("isa", c.c_char_p)]


class ModelDesc(c.Structure):
    _fields_ = [("size", U32), ("layers", U32), ("q_heads", U32), ("kv_heads", U32), ("head_dim", U32), ("type", U32),
                ("signature", U32), ("sig_bits", U32), ("name", c.c_char_p), ("weights", c.c_char_p),
                ("rope_base", F32), ("rope_dims", U32), ("rope_interleaved", U32)]


class Budget(c.Structure):
    _fields_ = [("size", U32), ("k", U32), ("sinks", U32), ("recent", U32), ("top_p", F32), ("scale", F32),
                ("rule", U32), ("dense", U32), ("dense_below", U32)]


class BatchOptions(c.Structure):
    _fields_ = [("size", U32), ("queries", U32), ("cache_bytes", U64)]


class Explain(c.Structure):
    _fields_ = [(name, U64) for name in (
        "queries_dense", "queries_sparse", "tokens_seen", "tokens_attended", "rows_pool", "rows_arena", "sign_ns",
        "scan_ns", "select_ns", "gather_ns", "attend_ns")]


_PROTOTYPES = {
    "pkv_connect": (c.c_int, [c.c_char_p, c.POINTER(Options), c.POINTER(VOID)]),
    "pkv_close": (None, [VOID]),
    "pkv_error": (c.c_char_p, [VOID]),
    "pkv_describe": (c.c_char_p, [VOID]),
    "pkv_ping": (c.c_int, [VOID, c.POINTER(U64)]),
    "pkv_version": (c.c_char_p, []),
    "pkv_model_open": (c.c_int, [VOID, c.POINTER(ModelDesc), c.POINTER(VOID)]),
    "pkv_model_settle": (c.c_int, [VOID]),
    "pkv_model_close": (c.c_int, [VOID]),
    "pkv_seq_create": (c.c_int, [VOID, U32, U32, c.c_char_p, c.POINTER(VOID)]),
    "pkv_seq_open": (c.c_int, [VOID, U64, c.POINTER(VOID)]),
    "pkv_seq_close": (c.c_int, [VOID]),
    "pkv_seq_destroy": (c.c_int, [VOID]),
    "pkv_seq_handle": (U64, [VOID]),
    "pkv_seq_tokens": (U64, [VOID]),
    "pkv_seq_fork": (c.c_int, [VOID, U64, U32, c.POINTER(VOID)]),
    "pkv_seq_truncate": (c.c_int, [VOID, U64]),
    "pkv_seq_recalibrate": (c.c_int, [VOID]),
    "pkv_seq_reserve": (c.c_int, [VOID, U32]),
    "pkv_append": (c.c_int, [VOID, U32, U32, VOID, VOID]),
    "pkv_append_batch": (c.c_int, [c.POINTER(VOID), U32, U32, VOID, VOID, c.POINTER(U32)]),
    "pkv_attend": (c.c_int, [c.POINTER(VOID), c.POINTER(U32), U32, U32, VOID, c.POINTER(Budget), VOID, VOID,
                             c.POINTER(Explain)]),
    "pkv_select": (c.c_int, [VOID, U32, U32, VOID, c.POINTER(Budget), VOID, VOID, VOID, VOID]),
    "pkv_audit": (c.c_int, [VOID, U32, U32, VOID, c.POINTER(Budget), c.POINTER(c.c_double), c.POINTER(c.c_double)]),
    "pkv_batch_open": (c.c_int, [c.POINTER(VOID), U32, c.POINTER(Budget), c.POINTER(BatchOptions), c.POINTER(VOID)]),
    "pkv_batch_close": (c.c_int, [VOID]),
    "pkv_batch_begin": (c.c_int, [VOID, VOID]),
    "pkv_batch_append": (c.c_int, [VOID, U32, VOID, VOID, VOID]),
    "pkv_batch_attend": (c.c_int, [VOID, U32, VOID, VOID, VOID, VOID]),
    "pkv_batch_end": (c.c_int, [VOID, VOID]),
    "pkv_batch_cancel": (c.c_int, [VOID, VOID]),
    "pkv_batch_wait": (c.c_int, [VOID]),
    "pkv_batch_rows": (c.c_int, [VOID, c.POINTER(U64), c.POINTER(U64)]),
}


def load() -> c.CDLL:
    """$PIVOTKV_LIBRARY, then beside the package, then what the system's loader finds."""
    beside = pathlib.Path(__file__).with_name("libpivotkv.so.0")
    path = os.environ.get("PIVOTKV_LIBRARY") or (str(beside) if beside.exists() else c.util.find_library("pivotkv"))
    if not path:
        raise ImportError("libpivotkv is not found: install it, or set PIVOTKV_LIBRARY to libpivotkv.so")
    try:
        library = c.CDLL(path)
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except OSError as error:
        raise ImportError(f"libpivotkv cannot be loaded: {error}. It needs OpenBLAS, jansson and xxhash of the system "
                          "(Debian and Ubuntu: libopenblas0 libjansson4 libxxhash0)") from None
    except AttributeError as error:
        raise ImportError(f"{path} is of another version than the package: {error}") from None
    return library
