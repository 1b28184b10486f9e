"""What the adapters' tests share: a tiny random model, a private daemon, and how many sequences it holds."""
import json
import os
import pathlib
import subprocess
import unittest

import pivotkv
from daemon import PrivateDaemon

LAYERS, KV_HEADS, DIM, VOCABULARY = 3, 2, 64, 320


def model(dtype="float32", kind="Llama", **more):
    """Random weights, wide enough apart that greedy decoding has no ties."""
    import torch
    import transformers
    settings = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": LAYERS,
                "num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "head_dim": DIM, "max_position_embeddings": 1024,
                "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None} | more
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(**settings)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(getattr(torch, dtype)).eval()


def prompts(lengths, seed=1):
    """Random tokens, padded on the left, and their mask."""
    import torch
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def covers(tokens):
    """A budget that selects every token of sequences of this length and of half more."""
    return pivotkv.Budget(k=tokens, sinks=tokens // 4, recent=tokens // 4)


def assert_decodes(case, model, cache, inputs, wanted):
    """replay.Decoder on an empty cache: the 80 tokens that `wanted` has after the 130 of `inputs`, and after a crop again."""
    import torch

    from pivotkv.replay import Decoder
    with case.assertRaises(ValueError):
        Decoder(model, cache)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    token = model(**inputs, position_ids=places, past_key_values=cache).logits[:, -1].argmax(-1)
    decode, made = Decoder(model, cache), [token]
    for _ in range(79):
        made.append(decode(made[-1]).argmax(-1))
    case.assertEqual(torch.stack(made, 1).tolist(), wanted[:, 130:].tolist())
    case.assertEqual(cache.get_seq_length(), 209)
    cache.crop(-30)
    for i in range(49, 79):
        case.assertEqual(decode(made[i]).argmax(-1).tolist(), made[i + 1].tolist())


class Fixture(unittest.TestCase):
    """A daemon for all tests of the class."""
    POOL, ARENA, FLAGS = 16 << 20, 64 << 20, ()

    @classmethod
    def setUpClass(cls):
        cls.daemon = PrivateDaemon(pathlib.Path(os.environ["PIVOTKVD"]), pool_bytes=cls.POOL, arena_bytes=cls.ARENA,
                                   flags=cls.FLAGS)
        cls.addClassCleanup(cls.daemon.stop)

    def asked(self, verb):
        cli = pathlib.Path(os.environ["PIVOTKV_BUILD_DIR"]) / "client" / "cli" / "pivotkv"
        done = subprocess.run([cli, verb, "--socket", self.daemon.socket, "--format", "json"], capture_output=True, text=True,
                              timeout=60, check=True)
        return json.loads(done.stdout)

    def sequences(self):
        return len(self.asked("ls")["sequences"])
