"""safetensors files in numpy: read by mapping, written so that the same content gives the same bytes.

The library `safetensors` writes its metadata in the order of a hash table, which differs from run to run; files here are
compared byte for byte. Layout: 8 bytes of header length (little endian), a JSON header padded to 8 bytes, the tensors' bytes.
"""
from __future__ import annotations

import json
import os
import pathlib
import tempfile
from dataclasses import dataclass
from typing import Mapping

import numpy as np

_HEADER_MAX = 16 << 20  # what the C library reads
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8, "I8": np.int8,
          "I32": np.int32, "I64": np.int64, "U32": np.uint32, "U16": np.uint16}
_NAMES = {np.dtype(value): name for name, value in _NUMPY.items() if name != "BF16"}


class FormatError(ValueError):
    """A file that is not what it should be; the text is a sentence for the user."""


@dataclass(frozen=True)
class BFloat16:
    """An array to be written as BF16: the upper halves of float32 numbers."""

    halves: np.ndarray  # uint16


def smallest(array: np.ndarray) -> np.ndarray | BFloat16:
    """float32 in half the bytes, where nothing is lost by it."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    if not (bits & 0xFFFF).any():
        return BFloat16((bits >> 16).astype(np.uint16))
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if (half.astype(np.float32).view(np.uint32) == bits).all() else array


def write(path: str | os.PathLike, arrays: Mapping[str, np.ndarray | BFloat16], meta: Mapping[str, str] | None = None) -> None:
    """All or nothing: readers see the old file or the whole new one. Tensors in the order of their names."""
    header: dict = {"__metadata__": dict(sorted((meta or {}).items()))}
    plain = {name: array.halves if isinstance(array, BFloat16) else array for name, array in arrays.items()}
    at = 0
    for name, array in sorted(plain.items()):
        dtype = "BF16" if isinstance(arrays[name], BFloat16) else _NAMES[array.dtype]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    path = pathlib.Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, array in sorted(plain.items()):
                file.write(memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b"")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class File:
    """A mapped file. Arrays are views of it, BF16 ones are copies in float32."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        try:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        except ValueError:  # an empty file cannot be mapped
            raise FormatError(f"{self.path} is empty") from None
        self.meta: dict[str, str] = {}
        self._tensors: dict[str, dict] = {}
        try:
            self._read_header()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(f"{self.path} is damaged or not safetensors: {error}") from None

    def _read_header(self) -> None:
        size = len(self._bytes)
        length = int.from_bytes(self._bytes[:8].tobytes(), "little")
        if size < 8 or length > min(_HEADER_MAX, size - 8):
            raise ValueError("its header is longer than the file")
        header = json.loads(self._bytes[8: 8 + length].tobytes())
        self.meta = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        self._data, room = 8 + length, size - 8 - length
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            dtype, shape = np.dtype(_NUMPY[tensor["dtype"]]), tensor["shape"]
            whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
            count = 1
            for n in shape:
                count *= n
            if not whole or not begin <= end <= room or end - begin != count * dtype.itemsize:
                raise ValueError(f"tensor {name!r} does not fit its bytes")
            self._tensors[name] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def array(self, name: str) -> np.ndarray:
        if name not in self._tensors:
            raise FormatError(f"{self.path} has no tensor {name!r}")
        tensor = self._tensors[name]
        begin, end = tensor["data_offsets"]
        raw = self._bytes[self._data + begin: self._data + end].view(np.ndarray)
        dtype = np.dtype(_NUMPY[tensor["dtype"]])
        if (self._data + begin) % dtype.itemsize:  # files of others need not be aligned
            raw = raw.copy()
        array = raw.view(dtype).reshape(tensor["shape"])
        if tensor["dtype"] == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array

    def floats(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """As float32, of exactly this shape, all finite."""
        array = self.array(name).astype(np.float32)
        if shape is not None and array.shape != shape:
            raise FormatError(f"{self.path}: {name} has shape {list(array.shape)}, not {list(shape)}")
        if not np.isfinite(array).all():
            raise FormatError(f"{self.path}: {name} holds NaN or infinity")
        return array
