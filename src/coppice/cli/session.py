"""Connect a session in a guest to this process: its three streams, its signals, its window size."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from coppice.cli import output, terminal
from coppice.cli.ending import Left, OutputClosed
from coppice.cli.interrupt import signals_to
from coppice.errors import GuestError
from coppice.model import MIB

if TYPE_CHECKING:
    from coppice.model.guest import ExecSession, Exit

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_MAX_CAPTURED = 64 * MIB
_Action = Callable[[], Coroutine[Any, Any, None]]


class Captured:
    """Output that is collected instead of passed on."""

    def __init__(self) -> None:
        self.stdout = bytearray()
        self.stderr = bytearray()

    def add(self, stream: str, data: bytes) -> None:
        """Append data of a stream.

        :raises GuestError: the output exceeds its limit
        """
        if len(self.stdout) + len(self.stderr) + len(data) > _MAX_CAPTURED:
            raise GuestError(f"the command printed more than {_MAX_CAPTURED // MIB} MiB", hint="run it without --json")
        (self.stderr if stream == "stderr" else self.stdout).extend(data)


def window() -> tuple[int, int]:
    """Return (rows, columns) of this process's terminal."""
    return terminal.size_of(_STDIN)


async def attach(session: ExecSession, *, stdin: bool, raw: bool, forward: bool, captured: Captured | None) -> Exit:
    """Pass streams and signals through until the command has ended. Return how it ended.

    `stdin`: pass standard input on. `raw`: standard input is a terminal; pass its keys and its size
    on. `forward`: pass SIGINT and SIGTERM to the command. The third signal ends the session.

    :raises Left: the user left with `~.`
    :raises Interrupted: a signal ended the session
    :raises OutputClosed: the reader has closed standard output
    """
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    actions: asyncio.Queue[_Action] = asyncio.Queue()
    pump = asyncio.create_task(_pump(session, captured))
    others = [asyncio.create_task(_act(actions))]
    try:
        with contextlib.ExitStack() as stack:
            if raw:
                stack.enter_context(terminal.raw_mode(_STDIN))
                stack.enter_context(_following_size(session, actions))
            stack.enter_context(terminal.watched(_STDOUT, lambda: _end(over, OutputClosed())))
            if forward:
                stack.enter_context(signals_to(_forwarder(session, actions)))
            if stdin:
                others.append(asyncio.create_task(_feed(session, over, escapes=raw)))
            waiting: list[asyncio.Future[Any]] = [pump, over]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if over.done():
                over.result()
            return await pump
    finally:
        over.cancel()
        for task in (pump, *others):
            task.cancel()
        await asyncio.gather(pump, *others, return_exceptions=True)


def _end(over: asyncio.Future[None], reason: Exception) -> None:
    if not over.done():
        over.set_exception(reason)


async def _pump(session: ExecSession, captured: Captured | None) -> Exit:
    missed = 0
    async for stream, data in session:
        if session.dropped_bytes > missed:
            output.complain(f"{session.dropped_bytes - missed} bytes of output before this are no longer kept")
            missed = session.dropped_bytes
        if captured is not None:
            captured.add(stream, data)
        else:
            await terminal.write(_STDERR if stream == "stderr" else _STDOUT, data)
    return await session.wait()


async def _feed(session: ExecSession, over: asyncio.Future[None], *, escapes: bool) -> None:
    """Pass standard input on until its end."""
    escape = terminal.Escape() if escapes else None
    while data := await terminal.read(_STDIN):
        wanted, leave = escape.feed(data) if escape else (data, False)
        await session.send_stdin(wanted)
        if leave:
            _end(over, Left())
            return
    await session.eof()


async def _act(actions: asyncio.Queue[_Action]) -> None:
    """Run queued actions in order. Signal handlers queue them, because a handler cannot await."""
    while True:
        await (await actions.get())()


@contextlib.contextmanager
def _following_size(session: ExecSession, actions: asyncio.Queue[_Action]) -> Iterator[None]:
    """During a block, resize the command's terminal whenever the local terminal is resized."""

    async def resize() -> None:
        await session.resize(*window())

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, actions.put_nowait, resize)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


def _forwarder(session: ExecSession, actions: asyncio.Queue[_Action]) -> Callable[[int, Callable[[int], None]], None]:
    seen = 0

    def forward(number: int, end: Callable[[int], None]) -> None:
        nonlocal seen
        seen += 1
        if seen > 2 or number == signal.SIGHUP:
            end(number)
            return
        if seen == 2:
            output.complain("signal sent to the command; another one ends the session")
        actions.put_nowait(lambda: session.signal(number))

    return forward
