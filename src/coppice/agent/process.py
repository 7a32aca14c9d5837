"""A command that runs in a guest: its streams, signals and end.

A command goes on when its host goes away, and keeps its latest output. Any host can attach to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager

import msgspec

from coppice.agent.channel import Channel
from coppice.agent.collecting import Collecting
from coppice.agent.protocol import LIMITS, Fields, Frame, FrameType, encode_fields, encode_frame, pack32, unpack_number
from coppice.agent.stream import REFUSED, RemoteStream, deadline
from coppice.arguments import checked
from coppice.commands import check_signal, new_command_id
from coppice.errors import (
    Busy,
    CommandNotFound,
    CommandNotStarted,
    CoppiceError,
    GuestProtocolError,
    GuestRefused,
    GuestTimeout,
    NotFound,
    UsageError,
    VmmDied,
)
from coppice.model import Record
from coppice.model.guest import Exit, GuestCommand, Stream, TerminalSize
from coppice.names import check_terminal

_TTY, _STDIN, _DETACHED = 1, 2, 4
_TIMED_OUT, _OUT_OF_MEMORY = 1, 2
_WITHOUT_OUTPUT, _WITH_INPUT = 1, 2
_LIST_MAX = 4 << 20  # an agent knows 1024 commands at most, and lists about 2 KiB of each
_TIMEOUT_GRACE_S = 10.0  # added to the guest's own timeout, in case the guest does not keep it
_STREAMS: dict[int, Stream] = {FrameType.STDOUT: "stdout", FrameType.STDERR: "stderr"}


class Command(Record, frozen=True, kw_only=True):
    """A command to run. `env` adds to the image's; None for `cwd` or `user` means the image's."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = {}
    cwd: str | None = None
    user: str | None = None
    tty: bool = False
    size: TerminalSize
    term: str | None = None
    has_stdin: bool = False
    timeout_s: float | None = None
    id: str = ""  # empty: a random one
    detached: bool = False  # the caller does not stay for its output
    keep_bytes: int | None = None  # of its latest output, for clients that attach later
    memory_bytes: int | None = None  # limit of all of its processes together
    processes: int | None = None  # limit of their number


def encode_command(command: Command) -> bytes:
    """Return the payload of the EXEC request for a command."""
    flags = (_TTY if command.tty else 0) | (_STDIN if command.has_stdin else 0) | (_DETACHED if command.detached else 0)
    rows, columns = command.size
    return encode_fields(
        [
            *((1, argument) for argument in command.argv),
            *((2, f"{name}={value}") for name, value in command.env.items()),
            (3, command.cwd),
            (4, command.user),
            (5, flags),
            (6, rows),
            (7, columns),
            (8, None if command.timeout_s is None else max(1, int(command.timeout_s * 1000))),
            (9, command.term),
            (10, command.id),
            (11, command.keep_bytes),
            (12, command.memory_bytes),
            (13, command.processes),
        ]
    )


class ExecSession(Collecting):
    """A running command. Iterate over it for its output; then `wait` returns how it ended.

    A command whose output is not read blocks when the buffers are full, as with a pipe.
    """

    def __init__(
        self,
        channel: Channel,
        stream: RemoteStream,
        command_id: str,
        name: str,
        timeout_s: float | None,
        *,
        has_stdin: bool = True,
    ) -> None:
        self.id = command_id
        self.pid = 0
        self.offset = 0
        self.dropped_bytes = 0
        super().__init__(name, timeout_s, has_stdin=has_stdin)
        self._channel = channel
        self._stream = stream
        self._ends_at = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s + _TIMEOUT_GRACE_S

    async def opened(self) -> None:
        """Wait for the agent's word that the command runs.

        :raises GuestRefused: it does not
        """
        try:
            async with self._limit():
                frame = await self._stream.opened()
        except (VmmDied, GuestTimeout, GuestProtocolError) as error:
            raise _lost(error, f"{self._name} may have been started as command {self.id}") from error
        fields = Fields(frame.payload)
        self.pid, self._stream.window, self.offset = fields.integer(1), fields.integer(2), fields.integer(3)

    def _limit(self) -> AbstractAsyncContextManager[None]:
        """Keep the time limit of the command here too, in case the guest does not."""
        return contextlib.nullcontext() if self._ends_at is None else self._until_its_end()

    @contextlib.asynccontextmanager
    async def _until_its_end(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(self._ends_at):
                yield
        except TimeoutError as error:
            raise GuestTimeout(
                f"{self._name} ran longer than {self._timeout_s or 0:g} s, and the guest did not end it",
                hint="see the guest's console with `coppice logs NAME`",
            ) from error

    def _take(self, frame: Frame) -> tuple[Stream, bytes] | None:
        stream = _STREAMS.get(frame.type)
        if stream:
            self.offset += len(frame.payload)
            return stream, frame.payload
        if frame.type == FrameType.DROPPED:
            count = unpack_number(frame.payload)
            self.dropped_bytes += count
            self.offset += count
            return None
        fields = self._stream.final(frame, FrameType.EXIT)
        flags = fields.integer(2, 0)
        self._exit = Exit(
            exit_code=fields.integer(1),
            timed_out=bool(flags & _TIMED_OUT),
            out_of_memory=bool(flags & _OUT_OF_MEMORY),
            signal=fields.integer(3, 0) or None,
        )
        return None

    async def __aiter__(self) -> AsyncIterator[tuple[Stream, bytes]]:
        """Yield the command's output as it arrives, until the command has ended.

        :raises VmmDied: the machine ended
        :raises GuestTimeout: the guest is silent, or does not end the command in time
        :raises GuestProtocolError: the guest broke the protocol
        """
        while self._exit is None:
            try:
                async with self._limit():
                    item = self._take(await self._stream.receive())
            except (VmmDied, GuestTimeout, GuestProtocolError) as error:
                raise _lost(error, f"{self._name} had been started as command {self.id}, and may run on") from error
            if item is not None:
                yield item

    @checked
    async def send_stdin(self, data: bytes) -> None:
        """Send data to the command's standard input.

        Waits while the command does not read. Data sent after its end is dropped.
        """
        await self._stream.send_data(FrameType.STDIN, data)

    async def eof(self) -> None:
        """Close the command's standard input."""
        await self._stream.send(FrameType.STDIN_EOF)

    @checked
    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group.

        :raises UsageError: no signal has this number
        """
        check_signal(number)
        await self._stream.send(FrameType.SIGNAL, pack32(number))

    @checked
    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal.

        :raises UsageError: a number is out of range
        """
        await self._stream.send(FrameType.RESIZE, pack32(*check_terminal((rows, columns))))

    async def terminate(self) -> Exit:
        """End all processes that the command has started: SIGTERM, SIGKILL half a second later.
        Return how it ended. The agent remembers it.
        """
        if self._exit is None:
            self._stream.abandon(encode_fields([(1, int(signal.SIGTERM))]))
        return await self.wait()

    def end(self) -> None:
        """End the command (SIGHUP, SIGKILL half a second later), or forget it if it has ended."""
        if self._exit is None:
            self._stream.abandon()
        elif self._channel.failure is None:
            forget(self._channel, self.id)

    async def leave(self) -> None:
        """Let the command run on when the session is closed."""
        self._stream.leave()


def _lost(error: CoppiceError, what: str) -> CoppiceError:
    """Return the error with a word on what may have happened in the guest."""
    return type(error)(f"{error.message}; {what}", hint=error.hint)


@contextlib.asynccontextmanager
async def start(channel: Channel, command: Command) -> AsyncIterator[ExecSession]:
    """Start a command. Leaving the block ends it, unless it is detached.

    :raises UsageError: the command is empty
    :raises CommandNotStarted: the guest cannot start it; `errno` is that of the guest's kernel
    :raises NotSupported: the command has limits, and the agent is too old to keep them
    """
    if not command.argv:
        raise UsageError("no command given", hint="give a program and its arguments")
    if command.memory_bytes is not None or command.processes is not None:
        await channel.require(LIMITS, "limits of commands")
    name, command_id = command.argv[0], command.id or new_command_id()
    payload = encode_command(msgspec.structs.replace(command, id=command_id))
    stream = await channel.open(FrameType.EXEC, payload)
    running = ExecSession(channel, stream, command_id, name, command.timeout_s, has_stdin=command.has_stdin)
    try:
        try:
            await running.opened()
        except GuestRefused as error:
            kind = CommandNotFound if error.errno == errno.ENOENT else CommandNotStarted
            reason = error.message.removeprefix(REFUSED)
            raise kind(f"cannot start {name}: {reason}", errno=error.errno, hint=error.hint) from None
        yield running
    finally:
        if not command.detached:
            running.end()


@contextlib.asynccontextmanager
async def attach(
    channel: Channel, command_id: str, *, offset: int = 0, output: bool = True, stdin: bool = False
) -> AsyncIterator[ExecSession]:
    """Attach to a command that runs or has ended. Leaving the block lets it run on.

    :param offset: the output from here on is replayed, as far as it is kept
    :param output: False only waits for the end
    :param stdin: send its standard input from here. One client at a time can
    :raises NotFound: the agent knows no such command
    :raises Busy: another client sends the command's input
    """
    flags = (0 if output else _WITHOUT_OUTPUT) | (_WITH_INPUT if stdin else 0)
    fields = encode_fields([(1, command_id), (2, offset), (3, flags)])
    stream = await channel.open(FrameType.ATTACH, fields)
    running = ExecSession(channel, stream, command_id, f"command {command_id}", None)
    try:
        try:
            await running.opened()
        except GuestRefused as error:
            if error.errno == errno.ESRCH:
                raise NotFound(
                    f"the machine has no command {command_id}", hint="it may have ended long ago, and is forgotten then"
                ) from None
            if error.errno == errno.EBUSY:
                raise Busy(
                    f"another client sends the input of command {command_id}",
                    hint="attach without input (`coppice attach -n NAME ID`), or wait until that client has left",
                ) from None
            raise
        yield running
    finally:
        await running.leave()


def forget(channel: Channel, command_id: str) -> None:
    """Have the agent forget a command that has ended and that no client is attached to."""
    channel.post(encode_frame(FrameType.FORGET, 0, encode_fields([(1, command_id)])))


async def commands(channel: Channel) -> list[GuestCommand]:
    """Return the commands that the agent knows, the oldest first.

    :raises GuestTimeout: the list did not come in time
    :raises GuestProtocolError: the list is malformed or too long
    """
    stream = await channel.open(FrameType.LIST)
    payload = bytearray()
    try:
        async with deadline(channel.patience_s, "no complete list"):
            async for chunk in stream.data():
                payload += chunk
                if len(payload) > _LIST_MAX:
                    raise GuestProtocolError(
                        f"the guest's list of commands is longer than {_LIST_MAX} bytes",
                        hint="run `coppice stop NAME`, then `coppice start NAME`",
                    )
    finally:
        stream.abandon()
    found = [_listed(Fields(entry)) for entry in Fields(bytes(payload)).raws(1)]
    return sorted(found, key=lambda command: command.started_at)


def _listed(fields: Fields) -> GuestCommand:
    last = fields.raw(9)
    ended = None if last is None else Fields(last)
    flags = fields.integer(3, 0)
    return GuestCommand(
        id=fields.text(1),
        argv=tuple(fields.texts(10)),
        pid=fields.integer(2),
        user=fields.text(5) or None,
        tty=bool(flags & _TTY),
        stdin=bool(flags & _STDIN),
        started_at=fields.integer(4) / 1e9,
        attached=bool(fields.integer(8, 0)),
        output_bytes=fields.integer(7),
        dropped_bytes=fields.integer(6),
        exit_code=None if ended is None else ended.integer(1),
        timed_out=ended is not None and bool(ended.integer(2, 0) & _TIMED_OUT),
        out_of_memory=ended is not None and bool(ended.integer(2, 0) & _OUT_OF_MEMORY),
        ended_at=None if ended is None else fields.integer(11) / 1e9,
    )
