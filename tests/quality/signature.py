"""A signature to judge, as named on the command line: code:128, sign:64, hash:128:FILE, or a selection in numpy."""
from __future__ import annotations

import pathlib
from dataclasses import dataclass

from selection import RECENT, SINKS

IN_NUMPY = ("oracle", "quest")


@dataclass(frozen=True)
class Signature:
    kind: str  # of pivotkv's schemes, or one of IN_NUMPY
    bits: int = 0  # per token and KV head
    weights: pathlib.Path | None = None

    @staticmethod
    def parse(text: str) -> "Signature":
        kind, _, rest = text.partition(":")
        bits, _, weights = rest.partition(":")
        if kind in IN_NUMPY and not rest:
            return Signature(kind)
        if kind not in ("code", "sign", "hash", "linear") or not bits.isdigit():
            raise ValueError(f"{text!r} is no signature: code:BITS, sign:BITS, hash:BITS:FILE, linear:BITS:FILE, "
                             f"{' or '.join(IN_NUMPY)}")
        return Signature(kind, int(bits), pathlib.Path(weights) if weights else None)

    def budget(self, k: int):
        """What a query attends under it. The learned hash's scores are counts of equal bits, no estimates of probabilities: its
        heads' scores are summed, as HashAttention's pieces do over a group."""
        import pivotkv
        rule = pivotkv.Rule.SUM if self.kind == "hash" else pivotkv.Rule.SOFTMAX_SUM
        return pivotkv.Budget(k=k, sinks=SINKS, recent=RECENT, rule=rule)

    def bytes(self, head_dim: int) -> int | None:
        """Per token and KV head; Quest's pages of 8 keep two numbers of 4 bits a channel."""
        return None if self.kind == "oracle" else head_dim // 8 if self.kind == "quest" else self.bits // 8

    def title(self, head_dim: int) -> str:
        if self.kind == "oracle":
            return "exact scores (the best possible)"
        if self.kind == "quest":
            return "Quest, pages of 8, int4"
        name = {"hash": "learned hash"}.get(self.kind, self.kind)
        return f"{name}, {self.bits} bit" + (f" of another file" if self.kind == "code" and self.weights else "")
