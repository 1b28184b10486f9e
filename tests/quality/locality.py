#!/usr/bin/env python3
"""How alike the selections of neighbouring decoding steps are, on a real model: what the row cache of batches finds.

A text that Gemma 3 270M has read (quality.py keeps q, k and v of its three global layers) is decoded once more from --first on:
each step appends a token, asks the daemon's selection for its query, and looks the selected rows up in a cache as the GPU's is
(8 ways, gpu/cuda/rows.cuh). Prints JSON: of each layer and cache size the share of selected rows that were found after --warm
steps, and the share of selected rows that follow a selected one. Sinks and recent, which are always found, do not count.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "examples"), str(ROOT / "client" / "python")]

import numpy as np  # noqa: E402

import retrieval  # noqa: E402  the examples must be found first
from quality import SEEDS  # noqa: E402
from selection import RECENT, SINKS  # noqa: E402
from signature import Signature  # noqa: E402
from subject import Subject, fill  # noqa: E402

WAYS = 8


class RowCache:
    """Tokens of one sequence and kv head. A step finds what is there; then what it missed takes the way that was used longest
    ago, but none that the step itself has found or put there."""

    def __init__(self, rows: int):
        self.sets = max(rows // WAYS, 1)
        self.token = np.full((self.sets, WAYS), -1, np.int64)
        self.used = np.full((self.sets, WAYS), -1, np.int64)
        self.now = 0

    def step(self, tokens: np.ndarray) -> int:
        """Ascending tokens; how many were found."""
        mixed = tokens.astype(np.uint64) * np.uint64(2654435761) & np.uint64(0xffffffff)
        sets = (mixed * np.uint64(self.sets) >> np.uint64(32)).astype(np.int64)
        match = self.token[sets] == tokens[:, None]
        found = match.any(axis=1)
        self.used[sets[found], match[found].argmax(axis=1)] = self.now
        for s, token in zip(sets[~found], tokens[~found]):
            way = self.used[s].argmin()
            if self.used[s, way] < self.now:
                self.token[s, way], self.used[s, way] = token, self.now
        self.now += 1
        return int(found.sum())


def measure(kv, subject: Subject, kept, name: str, options: argparse.Namespace) -> list[dict]:
    model = subject.open_model(kv, options.signature, range(subject.layers), f"locality-{name}")
    length, budget, results = len(kept.tokens), options.signature.budget(options.k), []
    first = options.first if options.first is not None else length - options.steps
    with model.sequence(length) as sequence:
        for layer in range(subject.layers):
            fill(sequence, kept, layer, layer, 0, first, retrieval.LEARN)
        for layer in range(subject.layers):
            caches = {share: RowCache(int(share * options.k)) for share in options.caches}
            found, neighbours, selected = dict.fromkeys(caches, 0), 0, 0
            for at in range(first, min(first + options.steps, length)):
                fill(sequence, kept, layer, layer, at, at + 1, 0)
                choice = sequence.select(layer, kept.q[layer, at: at + 1], budget)
                rows = choice.index[0, 0, : choice.count[0, 0]].astype(np.int64)
                rows = rows[(rows >= SINKS) & (rows < at + 1 - RECENT)]
                hits = {share: cache.step(rows) for share, cache in caches.items()}
                if at - first < options.warm:
                    continue
                selected += len(rows)
                neighbours += int((np.diff(rows) == 1).sum())
                for share, n in hits.items():
                    found[share] += n
            results.append({"text": name, "tokens": first, "layer": subject.model.global_layers[layer], "k": options.k,
                            "follows_a_selected_row": round(neighbours / selected, 4),
                            "found": {str(share): round(n / selected, 4) for share, n in found.items()}})
            print(json.dumps(results[-1]), flush=True)
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", default="manuals", help="as quality.py knows them, with commas; default: manuals")
    parser.add_argument("--signature", default="code:128", type=Signature.parse)
    parser.add_argument("--k", type=int, default=2048)
    parser.add_argument("--caches", default="1,1.5,2,3,4", help="rows of the cache, in selections (k); with commas")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--warm", type=int, default=32, help="steps that do not count")
    parser.add_argument("--first", type=int, help="the first step's token; default: so that the last is the text's last")
    parser.add_argument("--build-dir", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--cache", type=pathlib.Path, help="default: $XDG_CACHE_HOME/pivotkv-quality")
    options = parser.parse_args()
    try:
        options.caches = [float(share) for share in options.caches.split(",")]
    except ValueError:
        parser.error(f"--caches are numbers with commas, not {options.caches}")
    if not 0 <= options.warm < options.steps:
        parser.error("--warm is less than --steps")
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    options.cache = options.cache or pathlib.Path(home) / "pivotkv-quality"
    return options


def run(options: argparse.Namespace) -> None:
    import pivotkv
    from daemon import PrivateDaemon
    from texts import Texts
    subject, texts = Subject("gemma3", options.cache), Texts(options.cache)
    with PrivateDaemon(options.build_dir / "cachesvc" / "pivotkvd", pool_bytes=640 << 20, arena_bytes=2 << 30,
                       threads=1) as daemon, \
            pivotkv.connect(daemon.socket, threads=1, label="locality", timeout_ms=60000) as kv:
        for name in options.texts.split(","):
            exam = retrieval.Exam(subject, texts, name, 56, SEEDS.get(name, 0))
            measure(kv, subject, exam.reading, name, options)


def main() -> int:
    options = arguments()
    os.environ.setdefault("PIVOTKV_LIBRARY", str((options.build_dir / "client" / "libpivotkv.so").resolve()))
    try:
        run(options)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"locality: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("locality: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
