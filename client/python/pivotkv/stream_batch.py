"""Decoding in batches: steps in a stream of the caller's, on arrays of the GPU (pivotkv.h has the whole story)."""
from __future__ import annotations

import contextlib
import ctypes as c
from typing import TYPE_CHECKING, Any, Iterator
from typing import Sequence as ListOf

import numpy as np

from . import _library

if TYPE_CHECKING:
    from . import Budget, Model, Sequence

_TORCH = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}
_TYPESTR = {"<f4": "f32", "<f2": "f16", "<V2": "bf16", "<u2": "bf16"}


def _stream(value: Any) -> int | None:
    """A torch or CuPy stream, an address, or None: the default stream."""
    for name in ("cuda_stream", "ptr"):
        value = getattr(value, name, value)
    return value


def _on_device(value: Any) -> tuple[int, tuple[int, ...], str] | None:
    """Address, shape and dtype of an array of the GPU; None for one of the CPU."""
    if getattr(value, "is_cuda", False):
        if not value.is_contiguous():
            raise ValueError("a CUDA tensor must be contiguous")
        return value.data_ptr(), tuple(value.shape), _TORCH.get(str(value.dtype), str(value.dtype))
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        return None
    if interface.get("strides") is not None:
        raise ValueError("a CUDA array must be contiguous")
    return interface["data"][0], tuple(interface["shape"]), _TYPESTR.get(interface["typestr"], interface["typestr"])


class StreamBatch:
    """Sequences of one model that decode together: `queries` new tokens each in a step.

    On a CUDA daemon append and attend take tensors of the GPU (torch, or whatever has __cuda_array_interface__), launch into
    the step's stream and return; they may be captured into a CUDA graph, which then replays while the sequences grow. Tensors
    must live until the stream has read them. On the host backend they take arrays of the CPU, and are done on return."""

    def __init__(self, model: Model, sequences: ListOf[Sequence], budget: Budget, queries: int, cache_bytes: int):
        from . import _lib
        self._lib, self.model, self.count, self.queries = _lib, model, len(sequences), queries
        self._pointer, wish = c.c_void_p(), budget._struct()
        options = _library.BatchOptions(c.sizeof(_library.BatchOptions), queries, cache_bytes)
        handles = (c.c_void_p * len(sequences))(*[s._live() for s in sequences])
        model.connection.check(_lib.pkv_batch_open(handles, len(sequences), c.byref(wish), c.byref(options),
                                                   c.byref(self._pointer)))

    def __enter__(self) -> StreamBatch:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _live(self) -> c.c_void_p:
        if not self._pointer:
            raise ValueError("StreamBatch is closed")
        return self._pointer

    def _check(self, status: int) -> None:
        self.model.connection.check(status)

    def close(self) -> None:
        if self._pointer and self.model.connection._pointer:
            self._check(self._lib.pkv_batch_close(self._pointer))
        self._pointer = None

    def begin(self, stream: Any = None) -> None:
        self._check(self._lib.pkv_batch_begin(self._live(), _stream(stream)))

    def end(self, stream: Any = None) -> None:
        self._check(self._lib.pkv_batch_end(self._live(), _stream(stream)))

    def cancel(self, stream: Any = None) -> None:
        self._check(self._lib.pkv_batch_cancel(self._live(), _stream(stream)))

    def wait(self) -> None:
        self._check(self._lib.pkv_batch_wait(self._live()))

    @contextlib.contextmanager
    def step(self, stream: Any = None) -> Iterator[StreamBatch]:
        """begin, and end; cancel where the body raises."""
        self.begin(stream)
        try:
            yield self
        except BaseException:
            self.cancel(stream)
            raise
        self.end(stream)

    def append(self, layer: int, k: Any, v: Any, stream: Any = None) -> None:
        """k, v [sequences x queries, kv_heads, head_dim]."""
        rows = [self._rows(value, self.model.kv_heads, name) for value, name in ((k, "k"), (v, "v"))]
        self._check(self._lib.pkv_batch_append(self._live(), layer, rows[0][0], rows[1][0], _stream(stream)))

    def attend(self, layer: int, q: Any, out: Any = None, lse: Any = None, stream: Any = None) -> tuple[Any, Any]:
        """q [sequences x queries, q_heads, head_dim]; out likewise in float32, lse [sequences x queries, q_heads]. On the
        GPU out is given, lse may be; on the host backend what is missing is made."""
        m, tokens = self.model, self.count * self.queries
        place, keep = self._rows(q, m.q_heads, "q")
        if keep is not None:
            out = np.empty((tokens, m.q_heads, m.head_dim), np.float32) if out is None else out
            lse = np.empty((tokens, m.q_heads), np.float32) if lse is None else lse
        self._check(self._lib.pkv_batch_attend(self._live(), layer, place,
                                               self._result(out, (tokens, m.q_heads, m.head_dim), "out"),
                                               None if lse is None else self._result(lse, (tokens, m.q_heads), "lse"),
                                               _stream(stream)))
        return out, lse

    def rows(self) -> tuple[int, int]:
        """Rows of the arena that attend chose so far: found in the cache, fetched."""
        cached, fetched = c.c_uint64(), c.c_uint64()
        self._check(self._lib.pkv_batch_rows(self._live(), c.byref(cached), c.byref(fetched)))
        return cached.value, fetched.value

    def _rows(self, value: Any, heads: int, what: str) -> tuple[int, np.ndarray | None]:
        """Where it lies, and what keeps it alive if that is an array of the CPU."""
        shape, found = (self.count * self.queries, heads, self.model.head_dim), _on_device(value)
        if found is None:
            array = self.model._array(value, heads, what, shape[0])
            return array.ctypes.data, array
        if found[1] != shape or found[2] != self.model.dtype:
            raise ValueError(f"{what} is {list(found[1])} of {found[2]}, not {list(shape)} of {self.model.dtype}")
        return found[0], None

    @staticmethod
    def _result(value: Any, shape: tuple[int, ...], what: str) -> int:
        found = _on_device(value)
        if found is None:
            if not isinstance(value, np.ndarray) or not value.flags.c_contiguous:
                raise ValueError(f"{what} must be a contiguous array: of the GPU, or numpy's on the host backend")
            found = value.ctypes.data, value.shape, "f32" if value.dtype == np.float32 else str(value.dtype)
        if found[1] != shape or found[2] != "f32":
            raise ValueError(f"{what} is {list(found[1])} of {found[2]}, not {list(shape)} of f32")
        return found[0]
