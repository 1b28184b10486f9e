"""Evaluation in numpy is what the daemon's audit says of the same files: HashAttention end to end - trained or converted, as a
file, served, attended - and the other schemes."""
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

import numpy as np

import pivotkv
from pivotkv import convert, evaluate, recording, schemes, tensors, train
from pivotkv import sizes as sizes_of
from pivotkv.calibrate import Calibrator
from private import DaemonTest
from test_convert import DATA
from test_train import QUICK, write_recording

TOKENS, POSITIONS = 900, range(500, 900, 20)
WISH = dict(sinks=16, recent=32)


class AuditTest(DaemonTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for seed, name in ((1, "train"), (2, "test")):
            write_recording(cls.folder / name, seed, TOKENS, layers=(0, 1), values=True)
        cls.test = recording.load(cls.folder / "test")
        made = Calibrator(cls.test.geometry, None, 1000)
        for layer in (0, 1):
            made.feed(layer, 0, q=cls.test.q(layer), k=cls.test.k(layer))
        for scheme, bits in (("code", 64), ("sign", 128)):
            made.write(cls.folder / f"{scheme}.safetensors", bits, scheme=scheme)
        for kind, query, more in (("hash", "value", {}), ("linear", "value", {"hidden": (), "bits": 64}),
                                  ("linear", "sign", {"hidden": (), "bits": 64})):
            plan = train.plan_of(kind, [cls.folder / "train"], query, **{**QUICK, "steps": 40, **more})
            checkpoint = train.Checkpoint(cls.folder / f"{kind}-{query}.checkpoint", plan)
            for key in plan.keys(cls.test):
                checkpoint.put(key, train.train_unit(plan, plan.load(), key))
            train.finish(plan, checkpoint, cls.folder / f"{kind}-{query}.safetensors")
        tensors.write(cls.folder / "released.safetensors", *convert.convert(DATA / "tiny.hat_weights.pkl", 2))

    def audited(self, kv, scheme, path, rule):
        """(mass, error) by budget, from the service."""
        g, found = scheme.geometry, {k: [] for k in (40, 160)}
        model = kv.model(path.name, layers=g.layers, q_heads=g.q_heads, kv_heads=g.kv_heads, head_dim=g.head_dim, dtype="f32",
                         scheme=scheme.kind, bits=scheme.bits, weights=str(path))
        with model.sequence(TOKENS) as sequence:
            for layer in range(g.layers):
                at = 0
                for position in POSITIONS:
                    sequence.append(layer, self.test.k(layer)[at: position + 1], self.test.v(layer)[at: position + 1])
                    at = position + 1
                    for k in found:
                        audit = sequence.audit(layer, self.test.q(layer)[position: at], k=k, rule=rule, **WISH)
                        found[k].append((audit.mass, audit.error))
        return {k: np.mean(values, axis=0) for k, values in found.items()}

    def test_numpy_and_daemon_agree(self):
        """Integer rules alike; with probabilities a token on the border of two codes may fall to either side."""
        rules = {"softmax": (pivotkv.Rule.SOFTMAX_SUM, 5e-3), "sum": (pivotkv.Rule.SUM, 1e-4), "max": (pivotkv.Rule.MAX, 1e-4)}
        for name in ("hash-value", "linear-value", "linear-sign", "released", "code", "sign"):
            path = self.folder / f"{name}.safetensors"
            scheme = schemes.load(path)
            whole = name in ("hash-value", "released")  # +-1 weights: the same integers everywhere
            for rule, (theirs, tolerance) in rules.items() if whole else [("softmax", rules["softmax"])]:
                points = evaluate.run(self.test, scheme, [40, 160], POSITIONS, rule=rule, **WISH)
                with pivotkv.connect(self.daemon.socket, threads=1) as kv:
                    audits = self.audited(kv, scheme, path, theirs)
                for point in points:
                    say = f"{name}, {rule}: {point}, the daemon {audits[point.k]}"
                    self.assertAlmostEqual(point.mass, audits[point.k][0], delta=tolerance, msg=say)
                    self.assertAlmostEqual(point.error, audits[point.k][1], delta=tolerance * max(1, 2 * point.error), msg=say)

    def test_exact_scores_are_the_best(self):
        best = evaluate.run(self.test, None, [40, 160, 900], POSITIONS, **WISH)
        for name in ("code", "hash-value"):
            scheme = schemes.load(self.folder / f"{name}.safetensors")
            points = evaluate.run(self.test, scheme, [40, 160, 900], POSITIONS, **WISH)
            for b, p in zip(best[:2], points):
                self.assertGreater(b.mass, p.mass)
            self.assertAlmostEqual(points[2].mass, 1, places=5)
            self.assertAlmostEqual(points[2].error, 0, places=5)

    def test_command(self):
        def run(*arguments):
            return subprocess.run([sys.executable, "-m", "pivotkv.evaluate_command", *map(str, arguments)],
                                  capture_output=True, text=True, timeout=60, check=False)

        common = (self.folder / "test", "--k", "40,160", "--sinks", "16", "--recent", "32", "--every", "20", "--begin", "481")
        done = run(*common, "--scheme", self.folder / "code.safetensors", "--format", "json")
        self.assertEqual(done.returncode, 0, done.stderr)
        rows = json.loads(done.stdout)
        points = evaluate.run(self.test, schemes.load(self.folder / "code.safetensors"), [40, 160], POSITIONS, **WISH)
        self.assertEqual([(r["scheme"], r["k"]) for r in rows],
                         [(n, k) for n in ("exact", "code.safetensors") for k in (40, 160)])
        for row, point in zip(rows[2:], points):
            self.assertEqual((row["bytes"], row["samples"]), (8, point.samples))
            self.assertAlmostEqual(row["mass"], point.mass, places=9)
        done = run(*common)
        self.assertEqual(len(done.stdout.splitlines()), 3)
        write_recording(self.folder / "mute", 3, 300, layers=(0, 1))
        write_recording(self.folder / "other", 3, 300, layers=(0,), values=True)
        code_file = self.folder / "code.safetensors"
        for arguments, code, word in (((self.folder / "mute",), 1, "no values"),
                                      ((common[0], "--begin", "950"), 1, "no position"),
                                      ((self.folder / "other", "--scheme", code_file), 1, "is for 2 layers"),
                                      ((common[0], self.folder / "other"), 1, "another model"),
                                      ((common[0], "--scheme", self.folder / "train"), 1, "no tensor"),
                                      ((common[0], "--k", "a"), 2, "no list of numbers"), ((), 2, "RECORDING")):
            failed = run(*arguments)
            self.assertEqual(failed.returncode, code, failed.stderr)
            self.assertIn(word, failed.stderr)
            self.assertNotIn("Traceback", failed.stderr)


class SizesTest(unittest.TestCase):
    """Signatures of several sizes: the choice against all choices, and what layers of different needs are given."""

    def test_choice(self):
        random, sizes = np.random.default_rng(4), [32, 64, 96]
        for mean in (32, 50, 64, 90, 96):
            found = np.sort(random.random((5, 3)))[:, ::-1]
            every = [pick for pick in itertools.product(range(3), repeat=5) if sum(sizes[i] for i in pick) <= 5 * mean]
            least = min(sum(found[layer, i] for layer, i in enumerate(pick)) for pick in every)
            chosen = sizes_of.choose(found, sizes, mean)
            self.assertLessEqual(sum(chosen), 5 * mean)
            self.assertAlmostEqual(sum(found[layer, sizes.index(size)] for layer, size in enumerate(chosen)), least)
        with self.assertRaisesRegex(ValueError, "below the smallest"):
            sizes_of.choose(found, sizes, 31)

    def test_command(self):
        """A layer that attends to recent tokens alone needs few bits, the other two share the rest."""
        def run(*arguments):
            return subprocess.run([sys.executable, "-m", "pivotkv.sizes", *map(str, arguments)], capture_output=True,
                                  text=True, timeout=60, check=False)

        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "recording"
            write_recording(path, 1, 900, layers=(2, 5, 6), values=True)
            file = tensors.File(path)
            arrays = {name: np.array(file.array(name)) for name in file.names()}
            arrays["k.5"][:, :, 0] = np.arange(900)[:, None] / 4  # the later, the larger the score: recent tokens have it all
            arrays["q.5"][:, :, 0] = 16
            tensors.write(path, arrays, recording.About("toy", "d1g", "noise").meta())
            common = (path, "--sizes", "64,32", "--k", "40,160", "--every", "40")
            done = run(*common, "--mean", "54", "--format", "json")
            self.assertEqual(done.returncode, 0, done.stderr)
            rows = json.loads(done.stdout)
            self.assertEqual([(r["layer"], r["bits"]) for r in rows], [(2, 64), (5, 32), (6, 64)])
            for row in (rows[0], rows[2]):
                self.assertLess(row["error_64"], 0.95 * row["error_32"])
            self.assertEqual(run(*common, "--mean", "54").stdout.splitlines()[-1], "64,32,64")
            done = run(path, "--sizes", "0,64", "--every", "40", "--mean", "43")
            self.assertEqual(done.stdout.splitlines()[-1], "64,0,64", done.stderr)
            write_recording(path, 3, 300, layers=(0, 1))
            for arguments, code, word in (((path,), 1, "no values"), ((path, "--sizes", "40"), 2, "multiples of 32"),
                                          ((path, "--sizes", "64", "--mean", "40"), 2, "below the smallest"),
                                          ((path.parent / "none",), 1, "none")):
                failed = run(*arguments)
                self.assertEqual(failed.returncode, code, failed.stderr)
                self.assertIn(word, failed.stderr)
                self.assertNotIn("Traceback", failed.stderr)


if __name__ == "__main__":
    unittest.main()
