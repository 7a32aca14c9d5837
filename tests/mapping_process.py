"""A real process that maps a file as a VMM maps guest RAM, and writes or reads it on command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

_CHILD = """
import mmap, sys
writer = going = None
def churn(seed):
    import random
    choices = random.Random(seed)
    while going:
        offset = choices.randrange(size - 65536)
        data = choices.randbytes(choices.choice((3, 3, 3, 9000, 65536)))
        ram[offset : offset + len(data)] = data
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
    elif word == "digest":
        import hashlib
        print(hashlib.sha256(ram).hexdigest(), flush=True)
        continue
    elif word == "churn":
        import threading
        going = True
        writer = threading.Thread(target=churn, args=arguments)
        writer.start()
    elif word == "halt":
        going = False
        writer.join()
    elif word == "discard":
        ram.madvise(mmap.MADV_DONTNEED, *map(int, arguments))
    elif word == "handle":
        import os, signal
        pipe = os.pipe()
        os.set_blocking(pipe[1], False)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
    elif word == "touch":
        sum(ram[offset] for offset in range(0, size, 4096))
    print("done", flush=True)
"""


class MappingProcess:
    """The process, as a context manager. Between commands it is idle, like a paused guest."""

    def __init__(
        self, path: Path, kind: Literal["private", "shared", "copy"] = "private", *, holding: Sequence[Path] = ()
    ) -> None:
        """Start it; it has the files `holding` open."""
        held = [os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in holding]
        self._process = subprocess.Popen(
            (sys.executable, "-I", "-S", "-c", _CHILD, str(path), kind),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=held,
        )
        for descriptor in held:
            os.close(descriptor)
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
        """Store one byte value in a whole range."""
        self._command("fill", str(offset), str(length), str(value))

    def digest(self) -> str:
        """Return the SHA-256 of what it sees."""
        self._send("digest")
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def churn(self, seed: int) -> None:
        """Write to random places until `halt`, as a guest that runs."""
        self._command("churn", str(seed))

    def halt(self) -> None:
        """Return when it does not write any longer, as a paused guest."""
        self._command("halt")

    def discard(self, offset: int, length: int) -> None:
        """Give pages back to the kernel: the file's are seen again."""
        self._command("discard", str(offset), str(length))

    def handle_signals(self) -> None:
        """Handle SIGUSR1 from now on, by a handler that makes a system call."""
        self._command("handle")

    def touch(self) -> None:
        """Read one byte of each page."""
        self._command("touch")

    def _command(self, *words: str) -> None:
        self._send(*words)
        self._answer("done")

    def _send(self, *words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()

    def _answer(self, expected: str) -> None:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        assert answer == expected, f"the mapping process answered {answer!r}"
