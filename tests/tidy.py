"""The form of the house, as an ordinary test: edges between rooms, one door per folder, lengths, silence of libraries.

usage: tidy.py SOURCE_ROOT
Prints file:line, what is wrong and what to do; exit status 1 if there is anything.
"""
import pathlib
import re
import sys

EDGES = {
    "proto": {"proto"},
    "gpu": {"gpu", "proto"},
    "offload": {"offload", "proto"},
    "cachesvc": {"cachesvc", "proto", "gpu", "offload"},
    "client": {"client", "proto", "gpu"},
    "tests": {"tests", "proto", "gpu", "offload", "cachesvc", "client"},
}
DOORS = {"gpu": {"gpu/gpu.h"}, "offload": {"offload/offload.h"}, "client": {"client/pivotkv.h"}}
CORE_FORBIDDEN = re.compile(r"<(unistd|pthread|time|stdio|signal|fcntl|poll|sys/.*|linux/.*)\.?h?>")
SILENT = re.compile(r"\b(printf|fprintf|puts|perror|exit|abort|_exit)\s*\(")
FORBIDDEN = re.compile(r"/home/|/root/|pypi\.org|debian\.org|files\.pythonhosted")
FILE_LINES, FUNCTION_LINES, COLUMNS = 600, 70, 128
INCLUDE = re.compile(r'\s*#\s*include\s+(?:"([^"]+)"|(<[^>]+>))')


def room(path: str) -> str:
    return path.split("/", 1)[0]


def check_include(path: str, line: int, quoted: str | None, angled: str | None):
    if angled and path.startswith("cachesvc/core/") and CORE_FORBIDDEN.match(angled):
        yield line, f"core is pure: {angled} belongs into the shell around it"
    if not quoted:
        return
    here, there = room(path), room(quoted)
    if there not in EDGES:
        yield line, f'"{quoted}": spell includes from the root'
    elif there not in EDGES[here]:
        yield line, f"{here} may not know {there}: move the code, or pass what it needs as an argument"
    elif there != here and here != "tests" and there in DOORS and quoted not in DOORS[there]:
        yield line, f"{quoted} is private to {there}: use its door {', '.join(sorted(DOORS[there]))}"


def is_silent(path: str) -> bool:
    return room(path) in ("proto", "gpu", "offload") or (room(path) == "client" and path.count("/") == 1)


def check_functions(lines: list[str]):
    """Bodies that open with a brace in column 0, as this code base writes functions."""
    start = None
    for number, text in enumerate(lines, 1):
        if text.startswith("{"):
            start = number
        elif text.startswith("}") and start is not None:
            if not text.startswith("};") and number - start - 1 > FUNCTION_LINES:
                yield start, f"function of {number - start - 1} lines, at most {FUNCTION_LINES}: name its parts"
            start = None


def check_file(root: pathlib.Path, path: str):
    lines = (root / path).read_text(encoding="utf-8").splitlines()
    is_c = path.endswith((".c", ".h", ".cu", ".cuh"))
    if len(lines) > FILE_LINES:
        yield FILE_LINES, f"{len(lines)} lines, at most {FILE_LINES}: two names would tell the story better"
    if lines and is_c and not lines[0].startswith("/*"):
        yield 1, "begin with a comment that says what the file is for"
    for number, text in enumerate(lines, 1):
        if "\t" in text or text != text.rstrip():
            yield number, "tab or trailing white space: remove it"
        if len(text) > COLUMNS:
            yield number, f"{len(text)} columns, at most {COLUMNS}: break the line"
        if FORBIDDEN.search(text) and not path.startswith("tests/tidy"):
            yield number, "names a machine's path or a registry's host: remove it"
        if not is_c:
            continue
        match = INCLUDE.match(text)
        if match:
            for where, why in check_include(path, number, match.group(1), match.group(2)):
                yield where, why
        if is_silent(path) and SILENT.search(text.split("/*")[0]) and "snprintf" not in text:
            yield number, "libraries neither print nor exit: return an error"
    if is_c:
        yield from check_functions(lines)


def sources(root: pathlib.Path):
    for top in EDGES:
        for p in sorted((root / top).rglob("*")):
            if p.suffix in (".c", ".h", ".cu", ".cuh", ".py") and "egg-info" not in str(p):
                yield str(p.relative_to(root))


def check_tree(root: pathlib.Path) -> list[str]:
    return [f"{path}:{line}: {why}" for path in sources(root) for line, why in check_file(root, path)]


if __name__ == "__main__":
    complaints = check_tree(pathlib.Path(sys.argv[1]))
    print("\n".join(complaints) or "tidy")
    sys.exit(1 if complaints else 0)
