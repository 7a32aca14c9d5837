"""This side of a session: standard input without blocking, raw mode, the way out of a session that hangs."""

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
    """Hand every key through, for the length of a block; the terminal is as it was afterwards, whatever happens."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def size_of(descriptor: int) -> tuple[int, int]:
    """(rows, columns) of a terminal, 24 x 80 where it does not say."""
    try:
        columns, rows = os.get_terminal_size(descriptor)
    except OSError:
        return 24, 80
    return rows or 24, columns or 80


async def read(descriptor: int) -> bytes:
    """What can be read now, waiting for it; empty at the end. No thread is left in a read when the wait is cancelled.

    The descriptor's own mode is left alone: O_NONBLOCK would also hit the other programs on the terminal.
    """
    loop = asyncio.get_running_loop()
    while True:
        ready = asyncio.Event()
        try:
            loop.add_reader(descriptor, ready.set)
        except PermissionError:  # epoll takes no regular file and no /dev/null: a read of these does not wait
            return await asyncio.to_thread(os.read, descriptor, _CHUNK)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(descriptor)
        try:
            return os.read(descriptor, _CHUNK)
        except BlockingIOError:
            continue
        except OSError:  # EIO: the terminal has gone
            return b""


async def write(descriptor: int, data: bytes) -> None:
    """Write all of it, waiting for a slow reader.

    :raises OutputClosed: nobody reads it any more
    :raises OutputLost: it cannot be written
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
        except BlockingIOError:  # someone else made the terminal non-blocking
            select.select([], [descriptor], [])


@contextlib.contextmanager
def watched(descriptor: int, gone: Callable[[], None]) -> Iterator[None]:
    """For the length of a block, call `gone` when nobody reads a pipe any more, even if nothing is written to it.

    So `coppice logs -f vm | grep -m1 ready` ends with grep, not with the next line.
    """
    loop = asyncio.get_running_loop()

    def closed() -> None:
        loop.remove_reader(descriptor)
        gone()

    is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    if is_pipe:
        loop.add_reader(
            descriptor, closed
        )  # the writing end is never readable; epoll always tells of an error, which this is
    try:
        yield
    finally:
        if is_pipe:
            loop.remove_reader(descriptor)


async def while_read(descriptor: int, work: Coroutine[Any, Any, None]) -> None:
    """Do the work for as long as anybody reads the descriptor, where it is a pipe.

    :raises OutputClosed: nobody reads it any more
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
    """Finds `~.` at the start of a line, by which a user leaves a session that hangs; `~~` is one tilde. As ssh has it."""

    def __init__(self) -> None:
        self._at_start = True
        self._tilde = False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return what is to be sent on, and whether the user wants out."""
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
