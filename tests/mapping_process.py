"""A real process that maps a file as a VMM maps its guest RAM, and writes or touches it when told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

_CHILD = """
import mmap, sys
path, kind = sys.argv[1:]
with open(path, "r+b" if kind == "shared" else "rb") as file:
    size = file.seek(0, 2)
    if kind == "private":
        ram = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    elif kind == "shared":
        ram = mmap.mmap(file.fileno(), size)
    else:
        ram = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        ram[:] = file.seek(0) or file.read()
print("ready", flush=True)
for line in sys.stdin:
    word, *arguments = line.split()
    if word == "write":
        for item in arguments:
            offset, data = item.split(":")
            data = bytes.fromhex(data)
            ram[int(offset) : int(offset) + len(data)] = data
    elif word == "fill":
        offset, length, value = map(int, arguments)
        ram[offset : offset + length] = bytes([value]) * length
    elif word == "touch":
        sum(ram[offset] for offset in range(0, size, 4096))
    print("done", flush=True)
"""


class MappingProcess:
    """The process; a context manager. Between two commands it does nothing, as a paused guest."""

    def __init__(self, path: Path, kind: Literal["private", "shared", "copy"] = "private") -> None:
        self._process = subprocess.Popen(
            (sys.executable, "-I", "-S", "-c", _CHILD, str(path), kind),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self._answer("ready")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def write(self, *pieces: tuple[int, bytes]) -> None:
        """Store bytes at offsets of the mapping."""
        self._command("write", *(f"{offset}:{data.hex()}" for offset, data in pieces))

    def fill(self, offset: int, length: int, value: int) -> None:
        """Store one byte value all over a range."""
        self._command("fill", str(offset), str(length), str(value))

    def touch(self) -> None:
        """Read one byte of each page."""
        self._command("touch")

    def _command(self, *words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        self._answer("done")

    def _answer(self, expected: str) -> None:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        assert answer == expected, f"the mapping process said {answer!r}"
