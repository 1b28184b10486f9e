"""Training: gradients against differences, what is learnt, checkpoints, resume, and bytes that repeat."""
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import numpy as np

from pivotkv import command, evaluate, hash_unit, mlp, recording, schemes, tensors, train
from pivotkv.hash_unit import Options, Text

QUICK = dict(steps=6, hidden=(16,), bits=16, chunk=32, labels=8, negatives=64, sinks=16, recent=16)


def vectors(random, *shape):
    """Low-rank and noise: something to learn, and keys that matter."""
    x = random.standard_normal(shape).astype(np.float32)
    return x * np.geomspace(3, 0.1, shape[-1]).astype(np.float32) + 0.5


def write_recording(path, seed=1, tokens=600, layers=(3, 9), q_heads=4, kv_heads=2, dim=64, values=False):
    random = np.random.default_rng(seed)
    arrays = {}
    for layer in layers:
        arrays[f"q.{layer}"] = vectors(random, tokens, q_heads, dim).astype(np.float16)
        arrays[f"k.{layer}"] = vectors(random, tokens, kv_heads, dim).astype(np.float16)
        if values:
            arrays[f"v.{layer}"] = random.standard_normal((tokens, kv_heads, dim)).astype(np.float16)
    tensors.write(path, arrays, recording.About("toy", "d1g", "noise").meta())


class GradientTest(unittest.TestCase):
    def test_against_differences(self):
        random = np.random.default_rng(0)
        text = Text(vectors(random, 2, 400, 64), vectors(random, 400, 64))
        for hidden, loss in itertools.product(((), (16, 16)), hash_unit.LOSSES):
            options = Options(**QUICK, loss=loss)
            widths = [64, *hidden, 8]
            unit = hash_unit.Unit(mlp.MLP.fresh(widths, random), [mlp.MLP.fresh(widths, random) for _ in range(2)])
            for net in (unit.k, *unit.q):  # float64, so that differences mean something
                net.weights = [w.astype(np.float64) for w in net.weights]
                net.biases = [b.astype(np.float64) for b in net.biases]
            batch = hash_unit._draw([hash_unit.labelled(text, options)], options, random)
            _, d_k, d_q = hash_unit._step(unit, batch, options)
            for parameter, gradient in [*zip(unit.k.parameters(), d_k), *zip(unit.q[batch.head].parameters(), d_q)]:
                at = tuple(random.integers(n) for n in parameter.shape)
                losses = []
                for change in (1e-5, -2e-5):
                    parameter[at] += change
                    losses.append(hash_unit._step(unit, batch, options)[0])
                parameter[at] += 1e-5
                self.assertAlmostEqual((losses[0] - losses[1]) / 2e-5, gradient[at], delta=1e-6 + 1e-4 * abs(gradient[at]))

    def test_sampled_loss_has_the_full_loss_as_its_mean(self):
        random = np.random.default_rng(3)
        text = Text(vectors(random, 1, 900, 64), vectors(random, 900, 64))
        unit = hash_unit.Unit(mlp.MLP.fresh([64, 16, 8], random), [mlp.MLP.fresh([64, 16, 8], random)])

        def loss(kind, negatives, seed):
            options = Options(**{**QUICK, "negatives": negatives, "loss": kind})
            drawn = hash_unit._draw([hash_unit.labelled(text, options)], options, np.random.default_rng(seed))
            return hash_unit._step(unit, drawn, options)[0]

        # softmax has the logarithm of an estimated sum, which is a little below the sum's: half its relative variance.
        for kind, slack in (("bce", 1e-4), ("softmax", 1e-2)):
            full = [loss(kind, 0, seed) for seed in range(40)]
            thin = [loss(kind, 64, seed) for seed in range(40)]
            apart = abs(np.mean(full) - np.mean(thin))
            self.assertLess(apart, 3 * np.std(np.subtract(full, thin)) / np.sqrt(40) + slack)

    def test_labels_are_the_best_visible_keys(self):
        random = np.random.default_rng(4)
        text = Text(vectors(random, 1, 500, 64), vectors(random, 500, 64))
        for consecutive in (False, True):
            options = Options(**{**QUICK, "negatives": 0, "consecutive": consecutive})
            batch = hash_unit._draw([hash_unit.labelled(text, options)], options, random)
            positions = [int(np.flatnonzero((text.q[0] == query).all(axis=1))[0]) for query in batch.queries]
            self.assertEqual(len(set(positions)), options.chunk)
            self.assertEqual(positions[-1] - positions[0] == options.chunk - 1, consecutive)
            for i, position in enumerate(positions):
                sees = np.arange(options.sinks, position + 1 - options.recent)
                want = sees[np.argsort(-(text.k[sees] @ batch.queries[i]))[: options.labels]]
                np.testing.assert_array_equal(np.flatnonzero(batch.labels[i]) + options.sinks, np.sort(want))
                np.testing.assert_array_equal(np.flatnonzero(batch.weights[i]) + options.sinks, sees)


class TrainTest(unittest.TestCase):
    def setUp(self):
        self._folder = tempfile.TemporaryDirectory()
        self.addCleanup(self._folder.cleanup)
        self.folder = pathlib.Path(self._folder.name)
        self.recording = self.folder / "r.safetensors"
        write_recording(self.recording)

    def finished(self, plan, name, stops=()):
        checkpoint = train.Checkpoint(self.folder / f"{name}.checkpoint", plan)
        for stop in stops:
            self.assertFalse(train.run(plan, checkpoint, stop_after=stop))
        self.assertTrue(train.run(plan, checkpoint, workers=2))
        train.finish(plan, checkpoint, self.folder / name)
        return (self.folder / name).read_bytes()

    def test_same_seed_same_bytes_also_after_interruptions(self):
        plan = train.plan_of("hash", [self.recording], **QUICK)
        whole = self.finished(plan, "a")
        self.assertEqual(whole, self.finished(plan, "b", stops=(3, 1)))
        other = train.plan_of("hash", [self.recording], **QUICK, seed=2)
        self.assertNotEqual(whole, self.finished(other, "c"))
        with self.assertRaisesRegex(ValueError, "another training"):
            train.Checkpoint(self.folder / "a.checkpoint", other)

    def test_hash_learns(self):
        """More mass than the same MLPs before training, and than sinks and recent alone."""
        path, held = self.folder / "r.safetensors", self.folder / "held.safetensors"
        write_recording(path, tokens=1500, layers=(0,))
        write_recording(held, seed=2, tokens=700, layers=(0,), values=True)
        mass = []
        for steps in (1, 400):
            plan = train.plan_of("hash", [path], **{**QUICK, "steps": steps, "rate": 3e-3, "bits": 32, "hidden": (32, 32)})
            self.finished(plan, f"h{steps}")
            scheme, test = schemes.load(self.folder / f"h{steps}"), recording.load(held)
            self.assertEqual((scheme.kind, scheme.bits, scheme.geometry), ("hash", 64, test.geometry))
            mass.append(evaluate.run(test, scheme, [48], range(400, 700, 20), sinks=16, recent=16)[0].mass)
        self.assertGreater(mass[1], mass[0] + 0.1)

    def test_linear_file(self):
        plan = train.plan_of("linear", [self.recording], **{**QUICK, "hidden": (), "bits": 64})
        self.finished(plan, "l")
        scheme = schemes.load(self.folder / "l")
        self.assertEqual((scheme.kind, scheme.bits, scheme.meta["query"]), ("linear", 64, "value"))
        self.assertEqual(scheme.file.shape("q.weight"), (2, 4, 64, 64))
        self.assertEqual(scheme.sign(1, 1, np.ones((5, 64), np.float32)).shape, (5, 64))

    def test_command(self):
        out = self.folder / "hash.safetensors"
        command = [sys.executable, "-m", "pivotkv.train_command", str(self.recording), "--out", str(out), "--steps", "4",
                   "--bits", "16", "--hidden", "16", "--chunk", "32", "--labels", "8", "--sinks", "16", "--recent", "16",
                   "--workers", "2"]

        def run(*more):
            return subprocess.run([*command, *more], capture_output=True, text=True, timeout=120, check=False)

        done = run("--stop-after", "2")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertFalse(out.exists())
        done = run()
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("2 of 8 heads are in", done.stderr)
        self.assertIn("hash, 32 bits", done.stdout)
        self.assertEqual(np.array(json.loads(pathlib.Path(f"{out}.losses.json").read_text())).shape, (8, 4))
        meta = tensors.File(out).meta
        self.assertEqual([meta[n] for n in ("scheme", "layers", "q_heads", "kv_heads", "head_dim", "bits", "model", "text",
                                            "model_digest", "tokens")],
                         ["hash", "2", "4", "2", "64", "32", "toy", "noise", "d1g", "600"])
        for more, code, word in ((("--seed", "9"), 1, "another training"), (("--bits", "17"), 1, "32 to 256"),
                                 (("--hidden", "24"), 1, "multiples of 16"), (("--hidden", "16,16,16,16"), 1, "at most 3"),
                                 (("--steps", "0"), 2, "above zero"), (("--chunk", "700"), 1, "training needs")):
            failed = run(*more)
            self.assertEqual(failed.returncode, code, failed.stderr)
            self.assertIn(word, failed.stderr)
            self.assertNotIn("Traceback", failed.stderr)
        command[3] = str(self.folder / "none.safetensors")
        self.assertIn("No such file", run().stderr)

    def test_curve(self):
        if importlib.util.find_spec("matplotlib") is None:
            self.skipTest("no matplotlib")
        losses, made = np.geomspace(1, 0.1, 200)[None] * np.ones((4, 1)), set()
        for _ in range(2):
            self.assertTrue(command.save_curve(self.folder / "curve.png", losses, "toy"))
            made.add((self.folder / "curve.png").read_bytes())
        self.assertEqual({raw[:8] for raw in made}, {b"\x89PNG\r\n\x1a\n"})
        self.assertEqual(len(made), 1)

    def test_interrupted_and_killed(self):
        """Ctrl-C reaches the whole group, SIGKILL one worker: a sentence each time, nobody left, the same bytes in the end."""
        out, checkpoint = self.folder / "h.safetensors", self.folder / "h.safetensors.checkpoint"
        write_recording(self.recording, tokens=1200)
        command = [sys.executable, "-m", "pivotkv.train_command", str(self.recording), "--out", str(out), "--steps", "60",
                   "--bits", "16", "--hidden", "32", "--workers", "2"]

        def begin(*more):
            process = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True, start_new_session=True)
            self.addCleanup(process.stderr.close)
            return process

        def wait_for(condition):
            deadline = time.monotonic() + 60
            while not condition():
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.01)

        process = begin("--workers", "1")
        wait_for(lambda: list(checkpoint.glob("unit-*")))
        os.killpg(process.pid, signal.SIGINT)
        told = process.communicate(timeout=60)[1]
        self.assertEqual(process.returncode, 130, told)
        self.assertIn("interrupted", told)
        self.assertNotIn("Traceback", told)
        self.assertTrue(0 < len(list(checkpoint.glob("unit-*"))) < 8)
        with self.assertRaises(ProcessLookupError):
            wait_for(lambda: os.killpg(process.pid, 0))
        process = begin()
        wait_for(lambda: len(workers(process.pid)) == 2)
        os.kill(workers(process.pid)[0], signal.SIGKILL)
        told = process.communicate(timeout=60)[1]
        self.assertEqual(process.returncode, 1, told)
        self.assertIn("a worker process died", told)
        self.assertNotIn("Traceback", told)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        whole = self.folder / "whole.safetensors"
        command[command.index(str(out))] = str(whole)
        self.assertEqual(subprocess.run(command, capture_output=True, timeout=120, check=False).returncode, 0)
        self.assertEqual(out.read_bytes(), whole.read_bytes())


def workers(pid):
    """Of its children, those that train."""
    children = [word for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children") for word in task.read_text().split()]
    return [int(child) for child in children if b"spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes()]


if __name__ == "__main__":
    unittest.main()
