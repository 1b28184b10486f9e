"""safetensors files: what is written is read, the same content is the same bytes, damage is a sentence, nothing is half
written."""
import json
import os
import pathlib
import tempfile
import unittest

import numpy as np

from pivotkv import recording, tensors
from pivotkv.tensors import FormatError


class TensorsTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = pathlib.Path(folder.name) / "x.safetensors"

    def raw(self, header, data=b""):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return self.path

    def test_round_trip_and_same_bytes(self):
        arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(3, dtype=np.uint8),
                  "c": np.array([1, -2], np.float16), "empty": np.empty((0, 4), np.float32), "one": np.float32(3).reshape(())}
        halves = tensors.smallest(np.array([1.5, -2], np.float32))
        tensors.write(self.path, {**arrays, "h": halves}, {"z": "1", "a": "é"})
        file = tensors.File(self.path)
        self.assertEqual((file.names(), file.meta), (["a", "b", "c", "empty", "h", "one"], {"z": "1", "a": "é"}))
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.array(name), array)
            self.assertEqual((file.array(name).dtype, file.shape(name)), (array.dtype, array.shape))
        np.testing.assert_array_equal(file.array("h"), np.array([1.5, -2], np.float32))
        first = self.path.read_bytes()
        self.assertEqual(int.from_bytes(first[:8], "little") % 8, 0)
        tensors.write(self.path, {"h": halves, **dict(reversed(arrays.items()))}, {"a": "é", "z": "1"})
        self.assertEqual(self.path.read_bytes(), first)
        self.assertEqual(sorted(os.listdir(self.path.parent)), [self.path.name])

    def test_a_failed_write_leaves_what_was_there(self):
        tensors.write(self.path, {"a": np.zeros(3, np.float32)})
        before = self.path.read_bytes()
        with self.assertRaises(KeyError):
            tensors.write(self.path, {"a": np.zeros(3, np.complex64)})
        with self.assertRaises(OSError):
            tensors.write(self.path.parent / "none" / "x", {})
        self.assertEqual(self.path.read_bytes(), before)
        self.assertEqual(os.listdir(self.path.parent), [self.path.name])

    def test_damage(self):
        good = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        self.assertEqual(tensors.File(self.raw(good, b"\0" * 8)).shape("a"), (2,))
        for change in ({"dtype": "F99"}, {"dtype": 7}, {"shape": [3]}, {"shape": [-2]}, {"shape": [2.0]}, {"shape": "2"},
                       {"shape": [1 << 70, 0.5]}, {"data_offsets": [0, 9]}, {"data_offsets": [8, 0]}, {"data_offsets": [0]},
                       {"data_offsets": [-8, 0]}, {"data_offsets": None}):
            with self.assertRaisesRegex(FormatError, "damaged"):
                tensors.File(self.raw({"a": good["a"] | change}, b"\0" * 8))
        for header in (b"{", b"[]", b"7", b"\xff\xfe", b'{"a": 3}', b'{"__metadata__": []}', b"[" * 100000):
            with self.assertRaisesRegex(FormatError, "damaged"):
                tensors.File(self.raw(header))
        for content, word in ((b"", "empty"), (b"\0" * 7, "damaged"), (b"\xff" * 50, "longer than the file")):
            self.path.write_bytes(content)
            with self.assertRaisesRegex(FormatError, word):
                tensors.File(self.path)
        file = tensors.File(self.raw(good, np.array([1, np.nan], np.float32).tobytes()))
        for word, call in (("no tensor 'b'", lambda: file.array("b")), ("NaN", lambda: file.floats("a")),
                           ("not \\[3\\]", lambda: file.floats("a", (3,)))):
            with self.assertRaisesRegex(FormatError, word):
                call()

    def test_unaligned_files_of_others(self):
        header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},"p":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        file = tensors.File(self.raw(header + b" " * (7 - len(header) % 8), b"\7" + np.array([3, 4], np.float32).tobytes()))
        self.assertEqual((file.array("a").tolist(), file.array("p").tolist()), ([3, 4], [7]))


class RecordingTest(unittest.TestCase):
    setUp = TensorsTest.setUp

    def test_what_is_no_recording(self):
        k, q = np.zeros((9, 2, 64), np.float16), np.zeros((9, 4, 64), np.float16)
        for arrays, word in (({"k.0": k}, "needs q"), ({"x": k}, "needs q"), ({"k.0": k, "q.0": q[:, :3]}, "are not"),
                             ({"k.0": k[0], "q.0": q}, "are not"),
                             ({"k.0": k, "q.0": q, "k.1": k[:5], "q.1": q}, "k.1 has shape"),
                             ({"k.0": k, "q.0": q, "v.0": k[:, :1]}, "v.0 has shape")):
            tensors.write(self.path, arrays)
            with self.assertRaisesRegex(FormatError, word):
                recording.load(self.path)
        tensors.write(self.path, {"k.0": k * np.float16(np.nan), "q.0": q}, {"rope_base": "x"})
        with self.assertRaisesRegex(FormatError, "not a number"):
            recording.load(self.path)
        tensors.write(self.path, {"k.0": k * np.float16(np.nan), "q.0": q})
        with self.assertRaisesRegex(FormatError, "NaN"):
            recording.load(self.path).k(0)
        other = self.path.with_name("other.safetensors")
        tensors.write(self.path, {"k.0": k, "q.0": q})
        tensors.write(other, {"k.0": k, "q.0": q}, {"rope_base": "10000"})
        with self.assertRaisesRegex(FormatError, "another model"):
            recording.load_all([self.path, other])


if __name__ == "__main__":
    unittest.main()
