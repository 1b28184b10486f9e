"""The released weights of HashAttention (xAlg-ai/HashAttention-1.0) as scheme files of `hash`.

  .hat_weights.pkl  {layer: {query_matrix, query_bias, key_matrix, key_bias}}: lists of a tensor per stage, heads stacked,
                    matrices [heads, in, out], biases [heads, out]
  .pt               state dict: {layer}.learning_to_hash_transformation_{q|k}.{head}.{0, 2, 4}.{weight|bias}, weights [out, in]
"""
from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from . import tensors, unpickle
from .recording import Geometry
from .schemes import STAGES_MAX, check_widths, meta
from .tensors import FormatError

Stages = list[tuple[np.ndarray, np.ndarray]]  # weight [heads, out, in], bias [heads, out]
_NAME = re.compile(r"(\d+)\.learning_to_hash_transformation_([qk])\.(\d+)\.(\d+)\.(weight|bias)")


def _of_pkl(content: dict) -> dict[int, dict[str, Stages]]:
    layers = {}
    for layer, parts in content.items():
        wanted = [f"{side}_{part}" for side in ("query", "key") for part in ("matrix", "bias")]
        if not isinstance(parts, dict) or any(not isinstance(parts.get(name), (list, tuple)) for name in wanted):
            raise FormatError(f"layer {layer} does not have the lists {', '.join(wanted)}")
        layers[layer] = {}
        for side, name in (("q", "query"), ("k", "key")):
            matrices = [unpickle.floats(m) for m in parts[f"{name}_matrix"]]
            if any(m.ndim != 3 for m in matrices) or len(matrices) != len(parts[f"{name}_bias"]):
                raise FormatError(f"layer {layer}: {name}_matrix and {name}_bias are not [heads, in, out] and [heads, out]")
            layers[layer][side] = [(m.transpose(0, 2, 1), unpickle.floats(b)) for m, b in zip(matrices, parts[f"{name}_bias"])]
    return layers


def _of_state_dict(content: dict) -> dict[int, dict[str, Stages]]:
    found: dict[tuple, np.ndarray] = {}
    for name, tensor in content.items():
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or not isinstance(tensor, unpickle.Tensor):
            raise FormatError(f"{name!r} is not one of HashAttention's tensors")
        layer, side, head, place, part = match.groups()
        found[int(layer), side, int(head), int(place), part] = unpickle.floats(tensor)
    layers: dict[int, dict[str, Stages]] = {}
    for layer in sorted({key[0] for key in found}):
        heads = 1 + max(key[2] for key in found if key[0] == layer)
        places = sorted({key[3] for key in found if key[0] == layer})
        try:
            layers[layer] = {side: [(np.stack([found[layer, side, h, place, "weight"] for h in range(heads)]),
                                     np.stack([found[layer, side, h, place, "bias"] for h in range(heads)]))
                                    for place in places] for side in "qk"}
        except (KeyError, ValueError):
            raise FormatError(f"layer {layer}: a head lacks a tensor, or heads differ in shape") from None
    return layers


def read(path: str | os.PathLike) -> list[dict[str, Stages]]:
    """By layer and side, the stages of all q heads."""
    content = unpickle.load(path)
    if not isinstance(content, dict) or not content:
        raise FormatError(f"{path} holds no dictionary of weights")
    try:
        layers = _of_pkl(content) if all(type(key) is int for key in content) else _of_state_dict(content)
        if sorted(layers) != list(range(len(layers))):
            raise FormatError(f"it has layers {sorted(layers)[:8]}..., not 0 to {len(layers) - 1}")
        shapes = [[(m.shape, b.shape) for side in "qk" for m, b in layers[i][side]] for i in range(len(layers))]
        stages = layers[0]["k"]
        chain = [stages[0][0].shape[2]] + [m.shape[1] for m, _ in stages] if stages else []
        if any(s != shapes[0] for s in shapes) or not 1 <= len(stages) <= STAGES_MAX or any(
                m.ndim != 3 or b.shape != m.shape[:2] or m.shape[2] != n for (m, b), n in zip(stages, chain)):
            raise FormatError("its layers differ in shape, or stages do not fit each other")
    except FormatError as error:
        raise FormatError(f"{path} is not a weight file of HashAttention: {error}") from None
    except (TypeError, AttributeError, IndexError):
        raise FormatError(f"{path} is not a weight file of HashAttention: something in it is no tensor") from None
    return [layers[i] for i in range(len(layers))]


def convert(path: str | os.PathLike, kv_heads: int,
            more: dict[str, str] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of the scheme file, in as many bytes as the source has."""
    layers = read(path)
    stages = len(layers[0]["k"])
    q_heads, bits, head_dim = (*layers[0]["k"][-1][0].shape[:2], layers[0]["k"][0][0].shape[2])
    if q_heads % kv_heads:
        raise ValueError(f"{q_heads} q heads do not share {kv_heads} kv heads evenly")
    total = bits * (q_heads // kv_heads)
    if total % 32 or not 32 <= total <= 256:
        raise ValueError(f"{bits} bits for each of {q_heads // kv_heads} q heads are {total} bits a kv head: the service takes "
                         "32 to 256, in steps of 32")
    check_widths(weight.shape[1] for weight, _ in layers[0]["k"][:-1] + layers[0]["q"][:-1])
    arrays = {}
    for side in "qk":
        for i in range(stages):
            arrays[f"{side}.{i}.weight"] = tensors.smallest(np.stack([layer[side][i][0] for layer in layers]))
            arrays[f"{side}.{i}.bias"] = tensors.smallest(np.stack([layer[side][i][1] for layer in layers]))
    return arrays, meta("hash", Geometry(len(layers), q_heads, kv_heads, head_dim), total, more or {})
