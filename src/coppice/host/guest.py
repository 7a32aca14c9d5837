"""Use cases inside a running guest: exec, connections, files, logs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from functools import partial

from coppice.agent.client import Session
from coppice.commands import new_command_id
from coppice.completion import in_thread, later
from coppice.errors import CommandNotStarted, CoppiceError, GuestError, GuestTimeout, NameTaken, NotFound, VmmDied
from coppice.host import recovery
from coppice.host.activity import active, idle_s
from coppice.host.base import UseCases
from coppice.machine import last_words
from coppice.machine.follow import follow_file
from coppice.model import ExecResult, FileStat, Instance, ProgressSink, State
from coppice.model.guest import Connection, CopySession, ExecSession, Health
from coppice.model.lifecycle import Operation, require
from coppice.requests import (
    CommandStartRequest,
    ConnectRequest,
    CpInRequest,
    CpOutRequest,
    ExecRequest,
    HealthRequest,
    LogSource,
    LogsRequest,
    OpenCopyRequest,
    OpenExecRequest,
    ReadFileRequest,
    StatRequest,
    WaitRequest,
    WriteFileRequest,
)
from coppice.state.journal import JournalOperation
from coppice.vmm import driver as files

_LOG_FILES: dict[LogSource, str] = {"console": files.CONSOLE_LOG, "vmm": files.VMM_LOG}
_DEFAULT_SIZE = (24, 80)
_PORT_DEADLINE_S = 60.0
_LOOK_S = 1.0
_SILENT_S = 5.0


@contextlib.asynccontextmanager
async def started(
    session: Session,
    request: OpenExecRequest | CommandStartRequest,
    *,
    command: str,
    detached: bool = False,
    keep_bytes: int | None = None,
) -> AsyncIterator[ExecSession]:
    """Start a command with an id. Leaving the block ends it, unless it is detached.

    :raises NameTaken: the machine has a command with this id
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            running = await stack.enter_async_context(
                session.exec_stream(
                    request.argv,
                    env=request.env,
                    cwd=request.workdir or None,
                    user=request.user,
                    tty=request.tty,
                    size=request.size or _DEFAULT_SIZE,
                    term=request.term,
                    has_stdin=request.stdin,
                    timeout_s=request.timeout_s,
                    command_id=command,
                    detached=detached,
                    keep_bytes=keep_bytes,
                    memory_bytes=request.memory_limit_bytes,
                    processes=request.pids_limit,
                )
            )
        except CommandNotStarted as error:
            if error.errno != errno.EEXIST:
                raise
            raise NameTaken(
                f"{request.instance} has a command {command}",
                hint=f"`coppice commands {request.instance}` lists them; choose another id",
            ) from error
        yield running


class Guest(UseCases):
    """The operations that talk to the agent, and the logs."""

    async def exec(self, request: ExecRequest) -> ExecResult:
        """Run the command on its own session port."""
        async with self._session(request.instance) as session:
            return await session.exec(
                request.argv,
                env=request.env,
                cwd=request.workdir or None,
                user=request.user,
                stdin=request.stdin,
                timeout_s=request.timeout_s,
                memory_bytes=request.memory_limit_bytes,
                processes=request.pids_limit,
                max_output_bytes=request.max_output_bytes,
            )

    @contextlib.asynccontextmanager
    async def open_exec(self, request: OpenExecRequest) -> AsyncIterator[ExecSession]:
        """Start the command, and end it when the block ends."""
        async with (
            self._session(request.instance) as session,
            started(session, request, command=request.command or new_command_id()) as running,
        ):
            yield running

    @contextlib.asynccontextmanager
    async def connect(self, request: ConnectRequest) -> AsyncIterator[Connection]:
        """Connect, and close the connection when the block ends."""
        async with self._session(request.instance) as session, session.connect(request.to) as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def open_copy(self, request: OpenCopyRequest) -> AsyncIterator[CopySession]:
        """Open a session port, and close it when the block ends."""
        async with self._session(request.instance) as session:
            yield session

    async def cp_in(self, request: CpInRequest, progress: ProgressSink) -> int:
        """Pack the tree in a thread, and have the guest unpack it."""
        from coppice.agent.copy import copy_in  # imports tarfile, which few commands need

        async with self._session(request.instance) as session:
            copied = await copy_in(
                session, request.host_path, request.guest_path, keep_owners=request.keep_owners, progress=progress
            )
            return copied.content_bytes

    async def cp_out(self, request: CpOutRequest, progress: ProgressSink) -> int:
        """Have the guest pack the tree, and unpack it in a thread."""
        from coppice.agent.copy import copy_out

        async with self._session(request.instance) as session:
            return await copy_out(
                session,
                request.guest_path,
                request.host_path,
                outside_links=request.outside_links,
                progress=progress,
            )

    async def read_file(self, request: ReadFileRequest) -> bytes:
        """Read the file on a session port."""
        async with self._session(request.instance) as session:
            return await session.read_file(request.path, max_bytes=request.max_bytes)

    async def write_file(self, request: WriteFileRequest) -> None:
        """Write the file on a session port."""
        async with self._session(request.instance) as session:
            await session.write_file(request.path, request.data, mode=request.mode)

    async def stat(self, request: StatRequest) -> FileStat:
        """Ask the agent on a session port."""
        async with self._session(request.instance) as session:
            return await session.stat(request.path, follow=request.follow_links)

    async def health(self, request: HealthRequest) -> Health:
        """Ask the agent on the control port."""
        instance = await self._running(request.instance)
        async with self.rooms.ports(instance).control(10.0) as control:
            return await control.health()

    @contextlib.asynccontextmanager
    async def logs(self, request: LogsRequest) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open the log file, and follow it if requested."""
        instance = await self._get(request.instance)
        path = self.rooms.directory(instance.id) / _LOG_FILES[request.source]
        try:
            log = path.open("rb")  # at once: a removal of the machine does not take it away any more
        except FileNotFoundError as error:
            raise NotFound(
                f"{instance.name} has no {request.source} log yet", hint=f"`coppice start {instance.name}` starts it"
            ) from error

        async def ended() -> bool:
            try:
                current = await recovery.look(self.rooms, await self._get(instance.id))
            except NotFound:  # another operation has removed it
                return True
            return current.vmm is None

        followed = follow_file(log, tail=request.tail, follow=request.follow, ended=ended)
        with log:
            async with contextlib.aclosing(followed) as lines:
                yield lines

    async def _running(self, key: str) -> Instance:
        instance = await self._current(key)
        require(Operation.EXEC, instance)
        return instance

    @contextlib.asynccontextmanager
    async def _awake(self, key: str) -> AsyncIterator[Instance]:
        """Yield a Running instance, and keep it from an automatic standby for the block."""
        instance = await self._running(key)
        async with active(self.rooms, instance):
            # An automatic standby may have been faster.
            yield await self._running(key) if idle_s(instance) else instance

    @contextlib.asynccontextmanager
    async def _session(self, key: str) -> AsyncIterator[Session]:
        """Open a session port of a Running instance.

        Take no instance lock: sessions run in parallel, and a capture does not wait for them.
        """
        async with (
            self._awake(key) as instance,
            self.rooms.ports(instance).session(_PORT_DEADLINE_S) as session,
            later(_LOOK_S, partial(self._watch, instance, session)),
        ):
            try:
                yield session
            except VmmDied as error:
                raise await self._explained(error, instance) from error

    async def _explained(self, error: VmmDied, instance: Instance) -> VmmDied:
        """Return the error of a lost session with what was done to the machine meanwhile, if anything was."""
        name = instance.name
        doing: JournalOperation | State = JournalOperation.REMOVE
        with contextlib.suppress(NotFound):
            current, entry = await self.rooms.store.look_up(instance.id)
            doing = entry.operation if entry else current.state
        match doing:
            case JournalOperation.REMOVE:
                return VmmDied(
                    f"{name} was removed, which ended the session", hint="list the instances with `coppice ls`"
                )
            case JournalOperation.STANDBY | JournalOperation.STANDBY_COMMIT | State.STANDBY:
                hint = (
                    f"`coppice restore {name}` continues it; `coppice commands {name}` lists the commands that run on"
                )
                return VmmDied(f"{name} was put into standby, which ended the session", hint=hint)
            case JournalOperation.STOP | State.STOPPED | State.SHUTDOWN:
                return VmmDied(f"{name} was stopped, which ended the session", hint=f"`coppice start {name}` boots it")
            case _:
                return VmmDied(error.message, hint=error.hint and error.hint.replace("NAME", name))

    async def _watch(self, instance: Instance, session: Session) -> None:
        """End the session if the guest's kernel has ended and its VMM has not.

        A kernel without ACPI cannot switch its machine off, and Firecracker has no such switch. The
        guest can write anything to its console, so the agent is asked too.
        """
        console = self.rooms.directory(instance.id) / files.CONSOLE_LOG
        while True:
            words = await in_thread(last_words.of_end, console, instance.started_at or 0.0)
            if words and await self._is_silent(instance):
                session.give_up(
                    GuestError(
                        f"{instance.name} does not answer any more: {words}",
                        hint=f"`coppice stop --grace 0 {instance.name}` ends the machine",
                    )
                )
                return
            await asyncio.sleep(_LOOK_S)

    async def _is_silent(self, instance: Instance) -> bool:
        try:
            async with self.rooms.ports(instance).control(_SILENT_S) as control:
                await control.health()
        except GuestTimeout:
            return True
        except CoppiceError:  # another process asks, or the VMM has ended, which the session notices
            return False
        return False

    async def wait(self, request: WaitRequest) -> Instance:
        """Wait until the VMM has ended."""
        instance = await self._get(request.instance)
        if instance.vmm is not None:
            try:
                async with asyncio.timeout(request.deadline_s):
                    await self.rooms.driver(instance).wait_exit(self.rooms.directory(instance.id), instance.vmm)
            except TimeoutError as error:
                raise GuestTimeout(
                    f"{instance.name} still runs after {request.deadline_s:g} s",
                    hint=f"wait longer, or end it with `coppice stop {instance.name}`",
                ) from error
            instance = await self._settled(instance)
        return instance
