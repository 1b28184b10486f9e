#!/usr/bin/env python3
"""Lets a torch that was built for CUDA start on a machine without CUDA's libraries: cpu_torch.py DIR (the environment).

The torch that package registries carry for Linux is linked against 2 GB of CUDA libraries, which nothing calls where there is
no GPU; yet without them it does not load. This writes one library with all the functions that torch wants of them, each of
which reports cudaErrorNoDevice, and gives it their names, inside the environment. The CUDA runtime itself is small and must be
installed. For tests on CPUs only: install torch with its dependencies to use a GPU.
"""
import pathlib
import re
import subprocess
import sys
import tempfile

THEIRS = re.compile(r"(__)?(cu|nccl|nv)[A-Za-z]")
LIBRARY = re.compile(r"NEEDED.*\[(lib(?:cu|nv|nccl)[^]]*)\]")
NAME = "libcuda_absent.so"
NO_DEVICE = 100


def output(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def starts(python: pathlib.Path) -> str | None:
    """What keeps torch from loading."""
    done = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr


def wanted(folder: pathlib.Path) -> tuple[set[str], dict[str, set[str]]]:
    """Names of libraries that are not there, and by version the functions that nobody defines."""
    libraries = [path for path in folder.glob("*.so*") if not path.is_symlink() and path.name != NAME]
    needed, undefined, defined = set(), set(), set()
    for path in libraries:
        needed |= set(LIBRARY.findall(output("readelf", "-d", "-W", path)))
        for line in output("nm", "-D", "--with-symbol-versions", path).splitlines():
            *_, kind, name = line.split()
            (undefined if kind == "U" else defined).add(name if kind == "U" else name.partition("@")[0])
    # The driver is asked for at run time, by the CUDA runtime, and has to stay absent.
    there = {path.name for path in (*libraries, *folder.parents[1].glob("nvidia/*/lib/*"))} | {"libcuda.so.1"}
    functions: dict[str, set[str]] = {}
    for name in undefined:
        name, _, version = name.partition("@")
        if name not in defined and THEIRS.match(name) and version not in there:
            functions.setdefault(version, set()).add(name)
    return needed - there, functions


def build(folder: pathlib.Path, functions: dict[str, set[str]]) -> None:
    names = sorted(set().union(*functions.values()))
    source = "".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in names)
    script = "".join(f"{version} {{ {'; '.join(sorted(mine))}; }};\n" for version, mine in sorted(functions.items()) if version)
    with tempfile.NamedTemporaryFile("w", suffix=".map") as versions:
        versions.write(script)
        versions.flush()
        subprocess.run(["gcc", "-x", "c", "-", "-w", "-fno-builtin", "-shared", "-fPIC",
                        "-Wl,--version-script=" + versions.name, "-o", folder / NAME], input=source, text=True, check=True)


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    environment = pathlib.Path(sys.argv[1])
    python = environment / "bin" / "python"
    if not starts(python):
        return 0
    folder = next(environment.glob("lib/python3*/site-packages/torch/lib"), None)
    if not folder:
        sys.exit(f"no torch in {environment}")
    libraries, functions = wanted(folder)
    build(folder, functions)
    for name in libraries:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(NAME)
    why = starts(python)
    if why:
        sys.exit(f"torch does not start:\n{why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
