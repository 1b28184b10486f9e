"""The texts that quality is judged on, out of Debian packages: taken from the machine where it has them, else downloaded by
`apt-get download` and unpacked in the cache folder, without installing anything."""
from __future__ import annotations

import gzip
import pathlib
import re
import subprocess

MAN = "usr/share/man/man1/{}.1.gz"
POD = "usr/share/perl/5*/pod/{}.pod"
# name: [(package, file below /)]
SOURCES = {
    "bash": [("bash", MAN.format("bash"))],
    "manuals": [("bash", MAN.format("bash")), ("git-man", MAN.format("git-config")), ("tmux", MAN.format("tmux")),
                ("perl-doc", POD.format("perldiag"))],
    "genesis": [("bible-kjv-text", "usr/lib/bible.data")],
    "gospels": [("bible-kjv-text", "usr/lib/bible.data")],
    "git": [("git-man", MAN.format(page)) for page in ("git-rebase", "git-fast-import", "git-log", "git-rev-list")],
    "perl": [("perl-doc", POD.format(page)) for page in ("perlguts", "perlretut", "perlfaq4")],
    "reference": [("developers-reference", "usr/share/developers-reference/developers-reference.txt.gz")],
}
BIBLE_AT = {"genesis": "Ge1:1 ", "gospels": "Mat1:1 "}


class Texts:
    def __init__(self, cache: pathlib.Path):
        self.cache = cache / "packages"

    def read(self, name: str, characters: int) -> str:
        """The first `characters` of a text, in equal shares of its files; a path is read as it is."""
        if name not in SOURCES:
            path = pathlib.Path(name)
            if not path.is_file():
                raise FileNotFoundError(f"{name} is neither a file nor one of {', '.join(SOURCES)}")
            return path.read_text(encoding="utf-8", errors="replace")[:characters]
        files = SOURCES[name]
        parts = [plain(self.find(*source), BIBLE_AT.get(name)) for source in files]
        return "\n\n".join(part[: characters // len(files)] for part in parts)

    def find(self, package: str, pattern: str) -> pathlib.Path:
        """Pages of the machine itself first, then of the package."""
        for root in (pathlib.Path("/"), self.cache / package):
            for path in sorted(root.glob(pattern)):
                return path
        self.fetch(package)
        for path in sorted((self.cache / package).glob(pattern)):
            return path
        raise FileNotFoundError(f"the package {package} has no {pattern}")

    def fetch(self, package: str) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        got = subprocess.run(["apt-get", "download", package], cwd=self.cache, capture_output=True, text=True)
        files = sorted(self.cache.glob(f"{package}_*.deb"))
        if got.returncode or not files:
            said = (got.stderr.strip().splitlines() or ["apt-get said nothing"])[-1]
            raise FileNotFoundError(f"cannot download the package {package} ({said}): apt-get update, and see the network")
        subprocess.run(["dpkg-deb", "-x", files[-1], self.cache / package], check=True)


def plain(path: pathlib.Path, begin: str | None) -> str:
    raw = path.read_bytes()
    if path.name == "bible.data":
        return bible(raw, begin)
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    if ".1" in path.suffixes:
        try:
            raw = subprocess.run(["nroff", "-c", "-man", "-Tascii"], input=raw, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL, check=True).stdout
        except FileNotFoundError as error:
            raise FileNotFoundError("nroff is missing, which turns manual pages into text: install groff-base") from error
        return re.sub(".\x08", "", raw.decode("ascii", errors="replace"))
    return raw.decode("utf-8", errors="replace")


def bible(raw: bytes, begin: str | None) -> str:
    """Text in the format of compress(1) behind a table of offsets. Lines "Ge1:1 In the beginning ...": the text alone."""
    packed = raw[raw.index(b"\x1f\x9d"):]
    text = subprocess.run(["gzip", "-dc"], input=packed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode()
    text = text[text.index(begin or "Ge1:1 "):]
    return re.sub(r"^\w+:\d+ ", "", text, flags=re.MULTILINE)
