"""pivotkv-sizes: how many signature bits each layer needs, on recorded q, k, v."""
from __future__ import annotations

import argparse
from typing import Callable

import numpy as np

from . import command, evaluate
from .calibrate import Calibrator
from .recording import FormatError, Geometry, Recording, load_all
from .schemes import Scheme

NAME = "pivotkv-sizes"
ABOUT = """Layers need different sizes of signature: one whose attention keeps to the first and last tokens loses little by few
bits, one that looks things up loses much. For each layer and size: the relative error of the attention output over the first
tokens, the last ones and the k selected, with `code` calibrated on the recording's own first tokens, as the service does; mean
over q heads, budgets and positions of the second half. The column `bits` has the sizes with the least mean error whose
mean is at most --mean; the last line lists them for pivotkv.transformers.Cache(bits=[...])."""
LEARN = 4096  # tokens; what the service looks at
STEP = 32  # bits of a word


class _Arrays(dict):
    """Tensors of a scheme that is in no file."""

    def array(self, name: str) -> np.ndarray:
        return self[name]


def errors(recording: Recording, sizes: list[int], budgets: list[int], every: int = 32,
           progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """[layers, sizes], means over heads, budgets and positions."""
    whole, found = recording.geometry, np.empty((len(recording.layers), len(sizes)))
    geometry, learn = Geometry(1, whole.q_heads, whole.kv_heads, whole.head_dim), min(LEARN, recording.tokens // 2)
    for i, layer in enumerate(recording.layers):
        one = recording.only(layer)
        made = Calibrator(geometry, recording.about.rope, recording.tokens)
        made.feed(0, 0, q=one.q(layer)[:learn], k=one.k(layer)[:learn])
        for j, bits in enumerate(sizes):
            scheme = Scheme("code", geometry, bits, {}, 1.0, _Arrays(made.code(bits))) if bits else None
            points = evaluate.run(one, scheme, budgets, evaluate.positions_of(one, every), rule="softmax" if bits else "age")
            found[i, j] = np.mean([point.error for point in points])
            progress(i * len(sizes) + j + 1)
    return found


def choose(found: np.ndarray, sizes: list[int], mean: float) -> list[int]:
    """The size of each layer: the least sum of found [layers, sizes] within `mean` bits a layer."""
    room = int(mean * len(found)) // STEP
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # words taken: (sum, sizes)
    for row in found:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for words, (total, chosen) in best.items():
            for size, error in zip(sizes, row):
                now, sum_ = words + size // STEP, total + float(error)
                if now <= room and (now not in longer or sum_ < longer[now][0]):
                    longer[now] = sum_, (*chosen, size)
        best = longer
    if not best:
        raise ValueError(f"a mean of {mean:g} bits is below the smallest size, {min(sizes)}")
    return list(min(best.values())[1])


def _sizes(text: str) -> list[int]:
    """As command.numbers, and 0."""
    parts = text.split(",")
    bits = [part for part in parts if part != "0"]
    return [0] * (len(bits) < len(parts)) + (command.numbers(",".join(bits)) if bits else [])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = command.parser(NAME, ABOUT)
    p.add_argument("recordings", nargs="+", metavar="RECORDING", help="of all layers, with values (pivotkv-calibrate --values)")
    p.add_argument("--sizes", type=_sizes, default=[32, 64, 96], metavar="BITS,BITS",
                   help="to choose from (32,64,96); 0: no signatures, the latest k tokens")
    p.add_argument("--mean", type=float, help="bits of a layer, on average (the middle size)")
    p.add_argument("--k", type=command.numbers, default=[128], metavar="K,K", help="budgets (128)")
    p.add_argument("--every", type=command.positive, default=32, help="positions (%(default)s)")
    p.add_argument("--format", choices=("table", "json"), default="table")
    o = p.parse_args(argv)
    o.sizes = sorted(set(o.sizes))
    if any(size % STEP or not 0 <= size <= 256 for size in o.sizes):
        p.error("--sizes are multiples of 32 up to 256, or 0")
    o.mean = o.mean or float(o.sizes[len(o.sizes) // 2])
    if o.mean < o.sizes[0]:
        p.error(f"--mean {o.mean:g} is below the smallest of --sizes, {o.sizes[0]}")
    return o


def body(argv: list[str] | None) -> int:
    o = arguments(argv)
    recordings = load_all(o.recordings)
    for r in recordings:
        if not r.has_values:
            raise FormatError(f"{r.path} has no values: record with --values")
        if not evaluate.positions_of(r, o.every) or o.sizes[-1] > 4 * r.geometry.head_dim:
            raise ValueError(f"{r.path} has {r.tokens} tokens and heads of {r.geometry.head_dim}: too few for --every "
                             f"{o.every} or --sizes {o.sizes[-1]}")
    bar = command.Progress(NAME, len(recordings) * len(recordings[0].layers) * len(o.sizes))
    step = len(recordings[0].layers) * len(o.sizes)
    found = np.mean([errors(r, o.sizes, o.k, o.every, lambda done, n=n: bar(n * step + done))
                     for n, r in enumerate(recordings)], axis=0)
    chosen = choose(found, o.sizes, o.mean)
    rows = [{"layer": layer, **{f"error_{size}": float(e) for size, e in zip(o.sizes, row)}, "bits": bits}
            for layer, row, bits in zip(recordings[0].layers, found, chosen)]
    print(command.table(rows, o.format))
    if o.format == "table":
        error = np.mean([row[o.sizes.index(bits)] for row, bits in zip(found, chosen)])
        print(f"mean {np.mean(chosen):.1f} bits, error {error:.4f}; of equal sizes: "
              + ", ".join(f"{size} bits {e:.4f}" for size, e in zip(o.sizes, found.mean(axis=0))))
        print(",".join(map(str, chosen)))
    return 0


def main(argv: list[str] | None = None) -> None:
    command.run(NAME, lambda: body(argv))


if __name__ == "__main__":
    main()
