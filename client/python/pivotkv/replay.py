"""Decoding with transformers on a GPU without transformers' own time: a step of the whole model as one CUDA graph.

    logits = model(**inputs, past_key_values=cache).logits[:, -1]
    decode = pivotkv.replay.Decoder(model, cache)
    for _ in range(200):
        logits = decode(logits.argmax(-1))

The graph is captured at the first step and replayed while the sequences grow; where their signatures come to be made in another
way, or the cache was used otherwise in between (crop, beams, a prompt), it is captured anew. On the host backend there is
no graph, and the steps are the same.
"""
from __future__ import annotations

import numpy as np
import torch
import transformers

from .batch import always_possible
from .groups import LayeredSteps
from .steps import Steps
from .transformers import Cache

__all__ = ["Decoder"]


class Decoder:
    """Steps of one new token of every row of the cache, which has a past and `stream`."""

    def __init__(self, model: transformers.PreTrainedModel, cache: Cache):
        store = cache._store
        if not store.stream:
            raise ValueError("Decoder needs a cache whose steps run in torch's stream: daemon and model on one GPU, or "
                             "stream=True")
        if store.scale is None:
            raise ValueError("Decoder needs a cache with a past: let the model read the prompt first")
        self.model, self.cache, self._store = model, cache, store
        self._ids, self._places = (torch.zeros(len(store.batch), 1, dtype=torch.long, device=model.device) for _ in range(2))
        self._known: list[int] = []  # the rows' lengths that _places has
        self._graph, self._captured = None, None  # of which opening of the steps

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next token of each row, [rows] -> logits [rows, vocabulary]; the next call writes over them."""
        batch, store = self._store.batch, self._store
        if len(batch) != len(self._ids):
            raise ValueError(f"the cache has {len(batch)} rows now, and the Decoder {len(self._ids)}: make another one")
        self._ids.copy_(tokens.reshape(-1, 1))
        if self._known != batch.tokens:
            self._places.copy_(torch.tensor(batch.tokens)[:, None])
        stream = torch.cuda.current_stream(self.model.device).cuda_stream if self._ids.is_cuda else 0
        batch.stream_pass(always_possible(store.budget, store.scale), stream, self._launch)
        store.kept = np.concatenate([store.kept, np.ones((len(batch), 1), bool)], axis=1)
        self._places += 1
        self._known = list(batch.tokens)
        return self._logits

    def _launch(self, steps: Steps | LayeredSteps) -> None:
        if not self._ids.is_cuda:
            self._logits = self._forward(steps)
            return
        if self._captured != steps.opening:
            self._graph, self._captured = None, None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._forward(steps)
            self._graph, self._captured = graph, steps.opening
        self._graph.replay()

    def _forward(self, steps: Steps | LayeredSteps) -> torch.Tensor:
        self._store.launching = steps
        try:
            return self.model(self._ids, position_ids=self._places, past_key_values=self.cache, use_cache=True).logits[:, -1]
        finally:
            self._store.launching = None
