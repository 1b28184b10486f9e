#!/usr/bin/env python3
"""What signatures cost beside a model's own work: SmolLM2-135M reads a text through the daemon, then decodes.

    build/venv/bin/python tests/quality/signing.py [--build-dir build] [--format json]

Per scheme, on all threads: time of the whole forward pass per token, attention through the daemon included; of the appends in
it, which check, copy and sign keys (an upper bound of signing); and of the queries' weights, as the service reports it. Shares
are of the forward pass. Schemes come from files of random weights, since time does not depend on them: `code` with one bit in
every dimension, which is the most work for its size; `hash` of HashAttention's shape (MLPs 64-128-128-32, two a q head).
Timings are of one machine: not a test.
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

CHUNK, WARM, READ, DECODE = 256, 512, 512, 24  # tokens


class TimedCache:
    """The model's cache on a sequence; adds up what appends and weights take."""

    def __init__(self, sequence, budget):
        self.sequence, self.budget, self.append_ns, self.weigh_ns = sequence, budget, 0, 0

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        k, v = k.astype(np.float16), v.astype(np.float16)  # what the service stores: the cast is the model's affair
        begin = time.perf_counter_ns()
        self.sequence.append(layer, k, v)
        self.append_ns += time.perf_counter_ns() - begin

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        out, _, explain = self.sequence.explain(layer, q, self.budget)
        self.weigh_ns += explain.sign_ns
        return out


def random_file(path: pathlib.Path, model, kind: str) -> int:
    """A scheme file; its bits."""
    from pivotkv import schemes, tensors
    from pivotkv.recording import Geometry
    g, random = Geometry(model.layers, model.q_heads, model.kv_heads, model.head_dim), np.random.default_rng(1)
    dim, heads = g.head_dim, (g.layers, g.kv_heads)

    def numbers(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    if kind == "hash":
        arrays = {f"{side}.{i}.{part}": numbers(g.layers, g.q_heads, n_out, *([n_in] if part == "weight" else []))
                  for side in "kq" for i, (n_in, n_out) in enumerate(((dim, 128), (128, 128), (128, 32)))
                  for part in ("weight", "bias")}
    elif kind == "code":
        arrays = {"k.weight": numbers(*heads, dim, dim), "q.weight": numbers(*heads, dim, dim), "k.mean": numbers(*heads, dim),
                  "k.low": numbers(*heads, dim), "k.step": np.ones((*heads, dim), np.float32),
                  "k.bits": np.ones((*heads, dim), np.uint8)}
    else:
        arrays = {"k.mean": numbers(*heads, dim), "k.deviation": np.ones((*heads, dim), np.float32)}
    bits = 32 * g.group if kind == "hash" else dim
    tensors.write(path, arrays, schemes.meta(kind, g, bits, {}))
    return bits


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
            begin = time.perf_counter_ns()
            for at in range(first, first + count, step):
                model.forward(tokens[at: at + step], at, cache)
            whole = time.perf_counter_ns() - begin
            rows.append({"scheme": scheme, "bits": bits, "pass": name, "forward_us": whole / count / 1e3,
                         "append_us": cache.append_ns / count / 1e3, "weigh_us": cache.weigh_ns / count / 1e3,
                         "append_percent": 100 * cache.append_ns / whole, "weigh_percent": 100 * cache.weigh_ns / whole})
    return rows


def body() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-dir", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
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
            pivotkv.connect(daemon.socket, threads=o.threads, label="signing") as kv:
        for scheme in ("sign", "code", "hash"):
            path = pathlib.Path(folder) / f"{scheme}.safetensors"
            bits = random_file(path, model, scheme)
            command.say(f"{scheme}, {bits} bits")
            rows += measure(kv, model, tokens, scheme, bits, str(path))
    print(command.table(rows, o.format))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "client" / "python"))
    os.environ.setdefault("PIVOTKV_LIBRARY", str(ROOT / "build" / "client" / "libpivotkv.so"))
    from pivotkv.command import run
    run("signing", body)
