"""What the commands share: errors as sentences with exit codes, Ctrl-C, a progress bar, tables as text or JSON, plots as PNG.

Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from typing import Any, Callable, NoReturn, Sequence

import numpy as np

from . import version


class Progress:
    """A bar that rewrites itself on a terminal, a line every tenth elsewhere; on stderr, so that output stays clean."""

    def __init__(self, what: str, total: int, unit: str = ""):
        self.what, self.total, self.unit, self.start, self.shown = what, max(total, 1), unit, time.monotonic(), -1

    def __call__(self, done: int, more: str = "") -> None:
        left = (time.monotonic() - self.start) * (self.total - done) / done if done else 0
        text = f"{self.what} {done}/{self.total}{self.unit}{', ' + more if more else ''}"
        if sys.stderr.isatty():
            bar = "#" * (done * 24 // self.total)
            end = "\n" if done == self.total else ""
            print(f"\r\033[K{text}  [{bar:<24}] {_clock(left)} left", end=end, file=sys.stderr, flush=True)
        elif done * 10 // self.total != self.shown:
            self.shown = done * 10 // self.total
            print(f"{text}  {_clock(left)} left", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def parser(name: str, description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--version", action="version", version=f"{name} {version()}")
    return made


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def numbers(text: str) -> list[int]:
    """"128,256" for argparse."""
    try:
        return [positive(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 128,256") from None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]], form: str) -> str:
    """Rows of equal keys: columns for people, or a JSON array."""
    if form == "json":
        return json.dumps(list(rows), indent=1)
    cells = [[name for name in rows[0]]] if rows else []
    cells += [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))] if cells else []
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths)).rstrip() for line in cells)


def save_curve(path: str, losses: np.ndarray, title: str) -> bool:
    """Mean loss of the units by step, smoothed, with the range that four fifths of them stay in. False: no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        say(f"no {path}: install matplotlib for the plot (pip install 'pivotkv[plot]')")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    width = max(1, losses.shape[1] // 50)
    smooth = np.stack([np.convolve(row, np.ones(width) / width, "valid") for row in losses])
    steps = np.arange(smooth.shape[1]) + width
    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    low, high = np.quantile(smooth, [0.1, 0.9], axis=0)
    axes.fill_between(steps, low, high, alpha=0.25, label="10 % to 90 % of the units")
    axes.plot(steps, smooth.mean(axis=0), label=f"mean of {len(losses)}")
    axes.set(xlabel="step", ylabel=f"loss, mean of {width} steps", title=title)
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def run(name: str, body: Callable[[], int]) -> NoReturn:
    """Ends the process with the body's exit code; what users cause ends in a sentence, not in a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = body()
        sys.stdout.flush()
    except KeyboardInterrupt:
        say(f"\n{name}: interrupted")
        code = 130
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except MemoryError:
        say(f"{name}: not enough memory: use fewer or shorter recordings")
        code = 1
    except (OSError, ValueError, ImportError) as error:
        sentence = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
        say(f"{name}: {sentence}")
        code = 1
    sys.exit(code)
