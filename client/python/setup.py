"""Builds the wheel with the C library inside: $PIVOTKV_LIBRARY, or the one in the source tree's build folder.

The library links to OpenBLAS, jansson and xxhash of the system, so the wheel is for this platform and is no manylinux one.
Nothing is written into the source tree.
"""
import os
import pathlib
import shutil
import subprocess
import tempfile

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

HERE = pathlib.Path(__file__).resolve().parent
NAME = "libpivotkv.so.0"  # what pivotkv/_library.py looks for beside itself


def library() -> pathlib.Path:
    named = os.environ.get("PIVOTKV_LIBRARY")
    for path in [pathlib.Path(named)] if named else [HERE.parents[1] / "build" / "client" / NAME, HERE / "pivotkv" / NAME]:
        if path.exists():
            return path.resolve()
    raise SystemExit(f"{named or 'libpivotkv.so'} is not there: build it (`make` at the top of the source tree), or name it in "
                     "PIVOTKV_LIBRARY")


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return  # the library is found by PIVOTKV_LIBRARY or by the system's loader
        target = pathlib.Path(self.build_lib) / "pivotkv" / NAME
        shutil.copyfile(library(), target)
        if shutil.which("strip"):
            subprocess.run(["strip", "--strip-unneeded", target], check=True)


class Platform(Distribution):
    def has_ext_modules(self):
        return True


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]  # ctypes: any Python 3


scratch = tempfile.mkdtemp(prefix="pivotkv-wheel-")
try:
    setup(distclass=Platform, cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel},
          options={"build": {"build_base": scratch}, "egg_info": {"egg_base": scratch}})
finally:
    shutil.rmtree(scratch, ignore_errors=True)
