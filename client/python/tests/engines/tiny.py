"""What the adapters' tests share: a tiny random model, a private daemon, and how many sequences it holds."""
import json
import os
import pathlib
import subprocess
import unittest

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
