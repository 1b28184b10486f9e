"""Recordings: post-RoPE queries, keys and, where they are needed, values of a text, by layer - what calibration, training and
evaluation work on.

A file holds q.<layer> [tokens, q_heads, head_dim], k.<layer> and v.<layer> [tokens, kv_heads, head_dim], token 0 first. As
safetensors its metadata names model, digest, text and rope; as .npz these are strings of the same names. The layers of a
recording, in ascending order, are the layers of what is made from it.
"""
from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import pathlib
import re
import sys
import zipfile
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator

import numpy as np

from . import Budget, Rope, Sequence, connect, tensors
from .tensors import FormatError

CHUNK = 256  # tokens of one step of a model that reads


@dataclass(frozen=True)
class Geometry:
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads


@dataclass(frozen=True)
class About:
    """What the files made from a recording say of it."""

    model: str = "unnamed"
    digest: str = ""
    text: str = ""
    rope: Rope = Rope(0.0)

    def meta(self) -> dict[str, str]:
        return {"model": self.model, "model_digest": self.digest, "text": self.text, "rope_base": f"{self.rope.base:g}",
                "rope_dims": str(self.rope.dims), "rope_interleaved": str(int(self.rope.interleaved))}

    @staticmethod
    def of(meta: dict[str, str], path: Any) -> About:
        try:
            rope = Rope(float(meta.get("rope_base", "0")), int(meta.get("rope_dims", "0")),
                        bool(int(meta.get("rope_interleaved", "0"))))
        except ValueError:
            raise FormatError(f"{path}: its rope_base, rope_dims or rope_interleaved is not a number") from None
        return About(meta.get("model", "unnamed"), meta.get("model_digest", ""),
                     meta.get("text", pathlib.Path(str(path)).name), rope)


class Recording:
    """q(layer), k(layer), v(layer) of the layers in `layers`; read when asked for."""

    def __init__(self, read: Callable[[str], np.ndarray], names: Iterable[str], shape: Callable[[str], tuple], about: About,
                 path: Any = "recording"):
        self._read, self._shape, self.about, self.path = read, shape, about, path
        names = set(names)
        self.layers = sorted(int(m.group(1)) for m in (re.fullmatch(r"k\.(\d+)", name) for name in names) if m)
        self.has_values = all(f"v.{layer}" in names for layer in self.layers)
        if not self.layers or any(f"q.{layer}" not in names for layer in self.layers):
            raise FormatError(f"{path} is no recording: it needs q.<layer> and k.<layer> for each layer")
        q, k = shape(f"q.{self.layers[0]}"), shape(f"k.{self.layers[0]}")
        if len(q) != 3 or len(k) != 3 or not k[1] or q[1] % k[1] or q[2] != k[2]:
            raise FormatError(f"{path}: q {list(q)} and k {list(k)} are not [tokens, q_heads, head_dim] and [tokens, kv_heads, "
                              "head_dim]")
        self.tokens, self.geometry = k[0], Geometry(len(self.layers), q[1], k[1], q[2])
        for layer in self.layers:
            for name, heads in [("q", q[1]), ("k", k[1])] + [("v", k[1])] * self.has_values:
                if shape(f"{name}.{layer}") != (self.tokens, heads, q[2]):
                    raise FormatError(f"{path}: {name}.{layer} has shape {list(shape(f'{name}.{layer}'))}, not "
                                      f"{[self.tokens, heads, q[2]]}")

    def only(self, layer: int) -> Recording:
        """One of its layers, as a recording."""
        return Recording(self._read, [f"{part}.{layer}" for part in ("qkv" if self.has_values else "qk")], self._shape,
                         self.about, self.path)

    def q(self, layer: int) -> np.ndarray:
        return self._floats(f"q.{layer}")

    def k(self, layer: int) -> np.ndarray:
        return self._floats(f"k.{layer}")

    def v(self, layer: int) -> np.ndarray:
        return self._floats(f"v.{layer}")

    def _floats(self, name: str) -> np.ndarray:
        array = self._read(name).astype(np.float32)
        if not np.isfinite(array).all():
            raise FormatError(f"{self.path}: {name} holds NaN or infinity")
        return array


def load(path: str | os.PathLike) -> Recording:
    """A .safetensors or .npz file."""
    if pathlib.Path(path).suffix != ".npz":
        file = tensors.File(path)
        return Recording(file.array, file.names(), file.shape, About.of(file.meta, path), path)
    try:
        npz = np.load(path)
        meta = {name: str(npz[name]) for name in npz.files if npz[name].dtype.kind in "UO" or npz[name].ndim == 0}
    except (ValueError, zipfile.BadZipFile, EOFError):  # numpy refuses pickled arrays with a ValueError
        raise FormatError(f"{path} is damaged or no .npz file of plain arrays") from None
    arrays = {name: npz[name] for name in npz.files if name not in meta}
    return Recording(arrays.__getitem__, arrays, lambda name: arrays[name].shape, About.of(meta, path), path)


def load_all(paths: Iterable[str | os.PathLike]) -> list[Recording]:
    """Recordings of one model: the same layers and geometry, the same rope."""
    found = [load(path) for path in paths]
    for other in found[1:]:
        if (other.layers, other.geometry, other.about.rope) != (found[0].layers, found[0].geometry, found[0].about.rope):
            raise FormatError(f"{other.path} is of another model than {found[0].path}: layers, geometry or rope differ")
    return found


class Recorder:
    """The cache of a model that reads: passes everything on to `cache`, keeps what comes by."""

    def __init__(self, cache, layers: Iterable[int], *, values: bool = False, dtype=np.float16):
        self.cache, self._dtype, self._sides = cache, dtype, "qkv" if values else "qk"
        self._kept: dict[str, list[np.ndarray]] = {f"{side}.{layer}": [] for side in self._sides for layer in layers}

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self.cache.append(layer, k, v)
        self._keep(f"k.{layer}", k)
        self._keep(f"v.{layer}", v)

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        self._keep(f"q.{layer}", q)
        return self.cache.attend(layer, q)

    def _keep(self, name: str, array: np.ndarray) -> None:
        if name in self._kept:
            self._kept[name].append(array.astype(self._dtype))

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self._kept.items()}

    def recording(self, about: About) -> Recording:
        arrays = self.arrays()
        return Recording(arrays.__getitem__, arrays, lambda name: arrays[name].shape, about)


def save(path: str | os.PathLike, recorder: Recorder, about: About) -> None:
    tensors.write(path, recorder.arrays(), about.meta())


# ---- models that read ----


@dataclass
class Reader:
    """A model in Python, as client/examples/smollm2.py is one: layers, q_heads, kv_heads, head_dim, rope_base,
    rope_interleaved, encode(text) and forward(tokens, first, cache); its module's ExactCache(model) attends exactly. Texts
    begin with the tokens `begin`, if it has any. Where only some layers attend to everything (global_layers, as in gemma3.py),
    these are the ones that count, and the module's WindowCache(model, cache) keeps the others."""

    model: Any
    module: Any
    name: str
    weights: pathlib.Path | None = None

    @property
    def layers(self) -> int:
        return len(getattr(self.model, "global_layers", range(self.model.layers)))

    def about(self, text: str) -> About:
        find = getattr(self.module, "find_gguf", None)
        path = self.weights or (find() if find else None)
        digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() if path else ""
        return About(self.name, digest, text, Rope(self.model.rope_base, interleaved=self.model.rope_interleaved))

    def read(self, tokens: list[int], *, layers: Iterable[int] | None = None, values: bool = False, cache: Any = None,
             progress: Callable[[int], None] = lambda done: None) -> Recorder:
        """The model reads `tokens`; what it computed in `layers` (default: all). `cache` attends exactly (ServiceCache does it
        many times faster than the model's own)."""
        chosen = range(self.layers) if layers is None else list(layers)
        if any(not 0 <= layer < self.layers for layer in chosen):
            raise ValueError(f"{self.name} has layers 0 to {self.layers - 1} that attend to everything")
        if cache is None and not hasattr(self.module, "ExactCache"):
            raise ValueError(f"{self.name} has no ExactCache of its own: let a daemon attend (--socket)")
        recorder = seen = Recorder(cache or self.module.ExactCache(self.model), chosen, values=values)
        if self.layers < self.model.layers:
            seen = self.module.WindowCache(self.model, recorder)
        for at in range(0, len(tokens), CHUNK):
            self.model.forward(tokens[at: at + CHUNK], at, seen)
            progress(min(at + CHUNK, len(tokens)))
        return recorder


class ServiceCache:
    """A sequence of a daemon as a model's cache: attends exactly."""

    def __init__(self, sequence: Sequence):
        self._sequence, self._dense = sequence, Budget(dense=True)

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self._sequence.append(layer, k, v)

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        return self._sequence.attend(layer, q, self._dense)[0]


@contextlib.contextmanager
def service_cache(reader: Reader, tokens: int, socket: str | None, threads: int = 0) -> Iterator[ServiceCache]:
    """On the daemon of `socket`, for a text of so many tokens."""
    with connect(socket, threads=threads, label="recording") as kv:
        served = kv.model(f"recording-{os.getpid()}", layers=reader.layers, q_heads=reader.model.q_heads,
                          kv_heads=reader.model.kv_heads, head_dim=reader.model.head_dim, dtype="f16", scheme="sign")
        with served.sequence(tokens + CHUNK) as sequence:
            yield ServiceCache(sequence)


def reader(name: str, weights: pathlib.Path | None = None) -> Reader:
    """`FILE.py:CLASS` or `MODULE:CLASS`; CLASS is called with the weights' path, if there is one. Runs that code: name only
    files that you trust."""
    where, _, what = name.rpartition(":")
    if not where or not what.isidentifier():
        raise ValueError(f"model {name!r}: write FILE.py:CLASS, as client/examples/smollm2.py:SmolLM2")
    if where.endswith(".py"):
        path = pathlib.Path(where)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.exists() or spec is None or spec.loader is None:
            raise FileNotFoundError(f"no file {where}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    if not hasattr(module, what):
        raise ValueError(f"{where} has no class {what}")
    return Reader(getattr(module, what)(*([weights] if weights else [])), module, what.lower(), weights)
