"""Run a command's session to its end: feed its input, collect its output."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

from coppice.agent.stream import deadline
from coppice.arguments import checked
from coppice.errors import CoppiceError, GuestError, GuestTimeout
from coppice.model import ExecResult
from coppice.model.guest import MAX_COLLECTED, Exit, OutputSink, Source, Stream
from coppice.names import check_limit

_TIMEOUT_GRACE_S = 15.0  # added to the guest's own timeout, in case the guest does not keep it


class Collecting(ABC):
    """Base of running commands, in a guest of this machine or of a server."""

    def __init__(self, name: str, timeout_s: float | None, *, has_stdin: bool = True) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._has_stdin = has_stdin  # otherwise its standard input is empty from the start
        self._began = time.perf_counter()
        self._exit: Exit | None = None  # known at the end of the output

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[tuple[Stream, bytes]]:
        """Yield the command's output as it arrives, until the command has ended."""

    @abstractmethod
    async def send_stdin(self, data: bytes) -> None:
        """Send data to the command's standard input."""

    @abstractmethod
    async def eof(self) -> None:
        """Close the command's standard input."""

    @abstractmethod
    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""

    async def wait(self) -> Exit:
        """Wait for the end and return it. Unread output is discarded."""
        if self._exit is None:
            async for _ in self:
                pass
        if self._exit is None:
            raise AssertionError("the output ends with the exit or with an error")
        return self._exit

    @checked
    async def collect(
        self,
        stdin: Source | None = None,
        *,
        on_stdout: OutputSink | None = None,
        on_stderr: OutputSink | None = None,
        max_output_bytes: int = MAX_COLLECTED,
    ) -> ExecResult:
        """Send all of `stdin`, take all output, and wait for the end. A stream with a sink is not
        collected.

        :raises GuestTimeout: the command ran longer than its timeout, and was ended
        :raises GuestError: the command wrote more than `max_output_bytes`
        :raises UsageError: `max_output_bytes` is negative
        """
        check_limit(max_output_bytes)
        collected: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        sinks: dict[Stream, OutputSink | None] = {"stdout": on_stdout, "stderr": on_stderr}
        limit = None if self._timeout_s is None else self._timeout_s + _TIMEOUT_GRACE_S
        feeder = None if stdin is None else asyncio.create_task(self._feed(stdin))
        try:
            async with deadline(limit, f"{self._name} does not end"):
                if feeder is None and self._has_stdin:
                    with contextlib.suppress(CoppiceError):  # the output ends with the same error, and says more
                        await self.eof()
                async for stream, data in self:
                    sink = sinks[stream]
                    if sink is None:
                        _collect(collected, stream, data, max_output_bytes)
                    elif inspect.isawaitable(taken := sink(data)):
                        await taken
            ended = await self.wait()
            if feeder is not None and feeder.done():
                feeder.result()
        finally:
            if feeder is not None:
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)
        if ended.timed_out:
            raise GuestTimeout(
                f"{self._name} ran longer than {self._timeout_s or 0:g} s and was ended",
                hint="give it more time with --timeout SECONDS, or a smaller task",
            )
        return ExecResult(
            exit_code=ended.exit_code,
            stdout=bytes(collected["stdout"]),
            stderr=bytes(collected["stderr"]),
            duration_ms=(time.perf_counter() - self._began) * 1000,
        )

    async def _feed(self, source: Source) -> None:
        """Send all of standard input. If the source fails, kill the command, whose input is partial."""
        try:
            async for chunk in chunks_of(source):
                await self.send_stdin(chunk)
            await self.eof()
        except Exception:
            await self.signal(signal.SIGKILL)
            raise


async def chunks_of(source: Source) -> AsyncIterator[bytes]:
    """Yield the chunks of a source."""
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
