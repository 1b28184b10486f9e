"""Scheme files in numpy: what a token's bits are and a query's weights, as gpu/scheme_file.c computes them, and what such a
file says of itself. Evaluation and tests measure with this; serving is the C library's.
"""
from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Iterable

import numpy as np

from . import tensors
from .mlp import MLP
from .recording import Geometry
from .tensors import FormatError

KINDS = ("sign", "code", "linear", "hash")
STAGES_MAX, WIDTH_STEP, WIDTH_MAX = 4, 16, 1024  # of the MLPs of `hash`
LOG2E = np.float32(1.44269504)


def meta(kind: str, geometry: Geometry, bits: int, more: dict[str, str]) -> dict[str, str]:
    """The metadata of a scheme file; no dates, no paths."""
    return {"scheme": kind, "layers": str(geometry.layers), "q_heads": str(geometry.q_heads),
            "kv_heads": str(geometry.kv_heads), "head_dim": str(geometry.head_dim), "bits": str(bits), **more}


def check_widths(widths: Iterable[int]) -> None:
    """Of hidden layers: what the C library computes with."""
    for width in widths:
        if width % WIDTH_STEP or not WIDTH_STEP <= width <= WIDTH_MAX:
            raise ValueError(f"hidden layers of {width}: the service takes multiples of {WIDTH_STEP} up to {WIDTH_MAX}")


def to_int8(weights: np.ndarray, plain: bool) -> tuple[np.ndarray, np.ndarray]:
    """[n, bits] real weights as int8, and the steps [n]: the largest becomes 127; plain +-1 stay what they are."""
    if plain:
        return weights.astype(np.int8), np.ones(len(weights), np.float32)
    most = np.abs(weights).max(axis=1)
    step = np.where(most > 0, np.float32(127) / np.where(most > 0, most, 1), 0).astype(np.float32)
    return np.rint(weights * step[:, None]).astype(np.int8), step


@dataclass
class Scheme:
    """sign() and weigh() of one layer's heads."""

    kind: str
    geometry: Geometry
    bits: int
    meta: dict[str, str]
    unit: float
    file: tensors.File

    def sign(self, layer: int, head: int, keys: np.ndarray) -> np.ndarray:
        """[tokens, head_dim] float32 -> [tokens, bits] of 0 and 1."""
        return self._signs[self.kind](self, layer, head, keys).astype(np.uint8)

    def weigh(self, layer: int, q_head: int, queries: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """[n, head_dim] -> int8 weights [n, bits] and what one unit of weight is worth in log2 units of the score, [n]."""
        weights, unit, plain = self._weighs[self.kind](self, layer, q_head, queries, np.float32(scale))
        whole, step = to_int8(weights, plain)
        return whole, np.where(step > 0, np.float32(unit) / np.where(step > 0, step, 1), 0).astype(np.float32)

    def _of(self, name: str, *index: int) -> np.ndarray:
        return self.file.array(name)[index].astype(np.float32)

    def _centred(self, layer: int, head: int, keys: np.ndarray) -> np.ndarray:
        return keys - self._of("k.mean", layer, head) if "k.mean" in self.file else keys

    # linear

    def _sign_linear(self, layer, head, keys):
        y = self._centred(layer, head, keys) @ self._of("k.weight", layer, head).T
        return y + self._of("k.bias", layer, head) > 0 if "k.bias" in self.file else y > 0

    def _weigh_linear(self, layer, q_head, queries, scale):
        plain = self.meta.get("query") == "sign"
        if "q.weight" in self.file:
            y = queries @ self._of("q.weight", layer, q_head).T
        else:
            y = queries @ self._of("k.weight", layer, q_head // self.geometry.group).T
            if "k.bias" in self.file:
                y = y + self._of("k.bias", layer, q_head // self.geometry.group)
        if plain:
            return np.where(y > 0, 1, -1), self.unit, True
        return y, self.unit * 2 * scale * LOG2E, False

    # hash

    def _mlp(self, side: str, layer: int, q_head: int) -> MLP:
        weights, biases = [], []
        for i in range(STAGES_MAX):
            if f"{side}.{i}.weight" in self.file:
                weights.append(self._of(f"{side}.{i}.weight", layer, q_head))
                biases.append(self._of(f"{side}.{i}.bias", layer, q_head) if f"{side}.{i}.bias" in self.file
                              else np.zeros(len(weights[-1]), np.float32))
        return MLP(weights, biases)

    def _sign_hash(self, layer, head, keys):
        heads = range(head * self.geometry.group, (head + 1) * self.geometry.group)
        return np.concatenate([self._mlp("k", layer, h).forward(keys) > 0 for h in heads], axis=1)

    def _weigh_hash(self, layer, q_head, queries, scale):
        each, at = self.bits // self.geometry.group, q_head % self.geometry.group
        weights = np.zeros((len(queries), self.bits), np.int8)
        weights[:, at * each: (at + 1) * each] = np.where(self._mlp("q", layer, q_head).forward(queries) > 0, 1, -1)
        return weights, self.unit, True

    # code

    def _sign_code(self, layer, head, keys):
        y = self._centred(layer, head, keys) @ self._of("k.weight", layer, head).T
        bits, step = self._of("k.bits", layer, head).astype(int), self._of("k.step", layer, head)
        level = np.floor((y - self._of("k.low", layer, head)) / step)
        level = np.clip(level, 0, (1 << bits) - 1).astype(np.uint8)
        planes = [level[:, i] >> p & 1 for i in range(len(bits)) for p in range(bits[i])]
        return np.stack(planes, axis=1)

    def _weigh_code(self, layer, q_head, queries, scale):
        head = q_head // self.geometry.group
        y = queries @ self._of("q.weight", layer, head).T
        bits, step = self._of("k.bits", layer, head).astype(int), self._of("k.step", layer, head)
        weights = [y[:, i] * step[i] * np.float32(1 << p) for i in range(len(bits)) for p in range(bits[i])]
        return np.stack(weights, axis=1), self.unit * scale * LOG2E, False

    # sign

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        dim, bases = self.geometry.head_dim, -(-self.bits // self.geometry.head_dim)
        signs = rotation_signs(dim, bases)
        return np.concatenate([rotate(x, signs[b]) for b in range(bases)], axis=1)[:, : self.bits]

    def _sign_sign(self, layer, head, keys):
        return self._rotated(self._centred(layer, head, keys)) > 0

    def _weigh_sign(self, layer, q_head, queries, scale):
        dim, bases = self.geometry.head_dim, -(-self.bits // self.geometry.head_dim)
        weights = self._rotated(queries) * self._of("k.deviation", layer, q_head // self.geometry.group)
        partial = np.sqrt(np.float32(max(dim / self.bits, 1)))
        return weights, self.unit * 2 * scale * LOG2E * partial / bases, False

    _signs = {"linear": _sign_linear, "hash": _sign_hash, "code": _sign_code, "sign": _sign_sign}
    _weighs = {"linear": _weigh_linear, "hash": _weigh_hash, "code": _weigh_code, "sign": _weigh_sign}


# ---- the rotation of `sign`: gpu/host/rotate.h ----

_GOLDEN, _M1, _M2, _ALL = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1
_SIGN_SEED = 0x70766B76


def mix(z: np.ndarray | int) -> np.ndarray:
    """The end of splitmix64, as gpu/scheme.h has it; uint64 in and out."""
    z = np.atleast_1d(np.asarray(z, np.uint64))
    z = (z ^ z >> np.uint64(30)) * np.uint64(_M1)
    z = (z ^ z >> np.uint64(27)) * np.uint64(_M2)
    return z ^ z >> np.uint64(31)


def rotation_signs(dim: int, bases: int) -> np.ndarray:
    """[bases, 2, dim] of +-1."""
    count = 2 * bases * dim
    states = np.uint64(_SIGN_SEED) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return np.where(mix(states) >> np.uint64(63), 1, -1).astype(np.float32).reshape(bases, 2, dim)


def rotate(x: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """[n, dim] turned by two rounds of signs and Walsh-Hadamard; 96 dimensions are three blocks of 32 and a reflection."""
    dim = x.shape[1]
    block = 32 if dim == 96 else dim
    y = x.astype(np.float32)
    for round_signs in signs:
        y = (y * round_signs).reshape(len(y), -1, block)
        size = 1
        while size < block:
            pairs = y.reshape(len(y), -1, 2, size)
            y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
            y = y.reshape(len(x), -1, block)
            size *= 2
        if dim == 96:
            y = y - y.sum(axis=1, keepdims=True) * np.float32(2 / 3)
        y = y.reshape(len(x), dim)
    return y / np.float32(block)


# ---- files ----


def kind_of(file: tensors.File) -> str:
    """From the metadata; files without it tell by their tensors."""
    named = file.meta.get("scheme")
    if named is None:
        tell = {"k.0.weight": "hash", "k.bits": "code", "k.deviation": "sign"}
        named = next((kind for tensor, kind in tell.items() if tensor in file), "linear")
    if named not in KINDS:
        raise FormatError(f"{file.path} is for a scheme {named!r}; there are {', '.join(KINDS)}")
    return named


def _shapes(kind: str, file: tensors.File) -> tuple[Geometry, int]:
    """Geometry and bits, from the tensors; q_heads of `code` and `sign` come from the metadata."""
    first = {"hash": "k.0.weight", "sign": "k.mean"}.get(kind, "k.weight")
    if first not in file:
        raise FormatError(f"{file.path} has no tensor {first!r}, which {kind} needs")
    shape = file.shape(first)
    layers, heads, dim = shape[0], shape[1], shape[-1]
    if kind == "hash":
        last = max(i for i in range(STAGES_MAX) if f"k.{i}.weight" in file)
        kv_heads = int(file.meta.get("kv_heads", 0))
        bits = file.shape(f"k.{last}.weight")[2] * (heads // kv_heads) if kv_heads else 0
        return Geometry(layers, heads, kv_heads, dim), bits
    bits = {"sign": lambda: file.shape("k.deviation")[2], "linear": lambda: shape[2],
            "code": lambda: int(file.array("k.bits")[0, 0].sum())}[kind]()
    q_heads = file.shape("q.weight")[1] if kind == "linear" and "q.weight" in file else int(file.meta.get("q_heads", 0))
    return Geometry(layers, q_heads, heads, dim), bits


def load(path: str | os.PathLike, **known: Any) -> Scheme:
    """`known`: q_heads or kv_heads of files whose metadata does not have them."""
    file = tensors.File(path)
    file.meta = {**file.meta, **{name: str(value) for name, value in known.items()}}
    try:
        kind = kind_of(file)
        geometry, bits = _shapes(kind, file)
        unit = float(file.meta.get("unit", "1"))
    except (ValueError, IndexError, KeyError) as error:
        raise error if isinstance(error, FormatError) else FormatError(f"{path} is no scheme file: {error}") from None
    if not geometry.kv_heads or not geometry.q_heads or geometry.q_heads % geometry.kv_heads:
        raise FormatError(f"{path} does not say how many q_heads and kv_heads it is for")
    return Scheme(kind, geometry, bits, file.meta, unit, file)
