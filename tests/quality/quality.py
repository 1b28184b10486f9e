#!/usr/bin/env python3
"""Selection quality of the signature schemes on real models, through the daemon: `make quality` runs it.

  mass        probability mass that the selection covers, and the relative error of the attention output
  perplexity  of the last 1000 tokens of a text, the selection in every layer (SmolLM2)
  needles     facts hidden in a long text and asked for at its end: the first judge
Models: smollm2, 8000 tokens, selection in all layers; gemma3, 32600 tokens, selection in its three global layers (240 MB to
download). Texts come out of Debian packages. What a model has read is kept in the cache folder; the first time takes
minutes a text.
Writes quality.md, quality.json and plots into --out; results of an earlier run there are kept unless measured again.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "examples"), str(ROOT / "client" / "python")]

import retrieval  # noqa: E402  the examples must be found first
from signature import Signature  # noqa: E402

WHATS = ("mass", "perplexity", "needles")
TUNING, HELD_OUT = ("manuals",), ("gospels", "git", "perl", "reference")
SEEDS = {name: i + 1 for i, name in enumerate(TUNING + HELD_OUT)}
DEFAULTS = {"smollm2": {"signatures": "code:32,code:64,code:128,sign:64,sign:128,oracle,quest", "texts": "bash"},
            "gemma3": {"signatures": "code:64,code:128,code:256,sign:256,oracle,quest", "texts": ",".join(HELD_OUT)}}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["mass"], help=f"of {', '.join(WHATS)}; default: mass")
    parser.add_argument("--model", choices=sorted(DEFAULTS), default="smollm2")
    parser.add_argument("--signatures", help="code:BITS, code:BITS/BITS/.. by layer, sign:BITS, hash:BITS:FILE, "
                        "linear:BITS:FILE, oracle, quest; commas")
    parser.add_argument("--texts", help=f"with commas, or files; shrinkage was chosen on {', '.join(TUNING)}, held out were "
                        f"{', '.join(HELD_OUT)}")
    parser.add_argument("--budgets", help="k of needles, with commas; default: 128,512,2048")
    parser.add_argument("--needles", type=int, default=56, help="of a text; default 56")
    parser.add_argument("--build-dir", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--cache", type=pathlib.Path, help="default: $XDG_CACHE_HOME/pivotkv-quality")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("quality"))
    options = parser.parse_args()
    for what in options.what:
        if what not in WHATS:
            parser.error(f"{what!r} is not one of {', '.join(WHATS)}")
    try:
        names = options.signatures or DEFAULTS[options.model]["signatures"]
        options.signatures = [Signature.parse(name) for name in names.split(",")]
        options.budgets = [int(k) for k in options.budgets.split(",")] if options.budgets else retrieval.BUDGETS
    except ValueError as error:
        parser.error(str(error))
    options.texts = options.texts or DEFAULTS[options.model]["texts"]
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    options.cache = options.cache or pathlib.Path(home) / "pivotkv-quality"
    return options


class Judge:
    """One run: a model, texts, signatures; results as report.py wants them."""

    def __init__(self, options: argparse.Namespace, subject, texts, kv):
        self.options, self.subject, self.texts, self.kv = options, subject, texts, kv
        self.signatures = options.signatures
        self.results: list[dict] = []

    def add(self, what: str, text: str, signature, values: dict, more: dict | None = None) -> None:
        head_dim = self.subject.model.head_dim
        self.results.append({"what": what, "model": self.subject.name, "text": text, "signature": signature.title(head_dim),
                             "bytes": signature.bytes(head_dim), "values": values, **(more or {})})
        print(f"{what}, {text}, {self.results[-1]['signature']}: {values}", file=sys.stderr, flush=True)

    def exam(self, name: str):
        return retrieval.Exam(self.subject, self.texts, name, self.options.needles, SEEDS.get(name, 0))

    def plain(self, name: str):
        """A text, read; a long one with its needles, so that it is read once for all."""
        if self.subject.name == "gemma3":
            return self.exam(name).reading
        count = self.subject.traits.tokens - len(self.subject.begin)
        tokens = self.subject.model.encode(self.texts.read(name, count * 12))[:count]
        if len(tokens) < count:
            raise ValueError(f"{name} has only {len(tokens)} tokens of the {count} wanted")
        return self.subject.read(self.subject.begin + tokens, pathlib.Path(name).name)

    def mass(self, name: str) -> None:
        import mass
        from signature import IN_NUMPY
        kept = self.plain(name)
        for s in self.signatures:
            found = mass.by_numpy(self.subject, kept, s) if s.kind in IN_NUMPY else \
                mass.through_service(self.kv, self.subject, kept, s, name)
            self.add("mass", name, s, {str(k): v for k, v in found.items()})

    def perplexity(self, name: str) -> None:
        import perplexity
        from signature import IN_NUMPY
        kept = self.plain(name)
        for s in self.signatures:
            if s.kind not in IN_NUMPY:
                self.add("perplexity", name, s, perplexity.through_service(self.kv, self.subject, kept, s, name, 1000))

    def needles(self, name: str) -> None:
        exam = self.exam(name)
        full = exam.full()
        for s in self.signatures:
            right = {"full": full} | {str(k): r for k, r in exam.selected(self.kv, s, self.options.budgets).items()}
            self.add("needles", name, s, {k: retrieval.accuracy(r) for k, r in right.items()},
                     {"right": {k: "".join("01"[ok] for ok in r) for k, r in right.items()},
                      "forms": [n.form for n in exam.needles]})

    def run(self) -> None:
        names = self.options.texts.split(",")
        for what in self.options.what:
            if what == "perplexity" and self.subject.name != "smollm2":
                raise ValueError("perplexity is judged on smollm2, where the selection is in every layer")
            for name in names:
                getattr(self, what)(name)


def merged(old: pathlib.Path, new: list[dict]) -> list[dict]:
    """Earlier results that were not measured again, and the new ones."""
    def key(r: dict) -> tuple:
        return r["what"], r["model"], r["text"], r["signature"]

    measured = {key(r) for r in new}
    kept = json.loads(old.read_text()) if old.exists() else []
    return [r for r in kept if key(r) not in measured] + new


def run(options: argparse.Namespace) -> str:
    import pivotkv
    import report
    from daemon import PrivateDaemon
    from subject import Subject
    from texts import Texts
    start = time.monotonic()
    subject = Subject(options.model, options.cache)
    with PrivateDaemon(options.build_dir / "cachesvc" / "pivotkvd", pool_bytes=640 << 20, arena_bytes=2 << 30,
                       threads=options.threads) as daemon, \
            pivotkv.connect(daemon.socket, threads=options.threads, label="quality",
                            timeout_ms=60000) as kv:
        judge = Judge(options, subject, Texts(options.cache), kv)
        judge.run()
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return report.write(merged(options.out / "quality.json", judge.results), options.out)


def main() -> int:
    options = arguments()
    os.environ.setdefault("PIVOTKV_LIBRARY", str((options.build_dir / "client" / "libpivotkv.so").resolve()))
    try:
        print(run(options))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quality: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
