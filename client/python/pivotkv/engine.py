"""What the adapters share: torch tensors as the library takes them, and RoPE as engines describe it."""
from __future__ import annotations

import numpy as np
import torch

from . import Rope

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """In place where it lies on the CPU, else a copy; the one place that knows about devices. bf16 comes as uint16."""
    tensor = tensor.detach().to("cpu")
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def rope_of(config, head_dim: int) -> Rope | None:
    """Of a transformers config. A scaled RoPE turns slower than its base says, which calibration, its only user, bears."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:
        return None
    return Rope(rope["rope_theta"], int(head_dim * rope.get("partial_rotary_factor", 1.0)))
