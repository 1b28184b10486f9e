#!/usr/bin/env python3
"""Runs Python tests against this build, in the environment that `make test` or `make demo` made.

run.py SOURCE BUILD TESTS [ENVIRONMENT MODULE], the tests' folder or one file as named in the source, the environment as named
in the build folder (venv), with a module that the tests cannot do without (numpy). Exit status 77 (skipped) where there is
neither that environment nor another Python with the module, or no test yet.
"""
import os
import pathlib
import subprocess
import sys

SKIPPED = 77


def interpreter(build, environment, module):
    for python in (build / environment / "bin" / "python", pathlib.Path(sys.executable)):
        imports = [python, "-c", f"import {module}"]
        if python.exists() and subprocess.run(imports, capture_output=True, check=False).returncode == 0:
            return python
    return None


def main():
    source, build = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
    package, tests = source / "client" / "python", source / sys.argv[3]
    environment, module = sys.argv[4:6] if len(sys.argv) > 4 else ("venv", "numpy")
    pattern = "test_*.py"
    if tests.suffix == ".py":
        tests, pattern = tests.parent, tests.name
    if not list(tests.glob(pattern)):
        print(f"no test_*.py in {tests}")
        return SKIPPED
    python = interpreter(build, environment, module)
    if not python:
        print(f"no Python with {module}: `make {environment}` makes one in the build folder")
        return SKIPPED
    # The examples hold the private daemon that the tests start.
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (package, source / "client" / "examples"))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # torch's threads leave the cores to the library's between their turns
        "PIVOTKV_LIBRARY": str(build / "client" / "libpivotkv.so"),
    }
    command = [python, "-m", "unittest", "discover", "-v", "-s", tests, "-p", pattern]
    return subprocess.run(command, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
