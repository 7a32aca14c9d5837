"""The guest of a fake VMM: it speaks the agent protocol on the machine's sockets, and keeps its
state in the machine's RAM.

It runs in the test's event loop, ends with its VMM process, and answers nothing while that process
is paused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from coppice.agent.protocol import WINDOW_SIZE, Fields, Frame, FrameType, Value, encode_fields
from coppice.commands import PROCESS
from coppice.errors import CoppiceError
from coppice.model import PAGE_SIZE, VmmProcess
from coppice.vmm import driver as files
from fakes import disk
from fakes.commands import Commands
from fakes.faults import Faults
from fakes.pids import ended, is_paused
from fakes.ram import Ram
from fakes.relay import relay
from fakes.wire import Fault, Peer

_TIMED_OUT = 1
_STDIN = 2
_RELAYED = frozenset(
    {
        FrameType.FILE_READ,
        FrameType.FILE_WRITE,
        FrameType.FILE_STAT,
        FrameType.FILE_LIST,
        FrameType.FILE_MKDIR,
        FrameType.FILE_MOVE,
        FrameType.FILE_REMOVE,
        FrameType.FILE_WATCH,
        FrameType.TREE_OUT,
        FrameType.TREE_IN,
        FrameType.CONNECT,
    }
)
_LATE = frozenset(
    {
        FrameType.STDIN,
        FrameType.STDIN_EOF,
        FrameType.SIGNAL,
        FrameType.RESIZE,
        FrameType.END,
        FrameType.LEAVE,
        FrameType.WINDOW,
        FrameType.DATA,
        FrameType.DATA_EOF,
    }
)


class Stream:
    """One request of a host, and the later frames of its stream; None when the host has hung up."""

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer = peer
        self.number = number
        self.frames: asyncio.Queue[Frame | None] = asyncio.Queue()

    async def send(self, frame_type: FrameType, payload: bytes = b"") -> None:
        await self._peer.send(frame_type, self.number, payload)

    async def pass_on(self, frame: Frame) -> None:
        """Send a frame of an agent, of any size it can have."""
        await self._peer.write(frame.type, self.number, frame.payload)

    async def open_window(self, size: int) -> None:
        await self._peer.open_window(self.number, size)


def _drop(streams: dict[int, Stream], stream: Stream, session: asyncio.Task[None]) -> None:
    """Forget a stream that has ended, unless the host has used its number again."""
    if streams.get(stream.number) is stream:
        del streams[stream.number]


class FakeGuest:
    """One guest, from the start of its VMM to its end."""

    def __init__(
        self, directory: Path, process: VmmProcess, listeners: Sequence[socket.socket], faults: Faults
    ) -> None:
        self.directory = directory
        self.process = process
        self.listeners = listeners
        self._faults = faults
        self._ram = Ram(process.pid)
        self._clock_set_ns = time.monotonic_ns()  # when the host last set the guest's clock
        self._commands = Commands()
        self._ended = asyncio.Event()  # the image's process has

    async def live(self) -> None:
        """Serve all ports until the VMM ends."""
        ports = [asyncio.create_task(serving) for serving in self._servings()]
        try:
            await ended(self.process)
        finally:
            for task in ports:
                task.cancel()
            outcomes = await asyncio.gather(*ports, return_exceptions=True)
            await self._commands.close()
            for listener in self.listeners:
                listener.close()
            for outcome in outcomes:  # a host that breaks the protocol is a failure of the test
                if not isinstance(outcome, asyncio.CancelledError) and outcome is not None:
                    raise outcome

    def _servings(self) -> list[Coroutine[Any, Any, None]]:
        """Return what uses the listeners. It ends before they are closed: the loop would watch a closed
        descriptor, and then miss events of the next file with its number.
        """
        return [self._serve(port) for port in range(files.PORTS)]

    async def _serve(self, port: int) -> None:
        """One client at a time, as a VMM's character device; any number of streams."""
        while True:
            async with Peer.over(await self._accept(port)) as peer, asyncio.TaskGroup() as running:
                streams: dict[int, Stream] = {}
                peer.takes_all = True
                with contextlib.suppress(ConnectionError):  # the host hung up
                    while (frame := await peer.receive()) is not None:
                        await self._while_paused()
                        if frame.type == FrameType.FORGET:
                            self._commands.forget(frame)
                        elif frame.type < FrameType.EXEC:
                            await self._answer(self._control(peer, frame), peer, frame)
                        elif frame.type in _LATE:
                            if stream := streams.get(frame.stream):
                                stream.frames.put_nowait(frame)
                        else:
                            stream = streams[frame.stream] = Stream(peer, frame.stream)
                            session = running.create_task(self._answer(self._session(stream, frame), peer, frame))
                            session.add_done_callback(partial(_drop, streams, stream))
                for stream in streams.values():
                    stream.frames.put_nowait(None)

    async def _answer(self, work: Coroutine[None, None, None], peer: Peer, frame: Frame) -> None:
        try:
            await work
        except Fault as error:
            await peer.send(FrameType.ERROR, frame.stream, encode_fields([(1, error.errno or 0), (2, error.strerror)]))
        except (ProcessLookupError, ConnectionError):
            pass  # the machine ended during the request, or the host hung up

    async def _accept(self, port: int) -> socket.socket:
        connection, _ = await asyncio.get_running_loop().sock_accept(self.listeners[port])
        return connection

    async def _while_paused(self) -> None:
        # Any process may have paused the machine, and any may resume it.
        while is_paused(self.process.pid):  # noqa: ASYNC110 - so there is no event
            await asyncio.sleep(0.001)

    # Control

    async def _control(self, peer: Peer, frame: Frame) -> None:
        kind = FrameType(frame.type)
        try:
            await self._faults.reach(kind.name.lower(), self.process)
        except CoppiceError as error:
            raise Fault(errno.EIO, error.message) from error
        await self._while_paused()
        fields = Fields(frame.payload)
        reply: list[tuple[int, Value | None]] = []
        match kind:
            case FrameType.HEALTH:
                state = self._ram.state
                reply = [
                    (1, 1000),
                    (2, state.serial),
                    (3, "fake"),
                    (4, 2 if state.argv else 0),
                    (6, 0),
                    *self._process_end(),
                ]
            case FrameType.IDENTITY:
                reply = [(1, self._identify(fields)), (2, "clock=1"), (2, "entropy=2"), (3, self._now_ns())]
                reply += self._process_end()
            case FrameType.CLOCK:
                self._set_clock(fields.integer(1))
                reply = [(1, self._now_ns())]
            case FrameType.FREEZE | FrameType.THAW:
                self._ram.change(frozen=kind is FrameType.FREEZE)
            case FrameType.SYNC:
                pass
            case FrameType.SHARED_RANDOM:
                reply = [
                    (1, line) for line in filter(None, self._ram.state.remembered.get("shared-random", "").split("|"))
                ]
            case FrameType.POWEROFF:
                await peer.send(FrameType.OK, frame.stream)
                with (self.directory / files.VMM_LOG).open("a") as log:
                    log.write("powered off\n")
                os.kill(self.process.pid, signal.SIGKILL)
                return
            case _:
                raise Fault(errno.ENOSYS, "no control request")
        await peer.send(FrameType.OK, frame.stream, encode_fields(reply))

    def _process_end(self) -> list[tuple[int, Value | None]]:
        """Return the fields about the end of the image's process. `remember exited N` ends it."""
        remembered = self._ram.state.remembered
        status = int(remembered.get("exited", -1))
        signal_number = status - 128 if status > 128 else None
        return [] if status < 0 else [(5, status + 1), (8, signal_number), (9, int(remembered["exited-at"]))]

    async def _attach_process(self, stream: Stream) -> None:
        """Send the end of the image's process when it comes."""
        if not self._ram.state.argv or "older" in self._ram.state.remembered:
            raise Fault(errno.ESRCH, PROCESS)
        await stream.send(FrameType.STARTED, encode_fields([(1, 2), (2, WINDOW_SIZE), (3, 0)]))
        leaving = asyncio.create_task(stream.frames.get())
        while not (end := dict(self._process_end())):
            self._ended.clear()
            ending = asyncio.create_task(self._ended.wait())
            await asyncio.wait({leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            if leaving.done():
                await stream.send(FrameType.OK)
                return
        leaving.cancel()
        code = end[5]
        assert isinstance(code, int)
        await stream.send(FrameType.EXIT, encode_fields([(1, code - 1), (2, 0), (3, end[8])]))

    def _set_clock(self, now_ns: int) -> None:
        self._clock_set_ns = time.monotonic_ns()
        self._ram.change(clock_ns=now_ns, clock_late_ns=time.time_ns() - now_ns)

    def _now_ns(self) -> int:
        return self._ram.state.clock_ns + time.monotonic_ns() - self._clock_set_ns

    def _identify(self, fields: Fields) -> int:
        state = self._ram.state
        serial = fields.integer(1)
        entropy = fields.raw(2) or b""
        if serial <= state.serial:
            raise Fault(errno.EINVAL, f"serial {serial} after {state.serial}")
        if len(entropy) < 32 or entropy.hex() == state.entropy:
            raise Fault(errno.EINVAL, "no fresh entropy")
        flags = fields.integer(12, 0)
        changes: dict[str, object] = {
            "serial": serial,
            "entropy": entropy.hex(),
            "hostname": fields.text(4, state.hostname),
            "machine_id": fields.text(5, state.machine_id),
            "boot_id": fields.text(6, state.boot_id),
            "mac": (fields.raw(7) or b"").hex(":") or state.mac,
            "address": fields.text(8, state.address),
            "sessions_ended": state.sessions_ended + (flags & 1),
            "frozen": state.frozen and not flags & 2,
        }
        if (payload := fields.raw(11)) is not None or flags & 8:
            changes |= {"payload": payload and payload[:256], "payload_size": len(payload or b"")}
        if flags & 4:
            changes |= {"argv": tuple(fields.texts(20)), "env": tuple(fields.texts(21))}
        if mounts := [f"{value[0]} {'ro' if value[1] else 'rw'} {value[2:].decode()}" for value in fields.raws(24)]:
            changes |= {"mounts": tuple(mounts)}
        self._set_clock(fields.integer(3))
        return self._ram.change(**changes).serial

    # Sessions

    async def _session(self, stream: Stream, frame: Frame) -> None:
        if frame.type in _RELAYED:
            await relay(stream, frame)
            return
        if frame.type == FrameType.ATTACH and Fields(frame.payload).text(1) == PROCESS:
            await self._attach_process(stream)
            return
        if frame.type in (FrameType.ATTACH, FrameType.LIST):
            await self._commands.relay(stream, frame)
            return
        if frame.type != FrameType.EXEC:
            raise Fault(errno.ENOSYS, "no request")
        fields = Fields(frame.payload)
        program, *arguments = fields.texts(1)
        if program.startswith("/"):
            await self._commands.relay(stream, frame)
            return
        command = _COMMANDS.get(program)
        if command is None:
            raise Fault(errno.ENOENT, program)
        await stream.send(FrameType.STARTED, encode_fields([(1, 100), (2, WINDOW_SIZE), (3, 0)]))
        timeout_ms, timed_out = fields.integer(8, 0), 0
        try:
            async with asyncio.timeout(timeout_ms / 1000 if timeout_ms else None):
                code = await command(self, stream, arguments, fields)
        except TimeoutError:
            code, timed_out = 128 + signal.SIGKILL, _TIMED_OUT
        await stream.send(FrameType.EXIT, encode_fields([(1, code), (2, timed_out)]))

    async def _echo(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        await stream.send(FrameType.STDOUT, (" ".join(arguments) + "\n").encode())
        return 0

    async def _cat(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        while fields.integer(5, 0) & _STDIN:
            frame = await stream.frames.get()
            if frame is None or frame.type in (FrameType.STDIN_EOF, FrameType.END):
                break
            if frame.type == FrameType.STDIN:
                await stream.send(FrameType.STDOUT, frame.payload)
                await stream.open_window(len(frame.payload))
        return 0

    async def _exit(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        return int(arguments[0])

    async def _env(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        lines = [*self._ram.state.env, *fields.texts(2)]
        await stream.send(FrameType.STDOUT, "".join(f"{line}\n" for line in lines).encode())
        return 0

    async def _hostname(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        return await self._echo(stream, [self._ram.state.hostname], fields)

    async def _sleep(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        while (frame := await stream.frames.get()) is not None:
            if frame.type == FrameType.SIGNAL:
                return 128 + int.from_bytes(frame.payload, "little")
            if frame.type == FrameType.END:
                break
        return 128 + signal.SIGHUP

    async def _remember(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        """`remember KEY VALUE`: in RAM, so that forks inherit it and a stop forgets it.

        With `older`, the guest's agent has no command for the image's process.
        """
        key, value = arguments
        more = {"exited-at": str(self._now_ns())} if key == "exited" else {}
        self._ram.change(remembered={**self._ram.state.remembered, key: value, **more})
        if key == "exited":
            self._ended.set()
            self._say(f"coppice-agent: the machine's process exited with status {value}\n")
        return 0

    def _say(self, text: str) -> None:
        with (self.directory / files.CONSOLE_LOG).open("a") as console:
            console.write(text)

    async def _print(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        """`print TEXT`: on the console, without the end of a line."""
        self._say(arguments[0])
        return 0

    async def _recall(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        value = self._ram.state.remembered.get(arguments[0])
        return 1 if value is None else await self._echo(stream, [value], fields)

    async def _dirty(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        """`dirty PAGES`: write so many pages of RAM."""
        self._ram.dirty(int(arguments[0]))
        return 0

    async def _save(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        """`save TEXT`: on the overlay disk, in its last page, so that forks inherit it and a stop
        keeps it.
        """
        with disk.files_in(self.directory)[0].open("r+b") as file:
            file.seek(-PAGE_SIZE, os.SEEK_END)
            file.write(arguments[0].encode().ljust(PAGE_SIZE, b"\0"))
        return 0

    async def _load(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        text = ""
        for path in disk.files_in(self.directory):
            with path.open("rb") as file:
                file.seek(-PAGE_SIZE, os.SEEK_END)
                text = text or file.read().rstrip(b"\0").decode()
        return await self._echo(stream, [text], fields)

    async def _payload(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        """`payload`: what /run/coppice/payload would hold, `payload size`: how large it would
        be.
        """
        state = self._ram.state
        if state.payload is None:
            return 1
        await stream.send(FrameType.STDOUT, str(state.payload_size).encode() if arguments else state.payload)
        return 0

    async def _sh(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        """A shell on a terminal: it echoes its input, answers each line with it in upper case, and
        ends at `exit`.
        """
        await stream.send(FrameType.STDOUT, b"$ ")
        line = b""
        while (frame := await stream.frames.get()) is not None and frame.type not in (
            FrameType.STDIN_EOF,
            FrameType.END,
        ):
            if frame.type != FrameType.STDIN:
                continue
            await stream.send(FrameType.STDOUT, frame.payload)
            await stream.open_window(len(frame.payload))
            *whole, line = (line + frame.payload).split(b"\r")
            for each in whole:
                if each == b"exit":
                    return 0
                await stream.send(FrameType.STDOUT, b"\r\n" + each.upper() + b"\r\n$ ")
        return 128 + signal.SIGHUP

    async def _crash(self, stream: Stream, arguments: list[str], fields: Fields) -> int:
        """`crash`: kill the VMM."""
        os.kill(self.process.pid, signal.SIGKILL)
        await ended(self.process)
        raise ProcessLookupError


_COMMANDS = {
    "/bin/sh": FakeGuest._sh,
    "cat": FakeGuest._cat,
    "crash": FakeGuest._crash,
    "dirty": FakeGuest._dirty,
    "echo": FakeGuest._echo,
    "env": FakeGuest._env,
    "exit": FakeGuest._exit,
    "hostname": FakeGuest._hostname,
    "load": FakeGuest._load,
    "payload": FakeGuest._payload,
    "print": FakeGuest._print,
    "recall": FakeGuest._recall,
    "remember": FakeGuest._remember,
    "save": FakeGuest._save,
    "sleep": FakeGuest._sleep,
}
