"""A model reads a long text once, minutes; what experiments need of it is kept in the cache folder: the tokens, q, k and v of
the layers that attend to all of it, and what the sliding windows hold at its end."""
from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from dataclasses import dataclass

import numpy as np

CHUNK = 256
VERSION = 1  # of the model readers and of what is kept: change it when either changes


@dataclass
class Reading:
    tokens: list[int]
    q: np.ndarray  # [layers, tokens, q_heads, head_dim] float16, on disk; after RoPE
    k: np.ndarray  # [layers, tokens, kv_heads, head_dim] float16
    v: np.ndarray
    window: tuple[dict, dict] | None  # see gemma3.WindowCache; None: every layer attends to all


class _Recorder:
    """Exact attention that writes q, k and v down as they pass."""

    def __init__(self, inner, arrays: dict[str, np.ndarray]):
        self.inner, self.arrays = inner, arrays
        self.at = [0] * len(arrays["k"])

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        at = self.at[layer]
        self.arrays["k"][layer, at: at + len(k)], self.arrays["v"][layer, at: at + len(k)] = k, v
        self.inner.append(layer, k, v)

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        at = self.at[layer]
        self.arrays["q"][layer, at: at + len(q)] = q
        self.at[layer] += len(q)
        return self.inner.attend(layer, q)


def read(model, kind: str, tokens: list[int], cache: pathlib.Path, name: str) -> Reading:
    """kind: the model's name; name: the text's, for the folder and the progress line."""
    digest = hashlib.sha256(json.dumps([VERSION, tokens]).encode()).hexdigest()[:12]
    folder = cache / "readings" / f"{kind}-{name}-{len(tokens)}-{digest}"
    if not (folder / "done").exists():
        _read(model, tokens, folder, f"{kind} reads {name}")
    arrays = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in "qkv"}
    window = None
    if (folder / "window.npz").exists():
        with np.load(folder / "window.npz") as kept:
            window = tuple({i: kept[f"{side}{i}"] for i in range(model.layers)} for side in "kv")
    return Reading(tokens, arrays["q"], arrays["k"], arrays["v"], window)


def _read(model, tokens: list[int], folder: pathlib.Path, what: str) -> None:
    from gemma3 import GlobalCache, WindowCache
    folder.mkdir(parents=True, exist_ok=True)
    layers = len(model.global_layers)

    def room(part: str, heads: int) -> np.ndarray:
        return np.lib.format.open_memmap(folder / f"{part}.npy", "w+", np.float16, (layers, len(tokens), heads, model.head_dim))

    arrays = {"q": room("q", model.q_heads), "k": room("k", model.kv_heads), "v": room("v", model.kv_heads)}
    cache = _Recorder(GlobalCache(model, len(tokens)), arrays)
    if layers < model.layers:
        cache = WindowCache(model, cache)
    for at in range(0, len(tokens), CHUNK):
        model.forward(tokens[at: at + CHUNK], at, cache)
        print(f"\r{what} {at:>6}/{len(tokens)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if layers < model.layers:
        k, v = cache.state()
        np.savez(folder / "window.npz", **{f"k{i}": x for i, x in k.items()}, **{f"v{i}": x for i, x in v.items()})
    for array in arrays.values():
        array.flush()
    (folder / "done").touch()
