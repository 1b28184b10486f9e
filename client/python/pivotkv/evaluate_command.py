"""pivotkv-evaluate: softmax mass and output error of scheme files on recorded q, k, v, by budget."""
from __future__ import annotations

import argparse
import pathlib

from . import command, evaluate, schemes
from .recording import FormatError, Recording, load_all

NAME = "pivotkv-evaluate"
ABOUT = """What selection costs with each scheme file, on recorded queries, keys and values: attention over the first tokens,
the last ones and the k selected, beside attention over all of them.

  mass   softmax probability that is covered       error  norm(difference of the outputs) / norm(exact output)

Means over layers, q heads and every 16th position of the second half. The row `exact` selects by the true scores: the best that
any signature can do. Record other texts than those that files were calibrated or trained on."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = command.parser(NAME, ABOUT)
    p.add_argument("recordings", nargs="+", metavar="RECORDING", help="with values (pivotkv-calibrate --values)")
    p.add_argument("--scheme", type=pathlib.Path, action="append", default=[], metavar="FILE", help="may be given again")
    p.add_argument("--k", type=command.numbers, default=[64, 128, 256, 512, 1024], metavar="K,K", help="budgets")
    p.add_argument("--sinks", type=int, default=128)
    p.add_argument("--recent", type=int, default=128)
    p.add_argument("--every", type=command.positive, default=16, help="positions (%(default)s)")
    p.add_argument("--begin", type=int, help="first position (the middle of the recording)")
    p.add_argument("--rule", choices=("softmax", "sum", "max"), default="softmax", help="of a group's scores (%(default)s)")
    p.add_argument("--scale", type=float, help="of the softmax (1 / sqrt(head_dim))")
    p.add_argument("--format", choices=("table", "json"), default="table")
    o = p.parse_args(argv)
    if o.sinks < 0 or o.recent < 0 or (o.begin is not None and o.begin < 0):
        p.error("--sinks, --recent and --begin are at least 0")
    return o


def fitting(path: pathlib.Path, first: Recording) -> schemes.Scheme:
    g = first.geometry
    scheme = schemes.load(path, q_heads=g.q_heads, kv_heads=g.kv_heads)
    if scheme.geometry != g:
        raise FormatError(f"{path} is for {_named(scheme.geometry)}, the recording is of {_named(g)}")
    return scheme


def _named(g) -> str:
    return f"{g.layers} layers, {g.q_heads} q heads, {g.kv_heads} kv heads of {g.head_dim}"


def rows_of(o: argparse.Namespace, recordings: list[Recording]) -> list[dict]:
    first, rows = recordings[0], []
    short = [r for r in recordings if not evaluate.positions_of(r, o.every, o.begin)]
    if short:
        raise ValueError(f"{short[0].path} has {short[0].tokens} tokens: no position is left")
    files = [(None, "exact")] + [(fitting(path, first), path.name) for path in o.scheme]
    for scheme, name in files:
        points: dict[int, list[evaluate.Point]] = {k: [] for k in o.k}
        bar = command.Progress(name, len(recordings) * first.geometry.layers * first.geometry.kv_heads, " heads")
        for n, r in enumerate(recordings):
            before = n * r.geometry.layers * r.geometry.kv_heads
            for point in evaluate.run(r, scheme, o.k, evaluate.positions_of(r, o.every, o.begin), sinks=o.sinks,
                                      recent=o.recent, scale=o.scale, rule=o.rule,
                                      progress=lambda done: bar(before + done)):
                points[point.k].append(point)
        for k, found in points.items():
            samples = sum(p.samples for p in found)
            mass, error = (sum(getattr(p, what) * p.samples for p in found) / samples for what in ("mass", "error"))
            rows.append({"scheme": name, "kind": scheme.kind if scheme else "", "bytes": scheme.bits // 8 if scheme else "",
                         "k": k, "mass": mass, "error": error, "samples": samples})
    return rows


def body(argv: list[str] | None) -> int:
    o = arguments(argv)
    recordings = load_all(o.recordings)
    without = [r for r in recordings if not r.has_values]
    if without:
        raise FormatError(f"{without[0].path} has no values: record with --values")
    print(command.table(rows_of(o, recordings), o.format))
    return 0


def main(argv: list[str] | None = None) -> None:
    command.run(NAME, lambda: body(argv))


if __name__ == "__main__":
    main()
