"""pivotkv: the KV-cache service for very long contexts, from Python.

    with pivotkv.connect() as kv:
        model = kv.model("my-model", layers=32, q_heads=32, kv_heads=8, head_dim=128)
        seq = model.sequence(max_tokens=1 << 20)
        seq.append(layer, k, v)                     # [tokens, kv_heads, head_dim]
        out, lse = seq.attend(layer, q, k=2048)     # q [queries, q_heads, head_dim]

Arrays are numpy arrays or anything with __dlpack__ on the CPU. An array of the model's dtype that is contiguous is used
in place; anything else is converted. Outputs are numpy float32. A connection belongs to one thread at a time.
"""
from __future__ import annotations

import ctypes as c
import enum
from dataclasses import dataclass
from typing import Any, Sequence as ListOf

import numpy as np

from . import _library
from .stream_batch import StreamBatch

__all__ = ["Audit", "Budget", "Connection", "Error", "Explain", "Model", "Rope", "Rule", "Selection", "Sequence",
           "StreamBatch", "connect", "version"]

_lib = _library.load()

_DTYPES = {"f32": 0, "f16": 1, "bf16": 2}
_NUMPY = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}
_SCHEMES = {"sign": 0, "code": 1, "linear": 2, "hash": 3, "none": 4}


class Error(OSError):
    """A failed call: errno as C returned it, strerror the library's sentence."""


class Rule(enum.IntEnum):
    """How a token's group score is made of its q heads' scores."""

    SOFTMAX_SUM = 0
    SUM = 1
    MAX = 2


@dataclass(frozen=True)
class Rope:
    base: float
    dims: int = 0  # 0: head_dim
    interleaved: bool = False


@dataclass(frozen=True)
class Budget:
    """What a query attends: the first `sinks`, the last `recent`, and the `k` best of the others."""

    k: int = 512
    sinks: int = 128
    recent: int = 128
    top_p: float | None = None
    scale: float | None = None
    rule: Rule = Rule.SOFTMAX_SUM
    dense: bool = False
    dense_below: int = 0

    def _struct(self) -> _library.Budget:
        return _library.Budget(c.sizeof(_library.Budget), self.k, self.sinks, self.recent, self.top_p or 0.0,
                               self.scale or 0.0, int(self.rule), int(self.dense), self.dense_below)


@dataclass(frozen=True)
class Explain:
    queries_dense: int
    queries_sparse: int
    tokens_seen: int
    tokens_attended: int
    rows_pool: int
    rows_arena: int
    sign_ns: int
    scan_ns: int
    select_ns: int
    gather_ns: int
    attend_ns: int


@dataclass(frozen=True)
class Selection:
    """Ascending token indices per query and kv head; entries from count on are undefined."""

    index: np.ndarray  # [queries, kv_heads, rows_max] uint32
    count: np.ndarray  # [queries, kv_heads] uint32
    score: np.ndarray  # [queries, kv_heads, rows_max] uint16
    rows: np.ndarray | None  # [queries, kv_heads, rows_max, 2, head_dim] in the model's dtype


@dataclass(frozen=True)
class Audit:
    mass: float  # softmax probability that the selection covered
    error: float  # norm(out - exact) / norm(exact)


def version() -> str:
    return _lib.pkv_version().decode()


def connect(path: str | None = None, *, threads: int = 0, served: bool = False, tenant: str | None = None,
            label: str | None = None, timeout_ms: int = 0, data_bytes: int = 0, isa: str | None = None,
            backend: str | None = None, device: int | None = None) -> Connection:
    """Attaches to the daemon on socket `path` (default: $PIVOTKV_SOCKET, then this user's default path).

    `backend`: "host" or "cuda"; None takes the daemon's, and is served where this process cannot use that. `device`: number of
    the GPU in this process; None takes the one that the daemon gives."""
    return Connection(path, threads, served, tenant, label, timeout_ms, data_bytes, isa, backend, device)


def _text(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


class _Handle:
    """A C object that closes once."""

    _pointer: c.c_void_p | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError

    def _live(self) -> c.c_void_p:
        if not self._pointer:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._pointer


class Connection(_Handle):
    def __init__(self, path, threads, served, tenant, label, timeout_ms, data_bytes, isa, backend=None, device=None):
        options = _library.Options(size=c.sizeof(_library.Options), flags=1 if served else 0, tenant=_text(tenant),
                                   label=_text(label), threads=threads, timeout_ms=timeout_ms, data_bytes=data_bytes,
                                   isa=_text(isa), backend=_text(backend), device=0 if device is None else device + 1)
        pointer = c.c_void_p()
        status = _lib.pkv_connect(_text(path), c.byref(options), c.byref(pointer))
        if status < 0:
            raise Error(-status, _lib.pkv_error(None).decode())
        self._pointer = pointer

    def close(self) -> None:
        if self._pointer:
            _lib.pkv_close(self._pointer)
            self._pointer = None

    def check(self, status: int) -> None:
        if status < 0:
            raise Error(-status, _lib.pkv_error(self._live()).decode())

    def describe(self) -> str:
        """How the connection attends: "direct on cuda NVIDIA H100 ...", "served: <why>; host avx512, 2 threads"."""
        return _lib.pkv_describe(self._live()).decode()

    def ping(self) -> int:
        """Nanoseconds of one round trip."""
        ns = c.c_uint64()
        self.check(_lib.pkv_ping(self._live(), c.byref(ns)))
        return ns.value

    def model(self, name: str, *, layers: int, q_heads: int, kv_heads: int, head_dim: int, dtype: str = "f16",
              rope: Rope | None = None, scheme: str = "code", bits: int = 0, weights: str | None = None) -> Model:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r}: one of {', '.join(_DTYPES)}")
        if scheme not in _SCHEMES:
            raise ValueError(f"scheme {scheme!r}: one of {', '.join(_SCHEMES)}")
        rope = rope or Rope(0.0)
        desc = _library.ModelDesc(c.sizeof(_library.ModelDesc), layers, q_heads, kv_heads, head_dim, _DTYPES[dtype],
                                  _SCHEMES[scheme], bits, name.encode(), _text(weights), rope.base, rope.dims,
                                  int(rope.interleaved))
        pointer = c.c_void_p()
        self.check(_lib.pkv_model_open(self._live(), c.byref(desc), c.byref(pointer)))
        return Model(self, pointer, layers, q_heads, kv_heads, head_dim, dtype)


class Model(_Handle):
    def __init__(self, connection: Connection, pointer, layers: int, q_heads: int, kv_heads: int, head_dim: int,
                 dtype: str):
        self.connection, self._pointer = connection, pointer
        self.layers, self.q_heads, self.kv_heads, self.head_dim, self.dtype = layers, q_heads, kv_heads, head_dim, dtype

    def close(self) -> None:
        if self._pointer and self.connection._pointer:
            self.connection.check(_lib.pkv_model_close(self._pointer))
        self._pointer = None

    def settle(self) -> None:
        """Waits until the calibration that this connection's calls have fed is in use. Without it that happens beside the
        calls, whenever it is solved: results then depend on the machine's speed."""
        self.connection.check(_lib.pkv_model_settle(self._live()))

    def sequence(self, max_tokens: int, *, persistent: bool = False, label: str | None = None) -> Sequence:
        pointer = c.c_void_p()
        self.connection.check(_lib.pkv_seq_create(self._live(), max_tokens, int(persistent), _text(label),
                                                  c.byref(pointer)))
        return Sequence(self, pointer)

    def open(self, handle: int) -> Sequence:
        pointer = c.c_void_p()
        self.connection.check(_lib.pkv_seq_open(self._live(), handle, c.byref(pointer)))
        return Sequence(self, pointer)

    def attend_batch(self, sequences: ListOf[Sequence], queries: ListOf[int], layer: int, q: Any,
                     budget: Budget) -> tuple[np.ndarray, np.ndarray, Explain]:
        """One attend over several sequences: queries[i] query tokens of sequences[i], one after the other in q."""
        if len(sequences) != len(queries):
            raise ValueError(f"{len(sequences)} sequences but {len(queries)} counts of queries")
        array = self._array(q, self.q_heads, "q", int(sum(queries)))
        out = np.empty(array.shape[:2] + (self.head_dim,), np.float32)
        lse = np.empty(array.shape[:2], np.float32)
        explain, wish = _library.Explain(), budget._struct()
        handles = (c.c_void_p * len(sequences))(*[s._live() for s in sequences])
        counts = (c.c_uint32 * len(queries))(*queries)
        self.connection.check(_lib.pkv_attend(handles, counts, len(sequences), layer, array.ctypes.data, c.byref(wish),
                                              out.ctypes.data, lse.ctypes.data, c.byref(explain)))
        return out, lse, Explain(*[getattr(explain, name) for name, _ in explain._fields_])

    def batch(self, sequences: ListOf[Sequence], budget: Budget | None = None, *, queries: int = 1,
              cache_bytes: int = 0) -> StreamBatch:
        """Sequences that decode together, `queries` new tokens each in a step; in a CUDA stream on a CUDA daemon."""
        return StreamBatch(self, sequences, budget or Budget(), queries, cache_bytes)

    def _array(self, value: Any, heads: int, what: str, tokens: int | None = None) -> np.ndarray:
        array = value if isinstance(value, np.ndarray) else np.from_dlpack(value)
        if array.ndim != 3 or array.shape[1:] != (heads, self.head_dim) or (tokens is not None and len(array) != tokens):
            wanted = f"[{tokens if tokens is not None else 'tokens'}, {heads}, {self.head_dim}]"
            raise ValueError(f"{what} has shape {list(array.shape)}, not {wanted}")
        dtype = _NUMPY[self.dtype]
        if array.dtype == dtype:
            return np.ascontiguousarray(array)
        if self.dtype == "bf16":
            return _to_bf16(np.ascontiguousarray(array, np.float32))
        return np.ascontiguousarray(array, dtype)


def _to_bf16(array: np.ndarray) -> np.ndarray:
    """Round to nearest even; NaN stays NaN, so that the library can refuse it."""
    bits = array.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


class Sequence(_Handle):
    """One context's cache."""

    def __init__(self, model: Model, pointer):
        self.model, self._pointer = model, pointer

    def _check(self, status: int) -> None:
        self.model.connection.check(status)

    def close(self) -> None:
        if self._pointer and self.model.connection._pointer:
            self._check(_lib.pkv_seq_close(self._pointer))
        self._pointer = None

    def destroy(self) -> None:
        self._check(_lib.pkv_seq_destroy(self._live()))
        self._pointer = None

    @property
    def handle(self) -> int:
        return _lib.pkv_seq_handle(self._live())

    def __len__(self) -> int:
        return _lib.pkv_seq_tokens(self._live())

    def append(self, layer: int, k: Any, v: Any) -> None:
        """K (after RoPE) and V of new tokens of one layer: [tokens, kv_heads, head_dim]."""
        keys = self.model._array(k, self.model.kv_heads, "k")
        values = self.model._array(v, self.model.kv_heads, "v", len(keys))
        self._check(_lib.pkv_append(self._live(), layer, len(keys), keys.ctypes.data, values.ctypes.data))

    def reserve(self, tokens: int) -> None:
        self._check(_lib.pkv_seq_reserve(self._live(), tokens))

    def attend(self, layer: int, q: Any, budget: Budget | None = None, **wish: Any) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) of the last len(q) tokens, causal. The budget, or its fields as keywords."""
        out, lse, _ = self.explain(layer, q, budget, **wish)
        return out, lse

    def explain(self, layer: int, q: Any, budget: Budget | None = None,
                **wish: Any) -> tuple[np.ndarray, np.ndarray, Explain]:
        """attend, and what it did."""
        return self.model.attend_batch([self], [len(q)], layer, q, budget or Budget(**wish))

    def select(self, layer: int, q: Any, budget: Budget | None = None, *, rows: bool = False, **wish: Any) -> Selection:
        m, budget = self.model, budget or Budget(**wish)
        array = m._array(q, m.q_heads, "q")
        shape = (len(array), m.kv_heads, budget.sinks + budget.recent + budget.k)
        index, score = np.zeros(shape, np.uint32), np.zeros(shape, np.uint16)
        count = np.zeros(shape[:2], np.uint32)
        data = np.zeros(shape + (2, m.head_dim), _NUMPY[m.dtype]) if rows else None
        self._check(_lib.pkv_select(self._live(), len(array), layer, array.ctypes.data, c.byref(budget._struct()),
                                    index.ctypes.data, count.ctypes.data, score.ctypes.data,
                                    data.ctypes.data if data is not None else None))
        return Selection(index, count, score, data)

    def audit(self, layer: int, q: Any, budget: Budget | None = None, **wish: Any) -> Audit:
        """What the selection costs: exact attention beside it."""
        array = self.model._array(q, self.model.q_heads, "q")
        mass, error = c.c_double(), c.c_double()
        self._check(_lib.pkv_audit(self._live(), len(array), layer, array.ctypes.data,
                                   c.byref((budget or Budget(**wish))._struct()), c.byref(mass), c.byref(error)))
        return Audit(mass.value, error.value)

    def fork(self, tokens: int | None = None, *, max_tokens: int = 0) -> Sequence:
        pointer = c.c_void_p()
        self._check(_lib.pkv_seq_fork(self._live(), len(self) if tokens is None else tokens, max_tokens,
                                      c.byref(pointer)))
        return Sequence(self.model, pointer)

    def recalibrate(self) -> None:
        """Signs the sequence again with its model's latest calibration. Nobody else may have it open, or share its blocks."""
        self._check(_lib.pkv_seq_recalibrate(self._live()))

    def truncate(self, tokens: int) -> None:
        self._check(_lib.pkv_seq_truncate(self._live(), tokens))
