"""Sequences that step together, as engines have them: append what is new and attend, sequence after sequence in flat arrays.

A `Batch` is a step's view of several sequences that grow by whole forward passes. Layers come one after the other:

    begin(counts)  -> step(layer, k, v, q, budget) for each layer -> the last one commits the pass

A pass of one new token per row may run in the caller's stream, on device arrays: begin, stream_step for each layer.

A pass that fails or is abandoned in the middle is taken back: every sequence is as long as after the last pass that all
layers finished. numpy only; transformers.py and vllm.py stand on it.
"""
from __future__ import annotations

import contextlib
import errno
from dataclasses import dataclass, field
from typing import Callable, Iterator
from typing import Sequence as ListOf

import numpy as np

from . import Budget, Error, Model, Sequence
from .steps import Steps

QUERIES_MAX, SEQUENCES_MAX = 4096, 256  # of one attend: PKV_QUERIES_MAX, PKV_BATCH_MAX
TEACHES, TAUGHT = 16, 4096  # tokens of a call that calibrates a model; and of all of them, as far as it learns


@dataclass
class Tally:
    """What the attends of a batch did; tokens times kv heads and layers."""

    queries_sparse: int = 0
    tokens_seen: int = 0
    tokens_attended: int = 0


def step(model: Model, sequences: ListOf[Sequence], counts: ListOf[int], layer: int, k: np.ndarray, v: np.ndarray,
         q: np.ndarray, budget: Budget, tally: Tally | None = None) -> np.ndarray:
    """Appends counts[i] new tokens to sequences[i], and attends from them: causal, so each sees those before it.

    k, v [sum of counts, kv_heads, head_dim], q [sum of counts, q_heads, head_dim] in the model's dtype (bf16 as uint16).
    Returns [sum of counts, q_heads, head_dim] float32. In pieces where the library's limits ask for it."""
    out = np.empty((len(q), model.q_heads, model.head_dim), np.float32)
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).tolist()
    busy = [i for i, count in enumerate(counts) if count]
    for first in range(0, len(busy), SEQUENCES_MAX):
        group = busy[first: first + SEQUENCES_MAX]
        piece = QUERIES_MAX // len(group)
        for done in range(0, max(counts[i] for i in group), piece):
            spans = [(i, starts[i] + done, min(starts[i] + done + piece, starts[i + 1])) for i in group if counts[i] > done]
            _piece(model, sequences, spans, layer, k, v, q, budget, out, tally)
    return out


def _piece(model, sequences, spans, layer, k, v, q, budget, out, tally) -> None:
    for i, first, last in spans:
        sequences[i].append(layer, k[first:last], v[first:last])
    where = slice(spans[0][1], spans[-1][2])
    if where.stop - where.start != sum(last - first for _, first, last in spans):
        where = np.concatenate([np.arange(first, last) for _, first, last in spans])
    out[where], _, did = model.attend_batch([sequences[i] for i, _, _ in spans], [last - first for _, first, last in spans],
                                            layer, q[where], budget)
    if tally:
        tally.queries_sparse += did.queries_sparse
        tally.tokens_seen += did.tokens_seen
        tally.tokens_attended += did.tokens_attended


def always_possible(budget: Budget, scale: float) -> Budget:
    """The library refuses a k above a sequence's length: such a short sequence is attended densely, which is exact."""
    return Budget(k=budget.k, sinks=budget.sinks, recent=budget.recent, top_p=budget.top_p, scale=scale, rule=budget.rule,
                  dense=budget.dense, dense_below=max(budget.dense_below, budget.k))


@dataclass
class _Lease:
    """A model that several batches have open: the last one closes it."""

    model: Model
    holders: int = 0
    shown: dict[int, int] = field(default_factory=dict)  # queries of a layer that Batch.keep has shown


@dataclass
class _Pass:
    """A forward pass in the middle: how many tokens each row brings, and which layers have them."""

    counts: list[int]
    layers: set[int] = field(default_factory=set)
    stream: int | None = None  # of a pass in the caller's stream


class Batch:
    """Rows of a batch, each a sequence of its own."""

    def __init__(self, model: Model | _Lease, max_tokens: int, label: str | None = None):
        self._lease = model if isinstance(model, _Lease) else _Lease(model)
        self._lease.holders += 1
        self.model, self.max_tokens, self.label = self._lease.model, max_tokens, label
        self.sequences: list[Sequence] = []
        self.tokens: list[int] = []  # that every layer has, per row
        self.tally = Tally()
        self._pass: _Pass | None = None
        self._broken: Error | None = None
        self._steps: Steps | None = None  # open over the sequences as they are
        self._taught = False  # what was read may be calibrating the model

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def layers(self) -> int:
        return self.model.layers

    def resize(self, rows: int) -> None:
        """As many empty rows; what was there is dropped."""
        self.clear()
        try:
            for _ in range(rows):
                self.sequences.append(self.model.sequence(self.max_tokens, label=self.label))
        except Error:
            self.clear()
            raise
        self.tokens = [0] * rows

    def clear(self) -> None:
        try:
            self._settle()
        except Error:  # what has not ended, or met NaN, goes with its sequences
            pass
        for sequence in self.sequences:
            try:
                sequence.close()
            except Error as error:
                if error.errno != errno.ECONNRESET:  # a daemon that is gone took them along
                    raise
        self.sequences, self.tokens, self._pass, self._broken = [], [], None, None

    def close(self) -> None:
        """Idempotent. The model closes with its last batch."""
        lease, self._lease = self._lease, None
        if lease:
            self.clear()
            lease.holders -= 1
            if not lease.holders:
                lease.model.close()

    def begin(self, counts: list[int]) -> None:
        """A pass in which row i brings counts[i] new tokens. One that never came to its end is taken back first."""
        self.take_back()
        self._pass = _Pass(list(counts))

    def needs(self, layer: int) -> bool:
        """True where this layer's next step belongs to a pass that has not begun."""
        return self._pass is None or layer in self._pass.layers

    def step(self, layer: int, k: np.ndarray, v: np.ndarray, q: np.ndarray, budget: Budget) -> tuple[np.ndarray, bool]:
        """(out, whether this was the pass's last layer). See step() above for the arrays."""
        with self._cut_back(layer):
            if self._taught and not budget.dense:  # what is selected must not depend on how fast that is
                self.model.settle()
                self._taught = False
            out = step(self.model, self.sequences, self._pass.counts, layer, k, v, q, budget, self.tally)
        return out, self._done(layer)

    def keep(self, layer: int, k: np.ndarray, v: np.ndarray, q_of: Callable[[int, int], np.ndarray]) -> bool:
        """step() of a pass that the caller attends by itself. While the model may learn from queries, q_of(first, last) is
        asked for some. True: the pass's last layer."""
        at = 0
        with self._cut_back(layer):
            for sequence, count in zip(self.sequences, self._pass.counts):
                teach = min(count, QUERIES_MAX) if self._lease.shown.get(layer, 0) < TAUGHT and count >= TEACHES else 0
                if teach:
                    sequence.append(layer, k[at: at + teach], v[at: at + teach])
                    self._show(sequence, layer, q_of(at, at + teach))
                if count > teach:
                    sequence.append(layer, k[at + teach: at + count], v[at + teach: at + count])
                at += count
        return self._done(layer)

    @contextlib.contextmanager
    def _cut_back(self, layer: int) -> Iterator[None]:
        """Calls of a layer on the sequences themselves: what they did is cut off if one fails."""
        try:
            self._settle()
            yield
        except BaseException:
            self._pass.layers.add(layer)
            self.take_back()
            raise

    def _show(self, sequence: Sequence, layer: int, q: np.ndarray) -> None:
        sequence.attend(layer, q, Budget(k=1, sinks=0, recent=1, dense_below=3))
        self._lease.shown[layer] = self._lease.shown.get(layer, 0) + len(q)

    def stream_step(self, layer: int, k: int, v: int, q: int, out: int, budget: Budget, stream: int) -> bool:
        """One new token of every row, in the caller's stream; addresses as Steps has them. True: the pass's last layer."""
        with self._taken_back():
            if not self._pass.layers:
                self.stream_begin(budget, stream)
            self._steps.append(layer, k, v, stream)
            self._steps.attend(layer, q, out, stream)
            if len(self._pass.layers) == self.model.layers - 1:
                self._steps.end(stream)
        return self._done(layer)

    def stream_pass(self, budget: Budget, stream: int, launch: Callable[[Steps], None]) -> None:
        """A whole pass of one new token of every row; launch() brings all its layers into the caller's stream."""
        self.begin([1] * len(self.sequences))
        with self._taken_back():
            launch(self.stream_begin(budget, stream))
            self.stream_end(stream)

    def stream_end(self, stream: int) -> None:
        self._steps.end(stream)
        for layer in range(self.model.layers):
            self._done(layer)

    def stream_begin(self, budget: Budget, stream: int) -> Steps:
        if self._steps is None or self._steps.budget != budget:
            self._settle()
            self._steps = Steps(self.sequences, budget)
        self._steps.begin(stream)
        self._pass.stream = stream
        return self._steps

    @contextlib.contextmanager
    def _taken_back(self) -> Iterator[None]:
        """The pass, if it fails here."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, Error) and error.errno == errno.EDOM and not self._pass.layers:
                self._broken = error  # of an earlier step: rows have lost tokens that were counted
            self.take_back()
            raise

    def _done(self, layer: int) -> bool:
        self._pass.layers.add(layer)
        if len(self._pass.layers) < self.model.layers:
            return False
        self.tokens = [had + count for had, count in zip(self.tokens, self._pass.counts)]
        self._taught |= max(self._pass.counts, default=0) >= TEACHES
        self._pass = None
        return True

    def _settle(self) -> None:
        """The sequences take other calls than stream steps again."""
        steps, self._steps = self._steps, None
        if steps:
            steps.close()

    def take_back(self) -> None:
        """Every row as long as after the last whole pass."""
        if self._pass and self._pass.stream is not None:
            try:
                self._steps.cancel(self._pass.stream)
            except Error as error:
                self._broken = error
        elif self._pass and self._pass.layers:
            self._cut(self.tokens)
        self._pass = None
        if self._broken:
            raise self._broken

    def truncate(self, tokens: list[int]) -> None:
        self.take_back()
        self._cut(tokens)
        self.tokens = list(tokens)
        if self._broken:
            raise self._broken

    def _cut(self, tokens: list[int]) -> None:
        try:
            self._settle()
        except Error as error:
            self._broken = error
            return
        for sequence, count in zip(self.sequences, tokens):
            try:
                sequence.truncate(count)
            except Error as error:  # a daemon that is gone, or no room: the rows are of unknown length from now on
                self._broken = Error(error.errno, f"{error.strerror} (the cache is lost: reset() it)")

    def pick(self, rows: list[int]) -> None:
        """Row i becomes what row rows[i] was: forks where one is wanted twice, closes what nobody wants."""
        self.take_back()
        self._settle()
        taken: set[int] = set()
        made: list[Sequence] = []
        forks: list[Sequence] = []
        try:
            for i in rows:
                if i in taken:
                    forks.append(self.sequences[i].fork(self.tokens[i], max_tokens=self.max_tokens))
                made.append(forks[-1] if i in taken else self.sequences[i])
                taken.add(i)
        except Error:
            for fork in forks:
                fork.close()
            raise
        for i, sequence in enumerate(self.sequences):
            if i not in taken:
                sequence.close()
        self.sequences, self.tokens = made, [self.tokens[i] for i in rows]

    def fork(self) -> Batch:
        """A batch of its own with the same content; blocks are shared until they are written."""
        self.take_back()
        self._settle()
        child = Batch(self._lease, self.max_tokens, self.label)
        try:
            for sequence, count in zip(self.sequences, self.tokens):
                child.sequences.append(sequence.fork(count, max_tokens=self.max_tokens))
        except Error:
            child.close()
            raise
        child.tokens = list(self.tokens)
        return child
