#!/usr/bin/env python3
"""Runs Python tests against this build, in the environment that `make test` or `make demo` made.

run.py SOURCE BUILD FOLDER, the folder as named in the source. Exit status 77 (skipped) where there is neither that environment
nor a numpy, or no test yet.
"""
import os
import pathlib
import subprocess
import sys

SKIPPED = 77


def interpreter(build):
    for python in (build / "venv" / "bin" / "python", pathlib.Path(sys.executable)):
        if python.exists() and subprocess.run([python, "-c", "import numpy"], capture_output=True, check=False).returncode == 0:
            return python
    return None


def main():
    source, build = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
    package, tests = source / "client" / "python", source / sys.argv[3]
    if not list(tests.glob("test_*.py")):
        print(f"no test_*.py in {tests}")
        return SKIPPED
    python = interpreter(build)
    if not python:
        print("no Python with numpy: `make venv` makes one in the build folder")
        return SKIPPED
    # The examples hold the private daemon that the tests start.
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (package, source / "client" / "examples"))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PIVOTKV_LIBRARY": str(build / "client" / "libpivotkv.so"),
    }
    command = [python, "-m", "unittest", "discover", "-v", "-s", tests]
    return subprocess.run(command, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
