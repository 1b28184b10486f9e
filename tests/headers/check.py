"""Compiles each header of the tree alone.

usage: check.py c|c++ SOURCE_ROOT COMPILER...
As C17 all headers; as C++17 those that a .cu file or a C++ engine includes (`NEUTRAL`).
"""
import pathlib
import subprocess
import sys

ROOMS = ("proto", "gpu", "offload", "cachesvc", "client", "tests")
NEUTRAL = {
    "proto/base.h", "proto/limits.h", "proto/geom.h", "proto/table.h", "proto/op.h", "proto/wire.h", "proto/err.h",
    "proto/check.h", "gpu/gpu.h", "gpu/kernel.h", "gpu/code.h", "client/pivotkv.h",
}
FLAGS = {"c": ["-std=gnu17", "-x", "c"], "c++": ["-std=c++17", "-x", "c++"]}


def main() -> int:
    language, root, *compiler = sys.argv[1:]
    top = pathlib.Path(root)
    headers = sorted(str(p.relative_to(top)) for room in ROOMS for p in (top / room).rglob("*.h"))
    if language == "c++":
        headers = [h for h in headers if h in NEUTRAL]
    failed = 0
    for header in headers:
        command = [*compiler, *FLAGS[language], "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function",
                   "-I", root, "-fsyntax-only", "-include", header, "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed += 1
            print(f"{header}: does not compile alone as {language}; include what it uses\n{done.stderr}")
    print(f"{len(headers)} headers, {failed} failed")
    return 1 if failed or not headers else 0


if __name__ == "__main__":
    sys.exit(main())
