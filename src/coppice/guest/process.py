"""A command that runs in a guest: its streams, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import signal
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from typing import Literal

from coppice.errors import CommandNotFound, CommandNotStarted, GuestError, GuestRefused, GuestTimeout, UsageError
from coppice.guest.channel import REFUSED, Channel, deadline, unexpected
from coppice.guest.protocol import (
    WINDOW_SIZE,
    Fields,
    Frame,
    FrameType,
    encode_fields,
    encode_frame,
    encode_request,
    encode_stream,
    integer32,
    pack32,
)
from coppice.model import MIB, ExecResult, Record

Stream = Literal["stdout", "stderr"]
TerminalSize = tuple[int, int]  # rows, columns
Source = bytes | AsyncIterable[bytes]
OutputSink = Callable[[bytes], Awaitable[None] | None]

MAX_COLLECTED = 64 * MIB

_TTY, _STDIN = 1, 2
_TIMED_OUT = 1
_TIMEOUT_GRACE_S = 15.0  # beyond the guest's own timeout, for a guest that does not keep it
_QUEUED_CHUNKS = 4  # output that is read ahead of the consumer; beyond, the guest is not read
_STREAMS: dict[int, Stream] = {FrameType.STDOUT: "stdout", FrameType.STDERR: "stderr"}


class Exit(Record, frozen=True, kw_only=True):
    """How a command ended. `exit_code` is 128+n where signal n ended it."""

    exit_code: int
    timed_out: bool


class Command(Record, frozen=True, kw_only=True):
    """What to run. An `env` variable replaces one of the image; `cwd` and `user` are the image's where None."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = {}
    cwd: str | None = None
    user: str | None = None
    tty: bool = False
    size: TerminalSize = (24, 80)
    term: str | None = None
    has_stdin: bool = False
    timeout_s: float | None = None


def encode_command(command: Command) -> bytes:
    """The EXEC request for a command."""
    flags = (_TTY if command.tty else 0) | (_STDIN if command.has_stdin else 0)
    rows, columns = command.size
    return encode_request(
        FrameType.EXEC,
        encode_fields(
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
            ]
        ),
    )


class ExecSession:
    """A running command. Iterate over it for its output; then `wait` says how it ended.

    Output that nobody takes stops the command when it has filled the buffers, as a pipe would.
    """

    def __init__(self, channel: Channel, command: Command, pid: int) -> None:
        self.pid = pid
        self._name = command.argv[0]
        self._timeout_s = command.timeout_s
        self._began = time.perf_counter()
        self._channel = channel
        self._output: asyncio.Queue[tuple[Stream, bytes] | None] = asyncio.Queue(_QUEUED_CHUNKS)
        self._window = WINDOW_SIZE
        self._window_opened = asyncio.Event()
        self._ended = False  # nothing more is sent to it
        self._exit: Exit | None = None
        self._error: BaseException | None = None
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            while self._exit is None:
                await self._take(await self._channel.receive(patience_s=None))
        except Exception as error:  # whatever it is, the consumer gets it
            self._error = error
        finally:
            self._ended = True
            self._window_opened.set()
        await self._output.put(None)

    async def _take(self, frame: Frame) -> None:
        stream = _STREAMS.get(frame.type)
        if stream:
            await self._output.put((stream, frame.payload))
        elif frame.type == FrameType.WINDOW:
            self._window += integer32(frame.payload)
            self._window_opened.set()
        else:
            fields = self._channel.final(frame, FrameType.EXIT)
            self._exit = Exit(exit_code=fields.integer(1), timed_out=bool(fields.integer(2, 0) & _TIMED_OUT))

    async def __aiter__(self) -> AsyncIterator[tuple[Stream, bytes]]:
        """What the command writes, as it comes, until it has ended.

        :raises VmmDied: the machine went away
        :raises GuestProtocolError: the guest sent something else
        """
        while (item := await self._output.get()) is not None:
            yield item
        self._output.put_nowait(None)  # for whoever iterates again
        if self._error:
            raise self._error

    async def send_stdin(self, data: bytes) -> None:
        """Give the command something to read; waits while it does not read. What is sent after its end is dropped."""
        view = memoryview(data)
        while view and not self._ended:
            while self._window == 0 and not self._ended:
                self._window_opened.clear()
                await self._window_opened.wait()
            size = min(len(view), self._window)
            self._window -= size
            if not self._ended:
                await self._channel.send(encode_stream(FrameType.STDIN, view[:size]))
            view = view[size:]

    async def eof(self) -> None:
        """Close the command's standard input."""
        await self._send(FrameType.STDIN_EOF)

    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group.

        :raises UsageError: there is no such signal
        """
        if not 1 <= number <= 64:
            raise UsageError(f"there is no signal {number}", hint="signals are 1 to 64; 15 is SIGTERM, 9 is SIGKILL")
        await self._send(FrameType.SIGNAL, pack32(number))

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its new size."""
        await self._send(FrameType.RESIZE, pack32(min(rows, 65535), min(columns, 65535)))

    async def _send(self, frame_type: FrameType, payload: bytes = b"") -> None:
        if not self._ended:
            await self._channel.send(encode_frame(frame_type, payload))

    async def wait(self) -> Exit:
        """Wait for the end. Output that was not taken is thrown away."""
        async for _ in self:
            pass
        if self._exit is None:
            raise AssertionError("the output ends with the exit or with an error")
        return self._exit

    async def collect(
        self,
        stdin: Source | None = None,
        *,
        on_stdout: OutputSink | None = None,
        on_stderr: OutputSink | None = None,
        max_output_bytes: int = MAX_COLLECTED,
    ) -> ExecResult:
        """Send all of `stdin`, take all output, and wait for the end. What has a sink goes there and is not collected.

        :raises GuestTimeout: it ran longer than its timeout, and was ended
        :raises GuestError: it wrote more than `max_output_bytes`
        """
        collected: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        sinks: dict[Stream, OutputSink | None] = {"stdout": on_stdout, "stderr": on_stderr}
        limit = None if self._timeout_s is None else self._timeout_s + _TIMEOUT_GRACE_S
        feeder = asyncio.create_task(self._feed(stdin))
        try:
            async with deadline(limit, f"{self._name} does not end"):
                async for stream, data in self:
                    sink = sinks[stream]
                    if sink is None:
                        _collect(collected, stream, data, max_output_bytes)
                    elif inspect.isawaitable(taken := sink(data)):
                        await taken
            ended = await self.wait()
            if feeder.done():
                feeder.result()
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
        if ended.timed_out:
            raise GuestTimeout(
                f"{self._name} ran longer than {self._timeout_s or 0:g} s and was ended",
                hint="give it more time, or let it do less",
            )
        return ExecResult(
            exit_code=ended.exit_code,
            stdout=bytes(collected["stdout"]),
            stderr=bytes(collected["stderr"]),
            duration_ms=(time.perf_counter() - self._began) * 1000,
        )

    async def _feed(self, source: Source | None) -> None:
        """Send standard input to the end. A source that fails ends the command: it must not take half for the whole."""
        try:
            if source is not None:
                async for chunk in chunks_of(source):
                    await self.send_stdin(chunk)
            await self.eof()
        except Exception:
            await self.signal(signal.SIGKILL)
            raise

    async def close(self) -> None:
        """Stop listening to it. Idempotent."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


@contextlib.asynccontextmanager
async def start(channel: Channel, command: Command) -> AsyncIterator[ExecSession]:
    """Start a command on a session port.

    :raises CommandNotStarted: `errno` is that of the guest's kernel
    """
    if not command.argv:
        raise UsageError("there is no command to run", hint="give a program and its arguments")
    await channel.begin(encode_command(command))
    frame = await channel.receive()
    if frame.type == FrameType.ERROR:
        try:
            channel.final(frame)
        except GuestRefused as error:
            kind = CommandNotFound if error.errno == errno.ENOENT else CommandNotStarted
            reason = error.message.removeprefix(REFUSED)
            hint = "check the program's name, the directory and the user inside of the guest"
            raise kind(f"{command.argv[0]} cannot be started: {reason}", errno=error.errno, hint=hint) from None
    if frame.type != FrameType.STARTED:
        raise unexpected(frame)
    process = ExecSession(channel, command, Fields(frame.payload).integer(1))
    try:
        yield process
    finally:
        await process.close()


async def chunks_of(source: Source) -> AsyncIterator[bytes]:
    """Bytes or a stream of bytes, as a stream."""
    if isinstance(source, bytes):
        yield source
    else:
        async for chunk in source:
            yield chunk


def _collect(collected: dict[Stream, bytearray], stream: Stream, data: bytes, limit: int) -> None:
    collected[stream] += data
    if sum(map(len, collected.values())) > limit:
        raise GuestError(
            f"the command wrote more than {limit} bytes", hint="take its output as a stream, or let it write to a file"
        )
