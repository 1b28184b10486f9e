"""Tensors out of pickles and torch archives, without torch and without running what a pickle says.

A pickle is a program. This reader lets it build containers, numbers, text and tensors, and nothing else: an opcode outside of
the list below ends the reading before it starts, and the only names that a pickle may call are the few that torch writes for
tensors, each replaced by a function of this file. Three layouts:

  zip archive     torch.save since 1.6: NAME/data.pkl, the storages beside it as NAME/data/<key>
  legacy stream   torch.save before: pickles of a magic number, a version and the machine, the object, the keys, the storages
  plain pickle    pickle.dump of tensors: each storage is a legacy stream inside of the pickle
"""
from __future__ import annotations

import collections
import io
import os
import pathlib
import pickle
import pickletools
import zipfile
from typing import Any, Callable

import numpy as np

from .tensors import FormatError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_BYTES_MAX = 16 << 30
_OPCODES = set("""PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
    GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID""".split())
# torch's names of storages; BFloat16 has no numpy type and comes as uint16.
_STORAGES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": np.uint16, "DoubleStorage": np.float64}


_MEMO_MAX = 1 << 24  # a pickle can ask for a table of as many entries as the largest number it names


class _Sealed:
    """Pickles may set the attributes of what they are given (the opcode BUILD): not of these."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise FormatError("it changes an object that it was given: do not trust this file")


class _Storage(_Sealed):
    """Elements of one type, in a row."""

    __slots__ = ("data", "bfloat")

    def __init__(self, data: np.ndarray, bfloat: bool):
        self.data, self.bfloat = data, bfloat


class Tensor(_Sealed):
    """A read-only view of a storage."""

    __slots__ = ("array", "bfloat")

    def __init__(self, array: np.ndarray, bfloat: bool):
        self.array, self.bfloat = array, bfloat


class _Call(_Sealed):
    """A function that a pickle may call."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _StorageType(_Sealed):
    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def of(self, raw: bytes) -> _Storage:
        return _Storage(np.frombuffer(raw, _STORAGES[self.name]), self.name == "BFloat16Storage")

    @property
    def size(self) -> int:
        return np.dtype(_STORAGES[self.name]).itemsize


class _Ordered(collections.OrderedDict):
    """state_dict() writes one, with a _metadata that is dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2. No bigger than its storage, so that a small file cannot claim a huge array."""
    if (not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple)
            or len(size) != len(stride)):
        raise FormatError("a tensor without a storage")
    numbers = (offset, *size, *stride)
    if any(type(n) is not int or n < 0 for n in numbers):
        raise FormatError("a tensor with an odd shape")
    count = int(np.prod(np.array(size, object))) if size else 1
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if count else offset
    if count > len(storage.data) or (count and last >= len(storage.data)):
        raise FormatError("a tensor that is larger than its storage")
    width = storage.data.itemsize
    view = np.lib.stride_tricks.as_strided(storage.data[offset:], size, [s * width for s in stride], writeable=False)
    return Tensor(view, storage.bfloat)


def _parameter(data: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_parameter."""
    if not isinstance(data, Tensor):
        raise FormatError("a parameter that is no tensor")
    return data


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BufferedIOBase, storage: Callable[[Any], _Storage] | None, nested: bool):
        super().__init__(file, encoding="latin-1")
        self._storage, self._nested = storage, nested

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Ordered
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _Call(_tensor if name == "_rebuild_tensor_v2" else _parameter)
        if module == "torch.storage" and name == "_load_from_bytes" and not self._nested:
            return _Call(lambda raw: _legacy(io.BytesIO(raw), nested=True))
        if module == "torch" and name in _STORAGES:
            return _StorageType(name)
        if (module, name) == ("_codecs", "encode"):  # how protocols below 3 write bytes
            return _Call(lambda text, _: text.encode("latin-1"))
        raise FormatError(f"it asks for {module}.{name}, which has no place in a file of tensors: do not trust this file")

    def persistent_load(self, pid: Any) -> _Storage:
        if self._storage is None:
            raise FormatError("a storage where there are none")
        return self._storage(pid)


def _check_opcodes(file: io.BufferedIOBase) -> None:
    """Reads one pickle through, executing nothing, and goes back to where it began."""
    at = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name.endswith("PUT") and argument > _MEMO_MAX:
            raise FormatError("it remembers more than any file of tensors does: do not trust this file")
        if opcode.name not in _OPCODES:
            raise FormatError(f"it uses the pickle opcode {opcode.name}, which tensors do not need: do not trust this file")
    file.seek(at)


def _load(file: io.BufferedIOBase, storage: Callable[[Any], _Storage] | None = None, nested: bool = False) -> Any:
    try:
        _check_opcodes(file)
        return _Reader(file, storage, nested).load()
    except FormatError:
        raise
    except Exception as error:  # a pickle can make the machine fail in any way
        raise FormatError(f"its pickle is damaged ({type(error).__name__}: {error})") from None


def _pid(pid: Any) -> tuple[_StorageType, str, int]:
    if (not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType)
            or not isinstance(pid[2], str) or type(pid[4]) is not int or pid[4] < 0):
        raise FormatError("it names a storage in a way that torch does not")
    return pid[1], pid[2], pid[4]


def _legacy(file: io.BufferedIOBase, nested: bool = False) -> Any:
    """The storages come last: the object is read twice, first for their types and then with their content."""
    if _load(file, nested=nested) != _MAGIC or _load(file, nested=nested) != _PROTOCOL:
        raise FormatError("it is no torch file")
    _load(file, nested=nested)
    at, types = file.tell(), {}

    def note(pid: Any) -> _Storage:
        kind, key, count = _pid(pid)
        if len(pid) > 5 and pid[5] is not None:
            raise FormatError("a view of a storage, which torch has not written for years: save it again with a newer torch")
        types[key] = kind, count
        room = os.fstat(file.fileno()).st_size if hasattr(file, "name") else len(file.getbuffer())
        if count * kind.size > room:
            raise FormatError("a storage that is larger than the file")
        return _Storage(np.zeros(count, _STORAGES[kind.name]), False)

    _load(file, note, nested)
    keys = _load(file, nested=nested)
    if not isinstance(keys, list) or set(keys) != set(types):
        raise FormatError("its storages do not match its tensors")
    storages = {}
    for key in keys:
        kind, count = types[key]
        head = file.read(8)
        raw = file.read(count * kind.size)
        if len(head) != 8 or int.from_bytes(head, "little") != count or len(raw) != count * kind.size:
            raise FormatError("a storage is cut off")
        storages[key] = kind.of(raw)
    file.seek(at)
    return _load(file, lambda pid: storages[_pid(pid)[1]], nested)


def _archive(file: zipfile.ZipFile) -> Any:
    pickles = [name for name in file.namelist() if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(pickles) != 1:
        raise FormatError("a zip archive, but none that torch wrote")
    folder, storages = pickles[0][: -len("data.pkl")], {}
    if f"{folder}byteorder" in file.namelist() and file.read(f"{folder}byteorder").strip() != b"little":
        raise FormatError("it was written on a big-endian machine")
    if sum(info.file_size for info in file.infolist()) > _BYTES_MAX:
        raise FormatError("it unpacks to more than 16 GiB")

    def storage(pid: Any) -> _Storage:
        kind, key, count = _pid(pid)
        if key not in storages:
            raw = file.read(f"{folder}data/{key}")
            if len(raw) != count * kind.size:
                raise FormatError("a storage does not have the size that its tensor says")
            storages[key] = kind.of(raw)
        return storages[key]

    return _load(io.BytesIO(file.read(pickles[0])), storage)


def floats(tensor: Tensor) -> np.ndarray:
    """float16, float32, float64 or bfloat16 as float32."""
    if tensor.bfloat:
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    return tensor.array.astype(np.float32)


def load(path: str | os.PathLike) -> Any:
    """Containers and tensors; floats() turns each of these into an array of float32."""
    path = pathlib.Path(path)
    try:
        if path.stat().st_size > _BYTES_MAX:
            raise FormatError("it has more than 16 GiB")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _archive(archive)
        with open(path, "rb") as file:
            first = _load(file)
            if isinstance(first, int):
                file.seek(0)
                return _legacy(file)
            return first
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise FormatError(f"{path}: {error}") from None
    except FormatError as error:
        raise FormatError(f"{path} cannot be converted: {error}") from None
