"""pivotkv-convert: the released weights of HashAttention as a scheme file."""
from __future__ import annotations

import argparse
import hashlib
import pathlib

from . import command, tensors
from .convert import convert

NAME = "pivotkv-convert"
ABOUT = """Converts weights of HashAttention (arXiv 2412.14468), .hat_weights.pkl or .pt, to a scheme file for `hash`.

Neither torch nor trust is needed: the pickle inside is read by a reader that builds tensors and refuses everything else."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = command.parser(NAME, ABOUT)
    p.add_argument("weights", type=pathlib.Path, help=".hat_weights.pkl or .pt")
    p.add_argument("--kv-heads", type=command.positive, required=True,
                   help="of the model; the weights know the q heads alone (Llama-3.1-8B: 8)")
    p.add_argument("--model", default="unnamed", help="name of the model, for the metadata")
    p.add_argument("--out", type=pathlib.Path, required=True, help="the scheme file to write")
    return p.parse_args(argv)


def body(argv: list[str] | None) -> int:
    o = arguments(argv)
    with open(o.weights, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    source = {"model": o.model, "source": o.weights.name, "source_sha256": digest.hexdigest()}
    arrays, meta = convert(o.weights, o.kv_heads, source)
    tensors.write(o.out, arrays, meta)
    print(f"{o.out}: hash, {meta['layers']} layers, {meta['q_heads']} q heads, {meta['kv_heads']} kv heads, head_dim "
          f"{meta['head_dim']}, {meta['bits']} bits a token and kv head")
    return 0


def main(argv: list[str] | None = None) -> None:
    command.run(NAME, lambda: body(argv))


if __name__ == "__main__":
    main()
