"""Selections in numpy to judge the daemon's against: the best possible one by exact scores, Quest's pages, and any other
estimate of the scores. All attend exactly to sinks, recent tokens and what they chose, one selection per KV head."""
from __future__ import annotations

import numpy as np

SINKS = RECENT = 128


def group_scores(exact: np.ndarray, estimate: np.ndarray, sinks: int, recent: int) -> np.ndarray:
    """The softmax rule (docs/signatures.md) for one query: exact, estimate [group, visible] -> [visible - sinks - recent]."""
    last = exact.shape[1] - recent
    fixed = np.concatenate([exact[:, :sinks], exact[:, last:]], axis=1)
    peak = fixed.max(axis=1, keepdims=True)
    reference = peak + np.log(np.exp(fixed - peak).sum(axis=1, keepdims=True))
    shift = (exact[:, last:] - estimate[:, last:]).mean(axis=1, keepdims=True)
    return np.exp(np.clip(estimate[:, sinks:last] + shift - reference, -60, 60)).sum(axis=0)


class Oracle:
    """The best possible: exact scores, summed probabilities of the group."""

    def estimates(self, layer: int, head: int, exact: np.ndarray, q: np.ndarray) -> np.ndarray:
        """Scores of q [group, queries, head_dim] for all cached tokens; exact [group, queries, tokens] are the true ones."""
        return exact


class Quest:
    """Quest (arXiv 2406.10774): upper bounds by each page's channel minima and maxima, these as 4-bit numbers."""

    def __init__(self, k: np.ndarray, page: int = 8):
        """k [layers, tokens, kv_heads, head_dim]; tokens past the last whole page are left to `recent`."""
        self.page, pages = page, k.shape[1] // page
        paged = k[:, : pages * page].reshape(k.shape[0], pages, page, *k.shape[2:]).astype(np.float32)
        low, high = paged.min(axis=2), paged.max(axis=2)
        self.bottom = low.min(axis=1, keepdims=True)
        self.step = np.maximum((high.max(axis=1, keepdims=True) - self.bottom) / 15, 1e-9)
        self.low, self.high = (np.rint((x - self.bottom) / self.step).astype(np.uint8) for x in (low, high))

    def estimates(self, layer: int, head: int, exact: np.ndarray, q: np.ndarray) -> np.ndarray:
        def real(levels: np.ndarray) -> np.ndarray:
            return levels[layer, :, head] * self.step[layer, :, head] + self.bottom[layer, :, head]

        scale = np.float32(q.shape[-1] ** -0.5)
        bound = (np.maximum(q, 0) @ real(self.high).T + np.minimum(q, 0) @ real(self.low).T) * scale
        out = exact.copy()
        tokens = np.repeat(bound, self.page, axis=-1)
        out[..., : tokens.shape[-1]] = tokens
        return out


class SelectingCache:
    """A model's cache (append, attend, truncate) that attends to what an estimate of the scores selects."""

    def __init__(self, exact, k: int, estimate, rule: str = "softmax"):
        """exact: a cache of all keys and values (gemma3.GlobalCache); it is shared, not owned."""
        self.exact, self.budget, self.estimate, self.rule = exact, k, estimate, rule

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self.exact.append(layer, k, v)

    def truncate(self, tokens: int) -> None:
        self.exact.truncate(tokens)

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        total, kv_heads = self.exact.length[layer], self.exact.k.shape[2]
        group, out = q.shape[1] // kv_heads, np.empty(q.shape, np.float32)
        for h in range(kv_heads):
            queries = np.ascontiguousarray(q[:, h * group: (h + 1) * group].transpose(1, 0, 2))
            keys, values = self.exact.k[layer, :total, h], self.exact.v[layer, :total, h]
            exact = queries @ keys.T * np.float32(q.shape[-1] ** -0.5)
            estimate = self.estimate.estimates(layer, h, exact, queries)
            for i in range(len(q)):
                seen = total - len(q) + i + 1
                weights, rows = self.choose(exact[:, i, :seen], estimate[:, i, :seen])
                out[i, h * group: (h + 1) * group] = weights @ values[rows]
        return out

    def choose(self, exact: np.ndarray, estimate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Softmax weights [group, rows] of one query over the rows it attends to, and those rows."""
        seen = exact.shape[1]
        rows = np.arange(seen)
        if seen > SINKS + RECENT + self.budget:
            if self.rule == "max":
                score = estimate[:, SINKS: seen - RECENT].max(axis=0)
            else:
                score = group_scores(exact, estimate, SINKS, RECENT)
            best = np.argpartition(-score, self.budget)[: self.budget] + SINKS
            rows = np.concatenate([rows[:SINKS], np.sort(best), rows[seen - RECENT:]])
        chosen = exact[:, rows]
        weights = np.exp(chosen - chosen.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True), rows
