"""Training of one q head's pair of MLPs as HashAttention does it (arXiv 2412.14468): for a chunk of queries, the keys with the
32 largest q . k, sinks and recent left out, are the positives; the model's answer is sigmoid(tanh(phi_q(q)) . tanh(phi_k(k))),
its loss binary cross-entropy with positives weighted 20, its optimiser Adam.

`linear` is the same with one linear map a side and without biases; the heads of a group share the keys' map.

Departures, each an option: the loss of the negatives estimated on a sample of them, which has the same expectation and costs a
fraction; Adam's rate falling to zero along a cosine; inputs centred and scaled by the training keys' and queries' mean and
deviation, folded into the first layer afterwards (the paper's code can do it too; here it was worse: small channels become
loud). A learnt scale and bias of the logit changed nothing and are not here.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

import numpy as np

from .mlp import MLP, Adam, sigmoid


@dataclass(frozen=True)
class Options:
    bits: int = 32  # of a q head (hash) or of a group (linear)
    hidden: tuple[int, ...] = (128, 128)  # () for linear
    steps: int = 600
    chunk: int = 128  # queries of a step
    labels: int = 32  # positives a query
    positive_weight: float = 20.0
    rate: float = 1e-3
    cosine: bool = True
    negatives: int = 1024  # keys sampled a step, beside all positives; 0: all keys
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


@dataclass
class _Batch:
    head: int
    queries: np.ndarray  # [chunk, head_dim]
    keys: np.ndarray  # [keys, head_dim]
    labels: np.ndarray  # [chunk, keys] of 0 and 1
    weights: np.ndarray  # [chunk, keys]; 0 where a query may not see a key


def least_tokens(options: Options) -> int:
    """What a text needs: a chunk of queries that have enough keys to choose from."""
    return options.sinks + options.recent + 2 * options.labels + options.chunk


def _draw(texts: list[Text], options: Options, random: np.random.Generator) -> _Batch:
    sizes = np.array([len(t.k) - least_tokens(options) + 1 for t in texts])
    at = int(random.integers(sizes.sum()))
    which = int(np.searchsorted(np.cumsum(sizes), at, side="right"))
    text = texts[which]
    first = least_tokens(options) - options.chunk + at - int(sizes[:which].sum())
    head = int(random.integers(len(text.q)))
    queries = text.q[head, first: first + options.chunk]
    # Query i may see keys of tokens below first + i + 1 - recent.
    sees = first + 1 - options.recent + np.arange(options.chunk)[:, None]
    tokens = np.arange(options.sinks, first + options.chunk - options.recent)
    scores = queries @ text.k[tokens[0]: tokens[-1] + 1].T
    late = slice(max(0, len(tokens) - options.chunk), None)
    scores[:, late][tokens[late] >= sees] = -np.inf
    best = np.argpartition(scores, -options.labels, axis=1)[:, -options.labels:]
    kept, shares = _sample(best, len(tokens), options, random)
    labels = np.zeros((options.chunk, len(kept)), bool)
    np.put_along_axis(labels, np.searchsorted(kept, best), True, axis=1)
    weights = np.where(labels, np.float32(options.positive_weight), shares)
    weights[tokens[kept] >= sees] = 0
    return _Batch(head, queries, text.k[tokens[kept]], labels, weights)


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


def _step(unit: Unit, batch: _Batch) -> tuple[float, list[np.ndarray], list[np.ndarray]]:
    """Loss, and gradients of the keys' MLP and of the query head's."""
    z_q, kept_q = unit.q[batch.head].forward_kept(batch.queries)
    z_k, kept_k = unit.k.forward_kept(batch.keys)
    t_q, t_k = np.tanh(z_q), np.tanh(z_k)
    s = t_q @ t_k.T
    p = sigmoid(s)
    total = np.float32(1 / batch.weights.sum())
    # -log p and -log(1 - p), both finite for any s
    soft = np.maximum(s, 0) + np.log1p(np.exp(-np.abs(s)))
    loss = float(np.vdot(batch.weights, soft - np.where(batch.labels, s, 0))) * float(total)
    g = (p - batch.labels) * batch.weights * total
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
    for step in range(options.steps):
        batch = _draw(texts, options, random)
        scales.apply(batch)
        fade = 0.5 + 0.5 * np.cos(np.pi * step / options.steps) if options.cosine else 1.0
        unit.losses[step], d_k, d_q = _step(unit, batch)
        for mlp, gradients, adam in ((unit.k, d_k, adams[0]), (unit.q[batch.head], d_q, adams[1 + batch.head])):
            count = 1 if linear and mlp is not unit.k else len(gradients)
            adam.step(mlp.parameters()[:count], gradients[:count], options.rate * fade)
        progress(step + 1)
    return scales.folded(unit)
