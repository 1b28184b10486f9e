"""The wheel, built in a temporary folder and installed in a fresh environment: it imports, finds its own library, and has its
commands."""
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest
import zipfile
from importlib import metadata

import numpy

import pivotkv

PACKAGE = pathlib.Path(pivotkv.__file__).resolve().parents[1]


def missing():
    """What of the tools is not here; the tests need no network."""
    versions = {}
    for name in ("pip", "setuptools", "wheel"):
        try:
            versions[name] = tuple(int(part) for part in metadata.version(name).split(".")[:2])
        except metadata.PackageNotFoundError:
            versions[name] = None
    absent = [name for name in ("pip", "setuptools") if not versions[name]]
    if absent:
        return f"this Python has no {absent[0]}"
    return None if versions["wheel"] or versions["setuptools"] >= (70, 1) else "this Python has nothing that builds wheels"


class WheelTest(unittest.TestCase):
    def run_bounded(self, *command, **env):
        kept = {name: value for name, value in os.environ.items() if name not in ("PIVOTKV_LIBRARY", "PYTHONPATH")}
        done = subprocess.run([str(part) for part in command], env=kept | {name: str(value) for name, value in env.items()},
                              cwd=self.folder, capture_output=True, text=True, timeout=90, check=False)
        self.assertEqual(done.returncode, 0, f"{command}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def test_build_install_import(self):
        if missing():
            self.skipTest(missing())
        scratch = tempfile.TemporaryDirectory(prefix="pivotkv-")
        self.addCleanup(scratch.cleanup)
        self.folder = pathlib.Path(scratch.name)
        before = sorted(PACKAGE.iterdir())
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        self.run_bounded(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", self.folder, PACKAGE,
                         PIVOTKV_LIBRARY=os.environ["PIVOTKV_LIBRARY"])
        self.assertEqual(sorted(PACKAGE.iterdir()), before, "building left something in the source tree")
        wheel, = self.folder.glob("*.whl")
        self.assertRegex(wheel.name, r"^pivotkv-[0-9.]+-py3-none-linux_\w+\.whl$")
        names = zipfile.ZipFile(wheel).namelist()
        for name in ("libpivotkv.so.0", "py.typed", *(path.name for path in PACKAGE.glob("pivotkv/*.py"))):
            self.assertIn(f"pivotkv/{name}", names)
        self.run_bounded(sys.executable, "-m", "venv", "--without-pip", self.folder / "venv")
        bin_folder = self.folder / "venv" / "bin"
        self.run_bounded(*pip, "--python", bin_folder / "python", "install", "--quiet", "--no-index", "--no-deps", wheel)
        numpy_at = pathlib.Path(numpy.__file__).parents[1]  # so that nothing is fetched
        found = self.run_bounded(bin_folder / "python", "-c", "import pivotkv; print(pivotkv.version(), pivotkv._lib._name)",
                                 PYTHONPATH=numpy_at).split()
        self.assertEqual(found[0], pivotkv.version())
        self.assertTrue(pathlib.Path(found[1]).is_relative_to(self.folder / "venv"), found)
        for command in ("calibrate", "convert", "evaluate", "sizes", "train"):
            told = self.run_bounded(bin_folder / f"pivotkv-{command}", "--version", PYTHONPATH=numpy_at)
            self.assertEqual(told, f"pivotkv-{command} {pivotkv.version()}\n")
            self.assertIn("usage:", self.run_bounded(bin_folder / f"pivotkv-{command}", "--help", PYTHONPATH=numpy_at))

    def test_without_a_library(self):
        """A sentence, also where the library is broken or of another version."""
        with tempfile.NamedTemporaryFile(suffix=".so") as broken:
            for path, word in (("/nonexistent/x.so", "cannot be loaded"), (broken.name, "cannot be loaded"),
                               ("libc.so.6", "another version")):
                done = subprocess.run([sys.executable, "-c", "import pivotkv"], capture_output=True, text=True, timeout=60,
                                      env=os.environ | {"PIVOTKV_LIBRARY": path}, check=False)
                self.assertEqual(done.returncode, 1)
                self.assertIn("ImportError: ", done.stderr)
                self.assertIn(word, done.stderr)


if __name__ == "__main__":
    unittest.main()
