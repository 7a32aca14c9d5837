"""Use cases on commands that go on without their client."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from coppice.agent.client import Session
from coppice.commands import PROCESS, new_command_id
from coppice.errors import GuestTimeout, IllegalTransition, InUse, NotFound, VmmDied
from coppice.host import process
from coppice.host.guest import Guest, started
from coppice.model import Instance, ProcessEnd, State
from coppice.model.guest import ExecSession, Exit, GuestCommand, StartedCommand
from coppice.requests import (
    CommandAttachRequest,
    CommandForgetRequest,
    CommandKillRequest,
    CommandLsRequest,
    CommandStartRequest,
    CommandWaitRequest,
    WaitProcessRequest,
)

_ASK_AGAIN_S: Final = 1.0


class Commands(Guest):
    """The operations on commands by their id. The agent has all of their state."""

    async def command_start(self, request: CommandStartRequest) -> StartedCommand:
        """Start the command detached. The agent answers when it runs."""
        command = request.command or new_command_id()
        async with self._session(request.instance) as session:
            starting = started(session, request, command=command, detached=True, keep_bytes=request.keep_bytes)
            async with starting as running:
                return StartedCommand(id=command, pid=running.pid)

    async def command_ls(self, request: CommandLsRequest) -> list[GuestCommand]:
        """Ask the agent on a session port."""
        async with self._session(request.instance) as session:
            return await session.commands()

    @contextlib.asynccontextmanager
    async def command_attach(self, request: CommandAttachRequest) -> AsyncIterator[ExecSession]:
        """Attach, and leave the command when the block ends."""
        async with (
            self._session(request.instance) as session,
            session.attach(request.command, offset=request.offset, stdin=request.stdin) as running,
        ):
            yield running

    async def command_kill(self, request: CommandKillRequest) -> None:
        """Send the signal, or have the agent end the command and wait for its end."""
        async with (
            self._session(request.instance) as session,
            session.attach(request.command, output=False) as running,
        ):
            if request.signal is None:
                await running.terminate()
            else:
                await running.signal(request.signal)
                await session.commands()  # the agent answers after it has read the signal

    async def command_wait(self, request: CommandWaitRequest) -> Exit:
        """Attach without output. The agent sends the end when it comes."""
        async with (
            self._session(request.instance) as session,
            session.attach(request.command, output=False) as running,
        ):
            try:
                async with asyncio.timeout(request.deadline_s):
                    return await running.wait()
            except TimeoutError as error:
                raise GuestTimeout(
                    f"command {request.command} still runs after {request.deadline_s or 0:g} s",
                    hint=f"wait longer, or end it with `coppice kill {request.instance} {request.command}`",
                ) from error

    async def wait_process(self, request: WaitProcessRequest) -> Instance:
        """Attach to the machine's process as to a command, or wait for the end of a machine without one."""
        instance = await self._current(request.instance)
        if instance.process_end is None and instance.state is not State.STOPPED:
            try:
                async with asyncio.timeout(request.deadline_s):
                    instance = await self._process_ended(instance)
            except TimeoutError as error:
                raise GuestTimeout(
                    f"the process of {instance.name} still runs after {request.deadline_s or 0:g} s",
                    hint=f"wait longer, or end it with `coppice kill {instance.name} {PROCESS}`",
                ) from error
        return instance

    async def _process_ended(self, instance: Instance) -> Instance:
        try:
            async with self._session(instance.id) as session, session.attach(PROCESS, output=False) as running:
                ended = await running.wait()
            instance = await process.learn(self.rooms, instance)
            if instance.process_end is not None:
                return instance
            end = ProcessEnd(exit_code=ended.exit_code, signal=ended.signal, at=time.time())
            return msgspec.structs.replace(instance, process_end=end)  # a later look records the agent's own word
        except NotFound:  # the machine has no process, or an older agent, of which the process is no command
            if (found := await self._asked(instance)) is not None:
                return found
        except VmmDied:
            pass
        except IllegalTransition:  # but a machine that is being stopped ends soon
            ending = instance.vmm and (await self._get(instance.id)).state in (State.SHUTDOWN, State.STOPPED)
            if not ending:
                raise
        if instance.vmm is None:
            raise AssertionError("a running instance has a VMM")
        await self.rooms.driver(instance).wait_exit(self.rooms.directory(instance.id), instance.vmm)
        instance = await self._settled(instance)
        if instance.state is State.STANDBY:
            raise IllegalTransition(
                f"{instance.name} was put into standby before its process ended",
                hint=f"run `coppice restore {instance.name}`, then wait again",
            )
        if instance.state is not State.STOPPED:
            raise IllegalTransition(
                f"{instance.name} was started again before its process told how it ended",
                hint=f"run `coppice wait {instance.name}` again",
            )
        return instance

    async def _asked(self, instance: Instance) -> Instance | None:
        """Ask an older agent until the machine's process has ended. None: the machine has ended, or has no process."""
        current = instance
        while process.may_end(current) and current.vmm == instance.vmm:
            current = await process.learn(self.rooms, current)
            if current.process_end is None:
                await asyncio.sleep(_ASK_AGAIN_S)
                current = await self._current(instance.id)
        return current if current.process_end is not None else None

    async def command_forget(self, request: CommandForgetRequest) -> None:
        """Have the agent forget it, and see whether it did: it keeps commands that are in use."""
        async with self._session(request.instance) as session:
            found = await _find(session, request.instance, request.command)
            session.forget(request.command)
            with contextlib.suppress(NotFound):
                found = await _find(session, request.instance, request.command)
                what = "runs" if found.exit_code is None else "is attached to a client"
                what = "is the machine's process" if request.command == PROCESS else what
                raise InUse(
                    f"command {request.command} {what}",
                    hint=f"end it with `coppice kill {request.instance} {request.command}`, or wait for its end",
                )


async def _find(session: Session, instance: str, command: str) -> GuestCommand:
    """Return a command that the agent knows.

    :raises NotFound: it knows none with this id
    """
    for found in await session.commands():
        if found.id == command:
            return found
    raise NotFound(f"{instance} has no command {command}", hint=f"`coppice commands {instance}` lists them")
