"""A host that answers the command line without any machine: it records what it was asked, and its guest is a local process.

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
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from coppice.cli import main
from coppice.cli.context import Cli
from coppice.errors import NotFound
from coppice.guest.process import Exit, Stream
from coppice.model import Instance, MachineSpec, MemoryReport, ProcessSpec, Sharing, State

if TYPE_CHECKING:
    from coppice.host import AsyncHost

DIGEST = "sha256:" + "ab" * 32


def instance(name: str, state: State = State.RUNNING, *, parent: Instance | None = None, **more: Any) -> Instance:
    """A record as a host would return it."""
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
    """What the kernel would say of a fork."""
    return MemoryReport(
        mapped_bytes=512 << 20,
        shared_bytes=120 << 20,
        unique_bytes=unique_mib << 20,
        vmm_overhead_bytes=28 << 20,
        inode=inode,
        link_count=links,
        sharing=Sharing.HARDLINK,
    )


class FakeHost:
    """Answers each method with what was put into `answers`: a value, an error to raise, or a function of the arguments."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.options: Cli | None = None
        self.opened = False
        self.closed = False

    def factory(self, options: Cli) -> AsyncHost:
        """What `main` takes as `host_factory`."""
        self.options = options
        return cast("AsyncHost", self)

    def asked(self, name: str) -> dict[str, Any]:
        """Positional and keyword arguments of the only call of a method; the former under their numbers."""
        ((args, kwargs),) = [(args, kwargs) for called, args, kwargs in self.calls if called == name]
        return {str(number): value for number, value in enumerate(args)} | kwargs

    async def __aenter__(self) -> Self:
        self.opened = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed = True

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in self.__dict__["answers"]:
            raise AttributeError(name)

        async def method(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            answer = self.answers[name]
            if isinstance(answer, BaseException):
                raise answer
            if callable(answer):
                answer = answer(*args, **kwargs)
                return await answer if asyncio.iscoroutine(answer) else answer
            return answer

        return method

    async def logs(self, reference: str, **options: Any) -> AsyncIterator[bytes]:
        """The lines that were put in; then, followed, silence."""
        self.calls.append(("logs", (reference,), options))
        for line in self.answers["logs"]:
            yield line
        if options["follow"]:
            await asyncio.Event().wait()

    @contextlib.asynccontextmanager
    async def open_exec(self, reference: str, argv: Sequence[str], **options: Any) -> AsyncIterator[LocalSession]:
        """Run the command right here; an instance called `nobody` does not exist."""
        self.calls.append(("open_exec", (reference, argv), options))
        if reference == "nobody":
            raise NotFound("there is no instance 'nobody'", hint="`coppice ls` shows those there are")
        session = await LocalSession.start(argv, options)
        try:
            yield session
        finally:
            await session.close()


class LocalSession:
    """What a guest's ExecSession does, on a process of this machine."""

    def __init__(self, process: asyncio.subprocess.Process, terminal: int | None, timeout_s: float | None) -> None:
        self._process = process
        self._terminal = terminal
        self._output: asyncio.Queue[tuple[Stream, bytes] | None] = asyncio.Queue(4)
        self._timeout_s = timeout_s
        self._timed_out = False
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, argv: Sequence[str], options: dict[str, Any]) -> Self:
        """Start the command, on a terminal of its own where it is to have one."""
        env = {**os.environ, **options["env"]}
        if not options["tty"]:
            pipe = asyncio.subprocess.PIPE
            stdin = pipe if options["stdin"] else asyncio.subprocess.DEVNULL
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=stdin, stdout=pipe, stderr=pipe, env=env, start_new_session=True
            )
            return cls(process, None, options["timeout_s"])
        ours, theirs = pty.openpty()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", *options["size"], 0, 0))
        setsid = [sys.executable, "-c", _WITH_TERMINAL, *argv]
        process = await asyncio.create_subprocess_exec(*setsid, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        return cls(process, ours, options["timeout_s"])

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
        with contextlib.suppress(OSError):  # EIO: the other side has gone
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

    async def wait(self) -> Exit:
        async for _ in self:
            pass
        code = self._process.returncode
        assert code is not None
        return Exit(exit_code=code if code >= 0 else 128 - code, timed_out=self._timed_out)

    async def close(self) -> None:
        """End the command, as the agent does when a session is left."""
        if self._process.returncode is None:
            self._process.kill()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._process.communicate()  # waits for its pipes too, which `wait` would not empty
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None


# Makes its standard input the controlling terminal of a new session, and becomes the command.
_WITH_TERMINAL = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"

PROGRAM = Path(__file__)

if __name__ == "__main__":
    sys.exit(main(host_factory=FakeHost().factory))
