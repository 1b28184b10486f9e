"""pivotkv.vllm inside a real vLLM on the CPU: what transformers makes, token for token, while requests come, go, are prefilled
in chunks and preempted. Needs the packages of client/python/requirements-engines.txt (`make test` has them)."""
import importlib.util
import os
import tempfile
import types
import unittest

import numpy as np

import pivotkv
import tiny
from tiny import DIM, KV_HEADS, LAYERS, VOCABULARY

READY = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "vllm"))
if READY:
    # One process, no network, little memory. Set before vLLM reads them.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
                      VLLM_LOGGING_LEVEL="ERROR", VLLM_PLUGINS="", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    import torch
    import vllm

    import pivotkv.vllm


@unittest.skipUnless(READY, "torch, transformers and vllm are not installed")
class EngineTest(tiny.Fixture):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder, cls.model = folder.name, tiny.model()
        cls.model.save_pretrained(folder.name)
        pivotkv.vllm.register()

    def engine(self, k=128, **more):
        """128 tokens a block (vLLM's on the CPU), one of the blocks being nobody's."""
        wish = {"socket": self.daemon.socket, "threads": 1, "name": "tiny", "k": k, "sinks": 16, "recent": 16}
        settings = {"num_gpu_blocks_override": 17, "max_num_seqs": 4, "max_model_len": 512, "enable_prefix_caching": False,
                    "additional_config": {"pivotkv": wish | more.pop("wish", {})}} | more
        return vllm.LLM(self.folder, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", disable_log_stats=True,
                        **settings)

    @staticmethod
    def service(engine):
        """Of the one worker, in this process."""
        runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
        return runner.attn_groups[0][0].get_metadata_builder().service

    @staticmethod
    def prompts(lengths, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]

    def made(self, engine, prompts, new=16):
        done = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts],
                               vllm.SamplingParams(temperature=0, max_tokens=new, detokenize=False), use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in done]

    def wanted(self, prompts, new=16):
        return [self.model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)[0, len(prompt):].tolist()
                for prompt in prompts]

    def test_requests_come_and_go(self):
        """More requests than run at once, twice: blocks serve one after the other, and so do sequences."""
        engine = self.engine(k=300)
        try:
            for seed in (1, 2):
                prompts = self.prompts((200, 131, 190, 60, 300, 5, 128, 127), seed)
                self.assertEqual(self.made(engine, prompts), self.wanted(prompts))
                self.assertLessEqual(self.sequences(), 16)
            service = self.service(engine)
            self.assertEqual(len(service.requests.requests), self.sequences())
            self.assertEqual(service.tally.tokens_attended, service.tally.tokens_seen)
        finally:
            self.close(engine)

    def test_prefill_in_chunks_and_preemption(self):
        """32 tokens a step; five usable blocks for three requests that need nine before they end."""
        engine = self.engine(k=300, max_num_batched_tokens=32, num_gpu_blocks_override=6)
        try:
            model, created = self.service(engine).model, []
            model.sequence = lambda *a, **k: created.append(type(model).sequence(model, *a, **k)) or created[-1]
            prompts = self.prompts((240, 230, 220))
            self.assertEqual(self.made(engine, prompts, 40), self.wanted(prompts, 40))
            self.assertGreater(len(created), 3)  # one began again
            self.assertLessEqual(self.sequences(), 5)
        finally:
            self.close(engine)

    def test_decoding_is_sparse_and_prefill_is_not(self):
        engine = self.engine(k=20)
        try:
            self.made(engine, self.prompts((200, 131)), new=4)
            tally = self.service(engine).tally
            self.assertEqual(tally.queries_sparse, 2 * 3 * LAYERS)
            # Everything of the prefill, k + sinks + recent of each decoded token.
            missing = sum(tokens + i - 52 for tokens in (200, 131) for i in (1, 2, 3)) * LAYERS * KV_HEADS
            self.assertEqual(tally.tokens_seen - tally.tokens_attended, missing)
        finally:
            self.close(engine)

    def test_refusals(self):
        for word, settings in (("enable_prefix_caching", {"enable_prefix_caching": True}),
                               ("num_gpu_blocks_override", {"num_gpu_blocks_override": None}),
                               ("known: .*sinks", {"wish": {"snks": 3}}),
                               ("is not found|start pivotkvd|no daemon", {"wish": {"socket": "/tmp/nobody-listens-here"}})):
            with self.subTest(word=word), self.assertRaisesRegex((ValueError, OSError), word):
                self.engine(**settings)

    def close(self, engine):
        self.service(engine).connection.close()
        del engine


@unittest.skipUnless(READY, "torch, transformers and vllm are not installed")
class RequestsTest(tiny.Fixture):
    """The map from block tables to sequences, without the engine."""

    def setUp(self):
        self.kv = pivotkv.connect(self.daemon.socket, threads=1)
        self.addCleanup(self.kv.close)
        model = self.kv.model("map", layers=1, q_heads=2, kv_heads=1, head_dim=DIM, dtype="f32")
        self.requests = pivotkv.vllm._Requests(model, 1000, 16)

    def find(self, blocks, computed, tokens):
        """As a pass that appends what is new."""
        request = self.requests.find(np.array(blocks + [0] * 8, np.int32), computed, tokens)
        rows = np.ones((tokens - computed, 1, DIM), np.float32)
        request.sequence.append(0, rows, rows)
        return request

    def test_a_request_grows_and_is_taken_back(self):
        first = self.find([3, 4], 0, 30)
        self.assertIs(self.find([3, 4, 5], 30, 34), first)
        self.assertEqual((len(first.sequence), first.blocks), (34, [3, 4, 5]))
        self.assertIs(self.find([3, 4, 5], 31, 32), first)  # three drafts were wrong
        self.assertEqual((len(first.sequence), first.tokens), (32, 32))

    def test_a_block_that_changes_hands_ends_its_request(self):
        self.find([3, 4], 0, 30)
        other = self.find([6], 0, 10)
        self.assertEqual(self.sequences(), 2)
        self.find([7, 4], 0, 20)  # 4 was the first one's
        self.assertEqual((sorted(self.requests.requests), self.sequences()), ([6, 7], 2))
        self.assertIs(self.find([6], 10, 11), other)
        again = self.find([6], 0, 5)  # the same first block, from the start: preempted, or another request
        self.assertEqual((len(again.sequence), self.sequences()), (5, 2))
        self.assertEqual(self.requests.owner, {6: 6, 7: 7, 4: 7})

    def test_tokens_that_it_has_not_seen_are_refused(self):
        self.find([3], 0, 10)
        for blocks, computed in (([9], 5), ([3], 11)):
            with self.assertRaisesRegex(ValueError, "prefix_caching"):
                self.requests.find(np.array(blocks, np.int32), computed, computed + 1)


@unittest.skipUnless(READY, "torch, transformers and vllm are not installed")
class ImplTest(unittest.TestCase):
    def test_refusals(self):
        fine = {"num_heads": 4, "head_size": 64, "scale": 0.125, "num_kv_heads": 2, "alibi_slopes": None,
                "sliding_window": None, "kv_cache_dtype": "auto"}
        pivotkv.vllm.Impl(**fine)
        for word, more in (("ALiBi", {"alibi_slopes": [1.0]}), ("sliding", {"sliding_window": 64}),
                           ("capped", {"logits_soft_cap": 30.0}), ("fp8", {"kv_cache_dtype": "fp8"}),
                           ("encoders", {"attn_type": "encoder_only"}), ("share", {"kv_sharing_target_layer_name": "x"})):
            with self.assertRaisesRegex(ValueError, word):
                pivotkv.vllm.Impl(**fine | more)

    def test_a_rehearsal_touches_nothing(self):
        impl = pivotkv.vllm.Impl(4, 64, 0.125, 2, None, None, "auto")
        out = torch.full((3, 256), 7.0)
        impl.forward(types.SimpleNamespace(layer_name="model.layers.0.attn"), out, out, out, None, None, out)
        self.assertEqual(out.abs().sum(), 0)


if __name__ == "__main__":
    unittest.main()
