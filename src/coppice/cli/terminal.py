"""The local side of a session: reading without blocking, raw mode, the escape from a hanging
session.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import stat
import termios
import tty
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from coppice.cli.ending import OutputClosed
from coppice.cli.output import discard, unwritten

_CHUNK = 1 << 15


@contextlib.contextmanager
def raw_mode(descriptor: int) -> Iterator[None]:
    """Pass every key through during a block. Then restore the terminal, even after an error."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def size_of(descriptor: int) -> tuple[int, int]:
    """Return (rows, columns) of a terminal, or 24 x 80 if they are unknown."""
    try:
        columns, rows = os.get_terminal_size(descriptor)
    except OSError:
        return 24, 80
    return rows or 24, columns or 80


async def read(descriptor: int) -> bytes:
    """Wait until data can be read, and return it; return nothing at the end of the input.

    A cancellation leaves no thread that still reads. The descriptor stays in blocking mode:
    O_NONBLOCK would also affect other programs on the terminal.
    """
    loop = asyncio.get_running_loop()
    while True:
        ready = asyncio.Event()
        try:
            loop.add_reader(descriptor, ready.set)
        except PermissionError:  # epoll refuses regular files and /dev/null, whose reads do not block
            return await asyncio.to_thread(os.read, descriptor, _CHUNK)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(descriptor)
        try:
            return os.read(descriptor, _CHUNK)
        except BlockingIOError:
            continue
        except OSError:  # EIO: the terminal is closed
            return b""


async def write(descriptor: int, data: bytes) -> None:
    """Write all data, and wait for a slow reader.

    :raises OutputClosed: the reader has closed the descriptor
    :raises OutputLost: the descriptor cannot be written
    """
    try:
        await asyncio.to_thread(_write_all, descriptor, data)
    except OSError as error:
        discard()
        raise unwritten(error) from error


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # another program has made the terminal non-blocking
            select.select([], [descriptor], [])


@contextlib.contextmanager
def watched(descriptor: int, gone: Callable[[], None]) -> Iterator[None]:
    """During a block, call `gone` when the reader of a pipe closes it, even if nothing is written.

    This ends `coppice logs -f vm | grep -m1 ready` together with grep, not at the next line.
    """
    loop = asyncio.get_running_loop()

    def closed() -> None:
        loop.remove_reader(descriptor)
        gone()

    is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    if is_pipe:
        # The writing end is never readable, but epoll also reports errors, such as a closed reading
        # end.
        loop.add_reader(descriptor, closed)
    try:
        yield
    finally:
        if is_pipe:
            loop.remove_reader(descriptor)


async def while_read(descriptor: int, work: Coroutine[Any, Any, None]) -> None:
    """Run the work. If the descriptor is a pipe, cancel the work when the reader closes it.

    :raises OutputClosed: the reader has closed it
    """
    task = asyncio.create_task(work)
    unread: list[bool] = []

    def stop() -> None:
        unread.append(True)
        task.cancel()

    with watched(descriptor, stop):
        try:
            await task
        except asyncio.CancelledError:
            if not unread:
                raise
            discard()
            raise OutputClosed from None


class Escape:
    """Finds `~.` at the start of a line, which leaves a hanging session; `~~` is one tilde. As in
    ssh.
    """

    def __init__(self) -> None:
        self._at_start = True
        self._tilde = False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return the bytes to send on, and whether the user leaves the session."""
        sent = bytearray()
        for byte in data:
            if self._tilde:
                self._tilde = False
                if byte == ord("."):
                    return bytes(sent), True
                if byte != ord("~"):
                    sent.append(ord("~"))
            elif self._at_start and byte == ord("~"):
                self._tilde = True
                continue
            sent.append(byte)
            self._at_start = byte in b"\r\n"
        return bytes(sent), False
