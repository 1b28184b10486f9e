"""Training of one q head's pair of MLPs, HashAttention's (arXiv 2412.14468): of each query of a step the keys with the 32
largest q . k, sinks and recent left out, are the positives; the model's score is s = tanh(phi_q(q)) . tanh(phi_k(k)); Adam.

Two losses. `softmax`: -log of a positive's share of exp(s) among all keys that the query may see, in the mean over its
positives; it asks for the order of the keys alone, which is what a selection uses. `bce`, the paper's: sigmoid(s) as the
probability of being positive, cross-entropy with positives weighted 20; it asks for one threshold that fits every query.

A step's queries are drawn from the whole of a text. The paper's follow each other: they then ask for much the same keys, and
the same number of steps ends far worse (docs/performance.md).

`linear` is the same with one linear map a side and without biases; the heads of a group share the keys' map.

Other departures from the paper, each an option: the negatives' part of the loss estimated on a sample of them, which costs a
fraction; Adam's rate falling to zero along a cosine; inputs centred and scaled by the training keys' and queries' mean and
deviation, folded into the first layer afterwards (the paper's code can do it too; here it was worse: small channels become
loud). A learnt scale and bias of the logit changed nothing and are not here.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

import numpy as np

from .mlp import MLP, Adam, sigmoid


_BLOCK = 512  # queries whose scores are held at once


@dataclass(frozen=True)
class Options:
    bits: int = 32  # of a q head (hash) or of a group (linear)
    hidden: tuple[int, ...] = (128, 128)  # () for linear
    steps: int = 600
    chunk: int = 128  # queries of a step
    labels: int = 32  # positives a query
    loss: str = "softmax"  # or "bce"
    positive_weight: float = 20.0  # of bce
    consecutive: bool = False  # a step's queries
    rate: float = 3e-3
    cosine: bool = True
    negatives: int = 512  # keys sampled a step, beside all positives; 0: all keys
    centre: bool = False
    sinks: int = 128
    recent: int = 128
    seed: int = 1


@dataclass
class Unit:
    """What is trained together: a q head's two MLPs (hash), or a group's maps (linear: one of keys, one for each q head)."""

    k: MLP
    q: list[MLP]
    losses: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # [steps]


@dataclass(frozen=True)
class Text:
    """A recording's vectors of one kv head."""

    q: np.ndarray  # [heads, tokens, head_dim]; one head for hash, the group for linear
    k: np.ndarray  # [tokens, head_dim]
    best: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # [heads, tokens, labels], of the first none


@dataclass
class _Batch:
    head: int
    queries: np.ndarray  # [chunk, head_dim]
    keys: np.ndarray  # [keys, head_dim]
    labels: np.ndarray  # [chunk, keys] of 0 and 1
    weights: np.ndarray  # [chunk, keys]: how many keys each stands for, times the loss's; 0 where a query may not see it


def _first(options: Options) -> int:
    """The first query that has enough keys to choose from."""
    return options.sinks + options.recent + 2 * options.labels


def least_tokens(options: Options) -> int:
    """What a text needs: a step's queries."""
    return _first(options) + options.chunk


def labelled(text: Text, options: Options) -> Text:
    """With the tokens of each query's positives."""
    tokens = len(text.k)
    best = np.zeros((len(text.q), tokens, options.labels), np.int32)
    for head, queries in enumerate(text.q):
        for at in range(_first(options), tokens, _BLOCK):
            to = min(at + _BLOCK, tokens)
            scores = queries[at:to] @ text.k[options.sinks: to - options.recent].T
            late = scores[:, at - options.recent - options.sinks:]
            late[np.arange(late.shape[1]) > np.arange(to - at)[:, None]] = -np.inf
            best[head, at:to] = np.argpartition(scores, -options.labels, axis=1)[:, -options.labels:] + options.sinks
    return Text(text.q, text.k, best)


def _draw(texts: list[Text], options: Options, random: np.random.Generator) -> _Batch:
    """Of labelled texts."""
    sizes = np.array([len(t.k) - least_tokens(options) + 1 for t in texts])
    at = int(random.integers(sizes.sum()))
    which = int(np.searchsorted(np.cumsum(sizes), at, side="right"))
    text, first = texts[which], _first(options)
    head = int(random.integers(len(text.q)))
    if options.consecutive:
        positions = first + at - int(sizes[:which].sum()) + np.arange(options.chunk)
    else:
        positions = first + np.sort(random.choice(len(text.k) - first, options.chunk, replace=False))
    best = text.best[head, positions]
    sees = positions[:, None] + 1 - options.recent  # tokens before it
    kept, shares = _sample(best - options.sinks, int(sees[-1, 0]) - options.sinks, options, random)
    kept += options.sinks
    labels = np.zeros((options.chunk, len(kept)), bool)
    np.put_along_axis(labels, np.searchsorted(kept, best), True, axis=1)
    weights = np.where(labels, np.float32(options.positive_weight if options.loss == "bce" else 1), shares)
    weights[kept >= sees] = 0
    return _Batch(head, text.q[head, positions], text.k[kept], labels, weights)


def _sample(best: np.ndarray, count: int, options: Options, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Of `count` keys, ascending, those that are positive for some query and a sample of the others; how many keys each
    stands for."""
    positive = np.zeros(count, bool)
    positive[best.ravel()] = True
    others = np.flatnonzero(~positive)
    if not options.negatives or len(others) <= options.negatives:
        return np.arange(count), np.ones(count, np.float32)
    shares = np.where(positive, np.float32(1), np.float32(len(others) / options.negatives))
    positive[random.choice(others, options.negatives, replace=False)] = True
    kept = np.flatnonzero(positive)
    return kept, shares[kept]


def _bce(s: np.ndarray, batch: _Batch) -> tuple[float, np.ndarray]:
    """Mean over pairs, by weight, and its gradient."""
    total = np.float32(1 / batch.weights.sum())
    # -log p and -log(1 - p), both finite for any s
    soft = np.maximum(s, 0) + np.log1p(np.exp(-np.abs(s)))
    loss = float(np.vdot(batch.weights, soft - np.where(batch.labels, s, 0))) * float(total)
    return loss, (sigmoid(s) - batch.labels) * batch.weights * total


def _softmax(s: np.ndarray, batch: _Batch) -> tuple[float, np.ndarray]:
    """Mean over positives, and its gradient."""
    part = np.float32(1 / np.count_nonzero(batch.labels))
    peak = np.where(batch.weights > 0, s, -np.inf).max(axis=1, keepdims=True)
    # A key that is not seen may be above the peak: its exponential is bounded, its weight is 0.
    shares = np.exp(np.minimum(s - peak, 0))
    shares *= batch.weights
    whole = shares.sum(axis=1, keepdims=True)
    loss = float((np.log(whole) + peak).mean()) - float(s[batch.labels].sum() * part)
    return loss, shares / (whole * np.float32(len(s))) - batch.labels * part


LOSSES = {"softmax": _softmax, "bce": _bce}


def _step(unit: Unit, batch: _Batch, options: Options) -> tuple[float, list[np.ndarray], list[np.ndarray]]:
    """Loss, and gradients of the keys' MLP and of the query head's."""
    z_q, kept_q = unit.q[batch.head].forward_kept(batch.queries)
    z_k, kept_k = unit.k.forward_kept(batch.keys)
    t_q, t_k = np.tanh(z_q), np.tanh(z_k)
    loss, g = LOSSES[options.loss](t_q @ t_k.T, batch)
    d_q = (g @ t_k) * (1 - t_q * t_q)
    d_k = (g.T @ t_q) * (1 - t_k * t_k)
    return loss, unit.k.backward(kept_k, d_k), unit.q[batch.head].backward(kept_q, d_q)


@dataclass(frozen=True)
class _Scales:
    """How inputs are made alike: keys centred and scaled, queries scaled only - their mean carries meaning."""

    mean: np.ndarray  # [head_dim], of keys
    k: np.ndarray  # [head_dim]
    q: list[np.ndarray]  # a head: [head_dim]

    @staticmethod
    def of(texts: list[Text], options: Options) -> _Scales:
        keys = np.concatenate([t.k[options.sinks:] for t in texts])
        heads = [np.concatenate([t.q[h] for t in texts]) for h in range(len(texts[0].q))]
        if not options.centre:
            ones = np.ones(keys.shape[1], np.float32)
            return _Scales(0 * ones, ones, [ones] * len(heads))
        return _Scales(keys.mean(axis=0), keys.std(axis=0) + np.float32(1e-3),
                       [np.sqrt(np.mean(q * q, axis=0)) + np.float32(1e-3) for q in heads])

    def apply(self, batch: _Batch) -> None:
        batch.keys = (batch.keys - self.mean) / self.k
        batch.queries = batch.queries / self.q[batch.head]

    def folded(self, unit: Unit) -> Unit:
        zero = np.zeros_like(self.mean)
        return Unit(unit.k.scaled_input(self.mean, self.k), [m.scaled_input(zero, s) for m, s in zip(unit.q, self.q)],
                    unit.losses)


def train(texts: list[Text], options: Options, key: tuple[int, ...],
          progress: Callable[[int], None] = lambda steps: None) -> Unit:
    """What a unit becomes depends on seed, key, options and texts alone. `progress` hears how many steps are done."""
    dim, heads = texts[0].k.shape[1], len(texts[0].q)
    random = np.random.default_rng([options.seed, *key])
    widths, linear = [dim, *options.hidden, options.bits], not options.hidden
    unit = Unit(MLP.fresh(widths, random), [MLP.fresh(widths, random) for _ in range(heads)],
                np.zeros(options.steps, np.float32))
    for mlp in unit.q if linear else []:
        mlp.biases[0][:] = 0  # and stays so: a file of `linear` has none for queries
    scales, adams = _Scales.of(texts, options), [Adam() for _ in range(heads + 1)]
    texts = [labelled(text, options) for text in texts]
    for step in range(options.steps):
        batch = _draw(texts, options, random)
        scales.apply(batch)
        fade = 0.5 + 0.5 * np.cos(np.pi * step / options.steps) if options.cosine else 1.0
        unit.losses[step], d_k, d_q = _step(unit, batch, options)
        for mlp, gradients, adam in ((unit.k, d_k, adams[0]), (unit.q[batch.head], d_q, adams[1 + batch.head])):
            count = 1 if linear and mlp is not unit.k else len(gradients)
            adam.step(mlp.parameters()[:count], gradients[:count], options.rate * fade)
        progress(step + 1)
    return scales.folded(unit)
