"""Batches over torch's tensors on a GPU, in a CUDA graph that replays while the sequences grow; against torch's full attention.
Skipped without torch, a GPU, or the CUDA module."""
import os
import pathlib
import unittest

import pivotkv
from daemon import PrivateDaemon

try:
    import torch
    READY = torch.cuda.is_available()
except ImportError:
    READY = False

LAYERS, Q, KV, DIM, SEQS, STEPS = 2, 8, 2, 128, 3, 140


@unittest.skipUnless(READY, "no torch with a GPU")
class CudaTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = PrivateDaemon(pathlib.Path(os.environ["PIVOTKVD"]), pool_bytes=64 << 20, arena_bytes=256 << 20,
                                   flags=("--backend", "cuda"))

    @classmethod
    def tearDownClass(cls):
        cls.daemon.stop()

    def test_replayed_graph(self):
        random = torch.Generator(device="cuda").manual_seed(3)
        with pivotkv.connect(self.daemon.socket, threads=1) as kv:
            model = kv.model("cuda", layers=LAYERS, q_heads=Q, kv_heads=KV, head_dim=DIM, dtype="bf16", scheme="sign")
            lengths = [5, 300, 130]
            sequences = [model.sequence(1000) for _ in range(SEQS)]
            held = [[[], []] for _ in range(SEQS)]
            for s, n, rows in zip(sequences, lengths, held):
                k, v = (torch.randn(n, KV, DIM, generator=random, device="cuda").bfloat16() for _ in range(2))
                rows[0].append(k), rows[1].append(v)
                for layer in range(LAYERS):
                    s.append(layer, k.float().cpu().numpy(), v.float().cpu().numpy())
            k, v, q = (torch.zeros(SEQS, heads, DIM, dtype=torch.bfloat16, device="cuda") for heads in (KV, KV, Q))
            out = torch.zeros(LAYERS, SEQS, Q, DIM, device="cuda")
            stream = torch.cuda.Stream()
            with model.batch(sequences, pivotkv.Budget(k=500, dense_below=800)) as batch:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
                    for layer in range(LAYERS):
                        batch.append(layer, k, v, stream)
                        batch.attend(layer, q, out[layer], stream=stream)
                for i in range(STEPS):
                    with torch.cuda.stream(stream):
                        for tensor in (k, v, q):
                            tensor.copy_(torch.randn(tensor.shape, generator=random, device="cuda"))
                        with batch.step(stream):
                            graph.replay()
                        for s in range(SEQS):
                            held[s][0].append(k[s:s + 1].clone()), held[s][1].append(v[s:s + 1].clone())
                    if i % 20 == 19:
                        stream.synchronize()
                        self._compare(held, q, out)
                batch.wait()
                self.assertEqual([len(s) for s in sequences], [n + STEPS for n in lengths])
                with self.assertRaises(ValueError):
                    batch.append(0, k.float(), v, stream)

    def _compare(self, held, q, out):
        for s, rows in enumerate(held):
            keys, values = (torch.cat(part).float().transpose(0, 1)[None] for part in rows)
            exact = torch.nn.functional.scaled_dot_product_attention(q[s].float()[None, :, None], keys, values,
                                                                     enable_gqa=True)[0, :, 0]
            for layer in range(LAYERS):
                error = (out[layer, s] - exact).norm() / exact.norm()
                self.assertLess(float(error), 1e-3)


if __name__ == "__main__":
    unittest.main()
