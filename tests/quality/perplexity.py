"""Perplexity of the end of a text with the selection in every layer that selects, against full attention."""
from __future__ import annotations

import numpy as np

from mass import LEARN
from reading import CHUNK, Reading
from signature import Signature
from subject import ServiceCache, Subject, fill

BUDGETS = (128, 256, 512)


def through_service(kv, subject: Subject, kept: Reading, signature: Signature, name: str, count: int) -> dict[str, float]:
    """Of the last `count` tokens: {"full": .., "128": .., ..}. SmolLM2 alone: all its layers select."""
    import pivotkv
    first, tokens = len(kept.tokens) - count, kept.tokens
    budgets = {"full": pivotkv.Budget(dense=True)}
    budgets.update((str(k), signature.budget(k)) for k in BUDGETS)
    result = {}
    model = subject.open_model(kv, signature, range(subject.layers), f"perplexity-{name}")
    with model.sequence(subject.model.context) as sequence:
        for layer in range(subject.layers):
            fill(sequence, kept, layer, layer, 0, first, LEARN)
        model.settle()
        for label, budget in budgets.items():
            cache, hidden = ServiceCache(sequence, budget), []
            for at in range(first, len(tokens), CHUNK):
                hidden.append(subject.model.forward(tokens[at: at + CHUNK], at, cache))
            nll = subject.model.negative_log_likelihood(np.concatenate(hidden)[:-1], tokens[first + 1:])
            result[label] = float(np.exp(nll.mean()))
            cache.truncate(first)
    return result
