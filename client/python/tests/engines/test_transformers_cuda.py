"""pivotkv.transformers with model and daemon on a GPU: decoding in torch's stream, on the service's memory. Skipped without a
GPU, the CUDA module, or the packages."""
import importlib.util
import os
import unittest

import pivotkv
import tiny
from tiny import LAYERS, covers

READY = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
if READY:
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    import torch

    from pivotkv.transformers import Cache
    READY = torch.cuda.is_available()


def prompts(lengths):
    return {name: tensor.cuda() for name, tensor in tiny.prompts(lengths).items()}


@unittest.skipUnless(READY, "no torch with a GPU, or no transformers")
class CudaTest(tiny.Fixture):
    POOL, ARENA, FLAGS = 64 << 20, 256 << 20, ("--backend", "cuda")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.kv = pivotkv.connect(cls.daemon.socket)
        cls.addClassCleanup(cls.kv.close)
        cls.assertTrue(cls, cls.kv.describe().startswith("direct on cuda"), cls.kv.describe())

    def model(self, dtype="float32", **more):
        return tiny.model(dtype, **more).cuda()

    def greedy(self, model, inputs, cache=None, new=40, **more):
        return model.generate(**inputs, past_key_values=cache, max_new_tokens=new, do_sample=False, **more)

    def test_same_tokens(self):
        """In float32, all of them: alone, in batches with padding, with beams, over block borders."""
        model = self.model()
        for lengths, more in (([200], {}), ([200, 171, 190], {}), ([90, 64], {"num_beams": 3}), ([7], {"new": 150})):
            with self.subTest(lengths=lengths, **more):
                inputs = prompts(lengths)
                wanted = self.greedy(model, inputs, **more)
                with Cache(self.kv, model, covers(200)) as cache:
                    self.assertTrue(cache._store.stream)
                    self.assertEqual(self.greedy(model, inputs, cache, **more).tolist(), wanted.tolist())

    def test_half_precision(self):
        """The same tokens wherever float32's best one leads by more than the type's own noise."""
        for dtype in ("bfloat16", "float16"):
            with self.subTest(dtype=dtype), torch.no_grad():
                model, inputs = self.model(dtype), prompts([200, 171, 190])
                ids = self.greedy(model, inputs)
                new = torch.ones(len(ids), 40, dtype=torch.long, device="cuda")
                mask = torch.cat([inputs["attention_mask"], new], dim=1)
                places = (mask.cumsum(1) - 1).clamp(min=0)
                first, made = inputs["attention_mask"].shape[1], []
                with Cache(self.kv, model, covers(200)) as cache:
                    model(**inputs, position_ids=places[:, :first], past_key_values=cache)
                    for at in range(first, ids.shape[1] - 1):
                        made.append(model(ids[:, at: at + 1], attention_mask=mask[:, : at + 1],
                                          position_ids=places[:, at: at + 1], past_key_values=cache).logits)
                made = torch.cat(made, dim=1).float()
                whole = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
                model.set_attn_implementation("sdpa")
                half = model(**whole).logits[:, first:-1].float()
                exact = model.float()(**whole).logits[:, first:-1]
                noise = (half - exact).square().mean().sqrt()
                ours = (made - exact).square().mean().sqrt()
                best = exact.topk(2).values
                clear = best[..., 0] - best[..., 1] > 8 * noise
                same = (made.argmax(-1) == half.argmax(-1)).float().mean()
                print(f"# {dtype}: {clear.float().mean():.0%} of the tokens clear, {same:.1%} as torch's; distance to float32 "
                      f"{ours:.4f}, torch's own {noise:.4f}")
                self.assertLess(ours, 1.25 * noise)
                self.assertGreater(clear.float().mean(), 0.2)
                self.assertEqual(made.argmax(-1)[clear].tolist(), exact.argmax(-1)[clear].tolist())

    def test_decoder(self):
        """Steps of replay.Decoder, replayed, and captured anew after a crop: the tokens of generate."""
        model, inputs = self.model(), prompts([130, 120])
        wanted = self.greedy(model, inputs, new=80)
        for bits in (0, [64, 32, 64]):
            with Cache(self.kv, model, covers(200), bits=bits) as cache, torch.no_grad():
                tiny.assert_decodes(self, model, cache, inputs, wanted)

    def test_through_crop_and_fork(self):
        model, inputs = self.model(), prompts([130, 120])
        wanted = self.greedy(model, inputs)
        with Cache(self.kv, model, covers(200)) as cache:
            made = self.greedy(model, inputs, cache)
            with cache.fork() as child:
                cache.crop(-30)
                child.crop(-20)
                for other, left in ((cache, 30), (child, 20)):
                    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 40 - left, device="cuda", dtype=torch.long)], 1)
                    again = self.greedy(model, {"input_ids": made[:, :-left], "attention_mask": mask}, other, new=left)
                    self.assertEqual(again.tolist(), wanted.tolist())

    def test_calibrates_and_selects(self):
        """A long prompt calibrates; a step attends then to exactly the rows that the signatures select."""
        model = self.model(max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
        budget, inputs = pivotkv.Budget(k=200, sinks=16, recent=64), prompts([4400, 4300])
        with Cache(self.kv, model, budget) as cache, torch.no_grad():
            model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0), past_key_values=cache)
            seen, real = {}, cache._store._stream_step

            def watch(layer, q, k, v, scale):
                out = real(layer, q, k, v, scale)
                seen[layer] = q, k, v, out
                return out

            cache._store._stream_step = watch
            for step in range(3):
                mask = torch.ones(2, 4401 + step, dtype=torch.long, device="cuda")
                mask[:, :4400] = inputs["attention_mask"]
                model(torch.full((2, 1), 5 + step, device="cuda"), attention_mask=mask,
                      position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache)
            torch.cuda.synchronize()
            cache._store.batch._settle()
            for row, sequence in enumerate(cache.sequences):
                for layer in range(LAYERS):
                    q, k, v, out = seen[layer]
                    rows = sequence.select(layer, q[row].transpose(0, 1).float().cpu().numpy(), budget, rows=True)
                    for head in range(tiny.KV_HEADS):
                        n = rows.count[0, head]
                        self.assertEqual(n, 280)
                        keys, values = (torch.from_numpy(rows.rows[0, head, :n, side]) for side in (0, 1))
                        for i in (2 * head, 2 * head + 1):
                            p = torch.softmax(keys @ q[row, i, 0].float().cpu() / 8, 0)
                            exact = p @ values
                            error = (out[row, 0, i].cpu() - exact).norm() / exact.norm()
                            self.assertLess(float(error), 1e-3)
        self.assertEqual(self.state(), 1)

    def state(self):
        return max(m["state"] for m in self.asked("stat")["models"])


if __name__ == "__main__":
    unittest.main()
