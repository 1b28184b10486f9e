"""Calibration of `code` and `sign` from queries and keys as an engine makes them: what the service does by itself on a model's
first tokens (gpu/scheme_learn.c, gpu/scheme_solve.c), on as many as one likes, for a file that serves from the first token on.

    calibrator = Calibrator(Geometry(layers=32, q_heads=32, kv_heads=8, head_dim=128), Rope(5e5), context=131072)
    calibrator.feed(layer, first_token, q=q, k=k)        # post-RoPE [tokens, heads, head_dim], chunk by chunk
    calibrator.write("code.safetensors", bits=64)

Only moments are kept: two matrices a kv head. Vectors are turned by RoPE from their own position to a random one of the
context that is to be served, since a prefix says nothing of the slow dimensions; the first 16 tokens of a text are left out,
sinks being outliers. C is the queries' second moment, shrunk, S the keys' covariance.
H = C^(1/2); V, w are the eigenvectors and values of H S H. Keys become V' H (k - mean), queries V' H^-1 q; bits go one by one
to the dimension whose distortion falls most.
"""
from __future__ import annotations

import os
from typing import Any

import numpy as np

from . import Rope, tensors
from .recording import About, Geometry
from .schemes import meta, mix, rotate, rotation_signs

SKIP = 16  # the first tokens of a text
PIECE = 256  # tokens turned at a time
SHRINK, SHRINK_FEW = 0.6, 0.95  # of the queries' moment; below half a bit a dimension, toward S^(-1/2)
_FLOOR, _FLOOR_KEYS = 1e-6, 1e-4  # eigenvalues of C, and of S in S^(-1/2), relative to the largest
_SIGN_MIN, _SIGN_MAX = 64, 4096  # keys that `sign` needs, and looks at
_GOLDEN = 0x9E3779B97F4A7C15

# One vector in _FAR_SHARE is turned to a position of _FAR times the context: later texts may be longer.
_FAR = _FAR_SHARE = 16

# Mean squared error of a unit Gaussian under the best uniform quantizer of 0..6 bits, and its step (Max 1960).
BITS_MAX = 6
_DISTORTION = np.array([1, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.00104])
_STEPS = np.array([1, 1.5956, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041])


def _numbers(value: Any, geometry: Geometry, heads: int, what: str) -> np.ndarray:
    try:
        array = np.asarray(value if isinstance(value, np.ndarray) else np.from_dlpack(value), np.float32)
    except (AttributeError, BufferError, RuntimeError, TypeError) as error:
        raise ValueError(f"{what} cannot be read ({error}): hand over float32 or float16 on the CPU, as numpy or by "
                         "DLPack") from None
    if array.ndim != 3 or array.shape[1:] != (heads, geometry.head_dim):
        raise ValueError(f"{what} has shape {list(array.shape)}, not [tokens, {heads}, {geometry.head_dim}]")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} holds NaN or infinity")
    return array


def turn(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """[tokens, heads, head_dim] by angles [tokens, pairs]; channels beyond the pairs stay."""
    pairs, y = angles.shape[1], x.copy()
    cos, sin = np.cos(angles).astype(np.float32)[:, None], np.sin(angles).astype(np.float32)[:, None]
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., first] * sin + x[..., second] * cos
    return y


class _Side:
    """Moments of one layer's keys, or queries by kv head."""

    def __init__(self, geometry: Geometry, heads: int, seed: int):
        self.heads, self.seed, self.tokens = heads, np.uint64(mix(seed)[0]), 0
        dim, kv = geometry.head_dim, geometry.kv_heads
        self.moment, self.sum = np.zeros((kv, dim, dim)), np.zeros((kv, dim))

    def add(self, x: np.ndarray) -> None:
        kv, dim = self.sum.shape
        rows = np.ascontiguousarray(x.reshape(len(x), kv, -1, dim).transpose(1, 0, 2, 3)).reshape(kv, -1, dim)
        self.moment += rows.transpose(0, 2, 1) @ rows
        self.sum += rows.sum(axis=1, dtype=np.float64)
        self.tokens += len(x)


class Calibrator:
    """Of a whole model; layers in any order. `limit`: tokens a side that are looked at (the service: 4080; None: all)."""

    def __init__(self, geometry: Geometry, rope: Rope | None, context: int, *, limit: int | None = None):
        self.geometry, self.context, self.limit = geometry, context, limit
        rope = rope or Rope(0.0)
        dims = min(rope.dims or geometry.head_dim, geometry.head_dim) if rope.base > 0 else 0
        self._interleaved = rope.interleaved
        self._frequencies = float(np.float32(rope.base)) ** (-2.0 * np.arange(dims // 2) / dims) if dims else np.empty(0)
        self._k = [_Side(geometry, geometry.kv_heads, layer + 1) for layer in range(geometry.layers)]
        self._q = [_Side(geometry, geometry.q_heads, layer + 1000003) for layer in range(geometry.layers)]
        self._early: list[list[np.ndarray]] = [[] for _ in range(geometry.layers)]  # keys that `sign` looks at

    def feed(self, layer: int, first_token: int, *, q: Any = None, k: Any = None) -> None:
        """Queries, keys, or both, of the tokens of a text from first_token on."""
        g = self.geometry
        if not 0 <= layer < g.layers:
            raise ValueError(f"layer {layer}: the model has 0 to {g.layers - 1}")
        queries = None if q is None else _numbers(q, g, g.q_heads, "q")
        keys = None if k is None else _numbers(k, g, g.kv_heads, "k")
        skip = max(0, SKIP - first_token)
        if keys is not None:
            self._keep_early(layer, keys[skip:])
        for at in range(skip, max(len(x) for x in (queries, keys) if x is not None), PIECE):
            for side, x in ((self._k[layer], keys), (self._q[layer], queries)):
                if x is not None and at < len(x) and (self.limit is None or side.tokens < self.limit):
                    side.add(self._turned(x[at: at + PIECE], first_token + at, side.seed))

    def _keep_early(self, layer: int, keys: np.ndarray) -> None:
        room = _SIGN_MAX - SKIP - sum(len(x) for x in self._early[layer])
        if room > 0 and len(keys):
            self._early[layer].append(keys[:room].astype(np.float16 if np.abs(keys).max() < 6e4 else np.float32))

    def _turned(self, x: np.ndarray, first: int, seed: np.uint64) -> np.ndarray:
        if not len(self._frequencies):
            return x
        positions = np.arange(first, first + len(x), dtype=np.uint64)
        random = mix(seed + positions * np.uint64(_GOLDEN))
        context = np.where(random % np.uint64(_FAR_SHARE), np.uint64(self.context), np.uint64(_FAR * self.context))
        targets = random // np.uint64(_FAR_SHARE) % context
        distance = targets.astype(np.float64) - positions.astype(np.float64)
        return turn(x, distance[:, None] * self._frequencies, self._interleaved)

    def tokens(self) -> int:
        """Fewest that a layer has seen of keys and queries."""
        return min(side.tokens for side in self._k + self._q)

    # ---- code ----

    def solve(self, layer: int, head: int, bits: int, shrink: float | None = None) -> dict[str, np.ndarray]:
        """Maps [dim, dim], levels and bits [dim] of one kv head. shrink: None is what the service does."""
        k, q, g = self._k[layer], self._q[layer], self.geometry
        if not k.tokens or not q.tokens:
            raise ValueError(f"layer {layer} has seen {k.tokens} keys and {q.tokens} queries: feed both first")
        mean = k.sum[head] / k.tokens
        s = k.moment[head] / k.tokens - np.outer(mean, mean)
        c = q.moment[head] / (q.tokens * g.group)
        c = _shrunk(c, s, bits, shrink)
        values, vectors = np.linalg.eigh(c)
        if not values[-1] > 0:
            raise ValueError(f"layer {layer}: its queries are all zero")
        root = np.sqrt(np.maximum(values, _FLOOR * values[-1]))
        h, inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
        w, v = np.linalg.eigh(h @ s @ h)
        w, v = np.maximum(w[::-1], 0), v[:, ::-1]
        given = give_bits(w, bits)
        step = _STEPS[given] * np.sqrt(w)
        step = np.where(step > 0, step, 1).astype(np.float32)
        low = np.where(given > 0, -step * 2.0 ** (given - 1), 0).astype(np.float32)
        return {"k.weight": (v.T @ h).astype(np.float32), "q.weight": (v.T @ inverse).astype(np.float32),
                "k.mean": mean.astype(np.float32), "k.low": low, "k.step": step, "k.bits": given.astype(np.uint8)}

    def code(self, bits: int, shrink: float | None = None) -> dict[str, np.ndarray]:
        """Tensors of a file for `code`."""
        return self._stack(lambda layer, head: self.solve(layer, head, bits, shrink))

    def _stack(self, of) -> dict[str, np.ndarray]:
        g = self.geometry
        rows = [[of(layer, head) for head in range(g.kv_heads)] for layer in range(g.layers)]
        return {name: np.stack([np.stack([cell[name] for cell in row]) for row in rows]) for name in rows[0][0]}

    # ---- sign ----

    def sign(self, bits: int) -> dict[str, np.ndarray]:
        """Tensors of a file for `sign`: the mean, and the mean magnitude of each rotated channel, of the first keys seen."""
        bases = -(-bits // self.geometry.head_dim)
        signs = rotation_signs(self.geometry.head_dim, bases)

        def of(layer: int, head: int) -> dict[str, np.ndarray]:
            seen = sum(len(x) for x in self._early[layer])
            if seen < _SIGN_MIN:
                raise ValueError(f"layer {layer} has seen {seen} keys beyond the first {SKIP}; `sign` needs {_SIGN_MIN}")
            keys = np.concatenate([x[:, head] for x in self._early[layer]]).astype(np.float32)
            mean = keys.mean(axis=0, dtype=np.float64).astype(np.float32)
            rotated = np.concatenate([rotate(keys - mean, signs[b]) for b in range(bases)], axis=1)[:, :bits]
            return {"k.mean": mean, "k.deviation": np.abs(rotated).mean(axis=0, dtype=np.float64).astype(np.float32)}

        return self._stack(of)

    def write(self, path: str | os.PathLike, bits: int, *, scheme: str = "code", shrink: float | None = None,
              about: About = About()) -> None:
        if bits % 32 or not 32 <= bits <= min(256, 4 * self.geometry.head_dim):
            raise ValueError(f"{bits} bits: 32 to 256, in steps of 32, at most 4 a head dimension")
        arrays = self.code(bits, shrink) if scheme == "code" else self.sign(bits)
        more = {**about.meta(), "tokens": str(self.tokens()), "context": str(self.context)}
        share = shrinkage(bits, self.geometry.head_dim) if shrink is None else shrink
        more |= {"shrink": f"{share:g}"} if scheme == "code" else {}
        tensors.write(path, arrays, meta(scheme, self.geometry, bits, more))


def shrinkage(bits: int, dim: int) -> float:
    """The service's."""
    return SHRINK_FEW if 2 * bits < dim else SHRINK


def _shrunk(c: np.ndarray, s: np.ndarray, bits: int, share: float | None) -> np.ndarray:
    """The queries' moment toward the identity; below half a bit a dimension, toward S^(-1/2)."""
    dim = len(c)
    share, toward = shrinkage(bits, dim) if share is None else share, np.eye(dim)
    if 2 * bits < dim:
        values, vectors = np.linalg.eigh(s)
        toward = vectors / np.sqrt(np.maximum(values, _FLOOR_KEYS * values[-1])) @ vectors.T
    return (1 - share) * c + share * np.trace(c) / np.trace(toward) * toward


def give_bits(w: np.ndarray, total: int) -> np.ndarray:
    """Greedily to the dimension whose distortion falls most; at most BITS_MAX each. w descending."""
    given = np.zeros(len(w), int)
    fall = _DISTORTION[:-1] - _DISTORTION[1:]
    for _ in range(total):
        gain = np.where(given < BITS_MAX, w * fall[np.minimum(given, BITS_MAX - 1)], -1)
        given[int(np.argmax(gain))] += 1
    return given
