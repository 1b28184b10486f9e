#!/usr/bin/env python3
"""What signatures cost beside a model's own work: SmolLM2-135M reads a text through the daemon, then decodes.

    build/venv/bin/python tests/quality/signing.py [--build-dir build] [--format json]

Per scheme, on one thread, in CPU time, so that a busy machine does not matter: the whole forward pass per token, attention
through the daemon included; the appends in it, which check, copy and sign keys (an upper bound of signing; `sign` hardly
computes, so what others take more than it is their signing); and the queries' weights, as the service reports them (elapsed
time). Shares are of the forward pass. `code` is calibrated on the first tokens; `hash` has HashAttention's shape (MLPs
64-128-128-32, two a q head) and random weights, since time does not depend on them. Timings are of one machine: not a test.
"""
from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "examples"), str(ROOT / "client" / "python")]

CHUNK, WARM, READ, DECODE = 256, 768, 512, 16  # tokens


class TimedCache:
    """The model's cache on a sequence; adds up what appends and weights take."""

    def __init__(self, sequence, budget):
        self.sequence, self.budget, self.append_ns, self.weigh_ns = sequence, budget, 0, 0

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        k, v = k.astype(np.float16), v.astype(np.float16)  # what the service stores: the cast is the model's affair
        begin = time.process_time_ns()
        self.sequence.append(layer, k, v)
        self.append_ns += time.process_time_ns() - begin

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        out, _, explain = self.sequence.explain(layer, q, self.budget)
        self.weigh_ns += explain.sign_ns
        return out


def random_hash(path: pathlib.Path, model) -> None:
    from pivotkv import schemes, tensors
    from pivotkv.recording import Geometry
    g, random = Geometry(model.layers, model.q_heads, model.kv_heads, model.head_dim), np.random.default_rng(1)
    arrays = {}
    for side in "kq":
        for i, (n_in, n_out) in enumerate(((g.head_dim, 128), (128, 128), (128, 32))):
            arrays[f"{side}.{i}.weight"] = random.standard_normal((g.layers, g.q_heads, n_out, n_in)).astype(np.float32)
            arrays[f"{side}.{i}.bias"] = random.standard_normal((g.layers, g.q_heads, n_out)).astype(np.float32)
    tensors.write(path, arrays, schemes.meta("hash", g, 32 * g.group, {}))


def calibrated(folder: pathlib.Path, model, kept) -> None:
    from pivotkv.calibrate import Calibrator
    from pivotkv.recording import Geometry
    made = Calibrator(Geometry(model.layers, model.q_heads, model.kv_heads, model.head_dim), None, WARM)
    for layer in range(model.layers):
        made.feed(layer, 0, q=kept[f"q.{layer}"], k=kept[f"k.{layer}"])
    for scheme in ("sign", "code"):
        made.write(folder / f"{scheme}.safetensors", model.head_dim, scheme=scheme)


def measure(kv, model, tokens: list[int], scheme: str, bits: int, weights: str) -> list[dict]:
    import pivotkv
    served = kv.model(f"signing-{scheme}-{bits}", layers=model.layers, q_heads=model.q_heads, kv_heads=model.kv_heads,
                      head_dim=model.head_dim, dtype="f16", scheme=scheme, bits=bits, weights=weights,
                      rope=pivotkv.Rope(model.rope_base, interleaved=True))
    rows = []
    with served.sequence(len(tokens) + 64) as sequence:
        cache = TimedCache(sequence, pivotkv.Budget(k=256))
        for at in range(0, WARM, CHUNK):
            model.forward(tokens[at: at + CHUNK], at, cache)
        for name, first, count, step in (("reading", WARM, READ, CHUNK), ("decoding", WARM + READ, DECODE, 1)):
            cache.append_ns = cache.weigh_ns = 0
            begin = time.process_time_ns()
            for at in range(first, first + count, step):
                model.forward(tokens[at: at + step], at, cache)
            whole = time.process_time_ns() - begin
            rows.append({"scheme": scheme, "bits": bits, "pass": name, "forward_us": whole / count / 1e3,
                         "append_us": cache.append_ns / count / 1e3, "weigh_us": cache.weigh_ns / count / 1e3,
                         "append_percent": 100 * cache.append_ns / whole, "weigh_percent": 100 * cache.weigh_ns / whole})
    return rows


def files(folder: pathlib.Path, model, tokens: list[int]) -> list[tuple[str, int, str]]:
    """(scheme, bits, file)."""
    from pivotkv.recording import Recorder
    from smollm2 import ExactCache
    recorder = Recorder(ExactCache(model), range(model.layers))
    for at in range(0, WARM, CHUNK):
        model.forward(tokens[at: at + CHUNK], at, recorder)
    calibrated(folder, model, recorder.arrays())
    random_hash(folder / "hash.safetensors", model)
    bits = {"sign": model.head_dim, "code": model.head_dim, "hash": 32 * model.q_heads // model.kv_heads}
    return [(scheme, n, str(folder / f"{scheme}.safetensors")) for scheme, n in bits.items()]


def body() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-dir", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    o = parser.parse_args()
    os.environ.setdefault("PIVOTKV_LIBRARY", str(o.build_dir.resolve() / "client" / "libpivotkv.so"))
    import pivotkv
    from daemon import PrivateDaemon
    from demo import read_document
    from pivotkv import command
    from smollm2 import SmolLM2
    model = SmolLM2()
    tokens = model.encode(read_document(None)[1])[: WARM + READ + DECODE]
    rows = []
    with tempfile.TemporaryDirectory(prefix="pivotkv-") as folder, \
            PrivateDaemon(o.build_dir / "cachesvc" / "pivotkvd", pool_bytes=256 << 20, arena_bytes=1 << 30) as daemon, \
            pivotkv.connect(daemon.socket, threads=1, label="signing") as kv:
        for scheme, bits, path in files(pathlib.Path(folder), model, tokens):
            command.say(f"{scheme}, {bits} bits")
            rows += measure(kv, model, tokens, scheme, bits, path)
    print(command.table(rows, o.format))
    return 0


if __name__ == "__main__":
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":  # read when numpy is loaded: begin again
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OPENBLAS_NUM_THREADS": "1"})
    sys.path.insert(0, str(ROOT / "client" / "python"))
    os.environ.setdefault("PIVOTKV_LIBRARY", str(ROOT / "build" / "client" / "libpivotkv.so"))
    from pivotkv.command import run
    run("signing", body)
