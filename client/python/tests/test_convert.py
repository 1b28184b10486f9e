"""The released layouts of HashAttention, and pickles that try something else.

tests/data was written by torch 2.13: pickle.dump and torch.save (new and legacy) of weights for 2 layers, 4 q heads, MLPs
64-16-16-16, in bfloat16 (.pkl) and float16; the numbers of a tensor are ((37 i + 11 seed) mod 101 - 50) / 64 over its elements
i as [heads, in, out], seed = 100 layer + 10 side (query 0, key 1) + stage, 5 more for biases."""
import io
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import unittest
import zipfile

import numpy as np

from pivotkv import convert, schemes, tensors, unpickle
from pivotkv.tensors import FormatError

DATA = pathlib.Path(__file__).with_name("data")
FILES = ("tiny.hat_weights.pkl", "tiny.pt", "tiny-legacy.pt")
LAYERS, Q, WIDTHS = 2, 4, (64, 16, 16, 16)


def number(seed, *shape):
    return (((np.arange(np.prod(shape)) * 37 + seed * 11) % 101 - 50) / 64).reshape(shape).astype(np.float32)


class Evil:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class LayoutTest(unittest.TestCase):
    def test_numbers(self):
        for name in FILES:
            arrays, meta = convert.convert(DATA / name, 2)
            self.assertEqual([meta[n] for n in ("scheme", "layers", "q_heads", "kv_heads", "head_dim", "bits")],
                             ["hash", "2", "4", "2", "64", "32"])
            self.assertEqual(len(arrays), 12)
            with tempfile.NamedTemporaryFile(suffix=".safetensors") as written:
                tensors.write(written.name, arrays, meta)
                file = tensors.File(written.name)
                # two bytes a number
                self.assertLess(pathlib.Path(written.name).stat().st_size, 2 * 2 * LAYERS * Q * 1700 + 4000)
            for layer in range(LAYERS):
                for j, side in enumerate("qk"):
                    for i in range(3):
                        seed = 100 * layer + 10 * j + i
                        want = number(seed, Q, WIDTHS[i], WIDTHS[i + 1]).transpose(0, 2, 1)
                        np.testing.assert_array_equal(file.array(f"{side}.{i}.weight")[layer], want, name)
                        np.testing.assert_array_equal(file.array(f"{side}.{i}.bias")[layer], number(seed + 5, Q, WIDTHS[i + 1]))

    def test_smallest_loses_nothing(self):
        cases = (([1.5, -(2.0 ** 127)], tensors.BFloat16), ([1.5, 1 / 1024 + 1], np.ndarray), ([1 / 3], np.ndarray))
        for numbers, kind in cases:
            array = np.array(numbers, np.float32)
            made = tensors.smallest(array)
            self.assertIsInstance(made, kind)
            if kind is np.ndarray:
                np.testing.assert_array_equal(made.astype(np.float32), array)
        self.assertEqual(tensors.smallest(np.array([1 / 1024 + 1], np.float32)).dtype, np.float16)

    def test_command(self):
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "hash.safetensors"

            def run(source, *more):
                return subprocess.run([sys.executable, "-m", "pivotkv.convert_command", str(source), "--out", str(out), *more],
                                      capture_output=True, text=True, timeout=60, check=False)

            written = set()
            for name in FILES:
                done = run(DATA / name, "--kv-heads", "2", "--model", "tiny")
                self.assertEqual(done.returncode, 0, done.stderr)
                scheme = schemes.load(out)
                self.assertEqual((scheme.kind, scheme.bits, scheme.geometry.q_heads), ("hash", 32, 4))
                self.assertEqual(scheme.meta["source"], name)
                written.add(scheme.sign(1, 1, number(3, 50, 64)).tobytes())
            self.assertEqual(len(written), 1)
            for more, code, word in ((["--kv-heads", "3"], 1, "evenly"), (["--kv-heads", "4"], 1, "steps of 32"),
                                     ([], 2, "--kv-heads")):
                failed = run(DATA / FILES[0], *more)
                self.assertEqual(failed.returncode, code)
                self.assertIn(word, failed.stderr)
                self.assertNotIn("Traceback", failed.stderr)

    def test_what_is_no_such_file(self):
        good = unpickle.load(DATA / FILES[0])
        tensor = {"query_matrix": [], "query_bias": [], "key_matrix": [], "key_bias": []}
        for content, word in (([1, 2], "no dictionary"), ({}, "no dictionary"), ({0: 5}, "does not have the lists"),
                              ({0: tensor}, "layers differ"), ({1: tensor}, "not 0 to 0"),
                              ({"model.weight": 1}, "model.weight"),
                              ({0: {**tensor, "key_matrix": [3], "key_bias": [3]}}, "no tensor")):
            with self.subTest(word), tempfile.NamedTemporaryFile() as file:
                file.write(pickle.dumps(content))
                file.flush()
                with self.assertRaisesRegex(FormatError, word):
                    convert.read(file.name)
        self.assertEqual(sorted(good), [0, 1])


class HostileTest(unittest.TestCase):
    """Nothing of these runs, whatever the layout."""

    def refused(self, raw, word):
        with tempfile.NamedTemporaryFile() as file:
            file.write(raw)
            file.flush()
            with self.assertRaises(FormatError) as caught:
                unpickle.load(file.name)
        self.assertIn(word, str(caught.exception))
        self.assertIn(file.name, str(caught.exception))

    def test_calls(self):
        marker = pathlib.Path(tempfile.mkdtemp()) / "ran"
        for function, arguments, word in ((os.system, (f"touch {marker}",), "system"), (eval, ("1",), "eval"),
                                          (getattr, (os, "system"), "getattr"), (open, (str(marker), "w"), "open"),
                                          (bytearray, (1 << 40,), "bytearray"), (pickle.loads, (b"I1\n.",), "loads")):
            raw = pickle.dumps({0: Evil(function, *arguments)} if function is not getattr else Evil(getattr, 1, "real"))
            for protocol_raw in (raw, pickle.dumps({0: Evil(os.system, "true")}, protocol=0)):
                self.refused(protocol_raw, "do not trust")
            self.refused(raw, word)
            archive = io.BytesIO()
            with zipfile.ZipFile(archive, "w") as file:
                file.writestr("x/data.pkl", raw)
            self.refused(archive.getvalue(), word)
            legacy = b"".join(pickle.dumps(part) for part in (unpickle._MAGIC, unpickle._PROTOCOL, {}))
            self.refused(legacy + raw, word)
        self.assertFalse(marker.exists())

    def test_nested(self):
        """A stream inside of a stream is judged alike, and no deeper one is read."""
        def inner(raw):  # GLOBAL torch.storage _load_from_bytes, the bytes, REDUCE
            return b"\x80\x04ctorch.storage\n_load_from_bytes\nB" + len(raw).to_bytes(4, "little") + raw + b"\x85R."
        legacy = b"".join(pickle.dumps(part) for part in (unpickle._MAGIC, unpickle._PROTOCOL, {}))
        self.refused(inner(legacy + pickle.dumps(Evil(os.system, "true"))), "system")
        self.refused(inner(legacy + inner(legacy)), "_load_from_bytes")

    def test_opcodes_and_attributes(self):
        self.refused(b"(i__main__\nEvil\n.", "opcode INST")
        self.refused(b"(cos\nsystem\nS'true'\no.", "opcode OBJ")
        self.refused(b"\x82\x01.", "opcode EXT1")
        self.refused(b"\x80\x04cbuiltins\nobject\n)\x81.", "opcode NEWOBJ")
        self.refused(b"\x80\x02}r\xff\xff\xff\x7f.", "remembers more")
        # BUILD sets attributes of what it is given: of a function, a type, a storage (which a tensor could then lie about), a
        # tensor.
        call, kind, state = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"}X\x01\x00\x00\x00aK\x01s"
        storage = b"(X\x07\x00\x00\x00storage" + kind + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
        tensor = call + b"(" + storage + b"K\x00K\x02\x85K\x01\x85\x89NtR"
        for thing, word in ((call, "changes an object"), (kind, "changes an object"), (storage, "changes an object"),
                            (tensor, "changes an object"), (b"ccollections\nOrderedDict\n", "damaged")):
            archive = io.BytesIO()
            with zipfile.ZipFile(archive, "w") as file:
                file.writestr("x/data.pkl", b"\x80\x02" + thing + state + b"b.")
                file.writestr("x/data/0", np.zeros(2, np.float32).tobytes())
            self.refused(archive.getvalue(), word)
            # The same without BUILD is read.
            with tempfile.NamedTemporaryFile() as good, zipfile.ZipFile(good, "w") as file:
                file.writestr("x/data.pkl", b"\x80\x02" + thing + b".")
                file.writestr("x/data/0", np.zeros(2, np.float32).tobytes())
                file.close()
                unpickle.load(good.name)

    def test_damage(self):
        for name in FILES:
            raw = (DATA / name).read_bytes()
            for cut in (0, 1, 100, len(raw) // 2, len(raw) - 1):
                self.refused(raw[:cut], "")
        good = (DATA / FILES[0]).read_bytes()
        random, accepted = np.random.default_rng(1), 0
        for _ in range(300):  # any byte changed: refused in a sentence, or other numbers
            at = int(random.integers(len(good)))
            broken = good[:at] + bytes([good[at] ^ int(random.integers(1, 256))]) + good[at + 1:]
            with tempfile.NamedTemporaryFile() as file:
                file.write(broken)
                file.flush()
                try:
                    convert.read(file.name)
                    accepted += 1
                except FormatError:
                    pass
        self.assertGreater(accepted, 0)

    def test_tensors_that_lie(self):
        storage = unpickle._Storage(np.zeros(10, np.float32), False)
        for size, stride, offset in (((1 << 40,), (0,), 0), ((11,), (1,), 0), ((5,), (3,), 0), ((2,), (1,), 9),
                                     ((-1,), (1,), 0), ((2, 2), (1,), 0), ((2.0,), (1,), 0), ((2,), (-1,), 5)):
            with self.assertRaises(FormatError):
                unpickle._tensor(storage, offset, size, stride)
        np.testing.assert_array_equal(unpickle._tensor(storage, 1, (3, 3), (3, 1)).array, np.zeros((3, 3)))


if __name__ == "__main__":
    unittest.main()
