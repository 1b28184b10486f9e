"""The main job on real input: SmolLM2-135M reads a document through pivotkv, answers, and continues it.

The daemon's pool is far smaller than the document's K/V, so most rows live in the arena; while the model answers, each
layer attends only to the tokens that the signatures select. Ends with what it cost: bytes, tokens attended, tokens/s,
perplexity and error against full attention.
"""
from __future__ import annotations

import argparse
import os
import pathlib
import signal
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
BUDGETS = (128, 256, 512)
SINKS = RECENT = 128
CHUNK = 256  # tokens of one prefill step


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-dir", type=pathlib.Path, default=pathlib.Path("build"))
    parser.add_argument("--document", type=pathlib.Path, help="text to read; default: licences that the machine has")
    parser.add_argument("--tokens", type=int, default=6000, help="how much of it")
    parser.add_argument("--short", action="store_true", help="a few hundred tokens, for a quick check")
    parser.add_argument("--question", default="What is this document about? Answer in one sentence.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def read_document(path: pathlib.Path | None) -> tuple[str, str]:
    """Name and text."""
    if path:
        return path.name, path.read_text(encoding="utf-8", errors="replace")
    licences = pathlib.Path("/usr/share/common-licenses")
    found = [licences / name for name in ("GPL-3", "LGPL-2.1", "GFDL-1.3") if (licences / name).exists()]
    if not found:
        raise FileNotFoundError("no text on this machine: name one with --document FILE")
    return ", ".join(p.name for p in found), "\n\n".join(p.read_text(encoding="utf-8") for p in found)


class Progress:
    """One line that rewrites itself on a terminal, a line every tenth elsewhere."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.start, self.shown = what, total, time.monotonic(), -1

    def show(self, done: int) -> None:
        rate = done / max(time.monotonic() - self.start, 1e-9)
        text = f"{self.what} {done:>5}/{self.total} tokens  {rate:6.1f} tokens/s"
        if sys.stdout.isatty():
            bar = "#" * (done * 30 // self.total)
            print(f"\r{text}  [{bar:<30}]", end="\n" if done == self.total else "", flush=True)
        elif done * 10 // self.total != self.shown:
            self.shown = done * 10 // self.total
            print(text, flush=True)


class ServiceCache:
    """The model's cache, kept by pivotkv: what smollm2.py asks of it."""

    def __init__(self, sequence, budget):
        self.sequence, self.budget = sequence, budget
        self.attended = self.seen = 0
        self.audits: dict[int, list] = {}
        self.audit_layers: tuple[int, ...] = ()

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self.sequence.append(layer, k, v)

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        out, _, explain = self.sequence.explain(layer, q, self.budget)
        self.attended += explain.tokens_attended
        self.seen += explain.tokens_seen
        if layer in self.audit_layers:
            import pivotkv
            for k in BUDGETS:
                wish = pivotkv.Budget(k=k, sinks=SINKS, recent=RECENT)
                self.audits.setdefault(k, []).append(self.sequence.audit(layer, q[-1:] if len(q) > 1 else q, wish))
        return out


def prefill(model, sequence, tokens: list[int], first: int, budget, what: str) -> tuple[np.ndarray, ServiceCache]:
    cache, progress, hidden = ServiceCache(sequence, budget), Progress(what, len(tokens)), []
    for at in range(0, len(tokens), CHUNK):
        piece = tokens[at: at + CHUNK]
        hidden.append(model.forward(piece, first + at, cache))
        progress.show(at + len(piece))
    return np.concatenate(hidden), cache


def generate(model, sequence, prompt: list[int], steps: int, budget) -> tuple[ServiceCache, float]:
    """Streams up to `steps` tokens; the prompt goes first. Returns the cache and tokens per second of decoding."""
    cache, position, made, shown = ServiceCache(sequence, budget), len(sequence), [], ""
    hidden = model.forward(prompt, position, cache)
    position += len(prompt)
    cache.audit_layers = tuple(range(2, model.layers, max(1, model.layers // 4)))
    start = time.monotonic()
    for step in range(steps):
        scores = model.logits(hidden[-1:])[0]
        for token in made[-64:]:  # a small model repeats itself under greedy decoding: divide what it said lately
            scores[token] = scores[token] / 1.1 if scores[token] > 0 else scores[token] * 1.1
        token = int(scores.argmax())
        if token == model.stop_token:
            break
        made.append(token)
        text = model.decode(made)
        print(text[len(shown):] if text.startswith(shown) else "", end="", flush=True)
        shown = text
        if step % 8:
            layers, cache.audit_layers = cache.audit_layers, ()
        hidden = model.forward([token], position, cache)
        if step % 8:
            cache.audit_layers = layers
        position += 1
    print(flush=True)
    return cache, len(made) / max(time.monotonic() - start, 1e-9)


def perplexity(model, base, tokens: list[int], count: int, budget, name: str) -> tuple[float, ServiceCache]:
    """Of the last `count` tokens, on a fork of the sequence cut before them."""
    first = len(tokens) - count
    with base.fork(first) as fork:
        hidden, cache = prefill(model, fork, tokens[first:], first, budget, f"perplexity, {name:>14}")
    nll = model.negative_log_likelihood(hidden[:-1], tokens[first + 1:])
    return float(np.exp(nll.mean())), cache


def report(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print("\n" + "-" * (width + 40))
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print("-" * (width + 40))


def run(options: argparse.Namespace, daemon, model) -> None:
    import pivotkv
    name, text = read_document(options.document)
    count = 1200 if options.short else min(options.tokens, model.context - 400)
    measured = 200 if options.short else 1000
    tokens = model.encode(text[: count * 12])[:count]
    if len(tokens) < measured + 300:
        raise ValueError(f"{name} has only {len(tokens)} tokens: choose a longer document")
    dense = pivotkv.Budget(dense=True)
    sparse = pivotkv.Budget(k=256, sinks=SINKS, recent=RECENT)
    with pivotkv.connect(daemon.socket, threads=options.threads, label="demo") as kv:
        served = kv.model("smollm2-135m-instruct", layers=model.layers, q_heads=model.q_heads, kv_heads=model.kv_heads,
                          head_dim=model.head_dim, dtype="f16", bits=model.head_dim,
                          rope=pivotkv.Rope(model.rope_base, interleaved=True))
        sequence = served.sequence(max_tokens=len(tokens) + 400, label=name[:20])
        print(f"document: {name}, {len(tokens)} tokens")
        start = time.monotonic()
        prefill(model, sequence, tokens, 0, dense, "reading")
        served.settle()  # calibrated on what was read, so that the numbers below are the same at every run
        reading = len(tokens) / (time.monotonic() - start)
        rows = table_of_bytes(model, tokens, options)
        for k in (None, *BUDGETS):
            budget = dense if k is None else pivotkv.Budget(k=k, sinks=SINKS, recent=RECENT)
            label = "full attention" if k is None else f"k = {k}"
            value, cache = perplexity(model, sequence, tokens, measured, budget, label)
            share = "" if k is None else f"   ({cache.attended / cache.seen:.0%} of the tokens attended)"
            rows.append((f"perplexity of the last {measured}, {label}", f"{value:.3f}{share}"))
        rows += answer(model, sequence, tokens, options, sparse)
        rows.insert(3, ("reading", f"{reading:.1f} tokens/s"))
        report(rows)


def table_of_bytes(model, tokens: list[int], options) -> list[tuple[str, str]]:
    per_token = model.layers * model.kv_heads
    signatures = len(tokens) * per_token * model.head_dim // 8
    full = len(tokens) * per_token * model.head_dim * 2 * 2
    return [("tokens cached", f"{len(tokens)} x {model.layers} layers"),
            ("signatures", f"{signatures / 2**20:.1f} MiB, always in the pool of {pool_bytes(options) / 2**20:.0f} MiB"),
            ("K/V", f"{full / 2**20:.1f} MiB, at home in the arena")]


def answer(model, sequence, tokens: list[int], options, budget) -> list[tuple[str, str]]:
    steps = 24 if options.short else 80
    prompt = model.encode(f"<|im_end|>\n<|im_start|>user\n{options.question}<|im_end|>\n<|im_start|>assistant\n")
    print(f"\n> {options.question}")
    cache, rate = generate(model, sequence, prompt, steps, budget)
    sequence.truncate(len(tokens))
    print("\n> (the document, continued)")
    more, _ = generate(model, sequence, tokens[-1:], steps // 2, budget)
    heads = model.layers * model.kv_heads
    steps_done = cache.seen / heads / (len(tokens) + len(prompt))
    rows = [("tokens attended, per step and layer",
             f"{cache.attended / heads / steps_done:.0f} of {cache.seen / heads / steps_done:.0f} under full attention"),
            ("decoding", f"{rate:.1f} tokens/s (audited steps included)")]
    for k in BUDGETS:
        audits = cache.audits.get(k, []) + more.audits.get(k, [])
        if audits:
            rows.append((f"audit, k = {k}", f"error of the output {np.mean([a.error for a in audits]):.3f}, softmax mass "
                         f"covered {np.mean([a.mass for a in audits]):.3f}, {len(audits)} samples"))
    return rows


def pool_bytes(options) -> int:
    return (16 if options.short else 48) << 20


def main() -> int:
    options = arguments()
    library = options.build_dir / "client" / "libpivotkv.so"
    os.environ.setdefault("PIVOTKV_LIBRARY", str(library.resolve()))
    sys.path[:0] = [str(HERE), str(HERE.parent / "python")]
    from daemon import PrivateDaemon
    from smollm2 import SmolLM2

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("loading SmolLM2-135M-Instruct", flush=True)
    model = SmolLM2()
    with PrivateDaemon(options.build_dir / "cachesvc" / "pivotkvd", pool_bytes=pool_bytes(options),
                       arena_bytes=1 << 30) as daemon:
        run(options, daemon, model)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
