"""The guest of a fake VMM: it speaks the agent protocol on the machine's sockets and keeps all that it knows in the machine's RAM.

It lives in the test's event loop, ends when its VMM process ends, and answers nothing while that process is paused.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from coppice.errors import CoppiceError
from coppice.guest.protocol import Fields, Frame, FrameType, Value, encode_fields
from coppice.model import PAGE_SIZE, VmmProcess
from coppice.vmm import driver as files
from fakes.faults import Faults
from fakes.pids import ended, is_paused
from fakes.ram import Ram
from fakes.wire import Fault, Peer

_TIMED_OUT = 1
_STDIN = 2
_LATE = frozenset({FrameType.STDIN, FrameType.STDIN_EOF, FrameType.SIGNAL, FrameType.RESIZE})


class FakeGuest:
    """One guest, from the start of its VMM to its end."""

    def __init__(
        self, directory: Path, process: VmmProcess, listeners: Sequence[socket.socket], faults: Faults
    ) -> None:
        self._directory = directory
        self._process = process
        self._listeners = listeners
        self._faults = faults
        self._ram = Ram(process.pid)

    async def live(self) -> None:
        """Serve all ports until the VMM ends."""
        ports = [asyncio.create_task(self._serve(port)) for port in range(len(self._listeners))]
        try:
            await ended(self._process)
        finally:
            for task in ports:
                task.cancel()
            outcomes = await asyncio.gather(*ports, return_exceptions=True)
            for listener in self._listeners:
                listener.close()
            for outcome in outcomes:  # a host that breaks the protocol is a failure of the test
                if not isinstance(outcome, asyncio.CancelledError) and outcome is not None:
                    raise outcome

    async def _serve(self, port: int) -> None:
        """One client at a time, as a VMM's character device."""
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listeners[port])
            async with Peer.over(connection) as peer:
                while (frame := await peer.receive()) is not None:
                    await self._while_paused()
                    try:
                        await (self._control if port == 0 else self._session)(peer, frame)
                    except Fault as error:
                        await peer.send(FrameType.ERROR, encode_fields([(1, error.errno or 0), (2, error.strerror)]))
                    except ProcessLookupError:
                        return  # the machine went away under the request

    async def _while_paused(self) -> None:
        # Any process may have paused it, and any may let it run.
        while is_paused(self._process.pid):  # noqa: ASYNC110 - so there is no event
            await asyncio.sleep(0.001)

    # Control

    async def _control(self, peer: Peer, frame: Frame) -> None:
        kind = FrameType(frame.type)
        try:
            await self._faults.reach(kind.name.lower(), self._process)
        except CoppiceError as error:
            raise Fault(errno.EIO, error.message) from error
        await self._while_paused()
        fields = Fields(frame.payload)
        reply: list[tuple[int, Value | None]] = []
        match kind:
            case FrameType.HEALTH:
                state = self._ram.state
                reply = [(1, 1000), (2, state.serial), (3, "fake"), (4, 2 if state.argv else 0), (5, 0), (6, 0)]
            case FrameType.IDENTITY:
                reply = [(1, self._identify(fields)), (2, "clock=1"), (2, "entropy=2")]
            case FrameType.FREEZE | FrameType.THAW:
                self._ram.change(frozen=kind is FrameType.FREEZE)
            case FrameType.SYNC:
                pass
            case FrameType.POWEROFF:
                await peer.send(FrameType.OK)
                with (self._directory / files.VMM_LOG).open("a") as log:
                    log.write("powered off\n")
                os.kill(self._process.pid, signal.SIGKILL)
                return
            case _:
                raise Fault(errno.ENOSYS, "no control request")
        await peer.send(FrameType.OK, encode_fields(reply))

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
            "clock_ns": fields.integer(3),
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
        return self._ram.change(**changes).serial

    # Sessions

    async def _session(self, peer: Peer, frame: Frame) -> None:
        if frame.type in _LATE:
            return  # of a command that has ended
        if frame.type != FrameType.EXEC:
            raise Fault(errno.ENOSYS, "a fake guest has no files")
        fields = Fields(frame.payload)
        program, *arguments = fields.texts(1)
        command = _COMMANDS.get(program)
        if command is None:
            raise Fault(errno.ENOENT, program)
        await peer.send(FrameType.STARTED, encode_fields([(1, 100)]))
        timeout_ms, timed_out = fields.integer(8, 0), 0
        try:
            async with asyncio.timeout(timeout_ms / 1000 if timeout_ms else None):
                code = await command(self, peer, arguments, fields)
        except TimeoutError:
            code, timed_out = 128 + signal.SIGKILL, _TIMED_OUT
        await peer.send(FrameType.EXIT, encode_fields([(1, code), (2, timed_out)]))

    async def _echo(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        await peer.send(FrameType.STDOUT, (" ".join(arguments) + "\n").encode())
        return 0

    async def _cat(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        while fields.integer(5, 0) & _STDIN:
            frame = await peer.receive()
            if frame is None or frame.type == FrameType.STDIN_EOF:
                break
            if frame.type == FrameType.STDIN:
                await peer.send(FrameType.STDOUT, frame.payload)
                await peer.open_window(len(frame.payload))
        return 0

    async def _exit(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        return int(arguments[0])

    async def _env(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        lines = [*self._ram.state.env, *fields.texts(2)]
        await peer.send(FrameType.STDOUT, "".join(f"{line}\n" for line in lines).encode())
        return 0

    async def _hostname(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        return await self._echo(peer, [self._ram.state.hostname], fields)

    async def _sleep(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        while (frame := await peer.receive()) is not None:
            if frame.type == FrameType.SIGNAL:
                return 128 + int.from_bytes(frame.payload, "little")
        return 128 + signal.SIGHUP

    async def _remember(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        """`remember KEY VALUE`: in RAM, so that forks inherit it and a stop forgets it."""
        key, value = arguments
        self._ram.change(remembered={**self._ram.state.remembered, key: value})
        return 0

    async def _recall(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        value = self._ram.state.remembered.get(arguments[0])
        return 1 if value is None else await self._echo(peer, [value], fields)

    async def _dirty(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        """`dirty PAGES`: costs this machine so much RAM."""
        self._ram.dirty(int(arguments[0]))
        return 0

    async def _save(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        """`save TEXT`: on the overlay disk, in its last page, so that forks inherit it and a stop keeps it."""
        with (self._directory / files.OVERLAY_DISK).open("r+b") as disk:
            disk.seek(-PAGE_SIZE, os.SEEK_END)
            disk.write(arguments[0].encode().ljust(PAGE_SIZE, b"\0"))
        return 0

    async def _load(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        with (self._directory / files.OVERLAY_DISK).open("rb") as disk:
            disk.seek(-PAGE_SIZE, os.SEEK_END)
            text = disk.read().rstrip(b"\0").decode()
        return await self._echo(peer, [text], fields)

    async def _payload(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        """`payload`: what /run/coppice/payload would hold, `payload size`: how large it would be."""
        state = self._ram.state
        if state.payload is None:
            return 1
        await peer.send(FrameType.STDOUT, str(state.payload_size).encode() if arguments else state.payload)
        return 0

    async def _crash(self, peer: Peer, arguments: list[str], fields: Fields) -> int:
        """`crash`: the VMM dies."""
        os.kill(self._process.pid, signal.SIGKILL)
        await ended(self._process)
        raise ProcessLookupError


_COMMANDS = {
    "cat": FakeGuest._cat,
    "crash": FakeGuest._crash,
    "dirty": FakeGuest._dirty,
    "echo": FakeGuest._echo,
    "env": FakeGuest._env,
    "exit": FakeGuest._exit,
    "hostname": FakeGuest._hostname,
    "load": FakeGuest._load,
    "payload": FakeGuest._payload,
    "recall": FakeGuest._recall,
    "remember": FakeGuest._remember,
    "save": FakeGuest._save,
    "sleep": FakeGuest._sleep,
}
