"""Hugging Face transformers on pivotkv: a cache whose K and V live in the service.

    with pivotkv.connect() as kv:
        cache = pivotkv.transformers.Cache(kv, model, pivotkv.Budget(k=512))
        model.generate(**inputs, past_key_values=cache)

Making the cache registers the attention function "pivotkv" and switches the model to it; calls without such a cache are
attended by torch as before. Each row of the batch is a sequence of its own, which holds the row's real tokens only, so padding
costs nothing. Prefill is exact, decoding attends to what the signatures select. What it cannot do it refuses in a sentence:
docs/engines.md has the list. On a GPU, decoding runs in torch's stream on the service's memory, if the daemon's pool is there;
prefill, and everything else, copies to the CPU and back.
"""
from __future__ import annotations

import hashlib
import weakref
from typing import Any, Callable
from typing import Sequence as ListOf

import numpy as np
import torch
import transformers
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from . import Budget, Connection
from .batch import Batch, Tally, always_possible
from .engine import DTYPES, numbers, rope_of
from .groups import LayeredBatch, LayeredSteps, open_batch
from .steps import Steps, on_gpu

__all__ = ["Cache", "NAME"]

NAME = "pivotkv"  # of the attention implementation
# Of an attention call: what changes its result, and is not done here.
_REFUSED = {"sliding_window": "sliding windows", "softcap": "capped logits", "s_aux": "learned sinks",
            "position_bias": "position biases", "output_attentions": "output_attentions", "cache": "paged caches"}


class _Stored(torch.Tensor):
    """New K or V on its way to pivotkv. The earlier ones are not in it, so no other attention may compute with it."""

    layer: _Layer
    plain: torch.Tensor

    _READS = {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")}
    _READS |= {torch.Tensor.size, torch.Tensor.dim}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in cls._READS:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise TypeError("the keys and values of this cache live in pivotkv, and only its attention can use them: "
                        f"model.set_attn_implementation({NAME!r}), for a model whose attention is pluggable")


class _Store:
    """What a cache owns: the batch, and which columns of the padded batch its rows hold."""

    def __init__(self, batch: Batch | LayeredBatch, budget: Budget, prefill: Budget, decode_tokens: int, stream: bool):
        self.batch, self.budget, self.prefill, self.decode_tokens, self.stream = batch, budget, prefill, decode_tokens, stream
        self.kept = np.zeros((0, 0), bool)  # [rows, columns]
        self.fresh = np.zeros((0, 0), bool)  # [rows, new columns] of the pass that runs
        self.scale: float | None = None  # of the last attention
        self.launching: Steps | LayeredSteps | None = None  # replay.py: a pass whose steps are open, or are being captured

    @property
    def columns(self) -> int:
        return self.kept.shape[1]

    def begin(self, mask: torch.Tensor | None, rows: int, new: int) -> None:
        if not self.columns and len(self.batch) != rows:
            self.batch.resize(rows)
            self.kept = np.zeros((rows, 0), bool)
        if len(self.batch) != rows:
            raise ValueError(f"the cache holds {len(self.batch)} sequences, and the model brings {rows}: use a new cache")
        self.fresh = np.ones((rows, new), bool)
        if mask is not None:
            seen = mask.detach().to("cpu", torch.bool).numpy()
            if seen.shape != (rows, self.columns + new):
                raise ValueError(f"the attention mask has shape {list(seen.shape)}, but {rows} sequences with {self.columns} "
                                 f"cached and {new} new columns need {[rows, self.columns + new]}: was the cache used for "
                                 "another text, or did a pass leave layers out?")
            if not np.array_equal(seen[:, : self.columns], self.kept):
                raise ValueError("the attention mask hides or shows tokens of the past otherwise than when they were cached: "
                                 "padding is fixed once it is in the cache")
            self.fresh = seen[:, self.columns:].copy()
        self.batch.begin(self.fresh.sum(axis=1).tolist())

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
               scale: float) -> torch.Tensor:
        """q, k, v [rows, heads, new, head_dim] -> [rows, new, q_heads, head_dim]; columns of padding come out as zeros."""
        rows, heads, new, dim = q.shape
        if self.launching:
            return _in_stream(q, k, v, lambda k, v, q, out, stream: (self.launching.append(layer, k, v, stream),
                                                                     self.launching.attend(layer, q, out, stream)))
        self.scale = scale
        if self.batch.needs(layer):
            self.begin(mask, rows, new)
        elif (rows, new) != self.fresh.shape:
            raise ValueError(f"layer {layer} brings {rows} x {new} tokens in a pass of {self.fresh.shape}")
        decodes = self.columns and new <= self.decode_tokens
        if self.stream and decodes and new == 1 and self.fresh.all():
            return self._stream_step(layer, q, k, v, scale)
        if self.stream and not self.columns and self.prefill.dense:
            return self._read(layer, q, k, v, scale)
        flat = [numbers(x.transpose(1, 2))[self.fresh] for x in (k, v, q)]
        out, done = self.batch.step(layer, *flat, always_possible(self.budget if decodes else self.prefill, scale))
        if self.fresh.all():
            result = torch.from_numpy(out.reshape(rows, new, heads, dim))
        else:
            result = torch.zeros(rows, new, heads, dim)
            result[torch.from_numpy(self.fresh)] = torch.from_numpy(out)
        if done:
            self.kept = np.concatenate([self.kept, self.fresh], axis=1)
        return result.to(q.device, q.dtype)

    def _stream_step(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        def launch(*arrays):
            if self.batch.stream_step(layer, *arrays[:4], always_possible(self.budget, scale), arrays[4]):
                self.kept = np.concatenate([self.kept, self.fresh], axis=1)

        return _in_stream(q, k, v, launch)

    def _read(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """An exact first pass is all there: torch attends on the GPU, and only K and V go through the CPU."""
        rows, whole = torch.from_numpy(self.fresh), bool(self.fresh.all())
        mask = _full_mask(None if whole else rows.to(q.device), q.shape[2], q.shape[2])
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale,
                                                               enable_gqa=True)
        out = out.transpose(1, 2)
        if not whole:
            out = out * rows.to(q.device)[:, :, None, None]
        flat = [numbers(x.transpose(1, 2)[rows] if not whole else x.transpose(1, 2).flatten(0, 1)) for x in (k, v)]
        at = rows.nonzero()
        if self.batch.keep(layer, *flat, lambda first, last: numbers(q[at[first:last, 0], :, at[first:last, 1]])):
            self.kept = np.concatenate([self.kept, self.fresh], axis=1)
        return out

    def crop(self, columns: int) -> None:
        self.batch.truncate(self.kept[:, :columns].sum(axis=1).tolist())
        self.kept = self.kept[:, :columns]

    def pick(self, rows: list[int]) -> None:
        self.batch.pick(rows)
        self.kept = self.kept[rows]

    def clear(self) -> None:
        self.batch.clear()
        self.kept = np.zeros((0, 0), bool)


def _in_stream(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, launch: Callable[..., Any]) -> torch.Tensor:
    """launch(k, v, q, out, stream) with one new token's arrays where they are. They may be freed at once: torch reuses memory
    in the order of its stream."""
    out = torch.empty(q.shape[0], 1, *q.shape[1:2], q.shape[3], dtype=torch.float32, device=q.device)
    k, v, q = (x[:, :, 0].contiguous() for x in (k, v, q))
    launch(k.data_ptr(), v.data_ptr(), q.data_ptr(), out.data_ptr(),
           torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0)
    return out.to(q.dtype)


class _Layer(CacheLayerMixin):
    """One layer's side of the store, as transformers asks for it."""

    is_sliding, is_croppable, is_compileable = False, True, False

    def __init__(self, store: _Store, index: int):
        super().__init__()
        self.store, self.index = store, index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Nothing is stored yet: which columns are padding, the attention function is told."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise ValueError("pivotkv computes no gradients: run the model under torch.no_grad()")
        both = tuple(tensor.as_subclass(_Stored) for tensor in (key_states, value_states))
        for stored, tensor in zip(both, (key_states, value_states)):
            stored.layer, stored.plain = self, tensor
        return both

    def get_seq_length(self) -> int:
        return self.store.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1


class Cache(transformers.Cache):
    """`past_key_values` of one batch: every row a sequence in pivotkv, released when this object goes.

    budget         what a decoding token attends
    prefill        what the tokens of a longer forward attend; default: everything, exactly. `prefill=budget`: sparse as well
    decode_tokens  a forward of at most so many new tokens (one, or a few that verify a draft) decodes, if the cache has a past
    max_tokens     of a sequence; default: the model's max_position_embeddings
    name           identity of the weights; default: a digest of them, of the RoPE and of the scheme
    scheme, bits   of the signatures, as in Connection.model; bits may be a list with a size for each layer (`pivotkv-sizes`):
                   0 for a layer that attends to the latest tokens instead
    stream         whether steps of one token a row run in torch's stream without a copy; default: where daemon and model are on
                   the only GPU that torch sees (of several, it must be the connection's). At most 256 rows; not in the tally
    """

    def __init__(self, kv: Connection, model: transformers.PreTrainedModel, budget: Budget | None = None, *,
                 prefill: Budget | None = None, decode_tokens: int = 16, max_tokens: int | None = None,
                 name: str | None = None, scheme: str = "code", bits: int | ListOf[int] = 0,
                 weights: str | None = None, stream: bool | None = None):
        config = model.config.get_text_config(decoder=True)
        _refuse(model, config)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        rope = rope_of(config, head_dim)
        batch = open_batch(kv, name or _digest(model, rope, scheme, bits, weights), config.num_hidden_layers, bits,
                           max_tokens or config.max_position_embeddings, type(model).__name__[:31], q_heads=heads,
                           kv_heads=getattr(config, "num_key_value_heads", None) or heads, head_dim=head_dim,
                           dtype=DTYPES[model.dtype], rope=rope, scheme=scheme, weights=weights)
        if stream is None:
            stream = model.device.type == "cuda" and torch.cuda.device_count() == 1 and on_gpu(kv)
        self._adopt(_Store(batch, budget or Budget(), prefill or Budget(dense=True), decode_tokens, stream))
        model.set_attn_implementation(NAME)

    def _adopt(self, store: _Store) -> None:
        super().__init__(layers=[_Layer(store, i) for i in range(store.batch.layers)])
        self._store = store
        self._finalizer = weakref.finalize(self, store.batch.close)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Releases the sequences; dropping the last reference does the same."""
        self._finalizer()

    def fork(self, budget: Budget | None = None) -> Cache:
        """A cache of its own with the same past, whose blocks are shared: for prompts that begin alike."""
        old, copy = self._store, object.__new__(type(self))
        store = _Store(old.batch.fork(), budget or old.budget, old.prefill, old.decode_tokens, old.stream)
        store.kept = old.kept.copy()
        copy._adopt(store)
        return copy

    def __deepcopy__(self, memo: dict) -> Cache:
        return self.fork()

    @property
    def sequences(self) -> list:
        """The pivotkv sequences, one per row: for audits and statistics. They belong to the cache. Where layers have
        signatures of several sizes, one per size and row, smaller sizes first; each numbers the layers of its size."""
        return list(self._store.batch.sequences)

    @property
    def tally(self) -> Tally:
        """What all attends did so far, prefill included."""
        return self._store.batch.tally

    @property
    def batch_size(self) -> int:
        return len(self._store.batch) or -1

    def reset(self) -> None:
        self._store.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """-n forgets the last n columns; n > 0 (older callers) keeps the first n; 0 does nothing."""
        columns = self._store.columns
        keep = columns + tokens_to_remove if tokens_to_remove < 0 else min(tokens_to_remove or columns, columns)
        self._store.crop(max(keep, 0))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._store.pick(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._store.pick([i for i in range(len(self._store.batch)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._store.pick((indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist())


def _refuse(model: transformers.PreTrainedModel, config) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds == {"full_attention"} and not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None):
        kinds = {"sliding_attention"}
    if kinds != {"full_attention"}:
        raise ValueError(f"pivotkv holds layers of full attention only, and this model has {', '.join(sorted(kinds))}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("pivotkv holds the cache of decoders, and this model has an encoder")
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError("pivotkv does not cap logits, and this model's attention does")
    if model.dtype not in DTYPES:
        raise ValueError(f"pivotkv stores float32, float16 and bfloat16, not {model.dtype}: model.to(torch.bfloat16)")
    if not model._can_set_attn_implementation():
        raise ValueError(f"the attention of {type(model).__name__} is not pluggable (AttentionInterface)")


def _digest(model: transformers.PreTrainedModel, *description: Any) -> str:
    """Identity of the weights, of the first numbers of each, and of what else the service knows a model by."""
    digest = hashlib.blake2b(repr(description).encode(), digest_size=12)
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return f"{type(model).__name__[:38]}-{digest.hexdigest()}"


def _attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
               **kwargs) -> tuple[torch.Tensor, None]:
    """The attention function "pivotkv". query [rows, q_heads, new, head_dim] -> [rows, new, q_heads, head_dim]."""
    if not isinstance(key, _Stored):
        mask = _full_mask(attention_mask, query.shape[2], key.shape[2])
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"pivotkv's attention does not do {what} ({name})")
    if dropout:
        raise ValueError("pivotkv's attention has no dropout: model.eval()")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError("pivotkv's attention is causal with a mask [rows, tokens] of the padding; it takes no mask of "
                         f"{attention_mask.ndim} dimensions")
    if value.shape != key.shape:
        raise ValueError(f"pivotkv stores K and V of one shape, not {list(key.shape)} and {list(value.shape)}")
    layer, scale = key.layer, scaling or query.shape[-1] ** -0.5
    return layer.store.attend(layer.index, query, key.plain, value.plain, attention_mask, scale), None


def _full_mask(padding: torch.Tensor | None, new: int, length: int) -> torch.Tensor | None:
    """For torch: [rows, 1, new, length] of the causal mask and the padding; None where torch knows by itself."""
    if padding is not None and padding.ndim == 4:
        return padding
    if (padding is None or bool(padding.all())) and new in (1, length):
        return None
    device = padding.device if padding is not None else None
    causal = torch.ones(new, length, dtype=torch.bool, device=device).tril(length - new)
    if padding is None:
        return causal[None, None]
    # A row of padding sees itself, as torch makes no number of a softmax over nothing.
    own = torch.eye(length, dtype=torch.bool, device=device)[length - new:]
    return (causal[None, None] & padding[:, None, None, :]) | own


def _mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, mask_function=causal_mask_function,
          attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """The mask of "pivotkv": the padding [rows, tokens], or None. Called once a forward."""
    if mask_function is not causal_mask_function:
        raise ValueError("pivotkv's attention is causal and nothing else: no windows, chunks, packed sequences or overlays")
    if kv_length != int(q_offset) + q_length:
        raise ValueError("pivotkv's attention works with pivotkv.transformers.Cache, and without it with caches that grow: "
                         "not with static ones. model.set_attn_implementation('sdpa') has them all")
    return attention_mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
