"""pivotkv-calibrate: a file for `code` or `sign` from recorded q and k, or from a model that reads a text."""
from __future__ import annotations

import argparse
import contextlib
import pathlib
import tempfile
from dataclasses import replace

from . import Rope, command
from .calibrate import SHRINK, SHRINK_FEW, Calibrator
from .recording import Reader, Recording, load_all, reader, save, service_cache

NAME = "pivotkv-calibrate"
ABOUT = """Calibrates signatures: a file with which the service signs with `code` (or `sign`) from a model's first token on.

Input: recordings (.safetensors or .npz with q.<layer> and k.<layer>, post-RoPE, [tokens, heads, head_dim]), or a model in
Python that reads texts, as
    pivotkv-calibrate --model client/examples/smollm2.py:SmolLM2 --text book.txt --out code.safetensors
--save-recording keeps what the model computed, for pivotkv-train and pivotkv-evaluate; with --socket a running daemon does
its attention, many times faster than numpy."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = command.parser(NAME, ABOUT)
    p.add_argument("recordings", nargs="*", metavar="RECORDING")
    p.add_argument("--out", type=pathlib.Path, help="the scheme file to write")
    p.add_argument("--scheme", choices=("code", "sign"), default="code")
    p.add_argument("--bits", type=command.positive, help="a token and kv head (one a head dimension)")
    p.add_argument("--shrink", type=float, help=f"of the queries' moment, 0 to 1 ({SHRINK}; {SHRINK_FEW} below half a bit "
                   "a head dimension)")
    p.add_argument("--context", type=command.positive, help="longest sequence to be served (131072)", default=131072)
    p.add_argument("--limit", type=command.positive, help="tokens that are looked at (all)")
    p.add_argument("--rope-base", type=float, help="instead of the recordings'; 0: keys carry no positions")
    p.add_argument("--rope-dims", type=int, default=0, help="with --rope-base: 0 is head_dim")
    p.add_argument("--rope-interleaved", action="store_true", help="with --rope-base: pairs of neighbours, not of halves")
    p.add_argument("--model", metavar="FILE.py:CLASS", help="reads --text; runs that file: name only code that you trust")
    p.add_argument("--weights", type=pathlib.Path, metavar="FILE", help="of --model, where its class wants to be told")
    p.add_argument("--text", type=pathlib.Path, action="append", default=[], help="for --model; may be given again")
    p.add_argument("--tokens", type=command.positive, default=8000, help="of each text (%(default)s)")
    p.add_argument("--skip", type=int, default=0, help="tokens of each text that are left out first")
    p.add_argument("--layers", metavar="N,N", type=lambda text: [int(x) for x in text.split(",")], help="of --model (all)")
    p.add_argument("--values", action="store_true", help="record v too: pivotkv-evaluate needs it")
    p.add_argument("--save-recording", type=pathlib.Path, metavar="FILE", help="with one --text")
    p.add_argument("--socket", help="of a running daemon")
    p.add_argument("--format", choices=("table", "json"), default="table")
    o = p.parse_args(argv)
    if not o.recordings and not o.model:
        p.error("a RECORDING or --model with --text is needed")
    if bool(o.model) != bool(o.text):
        p.error("--model and --text go together")
    if o.save_recording and len(o.text) != 1:
        p.error("--save-recording keeps one text")
    if not o.out and not o.save_recording:
        p.error("nothing to do: name --out or --save-recording")
    if o.shrink is not None and not 0 <= o.shrink <= 1:
        p.error("--shrink is between 0 and 1")
    return o


def read_text(o: argparse.Namespace, with_model: Reader, path: pathlib.Path, folder: str) -> str:
    """The file of the recording."""
    # Twelve characters a token are more than enough, and encoding a library takes minutes.
    text = path.read_text(encoding="utf-8", errors="replace")[: 12 * (o.skip + o.tokens)]
    tokens = with_model.model.encode(text)[o.skip: o.skip + o.tokens]
    if not tokens:
        raise ValueError(f"{path} has no token after the first {o.skip}")
    tokens = (getattr(with_model.model, "begin", []) + tokens)[: o.tokens]
    bar = command.Progress(f"reading {path.name}", len(tokens), " tokens")
    with service_cache(with_model, len(tokens), o.socket) if o.socket else contextlib.nullcontext() as cache:
        recorder = with_model.read(tokens, layers=o.layers, values=o.values, cache=cache, progress=bar)
    target = o.save_recording or pathlib.Path(folder) / f"{len(list(pathlib.Path(folder).iterdir()))}.safetensors"
    save(target, recorder, with_model.about(path.name))
    return str(target)


def calibrate(o: argparse.Namespace, recordings: list[Recording]) -> dict:
    first = recordings[0]
    rope = first.about.rope if o.rope_base is None else Rope(o.rope_base, o.rope_dims, o.rope_interleaved)
    made = Calibrator(first.geometry, rope, o.context, limit=o.limit)
    bits = o.bits or -(-first.geometry.head_dim // 32) * 32
    bar = command.Progress("moments", len(recordings) * len(first.layers), " layers")
    for n, recording in enumerate(recordings):
        for i, layer in enumerate(recording.layers):
            made.feed(i, 0, q=recording.q(layer), k=recording.k(layer))
            bar(n * len(first.layers) + i + 1)
    about = replace(first.about, text="; ".join(sorted({r.about.text for r in recordings})), rope=rope)
    made.write(o.out, bits, scheme=o.scheme, shrink=o.shrink, about=about)
    return {"file": str(o.out), "scheme": o.scheme, "bits": bits, "layers": first.geometry.layers,
            "kv_heads": first.geometry.kv_heads, "head_dim": first.geometry.head_dim, "tokens": made.tokens()}


def body(argv: list[str] | None) -> int:
    o = arguments(argv)
    with tempfile.TemporaryDirectory(prefix="pivotkv-") as folder:
        paths = list(o.recordings)
        if o.model:
            with_model = reader(o.model, o.weights)
            paths += [read_text(o, with_model, path, folder) for path in o.text]
        if o.out:
            print(command.table([calibrate(o, load_all(paths))], o.format))
    return 0


def main(argv: list[str] | None = None) -> None:
    command.run(NAME, lambda: body(argv))


if __name__ == "__main__":
    main()
