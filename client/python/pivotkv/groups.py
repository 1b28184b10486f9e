"""Layers with signatures of several sizes: to the service, the layers of one size are a model of their own.

Layers need different sizes: one whose attention keeps to sinks and recent tokens loses little by few bits, one that looks
things up loses much (`pivotkv-sizes` tells which). A `LayeredBatch` is to its caller what `Batch` is, of the whole model; its
parts step together, and a pass that one of them fails or that is abandoned is taken back in all.
"""
from __future__ import annotations

import contextlib
import hashlib
from typing import Any, Callable
from typing import Sequence as ListOf

import numpy as np

from . import Budget, Connection, Sequence
from .batch import Batch, Tally
from .steps import Steps


def open_batch(kv: Connection, name: str, layers: int, bits: int | ListOf[int], max_tokens: int, label: str | None = None,
               **model: Any) -> Batch | LayeredBatch:
    """bits: of every layer, or a list with a size for each: 0 for layers that select the latest tokens (scheme "none"). model:
    the rest of what Connection.model takes."""
    if isinstance(bits, int):
        return Batch(kv.model(name, layers=layers, bits=bits, **model), max_tokens, label)
    sizes = [int(size) for size in bits]
    if len(sizes) != layers:
        raise ValueError(f"bits has {len(sizes)} sizes, the model {layers} layers: one for each")
    if model.get("weights"):
        raise ValueError("a file of weights has one size of signatures: bits is a number then, or leave the file out")
    with contextlib.ExitStack() as opened:
        parts = []
        for size in sorted(set(sizes)):
            part = {**model, "bits": size, **({} if size else {"scheme": "none"})}
            parts.append(Batch(kv.model(_part_name(name, sizes, size), layers=sizes.count(size), **part), max_tokens, label))
            opened.callback(parts[-1].close)
        opened.pop_all()
    return LayeredBatch(parts, sizes)


def _part_name(name: str, sizes: list[int], size: int) -> str:
    """Which layers a part has belongs to its identity: what is learnt of them is kept under its name."""
    which = hashlib.blake2b(f"{name} {sizes}".encode(), digest_size=8).hexdigest()
    return f"{name[:36]}-{which}-{size}"


class LayeredSteps:
    """Open steps of all parts, by layer."""

    def __init__(self, where: list[tuple[Steps, int]]):
        self._where = where
        self.opening = tuple(steps.opening for steps, _ in where)

    def append(self, layer: int, k: int, v: int, stream: int) -> None:
        steps, index = self._where[layer]
        steps.append(index, k, v, stream)

    def attend(self, layer: int, q: int, out: int, stream: int) -> None:
        steps, index = self._where[layer]
        steps.attend(index, q, out, stream)


class LayeredBatch:
    """Of parts in ascending order of their size; sizes[layer] says to which one a layer belongs."""

    def __init__(self, parts: list[Batch], sizes: list[int]):
        self.parts, self.sizes = parts, sizes
        order = sorted(set(sizes))
        self._where = [(parts[order.index(size)], sizes[:layer].count(size)) for layer, size in enumerate(sizes)]
        self.tokens: list[int] = []  # that every layer has, per row
        self._pass: set[int] | None = None  # layers that have had their step

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def layers(self) -> int:
        return len(self.sizes)

    @property
    def sequences(self) -> list[Sequence]:
        """Part by part. A sequence numbers its own layers."""
        return [sequence for part in self.parts for sequence in part.sequences]

    @property
    def tally(self) -> Tally:
        tallies = [part.tally for part in self.parts]
        return Tally(*(sum(getattr(t, name) for t in tallies) for name in ("queries_sparse", "tokens_seen", "tokens_attended")))

    def resize(self, rows: int) -> None:
        self.clear()
        try:
            for part in self.parts:
                part.resize(rows)
        except BaseException:
            self.clear()
            raise
        self.tokens = [0] * rows

    def clear(self) -> None:
        self.tokens, self._pass = [], None
        self._all("clear")

    def close(self) -> None:
        self._all("close")

    def _all(self, verb: str) -> None:
        """Of every part, also where one fails."""
        with contextlib.ExitStack() as later:
            for part in self.parts:
                later.callback(getattr(part, verb))

    def begin(self, counts: list[int]) -> None:
        self.take_back()
        for part in self.parts:
            part.begin(counts)
        self._pass = set()

    def needs(self, layer: int) -> bool:
        return self._pass is None or layer in self._pass

    def step(self, layer: int, k: np.ndarray, v: np.ndarray, q: np.ndarray, budget: Budget) -> tuple[np.ndarray, bool]:
        part, index = self._where[layer]
        try:
            out, _ = part.step(index, k, v, q, budget)
        except BaseException:
            self.take_back()
            raise
        return out, self._done(layer)

    def stream_step(self, layer: int, k: int, v: int, q: int, out: int, budget: Budget, stream: int) -> bool:
        part, index = self._where[layer]
        try:
            part.stream_step(index, k, v, q, out, budget, stream)
        except BaseException:
            self.take_back()
            raise
        return self._done(layer)

    def keep(self, layer: int, k: np.ndarray, v: np.ndarray, q_of: Callable[[int, int], np.ndarray]) -> bool:
        part, index = self._where[layer]
        try:
            part.keep(index, k, v, q_of)
        except BaseException:
            self.take_back()
            raise
        return self._done(layer)

    def stream_pass(self, budget: Budget, stream: int, launch: Callable[[LayeredSteps], None]) -> None:
        self.begin([1] * len(self))
        try:
            steps = {id(part): part.stream_begin(budget, stream) for part in self.parts}
            launch(LayeredSteps([(steps[id(part)], index) for part, index in self._where]))
            for part in self.parts:
                part.stream_end(stream)
        except BaseException:
            self.take_back()
            raise
        self.tokens, self._pass = list(self.parts[0].tokens), None

    def _done(self, layer: int) -> bool:
        self._pass.add(layer)
        if len(self._pass) < self.layers:
            return False
        self.tokens, self._pass = list(self.parts[0].tokens), None
        return True

    def take_back(self) -> None:
        """A part may have finished a pass that the others have not."""
        self._pass = None
        for part in self.parts:
            part.take_back()
            if part.tokens != self.tokens:
                part.truncate(self.tokens)

    def truncate(self, tokens: list[int]) -> None:
        self._pass, self.tokens = None, list(tokens)
        for part in self.parts:
            part.truncate(tokens)

    def pick(self, rows: list[int]) -> None:
        """Where one part cannot, the rows differ between parts: all are dropped."""
        self.take_back()
        try:
            for part in self.parts:
                part.pick(rows)
        except BaseException:
            self.clear()
            raise
        self.tokens = list(self.parts[0].tokens)

    def fork(self) -> LayeredBatch:
        self.take_back()
        with contextlib.ExitStack() as opened:
            parts = []
            for part in self.parts:
                parts.append(part.fork())
                opened.callback(parts[-1].close)
            opened.pop_all()
        child = LayeredBatch(parts, self.sizes)
        child.tokens = list(self.tokens)
        return child
