"""A signature to judge, as named on the command line: code:128, sign:64, hash:128:FILE, code:32/64/0 with a size for each
layer (pivotkv-sizes; 0: the latest tokens), or a selection in numpy."""
from __future__ import annotations

import pathlib
from dataclasses import dataclass

from selection import RECENT, SINKS

IN_NUMPY = ("oracle", "quest")


@dataclass(frozen=True)
class Signature:
    kind: str  # of pivotkv's schemes, or one of IN_NUMPY
    bits: float = 0  # per token and KV head
    weights: pathlib.Path | None = None
    sizes: tuple[int, ...] = ()  # of the layers that select, where they differ; bits is their mean then

    @staticmethod
    def parse(text: str) -> "Signature":
        kind, _, rest = text.partition(":")
        bits, _, weights = rest.partition(":")
        if kind in IN_NUMPY and not rest:
            return Signature(kind)
        sizes = bits.split("/")
        if kind not in ("code", "sign", "hash", "linear") or not all(size.isdigit() for size in sizes) or \
                len(sizes) > 1 and (weights or kind not in ("code", "sign")):
            raise ValueError(f"{text!r} is no signature: code:BITS, sign:BITS, hash:BITS:FILE, linear:BITS:FILE, "
                             f"code:BITS/BITS/.. by layer, {' or '.join(IN_NUMPY)}")
        if len(sizes) > 1:
            return Signature(kind, sum(map(int, sizes)) / len(sizes), sizes=tuple(map(int, sizes)))
        return Signature(kind, int(bits), pathlib.Path(weights) if weights else None)

    def size(self, layer: int) -> int:
        return self.sizes[layer] if self.sizes else self.bits

    def budget(self, k: int):
        """What a query attends under it. The learned hash's scores are counts of equal bits, no estimates of probabilities: its
        heads' scores are summed, as HashAttention's pieces do over a group."""
        import pivotkv
        rule = pivotkv.Rule.SUM if self.kind == "hash" else pivotkv.Rule.SOFTMAX_SUM
        return pivotkv.Budget(k=k, sinks=SINKS, recent=RECENT, rule=rule)

    def bytes(self, head_dim: int) -> float | None:
        """Per token and KV head; Quest's pages of 8 keep two numbers of 4 bits a channel."""
        return None if self.kind == "oracle" else head_dim // 8 if self.kind == "quest" else \
            round(self.bits / 8, 2) if self.sizes else self.bits // 8

    def title(self, head_dim: int) -> str:
        if self.kind == "oracle":
            return "exact scores (the best possible)"
        if self.kind == "quest":
            return "Quest, pages of 8, int4"
        name = {"hash": "learned hash"}.get(self.kind, self.kind)
        if self.sizes:
            return f"{name}, {min(self.sizes)} to {max(self.sizes)} bit by layer, {self.bits:.1f} on average"
        return f"{name}, {self.bits} bit" + (f" of another file" if self.kind == "code" and self.weights else "")
