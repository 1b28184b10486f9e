"""Decoding in the caller's stream: pkv_batch_*, one new token of each sequence a step.

On a CUDA daemon arrays are device addresses and calls launch and return; on the host backend they are addresses of the CPU and
the work is done at once. While a step is open or in flight its sequences refuse other calls; close() ends that.
"""
from __future__ import annotations

import ctypes as c
import errno
import itertools
from typing import Sequence as ListOf

from . import Budget, Connection, Error, Sequence, _lib, _library


def on_gpu(connection: Connection) -> bool:
    """Whether this connection reads the service's memory on a GPU by itself."""
    return _lib.pkv_describe(connection._live()).startswith(b"direct on cuda")


_openings = itertools.count(1)


class Steps:
    """Of sequences in the order of the arrays below. Addresses are integers; `stream` is a cudaStream_t, or 0 on the host.
    What is captured belongs to one `opening`."""

    def __init__(self, sequences: ListOf[Sequence], budget: Budget, cache_bytes: int = 0):
        self.connection, self.budget = sequences[0].model.connection, budget
        self._sequences, self._cache_bytes = list(sequences), cache_bytes
        self._pointer = c.c_void_p()
        self._open()

    def _open(self) -> None:
        handles = (c.c_void_p * len(self._sequences))(*[s._live() for s in self._sequences])
        options = _library.BatchOptions(c.sizeof(_library.BatchOptions), 1, self._cache_bytes)
        self.connection.check(_lib.pkv_batch_open(handles, len(handles), c.byref(self.budget._struct()), c.byref(options),
                                                  c.byref(self._pointer)))
        self.opening = next(_openings)

    def begin(self, stream: int) -> None:
        """Opens the batch again where the sequences' signatures are made in another way since the last step."""
        status = _lib.pkv_batch_begin(self._pointer, stream)
        if status == -errno.ESTALE:
            self.close()
            self._open()
            status = _lib.pkv_batch_begin(self._pointer, stream)
        self.connection.check(status)

    def append(self, layer: int, k: int, v: int, stream: int) -> None:
        """[sequences, kv_heads, head_dim] each, in the model's dtype."""
        self.connection.check(_lib.pkv_batch_append(self._pointer, layer, k, v, stream))

    def attend(self, layer: int, q: int, out: int, stream: int) -> None:
        """q [sequences, q_heads, head_dim] in the model's dtype, out the same in float32."""
        self.connection.check(_lib.pkv_batch_attend(self._pointer, layer, q, out, None, stream))

    def end(self, stream: int) -> None:
        self.connection.check(_lib.pkv_batch_end(self._pointer, stream))

    def cancel(self, stream: int) -> None:
        self.connection.check(_lib.pkv_batch_cancel(self._pointer, stream))

    def close(self) -> None:
        """Waits, with a bound, for the steps in flight."""
        if self._pointer and self.connection._pointer:
            pointer, self._pointer = self._pointer, c.c_void_p()
            self.connection.check(_lib.pkv_batch_close(pointer))
