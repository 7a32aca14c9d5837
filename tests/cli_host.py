"""A host that answers the command line without any machine. It records the requests, and its guest
is a local process.

As a program it is the real command line over that host: `python tests/cli_host.py exec vm -- cat`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import msgspec

from coppice.cli import main
from coppice.cli.context import Cli
from coppice.client.joining import Local
from coppice.errors import GuestRefused, NotFound
from coppice.model import Instance, MachineSpec, MemoryReport, ProcessSpec, ProgressSink, Sharing, State
from coppice.model.guest import Exit, Stream
from coppice.requests import (
    ConnectRequest,
    FileLsRequest,
    FileWatchRequest,
    LogsRequest,
    OpenCopyRequest,
    OpenExecRequest,
    OpenExportRequest,
    Request,
    UnloadableRequest,
)

if TYPE_CHECKING:
    from coppice.client.backend import Backend

DIGEST = "sha256:" + "ab" * 32


def instance(name: str, state: State = State.RUNNING, *, parent: Instance | None = None, **more: Any) -> Instance:
    """Return a record as a host would."""
    return Instance(
        id="i" + name.replace("-", "").ljust(23, "0")[:23],
        name=name,
        state=state,
        created_at=1_700_000_000.0,
        driver="qemu",
        image=DIGEST,
        image_name="debian",
        machine=MachineSpec(kernel="debian-6.1"),
        process=ProcessSpec(argv=("sleep", "infinity")),
        hostname=name,
        parent=parent.id if parent else None,
        parent_name=parent.name if parent else None,
        **more,
    )


def memory(*, inode: int = 77, links: int = 3, unique_mib: int = 1) -> MemoryReport:
    """Return the kernel's figures for a fork."""
    return MemoryReport(
        mapped_bytes=512 << 20,
        shared_bytes=120 << 20,
        unique_bytes=unique_mib << 20,
        vmm_overhead_bytes=28 << 20,
        inode=inode,
        link_count=links,
        sharing=Sharing.HARDLINK,
    )


def named(request: Request[Any]) -> str:
    """Return the name of the object that a request concerns."""
    fields = msgspec.structs.asdict(request)
    return str(
        next(
            fields[word]
            for word in ("instance", "snapshot", "volume", "image", "kernel", "reference", "name")
            if word in fields
        )
    )


class FakeHost:
    """A host that answers each operation with its entry in `answers`: a value, an error to raise,
    or a function.

    A function gets the request, and the progress sink if the operation has one.
    """

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[Request[Any]] = []
        self.options: Cli | None = None
        self.opened = False
        self.closed = False

    def factory(self, options: Cli) -> Backend:
        """Return this host; `main` takes this method as `host_factory`."""
        self.options = options
        return cast("Backend", self)

    def asked(self, operation: str) -> dict[str, Any]:
        """Return the fields of the only request for an operation."""
        (request,) = [each for each in self.calls if each.operation == operation]
        return msgspec.structs.asdict(request)

    @property
    def operations(self) -> list[str]:
        """Return the requested operations, in order."""
        return [each.operation for each in self.calls]

    async def open(self) -> Self:
        """Note that it was opened."""
        self.opened = True
        return self

    async def close(self) -> None:
        """Note that it was closed."""
        self.closed = True

    async def call(self, request: Request[Any], progress: ProgressSink | None = None) -> Any:
        """Record the request and answer it."""
        if isinstance(request, UnloadableRequest):  # requested with every list
            return self.answers.get("unloadable", {})
        self.calls.append(request)
        answer = self.answers[request.operation]
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer):
            answer = answer(request) if progress is None else answer(request, progress)
            return await answer if asyncio.iscoroutine(answer) else answer
        return answer

    @contextlib.asynccontextmanager
    async def stream(
        self,
        request: LogsRequest
        | OpenExecRequest
        | ConnectRequest
        | OpenExportRequest
        | OpenCopyRequest
        | FileLsRequest
        | FileWatchRequest,
    ) -> AsyncIterator[Any]:
        """Return a log, an archive, a copy session, a local command, or a connection to a local server.

        An instance called `nobody` does not exist.
        """
        self.calls.append(request)
        if request.instance == "nobody":
            raise NotFound("there is no instance 'nobody'", hint="`coppice ls` lists the existing ones")
        if isinstance(request, OpenExportRequest):
            yield self._pieces()
            return
        if isinstance(request, OpenCopyRequest):
            yield self.answers["open_copy"]
            return
        if isinstance(request, FileLsRequest | FileWatchRequest):
            yield self._items(request.operation)
            return
        if isinstance(request, LogsRequest):
            yield self._log(request)
            return
        if isinstance(request, ConnectRequest):
            async with _local_connection(request) as connection:
                yield connection
            return
        session = await LocalSession.start(request)
        try:
            yield session
        finally:
            await session.close()

    async def _items(self, operation: str) -> AsyncIterator[Any]:
        for item in self.answers[operation]:
            yield item

    async def _pieces(self) -> AsyncIterator[bytes]:
        for piece in self.answers["open_export"]:
            yield piece

    async def _log(self, request: LogsRequest) -> AsyncIterator[bytes]:
        """Yield the prepared lines; if followed, then wait forever."""
        for line in self.answers["logs"]:
            yield line
        if request.follow:
            await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def _local_connection(request: ConnectRequest) -> AsyncIterator[Local]:
    try:
        reader, writer = (
            await asyncio.open_connection("127.0.0.1", request.to)
            if isinstance(request.to, int)
            else await asyncio.open_unix_connection(request.to.removeprefix("unix:"))
        )
    except OSError as error:
        raise GuestRefused(f"cannot connect: {os.strerror(error.errno or 0)}", errno=error.errno or 0) from error
    try:
        yield Local(reader, writer)
    finally:
        writer.close()


def _health(request: Request[Any]) -> None:
    if named(request) == "nobody":
        raise NotFound("there is no instance 'nobody'", hint="`coppice ls` lists the existing ones")


class LocalSession:
    """An ExecSession on a process of this machine."""

    id = "c0ffee"
    offset = dropped_bytes = 0

    def __init__(self, process: asyncio.subprocess.Process, terminal: int | None, timeout_s: float | None) -> None:
        self._process = process
        self._terminal = terminal
        self._output: asyncio.Queue[tuple[Stream, bytes] | None] = asyncio.Queue(4)
        self._timeout_s = timeout_s
        self._timed_out = False
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, request: OpenExecRequest) -> Self:
        """Start the command, on its own terminal if it requests one."""
        env = {**os.environ, **request.env}
        if not request.tty:
            pipe = asyncio.subprocess.PIPE
            stdin = pipe if request.stdin else asyncio.subprocess.DEVNULL
            process = await asyncio.create_subprocess_exec(
                *request.argv, stdin=stdin, stdout=pipe, stderr=pipe, env=env, start_new_session=True
            )
            return cls(process, None, request.timeout_s)
        ours, theirs = pty.openpty()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", *(request.size or (24, 80)), 0, 0))
        setsid = [sys.executable, "-c", _WITH_TERMINAL, *request.argv]
        process = await asyncio.create_subprocess_exec(*setsid, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        return cls(process, ours, request.timeout_s)

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.gather(*self._streams())
        except TimeoutError:
            self._timed_out = True
            self._process.kill()
        await self._process.wait()
        await self._output.put(None)

    def _streams(self) -> list[Any]:
        if self._terminal is not None:
            return [self._copy_terminal(self._terminal)]
        out, err = self._process.stdout, self._process.stderr
        assert out is not None
        assert err is not None
        return [self._copy("stdout", out), self._copy("stderr", err)]

    async def _copy(self, stream: Stream, source: asyncio.StreamReader) -> None:
        while data := await source.read(1 << 16):
            await self._output.put((stream, data))

    async def _copy_terminal(self, terminal: int) -> None:
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := await asyncio.to_thread(os.read, terminal, 1 << 16):
                await self._output.put(("stdout", data))

    async def __aiter__(self) -> AsyncIterator[tuple[Stream, bytes]]:
        while (item := await self._output.get()) is not None:
            yield item
        self._output.put_nowait(None)

    async def send_stdin(self, data: bytes) -> None:
        if self._terminal is not None:
            await asyncio.to_thread(os.write, self._terminal, data)
        elif self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._process.stdin.write(data)
                await self._process.stdin.drain()

    async def eof(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    async def resize(self, rows: int, columns: int) -> None:
        if self._terminal is not None:
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def leave(self) -> None:
        raise NotImplementedError("the command line leaves no command that it has started")

    async def wait(self) -> Exit:
        async for _ in self:
            pass
        code = self._process.returncode
        assert code is not None
        return Exit(exit_code=code if code >= 0 else 128 - code, timed_out=self._timed_out)

    async def close(self) -> None:
        """End the command, as the agent does at the end of a session."""
        if self._process.returncode is None:
            self._process.kill()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        # waits for its pipes too, which `wait` would not read to the end
        await self._process.communicate()
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None


# Makes standard input the controlling terminal of a new session, and executes the command.
_WITH_TERMINAL = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"

PROGRAM = Path(__file__)

if __name__ == "__main__":
    sys.exit(main(host_factory=FakeHost(health=_health).factory))
