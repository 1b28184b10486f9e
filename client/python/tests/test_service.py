"""The package against a private daemon: arrays in and out, dtypes, DLPack, errors with their sentences."""
import errno
import os
import pathlib
import signal
import subprocess
import sys
import time
import unittest

import numpy as np

import pivotkv
from daemon import PrivateDaemon

LAYERS, Q, KV, DIM = 2, 4, 2, 64


def exact(k, v, q):
    """out [queries, q_heads, dim] of the last queries, causal, in float64."""
    k, v, q = (np.asarray(a, np.float64) for a in (k, v, q))
    out = np.empty(q.shape)
    for i in range(len(q)):
        sees = len(k) - len(q) + 1 + i
        for h in range(q.shape[1]):
            scores = k[:sees, h * KV // Q] @ q[i, h] / np.sqrt(DIM)
            weights = np.exp(scores - scores.max())
            out[i, h] = weights @ v[:sees, h * KV // Q] / weights.sum()
    return out


class PrivateDaemonTest(unittest.TestCase):
    def test_ends_with_a_killed_parent(self):
        start = ("import os, pathlib, signal; from daemon import PrivateDaemon\n"
                 "d = PrivateDaemon(pathlib.Path(os.environ['PIVOTKVD']), pool_bytes=1 << 23, arena_bytes=1 << 24)\n"
                 "print(d.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)")
        ended = subprocess.run([sys.executable, "-c", start], stdout=subprocess.PIPE, timeout=60, check=False)
        self.assertEqual(ended.returncode, -signal.SIGKILL)
        daemon = pathlib.Path("/proc") / ended.stdout.decode().strip()
        deadline = time.monotonic() + 20
        while self.runs(daemon) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertFalse(self.runs(daemon))

    @staticmethod
    def runs(process: pathlib.Path) -> bool:
        """Not gone, and not a zombie that nobody has reaped."""
        try:
            return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False


class ServiceTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = PrivateDaemon(pathlib.Path(os.environ["PIVOTKVD"]), pool_bytes=16 << 20, arena_bytes=64 << 20)

    @classmethod
    def tearDownClass(cls):
        cls.daemon.stop()

    def setUp(self):
        self.random = np.random.default_rng(7)

    def numbers(self, *shape):
        return self.random.standard_normal(shape).astype(np.float32)

    def test_dtypes(self):
        for dtype, tolerance in (("f32", 1e-5), ("f16", 2e-3), ("bf16", 2e-2)):
            for served in (False, True):
                with pivotkv.connect(self.daemon.socket, served=served, threads=1) as kv:
                    model = kv.model(f"m-{dtype}", layers=LAYERS, q_heads=Q, kv_heads=KV, head_dim=DIM, dtype=dtype)
                    sequence = model.sequence(1000)
                    k, v, q = self.numbers(400, KV, DIM), self.numbers(400, KV, DIM), self.numbers(3, Q, DIM)
                    for layer in range(LAYERS):
                        sequence.append(layer, k[:300], v[:300])
                        sequence.append(layer, k[300:], v[300:])
                    self.assertEqual(len(sequence), 400)
                    out, lse = sequence.attend(1, q, dense=True)
                    np.testing.assert_allclose(out, exact(k, v, q), rtol=0, atol=tolerance)
                    self.assertEqual(lse.shape, (3, Q))

    def test_backends(self):
        with pivotkv.connect(self.daemon.socket, threads=1) as kv:
            self.assertIn("direct on host", kv.describe())
        with pivotkv.connect(self.daemon.socket, threads=1, served=True, backend="host") as kv:
            self.assertTrue(kv.describe().startswith("served"))
        for backend, number in (("cuda", errno.EPROTO), ("vulkan", errno.EOPNOTSUPP)):
            with self.assertRaises(pivotkv.Error) as caught:
                pivotkv.connect(self.daemon.socket, backend=backend)
            self.assertEqual(caught.exception.errno, number)

    def test_select_audit_fork(self):
        with pivotkv.connect(self.daemon.socket, threads=1) as kv:
            model = kv.model("m", layers=LAYERS, q_heads=Q, kv_heads=KV, head_dim=DIM, dtype="f32")
            sequence = model.sequence(1000, label="text")
            k, v, q = self.numbers(500, KV, DIM), self.numbers(500, KV, DIM), self.numbers(2, Q, DIM)
            for layer in range(LAYERS):
                sequence.append(layer, k, v)
            picked = sequence.select(0, q, k=50, sinks=8, recent=16, rows=True)
            self.assertEqual(picked.count.tolist(), [[74, 74], [74, 74]])
            np.testing.assert_array_equal(picked.rows[1, 1, :, 0], k[picked.index[1, 1], 1])
            audit = sequence.audit(0, q, k=499)
            self.assertAlmostEqual(audit.mass, 1.0, places=4)
            self.assertLess(audit.error, 1e-3)
            self.assertLess(sequence.audit(0, q, k=20, sinks=0, recent=8).mass, 0.9)
            with sequence.fork(333) as child:
                np.testing.assert_allclose(child.attend(1, q, dense=True)[0], exact(k[:333], v[:333], q), atol=1e-5)
            sequence.truncate(100)
            self.assertEqual(len(sequence), 100)
            _, _, explain = sequence.explain(0, q, k=10, sinks=8, recent=16)
            self.assertEqual((explain.queries_sparse, explain.tokens_attended), (2, 2 * KV * 34))

    def test_code_calibrates_itself_and_is_shared(self):
        """Through the daemon: more mass than `sign` at the same bits, equal lists for a second worker and for a served one."""
        count, spread = 4480, np.geomspace(3, 0.05, DIM).astype(np.float32)
        k, v, q = self.numbers(count, KV, DIM) * spread, self.numbers(count, KV, DIM), self.numbers(count, Q, DIM) * 6
        wish, missed = pivotkv.Budget(k=64, sinks=16, recent=16), {}
        with pivotkv.connect(self.daemon.socket, threads=1) as kv:
            for scheme in ("sign", "code"):
                model = kv.model(f"learns-{scheme}", layers=1, q_heads=Q, kv_heads=KV, head_dim=DIM, dtype="f32", scheme=scheme)
                sequence = model.sequence(5000)
                for at in range(0, count, 224):
                    sequence.append(0, k[at: at + 224], v[at: at + 224])
                    sequence.attend(0, q[at: at + 224], wish)
                model.settle()
                missed[scheme] = 1 - sequence.audit(0, q[-1:], wish).mass
            self.assertLess(missed["code"], 0.6 * missed["sign"])
            mine = sequence.select(0, q[-1:], wish)
            for served in (False, True):
                with pivotkv.connect(self.daemon.socket, threads=1, served=served) as other:
                    model = other.model("learns-code", layers=1, q_heads=Q, kv_heads=KV, head_dim=DIM, dtype="f32")
                    theirs = model.open(sequence.handle).select(0, q[-1:], wish)
                    np.testing.assert_array_equal(mine.index, theirs.index)
                    np.testing.assert_array_equal(mine.score, theirs.score)
                    # A sequence of its own needs no calibration any more.
                    with model.sequence(1000) as fresh:
                        fresh.append(0, k[:900], v[:900])
                        fresh.recalibrate()  # it has the latest: nothing to do
                        again = 1 - fresh.audit(0, q[-1:], wish).mass
                    self.assertLess(again, 0.6 * missed["sign"])

    def test_batch(self):
        """A step of a batch gives the bits of append and attend_batch; a step that raises does not count."""
        with pivotkv.connect(self.daemon.socket, threads=1) as kv:
            model = kv.model("batch", layers=LAYERS, q_heads=Q, kv_heads=KV, head_dim=DIM, dtype="f32", scheme="sign")
            budget = pivotkv.Budget(k=20, sinks=8, recent=8, dense_below=40)
            plain, batched = [[model.sequence(400) for _ in range(2)] for _ in range(2)]
            for s in plain + batched:
                for layer in range(LAYERS):
                    s.append(layer, np.ones((30, KV, DIM), np.float32), np.ones((30, KV, DIM), np.float32))
            with model.batch(batched, budget) as batch:
                for _ in range(70):
                    k, v, q = (self.random.normal(size=(2, heads, DIM)).astype(np.float32) for heads in (KV, KV, Q))
                    with batch.step():
                        results = []
                        for layer in range(LAYERS):
                            batch.append(layer, k, v)
                            results.append(batch.attend(layer, q))
                    for layer in range(LAYERS):
                        for i, s in enumerate(plain):
                            s.append(layer, k[i:i + 1], v[i:i + 1])
                        out, lse, _ = model.attend_batch(plain, [1, 1], layer, q, budget)
                        np.testing.assert_array_equal(out, results[layer][0])
                        np.testing.assert_array_equal(lse, results[layer][1])
                with self.assertRaises(ValueError), batch.step():
                    batch.append(0, k[:1], v)
                batch.wait()
                self.assertEqual([len(s) for s in batched], [100, 100])
                self.assertEqual(batch.rows(), (0, 0))
                with self.assertRaises(pivotkv.Error) as caught:
                    batch.append(0, k, v)
                self.assertEqual(caught.exception.errno, errno.EINVAL)
                with self.assertRaises(pivotkv.Error) as caught:
                    batched[0].close()
                self.assertEqual(caught.exception.errno, errno.EBUSY)

    def test_errors_have_numbers_and_sentences(self):
        with pivotkv.connect(self.daemon.socket, threads=1) as kv:
            model = kv.model("m", layers=LAYERS, q_heads=Q, kv_heads=KV, head_dim=DIM, dtype="f32")
            sequence = model.sequence(100)
            k, long = self.numbers(64, KV, DIM), self.numbers(101, KV, DIM)
            for number, word, call in (
                    (errno.EOVERFLOW, "max_tokens", lambda: sequence.append(0, long, long)),
                    (errno.EDOM, "NaN", lambda: sequence.append(0, k * np.nan, k)),
                    (errno.EINVAL, "number of tokens", lambda: sequence.attend(0, self.numbers(1, Q, DIM), k=1)),
                    (errno.ENOTUNIQ, "registered", lambda: kv.model("m", layers=3, q_heads=Q, kv_heads=KV, head_dim=DIM)),
                    (errno.EINVAL, "head_dim", lambda: kv.model("n", layers=3, q_heads=Q, kv_heads=KV, head_dim=80)),
                    (errno.ESTALE, "gone", lambda: model.open(sequence.handle + (5 << 32)))):
                with self.assertRaises(pivotkv.Error) as caught:
                    call()
                self.assertEqual(caught.exception.errno, number)
                self.assertIn(word, caught.exception.strerror)
            with self.assertRaises(ValueError):
                sequence.append(0, k[:, :1], k)
            sequence.close()
            with self.assertRaises(ValueError):
                sequence.append(0, k, k)
        with self.assertRaises(pivotkv.Error) as caught:
            pivotkv.connect("/tmp/" + "x" * 120)
        self.assertEqual(caught.exception.errno, errno.ENAMETOOLONG)

    def test_example(self):
        example = pathlib.Path(os.environ["PIVOTKV_BUILD_DIR"]) / "client" / "examples" / "attend"
        done = subprocess.run([example, self.daemon.socket], capture_output=True, text=True, timeout=60, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.count("attended 2.6 %"), 40, done.stdout)
        done = subprocess.run([example, "/tmp/none/socket"], capture_output=True, text=True, timeout=60, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("start pivotkvd", done.stderr)


if __name__ == "__main__":
    unittest.main()
