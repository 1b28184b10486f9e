"""What a scheme file costs and covers, on recorded q, k, v: the softmax mass and the output error of attention over sinks,
recent tokens and the k selected ones, beside the exact attention - the service's own selection rule in numpy, as `pkv_audit`
reports it.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable

import numpy as np

from .recording import Recording
from .schemes import LOG2E, Scheme

# gpu/code.h
_CODE_BASE, _CODE_MAX = (127 - 50) * 32, 2047


def exp2(s: np.ndarray) -> np.ndarray:
    """2^s with a parabola for the mantissa, in float32: gpu_exp2."""
    s = np.clip(s.astype(np.float32), -60, 60)
    whole = np.floor(s)
    f = (s - whole).astype(np.float64)  # products below are exact there, so one rounding each, as with fmaf
    inner = (f * np.float64(np.float32(0.3435)) + np.float64(np.float32(0.6565))).astype(np.float32)
    mantissa = (f * inner.astype(np.float64) + 1).astype(np.float32)
    return np.ldexp(mantissa, whole.astype(np.int32))


def softmax_codes(scores: np.ndarray, units: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Integer scores [heads, tokens] of a group into 11-bit codes [tokens]: gpu_code_softmax."""
    total = np.zeros(scores.shape[1], np.float32)
    for h in range(len(scores)):
        logit = scores[h].astype(np.float64) * units[h] + biases[h]
        total += exp2(logit.astype(np.float32))
    codes = (total.view(np.int32) >> 18) - _CODE_BASE
    return np.clip(codes, 1, _CODE_MAX).astype(np.int32)


@dataclass(frozen=True)
class Wish:
    """Of one evaluation: what the daemon calls a budget."""

    k: int
    sinks: int = 128
    recent: int = 128
    rule: str = "softmax"  # or "sum", "max" of the integer scores; "age": the latest, as without signatures


def select(scores: np.ndarray, units: np.ndarray, exact: np.ndarray, wish: Wish) -> np.ndarray:
    """Tokens that one query attends, ascending. scores [heads, visible] of a group, exact [heads, visible] in log2 units."""
    visible = exact.shape[1]
    first = min(wish.sinks, visible)
    last = visible - min(wish.recent, visible - first)
    if wish.rule == "softmax":
        codes = softmax_codes(scores[:, first:last], units, _biases(scores, units, exact, first, last))
    elif wish.rule == "age":
        codes = np.arange(first, last)
    else:
        codes = scores[:, first:last].sum(axis=0) if wish.rule == "sum" else scores[:, first:last].max(axis=0)
    order = np.argsort(-codes, kind="stable")[: wish.k]  # ties to the lower index
    return np.r_[0:first, np.sort(order) + first, last:visible]


def _biases(scores: np.ndarray, units: np.ndarray, exact: np.ndarray, first: int, last: int) -> np.ndarray:
    """Of each head, log2: minus the log-sum-exp over sinks and recent, plus how far its estimates are off over the recent."""
    visible = exact.shape[1]
    near = np.r_[0:first, last:visible]
    fitted = slice(last, visible) if last < visible else slice(0, first)
    if not len(near):
        return np.zeros(len(exact), np.float32)
    peak = exact[:, near].max(axis=1)
    shift = (exact[:, fitted] - units[:, None] * scores[:, fitted]).mean(axis=1)
    return (shift - (peak + np.log2(np.exp2(exact[:, near] - peak[:, None]).sum(axis=1)))).astype(np.float32)


def choose(scheme: Scheme, layer: int, head: int, queries: np.ndarray, keys: np.ndarray, wish: Wish,
           scale: float | None = None) -> np.ndarray:
    """What one token's queries [q_heads, head_dim] attend of keys [visible, head_dim] of one kv head."""
    g = scheme.geometry
    scale = scale or g.head_dim ** -0.5
    group = range(head * g.group, (head + 1) * g.group)
    bits = scheme.sign(layer, head, keys).astype(np.float32)
    weighed = [scheme.weigh(layer, h, queries[h: h + 1], scale) for h in group]
    scores = np.concatenate([w.astype(np.float32) @ bits.T for w, _ in weighed])
    exact = queries[list(group)] @ keys.T * (np.float32(scale) * LOG2E)
    return select(scores, np.concatenate([u for _, u in weighed]), exact, wish)


def cost(exact: np.ndarray, values: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mass covered and relative error of the output of each head of a group. exact [heads, visible] log2, values
    [visible, dim]."""
    p = np.exp2(exact - exact.max(axis=1, keepdims=True))
    whole, part = p.sum(axis=1), p[:, chosen].sum(axis=1)
    out = p @ values / whole[:, None]
    sparse = p[:, chosen] @ values[chosen] / part[:, None]
    return part / whole, np.linalg.norm(sparse - out, axis=1) / np.maximum(np.linalg.norm(out, axis=1), 1e-30)


@dataclass(frozen=True)
class Point:
    """Means over layers, heads and positions."""

    k: int
    mass: float
    error: float
    samples: int


def positions_of(recording: Recording, every: int = 16, begin: int | None = None) -> range:
    """Every 16th position of the second half."""
    begin = recording.tokens // 2 if begin is None else begin
    return range(begin + every - 1, recording.tokens, every)


def run(recording: Recording, scheme: Scheme | None, budgets: Iterable[int], positions: Iterable[int], *, sinks: int = 128,
        recent: int = 128, scale: float | None = None, rule: str = "softmax",
        progress: Callable[[int], None] = lambda done: None) -> list[Point]:
    """`scheme` None: exact scores, the best that any signature can do under the same rule."""
    g, budgets, positions = recording.geometry, list(budgets), list(positions)
    scale = scale or g.head_dim ** -0.5
    found: dict[int, list] = {k: [] for k in budgets}
    for i, layer in enumerate(recording.layers):
        q, k, v = recording.q(layer), recording.k(layer), recording.v(layer)
        for head in range(g.kv_heads):
            group = range(head * g.group, (head + 1) * g.group)
            log2 = np.stack([q[positions, h] @ k[:, head].T for h in group]) * (np.float32(scale) * LOG2E)
            if scheme:
                bits = scheme.sign(i, head, k[:, head]).astype(np.float32)
                weighed = [scheme.weigh(i, h, q[positions, h], scale) for h in group]
                scores = np.stack([w.astype(np.float32) @ bits.T for w, _ in weighed])
                units = np.stack([u for _, u in weighed])
            else:
                scores, units = log2, np.ones(log2.shape[:2], np.float32)
            for n, position in enumerate(positions):
                see = slice(0, position + 1)
                for budget in budgets:
                    chosen = select(scores[:, n, see], units[:, n], log2[:, n, see], Wish(budget, sinks, recent, rule))
                    found[budget].append(cost(log2[:, n, see], v[see, head], chosen))
            progress(i * g.kv_heads + head + 1)
    points = []
    for budget, values in found.items():
        mass, error = (np.concatenate([value[j] for value in values]) for j in (0, 1))
        points.append(Point(budget, float(mass.mean()), float(error.mean()), len(mass)))
    return points
