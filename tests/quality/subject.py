"""The models that quality is judged on: what they read, which layers select, and how pivotkv opens them."""
from __future__ import annotations

import contextlib
import pathlib
from dataclasses import dataclass
from typing import Sequence

import numpy as np

import reading
from selection import Oracle, Quest, SelectingCache
from signature import Signature


@dataclass(frozen=True)
class Traits:
    tokens: int  # of a text with needles
    budgets: tuple[int, ...]  # of mass and error
    mass_layers: tuple[int, ...] | None  # None: all that select
    mass_every: int  # positions between the queries of mass and error
    interleaved: bool


TRAITS = {"smollm2": Traits(8000, (64, 128, 256, 512, 1024), (4, 12, 20, 27), 16, True),
          "gemma3": Traits(32600, (128, 256, 512, 1024, 2048), None, 128, False)}


class Subject:
    def __init__(self, name: str, cache: pathlib.Path):
        self.name, self.cache, self.traits = name, cache, TRAITS[name]
        if name == "gemma3":
            from gemma3 import Gemma3, find_gguf
            self.model = Gemma3(find_gguf(cache))
            self.begin = [self.model.vocabulary.bos]
        else:
            from smollm2 import SmolLM2
            self.model = SmolLM2()
            self.begin = []
        self.layers = len(self.model.global_layers)  # that select

    def read(self, tokens: list[int], name: str) -> reading.Reading:
        return reading.read(self.model, self.name, tokens, self.cache, name)

    def exact_cache(self, kept: reading.Reading, room: int):
        """All of a reading in numpy, and room for more."""
        from gemma3 import GlobalCache
        cache, length = GlobalCache(self.model, len(kept.tokens) + room), len(kept.tokens)
        cache.k[:, :length], cache.v[:, :length] = kept.k, kept.v
        cache.truncate(length)
        return cache

    def whole(self, kept: reading.Reading, cache):
        """What the model's forward() wants around a cache of the layers that select, and how it goes back to the reading's
        end."""
        if kept.window is None:
            return cache, lambda: cache.truncate(len(kept.tokens))
        from gemma3 import WindowCache
        windows = WindowCache(self.model, cache)

        def restore() -> None:
            cache.truncate(len(kept.tokens))
            windows.restore(kept.window)

        restore()
        return windows, restore

    def open_model(self, kv, signature: Signature, layers: Sequence[int], name: str):
        """Of these of the layers that select. Sequences number them from 0."""
        if signature.sizes and len(signature.sizes) != self.layers:
            raise ValueError(f"{len(signature.sizes)} sizes of signatures, and {self.layers} layers that select")
        sizes = [signature.size(layer) for layer in layers]
        models = {size: self._open_part(kv, signature, size, sizes.count(size), name) for size in sorted(set(sizes))}
        return models[sizes[0]] if len(models) == 1 else Parts(models, sizes)

    def _open_part(self, kv, signature: Signature, bits: int, layers: int, name: str):
        import pivotkv
        m = self.model
        weights = str(signature.weights) if signature.weights else None
        scheme = signature.kind if bits or not signature.sizes else "none"
        return kv.model(f"{name}-{self.name}-{signature.kind}-{bits}-{layers}", layers=layers, q_heads=m.q_heads,
                        kv_heads=m.kv_heads, head_dim=m.head_dim, dtype="f16", scheme=scheme, bits=bits,
                        weights=weights, rope=pivotkv.Rope(m.rope_base, interleaved=self.traits.interleaved))


class Parts:
    """A model whose layers have signatures of several sizes: for each size one of the service's."""

    def __init__(self, models: dict, sizes: list[int]):
        self.models, self.sizes = models, sizes

    def settle(self) -> None:
        for model in self.models.values():
            model.settle()

    @contextlib.contextmanager
    def sequence(self, tokens: int):
        with contextlib.ExitStack() as opened:
            yield PartsSequence({size: opened.enter_context(model.sequence(tokens)) for size, model in self.models.items()},
                                self.sizes)


class PartsSequence:
    """What is asked of a sequence here, of the part that has the layer."""

    def __init__(self, parts: dict, sizes: list[int]):
        self.parts = list(parts.values())
        self.where = [(parts[size], sizes[:i].count(size)) for i, size in enumerate(sizes)]

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        part, index = self.where[layer]
        part.append(index, k, v)

    def attend(self, layer: int, q: np.ndarray, budget):
        part, index = self.where[layer]
        return part.attend(index, q, budget)

    def audit(self, layer: int, q: np.ndarray, budget):
        part, index = self.where[layer]
        return part.audit(index, q, budget)

    def truncate(self, tokens: int) -> None:
        for part in self.parts:
            part.truncate(tokens)


class ServiceCache:
    """A model's cache kept by pivotkv, with one budget."""

    def __init__(self, sequence, budget):
        self.sequence, self.budget = sequence, budget

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self.sequence.append(layer, k, v)

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        return self.sequence.attend(layer, q, self.budget)[0]

    def truncate(self, tokens: int) -> None:
        self.sequence.truncate(tokens)


def fill(sequence, kept: reading.Reading, layer: int, index: int, first: int, last: int, learn: int) -> None:
    """Tokens [first, last) of a reading's layer into layer `index` of a sequence; those before `learn` attend too, so that a
    scheme may calibrate itself on what comes first, and on nothing else."""
    import pivotkv
    budget = pivotkv.Budget(k=64)
    at = first
    while at < last:
        to = min(at + reading.CHUNK, last, learn if at < learn else last)
        sequence.append(index, kept.k[layer, at:to], kept.v[layer, at:to])
        if at < learn:
            sequence.attend(index, kept.q[layer, at:to], budget)
        at = to


def in_numpy(signature: Signature, exact, k: int) -> SelectingCache:
    length = exact.length[0]
    estimate = Oracle() if signature.kind == "oracle" else Quest(exact.k[:, :length])
    return SelectingCache(exact, k, estimate, "max" if signature.kind == "quest" else "softmax")
