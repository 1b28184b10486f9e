"""Calibration: equal to what the C library learns from the same tokens, the same in chunks as in one piece, and files that the
daemon takes."""
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import numpy as np

import pivotkv
from daemon import PrivateDaemon
from pivotkv import recording, schemes, tensors
from pivotkv.calibrate import Calibrator, give_bits, turn
from pivotkv.recording import Geometry
from private import DaemonTest
from test_train import vectors, write_recording

G = Geometry(layers=2, q_heads=4, kv_heads=2, head_dim=64)
WIDE = Geometry(layers=1, q_heads=2, kv_heads=1, head_dim=128)
TOKENS, CONTEXT = 4200, 30000


def calibrator(rope, limit=4080, piece=500, tokens=TOKENS, seed=7, geometry=G):
    """Fed with what arrays(seed) holds, `piece` tokens at a time."""
    made, source = Calibrator(geometry, rope, CONTEXT, limit=limit), arrays(tokens, seed, geometry)
    for layer in range(geometry.layers):
        for at in range(0, tokens, piece):
            made.feed(layer, at, q=source[f"q.{layer}"][at: at + piece], k=source[f"k.{layer}"][at: at + piece])
    return made


def arrays(tokens=TOKENS, seed=7, g=G):
    random = np.random.default_rng(seed)
    return {f"{side}.{layer}": vectors(random, tokens, heads, g.head_dim)
            for layer in range(g.layers) for side, heads in (("q", g.q_heads), ("k", g.kv_heads))}


class LibraryTest(unittest.TestCase):
    def learnt_in_c(self, folder, kind, bits, rope, piece=500, geometry=G):
        path = pathlib.Path(folder) / "recording.safetensors"
        tensors.write(path, arrays(g=geometry))
        tool = pathlib.Path(os.environ["PIVOTKV_BUILD_DIR"]) / "tests" / "unit" / "calibrate"
        command = [tool, path, kind, bits, CONTEXT, piece, rope.base, int(rope.interleaved)]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 77:
            self.skipTest("the library is built without LAPACK, so it does not calibrate itself")
        self.assertEqual(done.returncode, 0, done.stderr)
        made = pathlib.Path(done.stdout.strip())
        file = tensors.File(made)
        made.unlink()
        return file

    def test_code_equals_what_the_library_learns(self):
        for bits, rope, g in ((32, pivotkv.Rope(0.0), G), (64, pivotkv.Rope(1e5), G),
                              (128, pivotkv.Rope(1e4, interleaved=True), G), (32, pivotkv.Rope(1e5), WIDE)):
            with self.subTest(bits=bits, dim=g.head_dim), tempfile.TemporaryDirectory() as folder:
                theirs = self.learnt_in_c(folder, 1, bits, rope, geometry=g)
                ours = calibrator(rope, geometry=g).code(bits)
                np.testing.assert_array_equal(ours["k.bits"], theirs.array("k.bits"))
                for name in ("k.mean", "k.step", "k.low"):
                    np.testing.assert_allclose(ours[name], theirs.array(name), rtol=2e-4, atol=2e-5, err_msg=name)
                # Each dimension up to its sign, which an eigenvector leaves open.
                k, q = theirs.array("k.weight"), theirs.array("q.weight")
                signs = np.sign((ours["k.weight"] * k).sum(axis=-1, keepdims=True))
                used = ours["k.bits"][..., None] > 0
                for mine, other in ((ours["k.weight"], k), (ours["q.weight"], q)):
                    size = np.sqrt((other ** 2).sum(axis=-1, keepdims=True))
                    off = (np.abs(mine * signs - other) / size)[np.broadcast_to(used, other.shape)]
                    self.assertLess(float(off.max()), 2e-2)

    def test_sign_equals_what_the_library_learns(self):
        with tempfile.TemporaryDirectory() as folder:
            theirs = self.learnt_in_c(folder, 0, 128, pivotkv.Rope(0.0), piece=TOKENS)
            ours = calibrator(None).sign(128)
            for name in ("k.mean", "k.deviation"):
                np.testing.assert_allclose(ours[name], theirs.array(name), rtol=2e-4, atol=2e-4)


class CalibratorTest(unittest.TestCase):
    def test_chunks_do_not_matter(self):
        rope = pivotkv.Rope(1e5)
        whole, pieces = (calibrator(rope, limit=None, piece=p, tokens=900).code(64) for p in (900, 37))
        np.testing.assert_array_equal(whole["k.bits"], pieces["k.bits"])
        np.testing.assert_allclose(whole["k.step"], pieces["k.step"], rtol=1e-4)

    def test_the_product_is_kept(self):
        made = calibrator(None, limit=None, tokens=900)
        for shrink in (0.0, 0.3, 1.0):
            cell = made.solve(1, 1, 64, shrink)
            q = arrays(900)["q.1"][100:140, 3].astype(np.float64)
            k = arrays(900)["k.1"][100:140, 1].astype(np.float64) - cell["k.mean"]
            want, got = q @ k.T, (q @ cell["q.weight"].T) @ (k @ cell["k.weight"].T).T
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())
            self.assertEqual(cell["k.bits"].sum(), 64)

    def test_turn_undoes_itself_and_leaves_the_rest(self):
        x = np.random.default_rng(1).standard_normal((5, 3, 64)).astype(np.float32)
        angles = np.random.default_rng(2).uniform(-99, 99, (5, 16))
        for interleaved in (False, True):
            y = turn(x, angles, interleaved)
            np.testing.assert_array_equal(y[..., 32:], x[..., 32:])
            np.testing.assert_allclose(turn(y, -angles, interleaved), x, atol=1e-5)
            self.assertGreater(np.abs(y - x).max(), 0.1)

    def test_bits_go_where_they_help(self):
        np.testing.assert_array_equal(give_bits(np.array([1000, 1, 1, 0.0]), 8), [6, 1, 1, 0])
        self.assertEqual(give_bits(np.ones(8), 48).tolist(), [6] * 8)

    def test_what_it_refuses(self):
        made = Calibrator(G, None, CONTEXT)
        k = np.zeros((20, 2, 64), np.float32)
        for word, call in (("shape", lambda: made.feed(0, 0, q=k)), ("layer 2", lambda: made.feed(2, 0, k=k)),
                           ("as numpy or by DLPack", lambda: made.feed(0, 0, k=[[1.0]])),
                           ("NaN", lambda: made.feed(0, 0, k=k * np.nan)), ("feed both", lambda: made.code(64)),
                           ("needs 64", lambda: made.sign(64)), ("steps of 32", lambda: made.write("x", 40))):
            with self.assertRaisesRegex(ValueError, word):
                call()


class FileTest(DaemonTest):
    """What the daemon makes of the files, and numpy of the same."""

    def test_files_serve(self):
        """The daemon's lists are those that numpy's bits and weights give, but for a code where rounding decides."""
        source, made = arrays(1200), calibrator(pivotkv.Rope(1e5), limit=None, tokens=1200)
        v = np.random.default_rng(3).standard_normal((1200, G.kv_heads, G.head_dim)).astype(np.float32)
        from pivotkv import evaluate
        with pivotkv.connect(self.daemon.socket, threads=1) as kv:
            for scheme, bits in (("code", 64), ("sign", 64), ("sign", 96)):
                path = self.folder / f"{scheme}-{bits}.safetensors"
                made.write(path, bits, scheme=scheme, about=recording.About("toy", "d", "noise"))
                model = kv.model(f"{scheme}-{bits}", layers=2, q_heads=4, kv_heads=2, head_dim=64, dtype="f32", scheme=scheme,
                                 bits=bits, weights=str(path))
                ours, agree = schemes.load(path), []
                with model.sequence(1300) as sequence:
                    for layer in range(2):
                        sequence.append(layer, source[f"k.{layer}"], v)
                    for layer in range(2):
                        q = source[f"q.{layer}"][-3:]
                        theirs = sequence.select(layer, q, k=100, sinks=16, recent=32)
                        for i in range(3):
                            for head in range(2):
                                see = 1200 - 2 + i
                                want = evaluate.choose(ours, layer, head, q[i], source[f"k.{layer}"][:see, head],
                                                       evaluate.Wish(100, 16, 32))
                                agree.append(len(np.intersect1d(want, theirs.index[i, head, :148])) / 148)
                    self.assertGreater(min(agree), 0.98, (scheme, bits, agree))

    def test_refusals_are_sentences(self):
        path = self.folder / "refused.safetensors"
        calibrator(None, limit=None, tokens=300).write(path, 64)
        good = dict(layers=2, q_heads=4, kv_heads=2, head_dim=64, dtype="f32", scheme="code", bits=64, weights=str(path))
        with pivotkv.connect(self.daemon.socket, threads=1) as kv:
            for change, word in ((dict(layers=3), "other layers"), (dict(q_heads=8), "heads"), (dict(kv_heads=4), "heads"),
                                 (dict(head_dim=128), "head_dim"), (dict(bits=128), "another size"),
                                 (dict(scheme="sign"), "another signature scheme"), (dict(scheme="hash"), "another signature"),
                                 (dict(weights=str(path) + "x"), "cannot be opened"), (dict(weights=__file__), "damaged")):
                with self.assertRaises(pivotkv.Error) as caught:
                    kv.model("refused", **{**good, **change})
                self.assertIn(word, caught.exception.strerror)
            self.assertEqual(kv.model("fits", **good).kv_heads, 2)


READER = """
'''A model that reads: what client/examples/smollm2.py is, in a few lines.'''
import numpy as np

class Toy:
    layers, q_heads, kv_heads, head_dim, rope_base, rope_interleaved, global_layers = 4, 4, 2, 64, 1e4, True, (1, 3)

    def __init__(self, weights):
        assert weights.name == "weights.gguf"

    def encode(self, text):
        return list(text.encode())

    def forward(self, tokens, first, cache):
        for layer in range(self.layers):
            x = np.stack([np.random.default_rng([t, layer]).standard_normal((8, 64)) for t in tokens]).astype(np.float32)
            cache.append(layer, x[:, :2], x[:, 2:4])
            assert cache.attend(layer, x[:, 4:]).shape == (len(tokens), 4, 64)

class ExactCache:
    def __init__(self, model):
        pass

    def append(self, layer, k, v):
        pass

    def attend(self, layer, q):
        return q

class WindowCache:
    def __init__(self, model, remote):
        self.number, self.remote = {layer: i for i, layer in enumerate(model.global_layers)}, remote

    def append(self, layer, k, v):
        if layer in self.number:
            self.remote.append(self.number[layer], k, v)

    def attend(self, layer, q):
        return self.remote.attend(self.number[layer], q) if layer in self.number else q
"""


class CommandTest(unittest.TestCase):
    def test_a_model_reads(self):
        """Through its own cache and through a daemon: the same recording, and a file made at once."""
        with tempfile.TemporaryDirectory() as name, PrivateDaemon(
                pathlib.Path(os.environ["PIVOTKVD"]), pool_bytes=16 << 20, arena_bytes=32 << 20) as daemon:
            folder, made = pathlib.Path(name), []
            (folder / "toy.py").write_text(READER)
            (folder / "weights.gguf").write_bytes(b"numbers")
            (folder / "text.txt").write_text("In the beginning was the word. " * 20)
            for more in ((), ("--socket", daemon.socket)):
                command = ["--model", f"{folder}/toy.py:Toy", "--text", folder / "text.txt", "--tokens", 400, "--skip", 31,
                           "--weights", folder / "weights.gguf",
                           "--values", "--layers", "1", "--save-recording", folder / "r.safetensors",
                           "--out", folder / "c.safetensors", *more]
                done = subprocess.run([sys.executable, "-m", "pivotkv.calibrate_command", *map(str, command)],
                                      capture_output=True, text=True, timeout=60, check=False)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertIn("reading text.txt 400/400 tokens", done.stderr)
                kept = recording.load(folder / "r.safetensors")
                self.assertEqual((kept.layers, kept.tokens, kept.has_values, kept.about.model), ([1], 400, True, "toy"))
                self.assertEqual((kept.about.rope, kept.about.text), (pivotkv.Rope(1e4, 0, True), "text.txt"))
                self.assertEqual(kept.about.digest, hashlib.sha256(b"numbers").hexdigest())
                want = np.random.default_rng([ord("I"), 3]).standard_normal((8, 64)).astype(np.float16)
                np.testing.assert_array_equal(kept.k(1)[0], want[:2])
                np.testing.assert_array_equal(kept.q(1)[0], want[4:])
                made.append((folder / "c.safetensors").read_bytes())
            self.assertEqual(made[0], made[1])
            self.assertEqual(schemes.load(folder / "c.safetensors").geometry, Geometry(1, 4, 2, 64))

    def test_command(self):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            write_recording(folder / "r.safetensors", layers=(3, 9), tokens=700)
            file = tensors.File(folder / "r.safetensors")
            np.savez(folder / "r.npz", model="toy", text="noise", model_digest="d1g",
                     **{tensor: file.array(tensor) for tensor in file.names()})

            def run(*arguments):
                return subprocess.run([sys.executable, "-m", "pivotkv.calibrate_command", *map(str, arguments)],
                                      capture_output=True, text=True, timeout=60, check=False)

            made = []
            for source in ("r.safetensors", "r.npz"):
                done = run(folder / source, "--out", folder / "c.safetensors", "--bits", 64, "--context", 9000,
                           "--format", "json")
                self.assertEqual(done.returncode, 0, done.stderr)
                made.append((folder / "c.safetensors").read_bytes())
                row, = json.loads(done.stdout)
                self.assertEqual((row["scheme"], row["bits"], row["tokens"], row["layers"]), ("code", 64, 684, 2))
            self.assertEqual(made[0], made[1])
            meta = tensors.File(folder / "c.safetensors").meta
            self.assertEqual([meta[n] for n in ("model", "model_digest", "text", "context", "shrink")],
                             ["toy", "d1g", "noise", "9000", "0.6"])
            (folder / "bad.npz").write_bytes(b"PK nothing")
            (folder / "bad.safetensors").write_bytes(b"\xff" * 100)
            np.savez(folder / "other.npz", x=np.zeros(3))
            np.savez(folder / "pickled.npz", **{"k.0": np.array([{}], object)})
            for arguments, code, word in (((folder / "none",), 1, "No such file"), ((folder / "bad.npz",), 1, "damaged"),
                                          ((folder / "bad.safetensors",), 1, "damaged"),
                                          ((folder / "other.npz",), 1, "no recording"),
                                          ((folder / "pickled.npz",), 1, "plain arrays"), ((), 2, "RECORDING or --model"),
                                          ((folder / "r.npz", "--bits", "33"), 1, "steps of 32"),
                                          ((folder / "r.npz", "--shrink", "2"), 2, "between 0 and 1"),
                                          (("--model", "x.py:Y", "--text", folder / "r.npz"), 1, "no file x.py")):
                failed = run(*arguments, "--out", folder / "x")
                self.assertEqual(failed.returncode, code, failed.stderr)
                self.assertIn(word, failed.stderr)
                self.assertNotIn("Traceback", failed.stderr)
                self.assertFalse((folder / "x").exists())


if __name__ == "__main__":
    unittest.main()
