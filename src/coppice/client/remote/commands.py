"""Commands in guests of a server, over WebSockets.

A command goes on when its server ends, and its output is kept. So a session whose connection was
lost attaches to the command at the next server, and reads on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final

import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from coppice.agent.collecting import Collecting
from coppice.arguments import checked
from coppice.client.remote.address import Address
from coppice.client.remote.patience import persisting
from coppice.client.remote.streams import (
    Message,
    is_lost,
    may_have_arrived,
    message_of,
    next_frame,
    not_coppice,
    opened,
)
from coppice.commands import check_signal, new_command_id
from coppice.completion import complete
from coppice.errors import Busy, HostCannot, NameTaken
from coppice.flow import CHUNK
from coppice.model.guest import Stream
from coppice.names import check_terminal
from coppice.requests import CommandAttachRequest, CommandKillRequest, OpenExecRequest

_STREAMS: Final[dict[int, Stream]] = {1: "stdout", 2: "stderr"}
Opened = tuple[ClientConnection, Message]


class _Command:
    """A command of a server, and the ways to it."""

    def __init__(
        self,
        address: Address,
        headers: Mapping[str, str],
        stack: contextlib.AsyncExitStack,
        request: OpenExecRequest | CommandAttachRequest,
        command: str,
    ) -> None:
        self.id = command
        self.instance = request.instance
        self.stdin = request.stdin
        self._address = address
        self._headers = headers
        self._stack = stack

    async def start(self, request: OpenExecRequest) -> Opened:
        """Start it."""
        return await self._open("/stream/exec", request)

    async def attach(self, offset: int = 0) -> Opened:
        """Attach to it."""
        request = CommandAttachRequest(instance=self.instance, command=self.id, offset=offset, stdin=self.stdin)
        return await self._open("/stream/attach", request)

    async def _open(self, path: str, request: OpenExecRequest | CommandAttachRequest) -> Opened:
        async with contextlib.AsyncExitStack() as own:
            connection = await own.enter_async_context(opened(self._address, self._headers, path, request))
            first = await message_of(connection)
            await self._stack.enter_async_context(own.pop_all())
            return connection, first


class RemoteExecSession(Collecting):
    """A command that runs in a guest of a server."""

    def __init__(self, command: _Command, name: str, timeout_s: float | None, first: Opened, *, attached: bool) -> None:
        """`attached`: the server lets the command run on when the connection is closed."""
        super().__init__(name, timeout_s)
        self._command = command
        self._connection, message = first
        if message.pid is None:
            raise not_coppice()
        self.id = message.command
        self.pid = message.pid
        self.offset = message.offset
        self.dropped_bytes = 0
        self._is_attached = attached
        self._is_wanted = False
        self._is_lost = False
        self._is_connected = asyncio.Event()
        self._is_connected.set()
        self._is_fed = False
        self._is_at_eof = False
        self._unsent: list[str] = []

    async def __aiter__(self) -> AsyncIterator[tuple[Stream, bytes]]:
        """Yield the command's output as it arrives, until the command has ended."""
        while self._exit is None:
            try:
                frame = await next_frame(self._connection)
            except HostCannot as error:
                if not is_lost(error):
                    raise
                await self._go_on(error)
                continue
            if isinstance(frame, bytes):
                self.offset += len(frame) - 1
                yield _STREAMS[frame[0]], frame[1:]
            elif frame.exit is not None:
                self._exit = frame.exit
            else:
                self.offset += frame.dropped
                self.dropped_bytes += frame.dropped

    async def _go_on(self, lost: HostCannot) -> None:
        """Attach to the command at the next server.

        :raises HostCannot: there is none, or input of the command may be lost
        """
        self._is_lost = True
        self._is_connected.clear()
        try:
            await self._attach_again(lost)
        finally:
            self._is_connected.set()

    async def _attach_again(self, lost: HostCannot) -> None:
        hint = f"the command goes on: `coppice attach {self._command.instance} {self.id}` shows its output"
        if self._is_fed:
            raise HostCannot(f"{lost.message}, and some of the command's input may be lost", hint=hint) from lost
        try:
            self._connection, _ = await persisting(lambda: self._command.attach(self.offset))
        except (HostCannot, Busy) as error:
            raise HostCannot(lost.message, hint=hint) from error
        self._is_lost, self._is_attached = False, True
        unsent, self._unsent = self._unsent, []
        for message in unsent:
            await self._send(message)
        if self._is_at_eof:
            await self.eof()

    @property
    def outlives_connection(self) -> bool:
        """Whether the command outlives the connection although its caller did not ask for that."""
        return self._is_attached and self._exit is None and not self._is_wanted and not self._is_lost

    @checked
    async def send_stdin(self, data: bytes) -> None:
        """Send data to the command's standard input."""
        await self._is_connected.wait()
        self._is_fed = self._is_fed or bool(data)
        for at in range(0, len(data), CHUNK):  # a server refuses large frames
            await self._send(data[at : at + CHUNK])

    async def eof(self) -> None:
        """Close the command's standard input."""
        self._is_at_eof = True
        await self._send(_text(eof=True))

    @checked
    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group.

        :raises UsageError: no signal has this number
        """
        check_signal(number)
        await self._control(signal=number)

    @checked
    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal.

        :raises UsageError: a number is out of range
        """
        await self._control(resize=check_terminal((rows, columns)))

    async def leave(self) -> None:
        """Let the command run on when the session is closed."""
        self._is_wanted = True
        await self._control(leave=True)

    async def _control(self, **message: object) -> None:
        text = _text(**message)
        if not await self._send(text):
            self._unsent.append(text)

    async def _send(self, data: bytes | str) -> bool:
        """Return whether the connection was open. The reader reports a lost one."""
        try:
            await self._connection.send(data)
        except ConnectionClosed:
            return False
        return True


def _text(**message: object) -> str:
    return msgspec.json.encode(message).decode()


@contextlib.asynccontextmanager
async def open_exec(
    address: Address,
    headers: Mapping[str, str],
    request: OpenExecRequest,
    call: Callable[[CommandKillRequest], Awaitable[None]],
) -> AsyncIterator[RemoteExecSession]:
    """Start a command on the server. Leaving the block ends the command."""
    command_id = request.command or new_command_id()
    named = msgspec.structs.replace(request, command=command_id)
    async with contextlib.AsyncExitStack() as stack:
        command = _Command(address, headers, stack, request, command_id)
        attached = False
        try:
            first = await command.start(named)
        except HostCannot as error:
            if not is_lost(error):
                raise
            first, attached = await _started(command, request, error)
        session = RemoteExecSession(command, request.argv[0], request.timeout_s, first, attached=attached)
        try:
            yield session
        finally:
            if session.outlives_connection:
                await complete(call(CommandKillRequest(instance=request.instance, command=command_id)))


async def _started(command: _Command, request: OpenExecRequest, lost: HostCannot) -> tuple[Opened, bool]:
    """Start a command at the next server, unless the lost one has started it: then attach to it.
    Return whether it was attached to.

    :raises HostCannot: there is no next server, or a caller chose the command's id, so that another
        one may have started a command with it
    """
    unknown = lost
    if may_have_arrived(lost):
        unknown = HostCannot(
            f"{lost.message}; {request.argv[0]} may have been started as command {command.id}",
            hint=f"`coppice commands {request.instance}` shows whether it was",
        )
        if request.command is not None:
            raise unknown from lost

    async def again() -> tuple[Opened, bool]:
        try:
            return await command.start(msgspec.structs.replace(request, command=command.id)), False
        except NameTaken:
            return await command.attach(), True

    try:
        return await persisting(again)
    except (HostCannot, Busy) as error:
        raise unknown from error


@contextlib.asynccontextmanager
async def attach(
    address: Address, headers: Mapping[str, str], request: CommandAttachRequest
) -> AsyncIterator[RemoteExecSession]:
    """Attach to a command on the server. Leaving the block lets it run on."""
    async with contextlib.AsyncExitStack() as stack:
        command = _Command(address, headers, stack, request, request.command)
        first = await command.attach(request.offset)
        yield RemoteExecSession(command, f"command {request.command}", None, first, attached=True)
