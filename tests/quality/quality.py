#!/usr/bin/env python3
"""Selection quality of the signature schemes on a real model, through the daemon: `make quality` runs it.

SmolLM2-135M reads a text; queries, keys and values of some layers are kept. Then, for each scheme and size of signature, a
sequence of those layers grows through pivotkv (a scheme that calibrates itself does so on what comes first), and at every 16th
position of the second half the sparse attention is audited against the exact one: probability mass covered, and norm of the
difference over norm.
With --perplexity the whole model reads the end of the text again with the selection in every layer.
Writes quality.json, quality.md and quality.png into --out.
"""
from __future__ import annotations

import argparse
import gzip
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "examples"), str(ROOT / "client" / "python")]

LAYERS = (4, 12, 20, 27)
BUDGETS = (64, 128, 256, 512, 1024)
SINKS = RECENT = 128
CHUNK = 256
# The study behind the design, on the bash manual: error at k = 64 .. 1024 (docs/signatures.md).
PUBLISHED = {"best possible (exact scores, group sum)": (None, [.089, .065, .043, .025, .012]),
             "hash, 32 bit per q head, small training": (12, [.151, .127, .101, .073, .046]),
             "Quest, page of 8, int4": (8, [.191, .153, .121, .085, .049])}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-dir", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--text", type=pathlib.Path, help="default: the manual page of bash, if the machine has it")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--schemes", default="code:32,code:64,code:128,sign:64,sign:128", help="scheme:bits, ...")
    parser.add_argument("--perplexity", action="store_true", help="of the last 1000 tokens, for each scheme: minutes each")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("quality"))
    return parser.parse_args()


def read_text(path: pathlib.Path | None) -> tuple[str, str]:
    if path:
        return path.name, path.read_text(encoding="utf-8", errors="replace")
    page = pathlib.Path("/usr/share/man/man1/bash.1.gz")
    if not page.exists():
        raise FileNotFoundError("no manual page of bash on this machine: name a text with --text FILE")
    roff = gzip.decompress(page.read_bytes())
    struck = subprocess.run(["nroff", "-c", "-man", "-Tascii"], input=roff, stdout=subprocess.PIPE, check=True).stdout
    return "bash.1", re.sub(".\x08", "", struck.decode("ascii", errors="replace"))


class Recorder:
    """The model's cache while it reads: exact attention by pivotkv, q, k and v of some layers kept."""

    def __init__(self, sequence, budget, layers):
        self.sequence, self.budget = sequence, budget
        self.kept = {layer: {"q": [], "k": [], "v": []} for layer in layers}

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self.sequence.append(layer, k, v)
        if layer in self.kept:
            self.kept[layer]["k"].append(k.copy())
            self.kept[layer]["v"].append(v.copy())

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        if layer in self.kept:
            self.kept[layer]["q"].append(q.copy())
        return self.sequence.attend(layer, q, self.budget)[0]


def open_model(kv, model, scheme: str, bits: int, layers: int, name: str):
    import pivotkv
    return kv.model(f"{name}-{scheme}-{bits}", layers=layers, q_heads=model.q_heads, kv_heads=model.kv_heads,
                    head_dim=model.head_dim, dtype="f16", scheme=scheme, bits=bits,
                    rope=pivotkv.Rope(model.rope_base, interleaved=True))


def record(kv, model, tokens: list[int]) -> dict:
    import pivotkv
    with open_model(kv, model, "sign", 64, model.layers, "reader").sequence(len(tokens) + 64) as sequence:
        recorder = Recorder(sequence, pivotkv.Budget(dense=True), LAYERS)
        for at in range(0, len(tokens), CHUNK):
            model.forward(tokens[at: at + CHUNK], at, recorder)
            print(f"\rreading {at:>6}/{len(tokens)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    return {layer: {name: np.concatenate(parts) for name, parts in kept.items()} for layer, kept in recorder.kept.items()}


def audit(kv, model, kept: dict, scheme: str, bits: int) -> dict:
    """{k: (mass, error)} over layers, heads and every 16th position of the second half."""
    import pivotkv
    wishes = [pivotkv.Budget(k=k, sinks=SINKS, recent=RECENT) for k in BUDGETS]
    found: dict[int, list] = {k: [] for k in BUDGETS}
    total = len(next(iter(kept.values()))["k"])
    begin = total // 2 // CHUNK * CHUNK
    with open_model(kv, model, scheme, bits, len(kept), "audit").sequence(total + 64) as sequence:
        for i, parts in enumerate(kept.values()):
            for at in range(0, begin, CHUNK):
                sequence.append(i, parts["k"][at: at + CHUNK], parts["v"][at: at + CHUNK])
                sequence.attend(i, parts["q"][at: at + CHUNK], pivotkv.Budget(k=64, sinks=SINKS, recent=RECENT))
            for at in range(begin, total - 16, 16):
                sequence.append(i, parts["k"][at: at + 16], parts["v"][at: at + 16])
                for k, wish in zip(BUDGETS, wishes):
                    result = sequence.audit(i, parts["q"][at + 15: at + 16], wish)
                    found[k].append((result.mass, result.error))
    return {k: tuple(float(x) for x in np.mean(values, axis=0)) for k, values in found.items()}


def perplexity(kv, model, tokens: list[int], scheme: str, bits: int, count: int = 1000) -> dict:
    """Of the last `count` tokens: {"full": .., k: ..}, the selection in every layer."""
    import pivotkv
    dense, result, first = pivotkv.Budget(dense=True), {}, len(tokens) - count
    with open_model(kv, model, scheme, bits, model.layers, "perplexity").sequence(len(tokens) + 64) as base:
        read = Recorder(base, dense, ())
        for at in range(0, first, CHUNK):
            model.forward(tokens[at: min(at + CHUNK, first)], at, read)
        for name, budget in [("full", dense)] + [(k, pivotkv.Budget(k=k, sinks=SINKS, recent=RECENT)) for k in (128, 256, 512)]:
            with base.fork(first) as fork:
                cache, hidden = Recorder(fork, budget, ()), []
                for at in range(first, len(tokens), CHUNK):
                    hidden.append(model.forward(tokens[at: at + CHUNK], at, cache))
                nll = model.negative_log_likelihood(np.concatenate(hidden)[:-1], tokens[first + 1:])
                result[name] = float(np.exp(nll.mean()))
    return result


def table(results: list[dict]) -> str:
    lines = ["| signature | B per token and KV head | " + " | ".join(f"k={k}" for k in BUDGETS) + " |",
             "|---" * (2 + len(BUDGETS)) + "|"]
    for r in results:
        cells = [f"{m:.3f} / {e:.3f}" if m else f"- / {e:.3f}" for m, e in r["quality"].values()]
        lines.append(f"| {r['name']} | {r['bytes'] or '-'} | " + " | ".join(cells) + " |")
    told = [r for r in results if r.get("perplexity")]
    if told:
        lines += ["", "| perplexity | full | k=128 | k=256 | k=512 |", "|---|---|---|---|---|"]
    for r in told:
        p = r["perplexity"]
        lines.append(f"| {r['name']} | {p['full']:.3f} | " + " | ".join(
            f"{p[k]:.3f} ({100 * (p[k] / p['full'] - 1):+.1f} %)" for k in (128, 256, 512)) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict], title: str, path: pathlib.Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("quality: no matplotlib, so no plot", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    for r in results:
        axes.plot(list(r["quality"]), [e for _, e in r["quality"].values()], "o-" if r["measured"] else "x--", label=r["name"])
    axes.set(xscale="log", yscale="log", xlabel="selected rows k, beside 128 sinks and 128 recent",
             ylabel="relative error of the attention output", title=title)
    axes.set_xticks(BUDGETS, [str(k) for k in BUDGETS])
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def run(options: argparse.Namespace) -> list[dict]:
    import pivotkv
    from daemon import PrivateDaemon
    from smollm2 import SmolLM2
    model = SmolLM2()
    name, text = read_text(options.text)
    tokens = model.encode(text[: options.tokens * 12])[: options.tokens]
    results = []
    with PrivateDaemon(options.build_dir / "cachesvc" / "pivotkvd", pool_bytes=512 << 20, arena_bytes=2 << 30,
                       threads=options.threads) as daemon, \
            pivotkv.connect(daemon.socket, threads=options.threads, label="quality") as kv:
        kept = record(kv, model, tokens)
        for scheme, bits in (part.split(":") for part in options.schemes.split(",")):
            start = time.monotonic()
            row = {"name": f"{scheme}, {bits} bit", "bytes": int(bits) // 8, "measured": True,
                   "quality": audit(kv, model, kept, scheme, int(bits))}
            if options.perplexity:
                row["perplexity"] = perplexity(kv, model, tokens, scheme, int(bits))
            print(f"{row['name']}: {time.monotonic() - start:.0f} s", file=sys.stderr)
            results.append(row)
    if name == "bash.1":
        results += [{"name": n, "bytes": b, "measured": False, "quality": {k: (None, e) for k, e in zip(BUDGETS, errors)}}
                    for n, (b, errors) in PUBLISHED.items()]
    options.title = f"SmolLM2-135M, {name}, {len(tokens)} tokens, layers {LAYERS}"
    return results


def main() -> int:
    options = arguments()
    os.environ.setdefault("PIVOTKV_LIBRARY", str(options.build_dir / "client" / "libpivotkv.so"))
    try:
        results = run(options)
    except FileNotFoundError as e:
        print(f"quality: {e}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    text = f"# {options.title}: mass covered / relative error\n\n{table(results)}"
    (options.out / "quality.md").write_text(text)
    (options.out / "quality.json").write_text(json.dumps(results, indent=1))
    plot(results, options.title, options.out / "quality.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
