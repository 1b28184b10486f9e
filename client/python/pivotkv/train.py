"""Training of the schemes that are learnt: `hash`, HashAttention's MLPs (arXiv 2412.14468), and `linear`, one projection a kv
head.

Units (hash_unit.py) are independent of each other, so each is trained whole and then kept in a checkpoint: training that is
interrupted goes on with the units that are missing, and the file is the same, byte for byte, as without the interruption.
Workers are processes whose BLAS has one thread, so the number of workers changes nothing either.

numpy alone: the MLPs are so small that a framework on the CPU would call the same matrix products.
"""
from __future__ import annotations

import concurrent.futures as futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Callable, Iterable

import numpy as np

from . import tensors
from .hash_unit import Options, Text, Unit, least_tokens, train
from .mlp import MLP
from .recording import Recording, load_all
from .schemes import STAGES_MAX, check_widths, meta

_BLAS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Plan:
    """What is trained from what. Key of a unit: (layer's index, q head) for hash, (layer's index, kv head) for linear."""

    kind: str  # "hash" or "linear"
    recordings: tuple[str, ...]  # paths
    options: Options
    query: str = "value"  # linear: the file's metadata `query`

    def load(self) -> list[Recording]:
        found = load_all(self.recordings)
        short = [r for r in found if r.tokens < least_tokens(self.options)]
        if short:
            raise ValueError(f"{short[0].path} has {short[0].tokens} tokens; training needs {least_tokens(self.options)}")
        g, bits = found[0].geometry, self.bits(found[0])
        check_widths(self.options.hidden)
        if len(self.options.hidden) >= STAGES_MAX:
            raise ValueError(f"{len(self.options.hidden)} hidden layers: at most {STAGES_MAX - 1}")
        if bits % 32 or not 32 <= bits <= 256:
            raise ValueError(f"{bits} bits a token and kv head, which {g.group} q heads share: the service takes 32 to 256, in "
                             "steps of 32")
        return found

    def bits(self, recording: Recording) -> int:
        return self.options.bits * (recording.geometry.group if self.kind == "hash" else 1)

    def keys(self, recording: Recording) -> list[tuple[int, int]]:
        g = recording.geometry
        heads = g.q_heads if self.kind == "hash" else g.kv_heads
        return [(layer, head) for layer in range(g.layers) for head in range(heads)]

    def digest(self) -> str:
        """Of all that decides the result."""
        parts = [self.kind, self.query, json.dumps(dataclasses.asdict(self.options), sort_keys=True)]
        for path in self.recordings:
            with open(path, "rb") as file:
                parts.append(hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest")
                             else hashlib.sha256(file.read()).hexdigest())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def train_unit(plan: Plan, recordings: list[Recording], key: tuple[int, int],
               progress: Callable[[int], None] = lambda steps: None) -> Unit:
    layer, head = recordings[0].layers[key[0]], key[1]
    group = recordings[0].geometry.group
    texts = []
    for r in recordings:
        heads = [head] if plan.kind == "hash" else list(range(head * group, (head + 1) * group))
        kv = head // group if plan.kind == "hash" else head
        q = np.ascontiguousarray(r.q(layer)[:, heads].transpose(1, 0, 2))
        texts.append(Text(q, np.ascontiguousarray(r.k(layer)[:, kv])))
    return train(texts, plan.options, key, progress)


# ---- checkpoints ----


class Checkpoint:
    """Finished units in a folder, one small file each: written whole or not at all, so that a kill costs one unit."""

    def __init__(self, folder: str | os.PathLike, plan: Plan):
        self.folder, self._digest = pathlib.Path(folder), plan.digest()
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("unit-*.safetensors"):
            if tensors.File(path).meta.get("plan") != self._digest:
                raise ValueError(f"{self.folder} holds the checkpoint of another training (other data, options or seed): name "
                                 "another folder, or delete it")

    def _path(self, key: tuple[int, int]) -> pathlib.Path:
        return self.folder / f"unit-{key[0]}-{key[1]}.safetensors"

    def has(self, key: tuple[int, int]) -> bool:
        return self._path(key).exists()

    def put(self, key: tuple[int, int], unit: Unit) -> None:
        arrays = {"losses": unit.losses}
        for name, mlp in [("k", unit.k)] + [(f"q{i}", m) for i, m in enumerate(unit.q)]:
            for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases)):
                arrays[f"{name}.{i}.weight"], arrays[f"{name}.{i}.bias"] = weight, bias
        tensors.write(self._path(key), arrays, {"plan": self._digest})

    def get(self, key: tuple[int, int]) -> Unit:
        file = tensors.File(self._path(key))

        def mlp(name: str) -> MLP:
            stages = [i for i in range(4) if f"{name}.{i}.weight" in file]
            return MLP([file.floats(f"{name}.{i}.weight") for i in stages], [file.floats(f"{name}.{i}.bias") for i in stages])

        heads = sum(name.startswith("q") and name.endswith(".0.weight") for name in file.names())
        return Unit(mlp("k"), [mlp(f"q{i}") for i in range(heads)], file.floats("losses"))


# ---- all units ----

_held: tuple[Plan, list[Recording]] | None = None  # of a worker process


def _work(plan: Plan, key: tuple[int, int]) -> Unit:
    global _held
    if _held is None or _held[0] != plan:
        _held = plan, plan.load()
    return train_unit(plan, _held[1], key)


def _pool(workers: int) -> futures.ProcessPoolExecutor:
    """Fresh interpreters, since BLAS reads its number of threads when it is loaded."""
    before = {name: os.environ.get(name) for name in _BLAS}
    pool = futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_quiet)
    os.environ.update(dict.fromkeys(_BLAS, "1"))
    try:
        # All of them start here, while the environment says so: a process is started for a task that finds none idle.
        for begun in [pool.submit(_threads) for _ in range(workers)]:
            if begun.result() != "1":
                raise RuntimeError("a worker has started outside of its environment")
        return pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _threads() -> str | None:
    return os.environ.get(_BLAS[0])


def _quiet() -> None:
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides


def run(plan: Plan, checkpoint: Checkpoint, *, workers: int = 1, stop_after: int | None = None,
        progress: Callable[[int, int, float], None] = lambda done, total, loss: None) -> bool:
    """Trains the units that the checkpoint lacks, `stop_after` of them at most. True: all are there."""
    first = plan.load()[0]
    keys = plan.keys(first)
    missing = [key for key in keys if not checkpoint.has(key)]
    todo, done = missing[:stop_after], len(keys) - len(missing)
    if not todo:
        return not missing
    pool = None
    try:
        pool = _pool(min(workers, len(todo)))
        waiting = {pool.submit(_work, plan, key): key for key in todo}
        for future in futures.as_completed(waiting):
            unit = future.result()
            checkpoint.put(waiting[future], unit)
            done += 1
            progress(done, len(keys), float(unit.losses[-max(1, len(unit.losses) // 10):].mean()))
    except BrokenProcessPool:
        raise OSError("a worker process died, perhaps of too little memory: try again with fewer workers; what was finished is "
                      f"kept in {checkpoint.folder}") from None
    except BaseException:
        for process in list((pool and pool._processes or {}).values()):
            process.terminate()  # units that are under way are lost, the checkpoint has the others
        raise
    finally:
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)
    return done == len(keys)


# ---- the file ----


def assemble(plan: Plan, checkpoint: Checkpoint) -> tuple[dict[str, np.ndarray], dict[str, str], np.ndarray]:
    """Tensors and metadata of the scheme file, and the losses [units, steps]."""
    recordings = plan.load()
    g, about = recordings[0].geometry, recordings[0].about
    units = {key: checkpoint.get(key) for key in plan.keys(recordings[0])}
    arrays: dict[str, np.ndarray] = {}

    def stack(of: Callable[[Unit], np.ndarray]) -> np.ndarray:
        heads = len(units) // g.layers
        return np.stack([np.stack([of(units[layer, head]) for head in range(heads)]) for layer in range(g.layers)])

    if plan.kind == "hash":
        for i in range(len(plan.options.hidden) + 1):
            for side, of in (("k", lambda u: u.k), ("q", lambda u: u.q[0])):
                arrays[f"{side}.{i}.weight"] = stack(lambda u: of(u).weights[i])
                arrays[f"{side}.{i}.bias"] = stack(lambda u: of(u).biases[i])
    else:
        arrays["k.weight"], arrays["k.bias"] = stack(lambda u: u.k.weights[0]), stack(lambda u: u.k.biases[0])
        q = stack(lambda u: np.stack([m.weights[0] for m in u.q]))  # [layers, kv_heads, group, bits, dim]
        arrays["q.weight"] = q.reshape(g.layers, g.q_heads, *q.shape[3:])
    more = {**about.meta(), "text": "; ".join(sorted({r.about.text for r in recordings})),
            "tokens": str(sum(r.tokens for r in recordings)),
            "training": json.dumps(dataclasses.asdict(plan.options), sort_keys=True)}
    more |= {"query": plan.query} if plan.kind == "linear" else {}
    losses = np.stack([units[key].losses for key in units])
    return arrays, meta(plan.kind, g, plan.bits(recordings[0]), more), losses


def finish(plan: Plan, checkpoint: Checkpoint, path: str | os.PathLike) -> np.ndarray:
    """Writes the scheme file; the losses [units, steps]."""
    arrays, about, losses = assemble(plan, checkpoint)
    tensors.write(path, arrays, about)
    return losses


def plan_of(kind: str, recordings: Iterable[str | os.PathLike], query: str = "value", **options) -> Plan:
    """The default settings, but for what `options` names. linear: bits are of the kv head."""
    if kind == "linear":
        options = {"hidden": (), "bits": 128, **options}
    return Plan(kind, tuple(str(path) for path in recordings), Options(**options), query)
