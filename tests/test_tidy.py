#!/usr/bin/env python3
"""Shows that each rule of tidy.py can fail: a clean little tree passes, and each single breach is found where it is."""
import pathlib
import subprocess
import sys
import tempfile
import unittest

TIDY = pathlib.Path(__file__).with_name("tidy.py")

CLEAN = {
    "proto/base.h": "/* Base. */\n#include <stdint.h>\n",
    "gpu/gpu.h": "/* The door. */\n#include \"proto/base.h\"\n",
    "gpu/kernel.h": "/* Parameters. */\n#include \"proto/base.h\"\n",
    "gpu/host/lanes.h": "/* Private. */\n",
    "gpu/gpu.c": "/* Opening; exit( and printf( in a comment are fine. */\n#include \"gpu/gpu.h\"\n"
                 "#include \"gpu/host/lanes.h\"\nstatic const char *words = \"printf(\";\n",
    "offload/offload.h": "/* The door. */\n",
    "cachesvc/log.h": "/* The daemon's voice. */\n",
    "cachesvc/core/core.h": "/* Pure. */\n#include \"proto/base.h\"\n#include <assert.h>\n",
    "cachesvc/loop.c": "/* Loop. */\n#include \"cachesvc/core/core.h\"\n#include \"gpu/gpu.h\"\n"
                       "#include \"offload/offload.h\"\n#include <unistd.h>\n",
    "client/pivotkv.h": "/* Installed. */\n",
    "client/cli/main.c": "/* The tool speaks. */\n#include \"client/pivotkv.h\"\n#include <stdio.h>\n"
                         "int main(void)\n{\n    printf(\"hello\");\n    return 0;\n}\n",
    "client/examples/attend.c": "/* An example. */\n#include \"client/pivotkv.h\"\n",
    "tests/sim/sim.c": "/* Simulator. */\n#include \"cachesvc/core/core.h\"\n#include \"gpu/kernel.h\"\n",
    "tests/unit/test_lanes.c": "/* Units look inside. */\n#include \"gpu/host/lanes.h\"\n",
    "Makefile": "all:\n\techo \"tabs are make's own\"\n",
}

LONG = "/* Long. */\nint f(int a)\n{\n" + "    a++;\n" * 70 + "    return a;\n}\n"
HOME = "/" + "home/someone/model"
HOST = "pypi" + ".org"

# name: (file, its text, line of the breach, a word of the message)
BREACHES = {
    "edge gpu to offload": ("gpu/a.c", "/* A. */\n#include \"offload/offload.h\"\n", 2, "must not know"),
    "edge client to cachesvc": ("client/a.c", "/* A. */\n#include \"cachesvc/log.h\"\n", 2, "must not know"),
    "edge proto to gpu": ("proto/a.c", "/* A. */\n#include \"gpu/gpu.h\"\n", 2, "must not know"),
    "nobody includes tests": ("cachesvc/a.c", "/* A. */\n#include \"tests/sim/sim.c\"\n", 2, "must not know"),
    "door of gpu": ("cachesvc/a.c", "/* A. */\n#include \"gpu/kernel.h\"\n", 2, "private"),
    "private to gpu": ("tests/sim/a.c", "/* A. */\n#include \"gpu/host/lanes.h\"\n", 2, "private"),
    "example looks inside": ("client/examples/a.c", "/* A. */\n#include \"proto/base.h\"\n", 2, "installed header"),
    "not from the root": ("gpu/a.c", "/* A. */\n#include \"gpu.h\"\n", 2, "from the root"),
    "core makes system calls": ("cachesvc/core/a.c", "/* A. */\n#include <unistd.h>\n", 2, "pure"),
    "core uses a sys header": ("cachesvc/core/a.c", "/* A. */\n#include <sys/mman.h>\n", 2, "pure"),
    "core logs": ("cachesvc/core/a.c", "/* A. */\n#include \"cachesvc/log.h\"\n", 2, "only proto"),
    "long file": ("gpu/a.c", "/* A. */\n" * 601, 601, "601 lines"),
    "long function": ("gpu/a.c", LONG, 3, "f() has 71 lines"),
    "long line": ("gpu/a.c", "/* A. */\n/* " + "x" * 130 + " */\n", 2, "columns"),
    "tab": ("gpu/a.c", "/* A. */\n\tint a;\n", 2, "tab"),
    "trailing white space": ("gpu/a.c", "/* A. */\nint a; \n", 2, "white space"),
    "no newline": ("gpu/a.c", "/* A. */", 1, "newline"),
    "no comment on top": ("gpu/a.c", "#include <stdint.h>\n", 1, "no comment"),
    "no comment in Python": ("tests/a.py", "import sys\n", 1, "no comment"),
    "library prints": ("gpu/a.c", "/* A. */\nvoid f(void)\n{\n    printf(\"x\");\n}\n", 4, "prints"),
    "library prints to stderr": ("client/a.c", "/* A. */\nvoid f(void)\n{\n    fprintf(stderr, \"x\");\n}\n", 4, "prints"),
    "library exits": ("offload/a.c", "/* A. */\nvoid f(void)\n{\n    exit(1);\n}\n", 4, "ends the process"),
    "library aborts": ("proto/a.c", "/* A. */\nvoid f(void)\n{\n    abort();\n}\n", 4, "ends the process"),
    "typedef": ("gpu/a.h", "/* A. */\ntypedef struct a {\n    int b;\n} a;\n", 2, "typedef"),
    "path of a machine": ("gpu/a.c", f"/* A. */\nconst char *p = \"{HOME}\";\n", 2, "absolute path"),
    "registry": ("README.md", f"# A\nfrom {HOST}\n", 2, "registry"),
    "host in a build file": ("Makefile", "all:\n\tfetch http" + "://a.b/c\n", 2, "names a host"),
}


def tidy(files):
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = pathlib.Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        done = subprocess.run([sys.executable, TIDY, folder], capture_output=True, text=True, timeout=30, check=False)
        return done.returncode, done.stdout


class TidyCanFail(unittest.TestCase):
    def test_clean(self):
        code, out = tidy(CLEAN)
        self.assertEqual(code, 0, out)

    def test_function_at_the_limit(self):
        code, out = tidy({**CLEAN, "gpu/a.c": LONG.replace("    a++;\n", "", 1)})
        self.assertEqual(code, 0, out)

    def test_breaches(self):
        for name, (path, text, line, word) in BREACHES.items():
            with self.subTest(name):
                code, out = tidy({**CLEAN, path: text})
                self.assertEqual(code, 1, out)
                found = out.splitlines()[:-1]
                self.assertEqual(len(found), 1, out)
                self.assertTrue(found[0].startswith(f"{path}:{line}: "), out)
                self.assertIn(word, found[0])
                self.assertIn("; ", found[0])


if __name__ == "__main__":
    unittest.main()
