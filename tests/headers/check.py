#!/usr/bin/env python3
"""Every header compiles alone: as C17, and the neutral ones (what .cu files and C++ engines read) as C++17 too.

check.py ROOT C_COMPILER [CXX_COMPILER]
"""
import pathlib
import shlex
import subprocess
import sys
import tempfile

# Atomics by C builtins: never read by a .cu file.
C_ONLY = {"proto/ring.h"}
NEUTRAL = {"gpu/gpu.h", "gpu/kernel.h", "gpu/code.h", "client/pivotkv.h"}
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
# Headers of one instruction set are only read by files that are compiled for it.
ISAS = {"avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
        "avx2": ["-mavx2", "-mfma", "-mf16c"]}


def neutral(name):
    return name in NEUTRAL or (name.startswith("proto/") and name not in C_ONLY)


def compile_alone(folder, root, compiler, name, flags):
    unit = pathlib.Path(folder, "unit.c")
    unit.write_text(f'#include "{name}"\n#include "{name}"\nint unit_is_not_empty;\n', encoding="utf-8")
    command = [*compiler, *flags, *WARNINGS, "-fsyntax-only", f"-I{root}", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        print(f"{name}: does not compile alone with {' '.join(flags)}\n{done.stderr}")
    return done.returncode == 0


def main():
    root = pathlib.Path(sys.argv[1])
    c_compiler = shlex.split(sys.argv[2])
    cxx_compiler = shlex.split(sys.argv[3]) if len(sys.argv) > 3 else None
    bad = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for room in ("proto", "gpu", "offload", "cachesvc", "client", "tests"):
            for path in sorted((root / room).rglob("*.h")):
                name = path.relative_to(root).as_posix()
                isa = next((flags for key, flags in ISAS.items() if key in path.stem), [])
                # A neutral header asks for nothing beyond the standard; the others may use what the build gives.
                std = ["-std=c17"] if neutral(name) else ["-std=gnu17", "-D_GNU_SOURCE"]
                runs = [(c_compiler, [*std, *isa])]
                if cxx_compiler and neutral(name):
                    runs.append((cxx_compiler, ["-x", "c++", "-std=c++17"]))
                for compiler, flags in runs:
                    total += 1
                    bad += not compile_alone(folder, root, compiler, name, flags)
    print(f"{total} compilations, {bad} bad")
    return 1 if bad or not total else 0


if __name__ == "__main__":
    sys.exit(main())
