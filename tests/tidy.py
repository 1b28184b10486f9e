#!/usr/bin/env python3
"""The house rules, as a test: prints `file:line: what is wrong; what to do` for each breach, and fails if there is one.

tidy.py [ROOT]

A rule that is in the way of better code is changed here, in the same commit, with the reason in its message.
"""
import pathlib
import re
import sys

ROOMS = ("proto", "gpu", "offload", "cachesvc", "client", "tests")

# Who may include whom. Every room may include itself and proto.
EDGES = {
    "proto": set(),
    "gpu": {"proto"},
    "offload": {"proto"},
    "cachesvc": {"proto", "gpu", "offload"},
    "client": {"proto", "gpu"},
    "tests": {"proto", "gpu", "offload", "cachesvc", "client"},
}
# What other rooms may include of a room; proto is open.
DOORS = {"gpu": {"gpu/gpu.h", "gpu/device.h", "gpu/batch.h", "gpu/lab.h"},
         "offload": {"offload/offload.h"}, "client": {"client/pivotkv.h"},
         "cachesvc": set()}
# Beyond the doors, all tests may read these; the tests of one file (tests/unit, tests/kernels), and the module that stands in
# for CUDA (tests/fake), may read any header.
TEST_DOORS = ("gpu/kernel.h", "gpu/scheme.h", "cachesvc/core/")
INSIDE_TESTS = ("tests/unit/", "tests/kernels/", "tests/fake/")

FILE_LINES = 600
FUNCTION_LINES = 70
COLUMNS = 128

CORE = "cachesvc/core/"
CORE_SYSTEM = {f"{name}.h" for name in (
    "assert", "errno", "inttypes", "limits", "math", "stdalign", "stdbool", "stddef", "stdint", "stdlib", "string")}

CODE = {".c", ".h", ".cu", ".cuh"}
SOURCE = CODE | {".py", ".sh", ".map"}
TEXT = SOURCE | {".md", ".txt", ".toml", ".json", ".conf", ".supp", ".yml", ".pc", ".in", ".1", ".8"}
TEXT_NAMES = {"meson.build", "meson_options.txt", "Makefile", ".gitignore", ".clang-format"}
SKIPPED = {".git", "__pycache__", "corpus", "subprojects"}

INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]')
PRINTS = re.compile(r"\b(printf|vprintf|puts|putchar|perror|dprintf|vdprintf)\s*\(")
PRINTS_TO = re.compile(r"\b(fprintf|vfprintf|fputs|fputc|fwrite)\s*\([^;]*\b(stderr|stdout)\b")
ENDS = re.compile(r"\b(exit|_exit|_Exit|quick_exit|abort)\s*\(")
TYPEDEF = re.compile(r"^\s*typedef\s+(struct|union|enum)\b")
REGISTRY = re.compile(r"\b(?:pypi|pythonhosted|npmjs|crates|anaconda)\.(?:org|io|com)\b", re.I)
URL = re.compile(r"\bhttps?://|--(?:extra-)?index-url|--trusted-host")
ABSOLUTE = re.compile(r"(?:^|(?<=[\s\"'`=(:,]))/([a-z][a-z0-9_-]*)/[\w.]", re.I)
SYSTEM_DIRS = {"usr", "etc", "dev", "proc", "sys", "run", "tmp", "var", "bin", "lib", "opt", "srv", "mnt", "path",
               "nonexistent", "nowhere"}


def stripped(text):
    """The code with comments, strings and preprocessor lines blanked; every line keeps its number."""
    def blank(match):
        return re.sub(r"[^\n]", " ", match.group(0))
    text = re.sub(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", blank, text, flags=re.S)
    return re.sub(r"^[ \t]*#(?:\\\n|[^\n])*", blank, text, flags=re.M)


def functions(code):
    """Yields (name, first line, last line) of each function body in stripped code."""
    depth, start, line, head = 0, None, 1, ""
    for char in code:
        if char == "\n":
            line += 1
        if char == "{":
            if depth == 0:
                called = re.search(r"(\w+)\s*\((?:[^()]|\([^()]*\))*\)[\s\w]*$", head)
                start = (called.group(1), line) if called and "=" not in head else None
            depth += 1
        elif char == "}":
            depth = max(0, depth - 1)
            if depth == 0:
                if start:
                    yield start[0], start[1], line
                start, head = None, ""
        elif depth == 0:
            head = "" if char == ";" else head + char


class Tidy:
    def __init__(self, root):
        self.root = root
        self.breaches = []

    def say(self, path, line, what, remedy):
        self.breaches.append(f"{path}:{line}: {what}; {remedy}")

    def paths(self):
        for path in sorted(self.root.rglob("*")):
            parts = path.relative_to(self.root).parts
            if any(p in SKIPPED for p in parts) or parts[0].startswith("build") or not path.is_file():
                continue
            if path.suffix in TEXT or path.name in TEXT_NAMES or parts[0] == ".ci":
                yield path

    def run(self):
        for path in self.paths():
            name = path.relative_to(self.root).as_posix()
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                self.say(name, 1, "not UTF-8", "save it as UTF-8")
                continue
            self.words(name, path, text)
            if path.suffix in SOURCE:
                self.form(name, path, text)
            if path.suffix in CODE:
                self.includes(name, text)
                self.code(name, stripped(text))
        return self.breaches

    def words(self, name, path, text):
        build_file = path.name in TEXT_NAMES or name.startswith(".ci/") or path.name == "requirements.txt"
        for number, line in enumerate(text.splitlines(), 1):
            if REGISTRY.search(line):
                self.say(name, number, "host of a package registry", "leave the source of packages to the machine")
            if build_file and URL.search(line):
                self.say(name, number, "a build file names a host", "leave the source of packages to the machine")
            for match in ABSOLUTE.finditer(line):
                if match.group(1).lower() not in SYSTEM_DIRS:
                    self.say(name, number, f"absolute path of one machine: {match.group(0)}...",
                             "make it relative, or an option or environment variable")

    def form(self, name, path, text):
        lines = text.splitlines()
        if len(lines) > FILE_LINES:
            self.say(name, FILE_LINES + 1, f"{len(lines)} lines, at most {FILE_LINES}", "split the file by noun")
        if text and not text.endswith("\n"):
            self.say(name, len(lines), "no newline at the end", "add one")
        for number, line in enumerate(lines, 1):
            if len(line) > COLUMNS:
                self.say(name, number, f"{len(line)} columns, at most {COLUMNS}", "break the line")
            if "\t" in line:
                self.say(name, number, "tab", "indent with spaces; write \\t in strings")
            if line != line.rstrip():
                self.say(name, number, "white space at the end of the line", "delete it")
        first = [line for line in lines[:3] if line.strip() and not line.startswith("#!")][:1]
        if not first or not first[0].lstrip().startswith(("/*", "//", "#", '"""', "r\"\"\"")) \
                or (path.suffix in CODE and first[0].startswith("#")):
            self.say(name, 1, "no comment at the top", "say in a line or two what this file is for")

    def includes(self, name, text):
        room = name.split("/")[0]
        for number, line in enumerate(text.splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            quote, target = match.groups()
            if quote == "<":
                if name.startswith(CORE) and target not in CORE_SYSTEM:
                    self.say(name, number, f"the core includes <{target}>",
                             "the core is pure: take time, randomness and I/O as arguments and events")
                continue
            theirs = target.split("/")[0]
            if theirs not in ROOMS or not (self.root / target).is_file():
                self.say(name, number, f'"{target}" is not spelled from the root, or does not exist',
                         'write "room/file.h"')
                continue
            self.edge(name, number, room, target, theirs)

    def edge(self, name, number, room, target, theirs):
        if name.startswith(CORE) and not target.startswith(("proto/", CORE)):
            self.say(name, number, f"the core includes {target}", "the core knows only proto and itself")
        elif name.startswith("client/examples/") and target != "client/pivotkv.h":
            self.say(name, number, f"an example includes {target}", "use the installed header alone, as a user must")
        elif theirs == room or theirs == "proto":
            return
        elif theirs not in EDGES.get(room, set()):
            allowed = ", ".join(sorted(EDGES.get(room, set()))) or "nothing"
            self.say(name, number, f"{room} must not know {theirs} ({target})", f"{room} may include {allowed}")
        elif target not in DOORS[theirs] and not (room == "tests" and self.test_may(name, target)):
            door = ", ".join(sorted(DOORS[theirs])) or "it has none: ask through a socket"
            self.say(name, number, f"{target} is private to {theirs}", f"go through its door: {door}")

    @staticmethod
    def test_may(name, target):
        return target.startswith(TEST_DOORS) or name.startswith(INSIDE_TESTS)

    def code(self, name, code):
        for function, first, last in functions(code):
            if last - first - 1 > FUNCTION_LINES:
                self.say(name, first, f"{function}() has {last - first - 1} lines, at most {FUNCTION_LINES}",
                         "split it into steps with names")
        room, rest = name.split("/")[0], name.split("/")[1:]
        silent = room in ("proto", "gpu", "offload") or (room == "client" and len(rest) == 1)
        for number, line in enumerate(code.splitlines(), 1):
            if room != "tests" and TYPEDEF.match(line):
                self.say(name, number, "typedef of a struct, union or enum", "name it `struct x` where it is used")
            if not silent:
                continue
            if PRINTS.search(line) or PRINTS_TO.search(line):
                self.say(name, number, "a library prints", "return a code (or fill a counter); the caller speaks")
            if ENDS.search(line):
                self.say(name, number, "a library ends the process", "return a negative errno; assert is for our bugs")


def main():
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    root = pathlib.Path(sys.argv[1] if len(sys.argv) == 2 else ".").resolve()
    breaches = Tidy(root).run()
    print("\n".join(breaches + [f"{len(breaches)} breaches of the house rules"]))
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
