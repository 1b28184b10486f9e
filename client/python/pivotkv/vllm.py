"""vLLM (V1) on pivotkv: an attention backend whose K and V live in the service.

    pivotkv.vllm.register()
    llm = vllm.LLM(model, enforce_eager=True, enable_prefix_caching=False, num_gpu_blocks_override=512,
                   additional_config={"pivotkv": {"k": 512}})

vLLM schedules as ever; its own blocks shrink to tickets of a few bytes, since the rows are in the service, so their number says
how much the service's arena holds. A request is known by the first block of its table, which is its alone while it lives (hence
no prefix caching); when one of its blocks serves another request, it has ended, and its sequence is released. Prefill is exact,
decoding attends to what the signatures select.

`additional_config["pivotkv"]`: socket, threads, name, scheme, bits, weights (as in pivotkv.connect and Connection.model),
k, sinks, recent, top_p, dense_below (pivotkv.Budget), sparse_prefill (false). What it cannot do it refuses in a sentence:
docs/engines.md has the list. Tensors of a GPU are copied to the CPU and the output back.
"""
from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder,
                                       AttentionType, CommonAttentionMetadata)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from . import Budget, Model, Sequence, connect
from .batch import Tally, always_possible, step
from .engine import DTYPES, numbers, rope_of

__all__ = ["Backend", "plugin", "register"]

_SETTINGS = {"socket", "threads", "name", "scheme", "bits", "weights", "k", "sinks", "recent", "top_p", "dense_below",
             "sparse_prefill"}
_BUDGET = ("k", "sinks", "recent", "top_p", "dense_below")


def register() -> None:
    """Makes this the backend: instead of the CPU's only one, or as CUSTOM (`attention_backend="CUSTOM"`) on other platforms.

    vLLM's other processes do it by themselves, since plugin() is an entry point of the installed package."""
    os.environ["PIVOTKV_VLLM"] = "1"
    path = f"{Backend.__module__}.{Backend.__qualname__}"
    register_backend(AttentionBackendEnum.CPU_ATTN if current_platform.is_cpu() else AttentionBackendEnum.CUSTOM, path)


def plugin() -> None:
    """Entry point of the group vllm.general_plugins: vLLM calls it in each of its processes."""
    if os.environ.get("PIVOTKV_VLLM") == "1":
        register()


@dataclass
class _Request:
    sequence: Sequence
    tokens: int = 0
    blocks: list[int] = field(default_factory=list)


class _Requests:
    """vLLM's requests and the sequences that hold their rows."""

    def __init__(self, model: Model, max_tokens: int, block_tokens: int):
        self.model, self.max_tokens, self.block_tokens = model, max_tokens, block_tokens
        self.requests: dict[int, _Request] = {}  # by the first block
        self.owner: dict[int, int] = {}  # first block of the request that a block belongs to

    def drop(self, key: int) -> None:
        request = self.requests.pop(key, None)
        if request:
            request.sequence.close()
            for block in request.blocks:
                del self.owner[block]

    def find(self, table: np.ndarray, computed: int, tokens: int) -> _Request:
        """The request of this row of the block table, `computed` tokens long, about to be `tokens` long."""
        key = int(table[0])
        if not computed:
            self.drop(key)
            request = None
        else:
            request = self.requests.get(key)
            if request is None or request.tokens < computed:
                raise ValueError(f"vLLM counts {computed} tokens as computed that pivotkv has not seen: set "
                                 "enable_prefix_caching=False, and use no KV connector")
        # What these blocks belonged to has ended. Before a sequence is made, so that its memory is free.
        had = len(request.blocks) if request else 0
        new = [int(block) for block in table[had: -(-tokens // self.block_tokens)]]
        for block in new:
            if block in self.owner:
                self.drop(self.owner[block])
        if request is None:
            request = self.requests[key] = _Request(self.model.sequence(self.max_tokens, label="vllm"))
        for block in new:
            self.owner[block] = key
        request.blocks += new
        if request.tokens > computed:  # drafts that were not accepted
            request.sequence.truncate(computed)
        request.tokens = tokens
        return request


class _Service:
    """The connection of one worker process, and its model."""

    def __init__(self, config: VllmConfig, block_tokens: int):
        wish = _settings(config)
        model, parallel = config.model_config, config.parallel_config
        # A name without a host and its folders; the digest of the weights would need the weights.
        name = wish.get("name") or str(model.model).rstrip("/").rsplit("/", 1)[-1][-40:]
        if parallel.tensor_parallel_size > 1:
            name += f"-{parallel.rank % parallel.tensor_parallel_size}of{parallel.tensor_parallel_size}"
        self.connection = connect(wish.get("socket"), threads=wish.get("threads", 0), label="vllm")
        self.model = self.connection.model(
            name, layers=model.get_num_layers(parallel), q_heads=model.get_num_attention_heads(parallel),
            kv_heads=model.get_num_kv_heads(parallel), head_dim=model.get_head_size(), dtype=DTYPES[model.dtype],
            rope=rope_of(model.hf_text_config, model.get_head_size()), scheme=wish.get("scheme", "code"),
            bits=wish.get("bits", 0), weights=wish.get("weights"))
        self.requests = _Requests(self.model, model.max_model_len, block_tokens)
        self.budget = Budget(**{name: wish[name] for name in _BUDGET if name in wish})
        self.prefill = self.budget if wish.get("sparse_prefill") else Budget(dense=True)
        self.tally = Tally()


def _settings(config: VllmConfig) -> dict[str, Any]:
    wish = (config.additional_config or {}).get("pivotkv", {})
    if unknown := set(wish) - _SETTINGS:
        raise ValueError(f"additional_config['pivotkv'] has {', '.join(sorted(unknown))}; known: "
                         + ", ".join(sorted(_SETTINGS)))
    if config.cache_config.enable_prefix_caching:
        raise ValueError("pivotkv knows requests by their own blocks: set enable_prefix_caching=False")
    if not config.cache_config.num_gpu_blocks_override:
        raise ValueError("vLLM's blocks cost nothing under pivotkv, so it would admit more than the service can hold: set "
                         "num_gpu_blocks_override to the tokens that the daemon's arena holds, divided by the block size")
    if config.parallel_config.pipeline_parallel_size > 1 or config.parallel_config.decode_context_parallel_size > 1:
        raise ValueError("pivotkv's backend holds all layers and tokens of a request: no pipeline or context parallelism")
    if config.model_config.dtype not in DTYPES:
        raise ValueError(f"pivotkv stores float32, float16 and bfloat16, not {config.model_config.dtype}")
    return wish


@dataclass
class Metadata(AttentionMetadata):
    """One forward pass: rows of the batch, and what each brings."""

    service: _Service
    tables: np.ndarray  # [requests, blocks]
    starts: list[int]  # [requests + 1] of each request's query tokens
    tokens: list[int]  # of each request, after this pass
    prefilling: list[bool]
    rows: list[tuple[int, _Request]] | None = None  # found by the first layer

    def find(self) -> list[tuple[int, _Request]]:
        if self.rows is None:
            self.rows = []
            for i, tokens in enumerate(self.tokens):
                count = self.starts[i + 1] - self.starts[i]
                if count and self.tables[i, 0]:  # block 0 is nobody's: padding, or a rehearsal
                    self.rows.append((i, self.service.requests.find(self.tables[i], tokens - count, tokens)))
        return self.rows

    def attend(self, layer: int, scale: float, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        """q, out [tokens, q_heads, head_dim]; k, v [tokens, kv_heads, head_dim]."""
        service, rows = self.service, self.find()
        for prefilling, budget in ((True, service.prefill), (False, service.budget)):
            mine = [(i, request) for i, request in rows if self.prefilling[i] == prefilling]
            if not mine:
                continue
            spans = [range(self.starts[i], self.starts[i + 1]) for i, _ in mine]
            where = torch.tensor([at for span in spans for at in span], device=q.device)
            result = step(service.model, [request.sequence for _, request in mine], [len(span) for span in spans], layer,
                          numbers(k[where]), numbers(v[where]), numbers(q[where]), always_possible(budget, scale),
                          service.tally)
            out[where] = torch.from_numpy(result).to(out.device, out.dtype)


class Builder(AttentionMetadataBuilder[Metadata]):
    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.service = _Service(vllm_config, kv_cache_spec.block_size)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata,
              fast_build: bool = False) -> Metadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError("pivotkv's attention is causal")
        requests = common.num_reqs
        starts = common.query_start_loc_cpu[: requests + 1].tolist()
        tokens = common.seq_lens[:requests].tolist()
        prefilling = common.is_prefilling[:requests].tolist() if common.is_prefilling is not None else \
            [count == starts[i + 1] - starts[i] for i, count in enumerate(tokens)]
        return Metadata(self.service, common.block_table_tensor[:requests].cpu().numpy(), starts, tokens, prefilling)


class Impl(AttentionImpl):
    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: list[float] | None,
                 sliding_window: int | None, kv_cache_dtype: str, logits_soft_cap: float | None = None,
                 attn_type: str = AttentionType.DECODER, kv_sharing_target_layer_name: str | None = None, sinks=None, **_):
        refused = {"ALiBi": alibi_slopes, "sliding windows": sliding_window, "capped logits": logits_soft_cap,
                   "learned sinks": sinks, "layers that share another's cache": kv_sharing_target_layer_name,
                   "encoders": attn_type != AttentionType.DECODER or None,
                   f"caches of type {kv_cache_dtype}": kv_cache_dtype not in ("auto", "float16", "bfloat16") or None}
        for what, value in refused.items():
            if value is not None:
                raise ValueError(f"pivotkv's attention does not do {what}")
        self.num_heads, self.num_kv_heads, self.head_size, self.scale = num_heads, num_kv_heads, head_size, float(scale)
        self.kv_cache_dtype = kv_cache_dtype

    def forward(self, layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
                attn_metadata: Metadata | None, output: torch.Tensor, output_scale=None,
                output_block_scale=None) -> torch.Tensor:
        """query [tokens, q_heads, head_dim], key and value [tokens, kv_heads, head_dim]; kv_cache holds tickets, no rows."""
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("pivotkv's attention does not quantise its output")
        if attn_metadata is None:  # vLLM measures its memory
            return output.zero_()
        shape = (-1, self.num_heads, self.head_size)
        tokens = attn_metadata.starts[-1]
        attn_metadata.attend(extract_layer_index(layer.layer_name), self.scale, query.view(shape)[:tokens],
                             key.view(-1, self.num_kv_heads, self.head_size)[:tokens],
                             value.view(-1, self.num_kv_heads, self.head_size)[:tokens], output.view(shape)[:tokens])
        return output


class Backend(AttentionBackend):
    supported_dtypes = list(DTYPES)
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [64, 96, 128, 256]

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec):
        """vLLM's own cache of a token and layer: one number that nobody reads."""
        return replace(spec, num_head_slots=1, state_content_bytes=spec.dtype.itemsize)
