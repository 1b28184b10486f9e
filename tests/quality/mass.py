"""Probability mass that a selection covers, and the relative error of the attention output, over positions, layers, heads."""
from __future__ import annotations

import numpy as np

from reading import Reading
from selection import RECENT, SINKS
from signature import Signature
from subject import Subject, fill, in_numpy

LEARN = 4096  # tokens that also attend, so that a scheme can calibrate itself
EARLY = 1024  # which it does at first after so many


def positions(subject: Subject, tokens: int) -> list[int]:
    """Every so many of the second half."""
    every, first = subject.traits.mass_every, max(tokens // 2, EARLY)
    return list(range(first // every * every + every - 1, tokens, every))


def budgets(subject: Subject, tokens: int) -> list[int]:
    """Those that leave tokens out."""
    return [k for k in subject.traits.budgets if k + SINKS + RECENT < max(tokens // 2, EARLY)]


def through_service(kv, subject: Subject, kept: Reading, signature: Signature, name: str) -> dict[int, tuple[float, float]]:
    """{k: (mass, error)} by the daemon's audit."""
    layers = subject.traits.mass_layers or tuple(range(subject.layers))
    wishes = {k: signature.budget(k) for k in budgets(subject, len(kept.tokens))}
    found: dict[int, list] = {k: [] for k in wishes}
    model = subject.open_model(kv, signature, layers, f"mass-{name}")
    learn, first = min(LEARN, len(kept.tokens)), positions(subject, len(kept.tokens))[0] + 1
    with model.sequence(subject.model.context) as sequence:
        for i, layer in enumerate(layers):
            fill(sequence, kept, layer, i, 0, learn, LEARN)
        model.settle()
        sequence.truncate(min(learn, first))
        for i, layer in enumerate(layers):
            at = min(learn, first)
            for position in positions(subject, len(kept.tokens)):
                fill(sequence, kept, layer, i, at, position + 1, LEARN)
                at = position + 1
                for k, wish in wishes.items():
                    audit = sequence.audit(i, kept.q[layer, position: position + 1], wish)
                    found[k].append((audit.mass, audit.error))
    return {k: tuple(float(x) for x in np.mean(values, axis=0)) for k, values in found.items()}


def by_numpy(subject: Subject, kept: Reading, signature: Signature) -> dict[int, tuple[float, float]]:
    """The same for a selection in numpy."""
    exact = subject.exact_cache(kept, 0)
    return {k: _one_budget(subject, kept, in_numpy(signature, exact, k)) for k in budgets(subject, len(kept.tokens))}


def _one_budget(subject: Subject, kept: Reading, cache) -> tuple[float, float]:
    found, group = [], subject.model.q_heads // subject.model.kv_heads
    for layer in subject.traits.mass_layers or range(subject.layers):
        for position in positions(subject, len(kept.tokens)):
            for head in range(subject.model.kv_heads):
                q = kept.q[layer, position, head * group: (head + 1) * group, None].astype(np.float32)
                k, v = (x[layer, : position + 1, head] for x in (cache.exact.k, cache.exact.v))
                scores = q @ k.T * np.float32(q.shape[-1] ** -0.5)
                weights, rows = cache.choose(scores[:, 0], cache.estimate.estimates(layer, head, scores, q)[:, 0])
                p = np.exp(scores[:, 0] - scores[:, 0].max(axis=1, keepdims=True))
                p /= p.sum(axis=1, keepdims=True)
                true = p @ v
                error = np.linalg.norm(weights @ v[rows] - true, axis=1) / np.linalg.norm(true, axis=1)
                found.append((p[:, rows].sum(axis=1).mean(), error.mean()))
    return tuple(float(x) for x in np.mean(found, axis=0))
