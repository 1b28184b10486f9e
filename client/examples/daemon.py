"""A private pivotkvd for a demo or a test: its own folder, its own socket, ended by the process that started it, or with it.

The thread that starts it must live as long: the kernel takes that thread's end for the parent's."""
from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import tempfile
import time


# A parent that is killed leaves no daemon, and none of its memory, behind.
WITH_PARENT = ("setpriv", "--pdeathsig", "TERM", "--")  # of util-linux, which every Debian and Ubuntu has


class PrivateDaemon:
    def __init__(self, binary: pathlib.Path, *, pool_bytes: int, arena_bytes: int, threads: int = 1, flags: tuple = ()):
        if not binary.exists():
            raise FileNotFoundError(f"{binary} is not built: run make")
        self._folder = tempfile.TemporaryDirectory(prefix="pivotkv-")
        folder = pathlib.Path(self._folder.name)
        self.socket = str(folder / "run" / "socket")
        (folder / "run").mkdir(mode=0o700)
        self._log = open(folder / "log", "w+b")
        self._process = subprocess.Popen(
            [*WITH_PARENT, str(binary), "--socket", self.socket, "--pool-bytes", str(pool_bytes),
             "--arena-bytes", str(arena_bytes), "--threads", str(threads), *flags],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"pivotkvd ended with status {self._process.returncode}:\n{self.log()}")
            if os.path.exists(self.socket):
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                    if probe.connect_ex(self.socket) == 0:
                        return
            time.sleep(0.02)
        raise TimeoutError(f"pivotkvd did not listen within 30 s:\n{self.log()}")

    def log(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> PrivateDaemon:
        return self

    def __exit__(self, *_) -> None:
        self.stop()
