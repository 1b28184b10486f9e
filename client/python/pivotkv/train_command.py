"""pivotkv-train: a scheme file for `hash` or `linear` from recorded q and k."""
from __future__ import annotations

import argparse
import os
import pathlib

import numpy as np

from . import command, train
from .hash_unit import LOSSES, Options
from .recording import load

_DEFAULTS = Options()
NAME = "pivotkv-train"
ABOUT = """Trains signatures on recorded queries and keys (pivotkv-calibrate --save-recording makes recordings).

  hash    the MLPs of HashAttention (arXiv 2412.14468): one pair for each q head
  linear  one projection for each kv head

Finished heads are kept in OUT.checkpoint; the same command again goes on where it was stopped, and the file becomes the same,
byte for byte. Same recordings, options and seed: same file. Beside OUT: OUT.losses.json and, with matplotlib, OUT.png."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = command.parser(NAME, ABOUT)
    p.add_argument("recordings", nargs="+", metavar="RECORDING", help=".safetensors or .npz with q.<layer> and k.<layer>")
    p.add_argument("--out", required=True, type=pathlib.Path, help="the scheme file to write")
    p.add_argument("--scheme", choices=("hash", "linear"), default="hash")
    p.add_argument("--bits", type=command.positive, help="hash: of each q head (32); linear: of each kv head (128)")
    p.add_argument("--hidden", type=command.numbers, default=[128, 128], metavar="N,N", help="hidden widths of hash (128,128)")
    p.add_argument("--query", choices=("value", "sign"), default="value",
                   help="linear: weigh bits with the projected query, or with its signs")
    p.add_argument("--steps", type=command.positive, default=_DEFAULTS.steps)
    p.add_argument("--chunk", type=command.positive, default=_DEFAULTS.chunk, help="queries of a step (%(default)s)")
    p.add_argument("--labels", type=command.positive, default=_DEFAULTS.labels, help="positives of a query (%(default)s)")
    p.add_argument("--loss", choices=sorted(LOSSES), default=_DEFAULTS.loss,
                   help="softmax: a positive among all keys; bce: each key by itself, the paper's (%(default)s)")
    p.add_argument("--positive-weight", type=float, default=_DEFAULTS.positive_weight, help="of bce (%(default)s)")
    p.add_argument("--consecutive", action="store_true", help="a step's queries follow each other, as the paper's; default: "
                   "drawn from the whole of a text")
    p.add_argument("--rate", type=float, default=_DEFAULTS.rate, help="Adam's (%(default)s)")
    p.add_argument("--constant-rate", action="store_true", help="the paper's; default: falls to zero along a cosine")
    p.add_argument("--negatives", type=int, default=_DEFAULTS.negatives,
                   help="keys sampled for the loss beside all positives; 0: all keys, as the paper (%(default)s)")
    p.add_argument("--centre", action="store_true", help="inputs centred and scaled channel by channel, as the paper can")
    p.add_argument("--sinks", type=int, default=_DEFAULTS.sinks)
    p.add_argument("--recent", type=int, default=_DEFAULTS.recent)
    p.add_argument("--seed", type=int, default=_DEFAULTS.seed)
    p.add_argument("--checkpoint", type=pathlib.Path, metavar="FOLDER", help="default: OUT.checkpoint")
    p.add_argument("--workers", type=command.positive, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    p.add_argument("--stop-after", type=command.positive, metavar="UNITS", help="train so many more heads, then stop")
    options = p.parse_args(argv)
    if options.negatives < 0 or options.sinks < 0 or options.recent < 0 or not options.rate > 0:
        p.error("--negatives, --sinks and --recent are at least 0, --rate above 0")
    return options


def plan_of(o: argparse.Namespace) -> train.Plan:
    settings = {"steps": o.steps, "chunk": o.chunk, "labels": o.labels, "loss": o.loss,
                "positive_weight": o.positive_weight, "consecutive": o.consecutive, "rate": o.rate,
                "cosine": not o.constant_rate, "negatives": o.negatives, "centre": o.centre,
                "sinks": o.sinks, "recent": o.recent, "seed": o.seed}
    if o.bits:
        settings["bits"] = o.bits
    if o.scheme == "hash":
        settings["hidden"] = tuple(o.hidden)
    return train.plan_of(o.scheme, o.recordings, o.query, **settings)


def body(argv: list[str] | None) -> int:
    o = arguments(argv)
    plan = plan_of(o)
    first = load(o.recordings[0])
    plan.load()
    checkpoint = train.Checkpoint(o.checkpoint or f"{o.out}.checkpoint", plan)
    keys = plan.keys(first)
    bar = command.Progress("training", len(keys), " heads")
    there = sum(checkpoint.has(key) for key in keys)
    if there:
        command.say(f"{there} of {len(keys)} heads are in {checkpoint.folder}")
    complete = train.run(plan, checkpoint, workers=o.workers, stop_after=o.stop_after,
                         progress=lambda done, total, loss: bar(done, f"loss {loss:.4f}"))
    if not complete:
        command.say(f"stopped; the same command goes on. Checkpoint: {checkpoint.folder}")
        return 0
    losses = train.finish(plan, checkpoint, o.out)
    tell_losses(o.out, losses, f"{o.scheme}, {first.about.model}")
    last = losses[:, -max(1, o.steps // 10):].mean()
    print(f"{o.out}: {o.scheme}, {plan.bits(first)} bits a token and kv head, loss {last:.4f}")
    return 0


def tell_losses(out: pathlib.Path, losses: np.ndarray, title: str) -> None:
    rows = ",\n ".join("[" + ", ".join(f"{x:.5g}" for x in row) + "]" for row in losses)
    pathlib.Path(f"{out}.losses.json").write_text(f"[{rows}]\n")
    command.save_curve(f"{out}.png", losses, title)


def main(argv: list[str] | None = None) -> None:
    command.run(NAME, lambda: body(argv))


if __name__ == "__main__":
    main()
