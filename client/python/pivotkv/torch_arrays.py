"""torch tensors as the library takes them, and back: the one place of the adapters that knows about devices."""
from __future__ import annotations

import numpy as np
import torch

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """In place where it lies on the CPU, else a copy. bf16 comes as uint16, which is what the library takes for it."""
    tensor = tensor.detach().to("cpu")
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
