"""Use cases inside of a running guest: exec, files, logs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from coppice.errors import NotFound, UsageError
from coppice.guest.client import ExecSession, Health, Session, copy_in, copy_out
from coppice.host.base import HostBase, Reference
from coppice.instance import recovery
from coppice.instance.follow import follow_file
from coppice.lifecycle import Operation, require
from coppice.model import MIB, ExecResult, FileStat, Instance, ProgressSink, no_progress
from coppice.names import check_argv, check_env, check_timeout
from coppice.vmm import driver as files

LogSource = Literal["console", "vmm"]
_LOG_FILES: dict[LogSource, str] = {"console": files.CONSOLE_LOG, "vmm": files.VMM_LOG}
_DEFAULT_SIZE = (24, 80)
_PORT_DEADLINE_S = 60.0


class Guest(HostBase):
    """Everything that talks to the agent."""

    async def exec(
        self,
        reference: Reference,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        stdin: bytes | None = None,
        timeout_s: float | None = None,
        max_output_bytes: int = 64 * MIB,
    ) -> ExecResult:
        """Run a command in a Running guest and collect what it prints.

        A command that fails is a result, not an error: see `exit_code`, which is 128+n where signal n ended it.

        :raises CommandNotFound: the program, the directory or the user does not exist
        :raises CommandNotStarted: it cannot be started for another reason; the message has it
        :raises GuestTimeout: it did not end within `timeout_s`; it was killed
        :raises GuestError: it printed more than `max_output_bytes`
        """
        async with self._session(reference) as session:
            return await session.exec(
                _checked(argv),
                env=check_env(env or {}),
                cwd=workdir,
                user=user,
                stdin=stdin,
                timeout_s=check_timeout(timeout_s),
                max_output_bytes=max_output_bytes,
            )

    @contextlib.asynccontextmanager
    async def open_exec(
        self,
        reference: Reference,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        tty: bool = False,
        size: tuple[int, int] | None = None,
        term: str | None = None,
        stdin: bool = True,
        timeout_s: float | None = None,
    ) -> AsyncIterator[ExecSession]:
        """Run a command and talk to it while it runs: an open session, ended (with SIGHUP) when the block is left.

        `size` is (rows, columns) of the terminal where `tty` is wanted, `term` its type.
        """
        async with (
            self._session(reference) as session,
            session.exec_stream(
                _checked(argv),
                env=check_env(env or {}),
                cwd=workdir,
                user=user,
                tty=tty,
                size=size or _DEFAULT_SIZE,
                term=term,
                has_stdin=stdin,
                timeout_s=check_timeout(timeout_s),
            ) as running,
        ):
            yield running

    async def cp_in(
        self, reference: Reference, host_path: Path | str, guest_path: str, *, progress: ProgressSink = no_progress
    ) -> int:
        """Copy a file or directory of the host into the guest, as `cp -a` would name the result. Returns bytes copied."""
        async with self._session(reference) as session:
            return (await copy_in(session, Path(host_path), guest_path, progress=progress)).content_bytes

    async def cp_out(
        self, reference: Reference, guest_path: str, host_path: Path | str, *, progress: ProgressSink = no_progress
    ) -> int:
        """Copy a file or directory out of the guest. Nothing is written outside of `host_path`. Returns bytes copied."""
        async with self._session(reference) as session:
            return await copy_out(session, guest_path, Path(host_path), progress=progress)

    async def read_file(self, reference: Reference, path: str, *, max_bytes: int = 64 * MIB) -> bytes:
        """The content of a file of the guest."""
        async with self._session(reference) as session:
            return await session.read_file(path, max_bytes=max_bytes)

    async def write_file(self, reference: Reference, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file in the guest: whole, or not at all. Missing parent directories are made."""
        async with self._session(reference) as session:
            await session.write_file(path, data, mode=mode)

    async def stat(self, reference: Reference, path: str, *, follow_links: bool = False) -> FileStat:
        """What the guest says of a path."""
        async with self._session(reference) as session:
            return await session.stat(path, follow=follow_links)

    async def health(self, reference: Reference) -> Health:
        """The agent's own view: uptime, load, how the image's process fares."""
        instance = await self._running(reference)
        async with self.rooms.ports(instance.id).control(10.0) as control:
            return await control.health()

    async def logs(
        self, reference: Reference, *, source: LogSource = "console", tail: int | None = None, follow: bool = False
    ) -> AsyncIterator[bytes]:
        """Lines of the guest's console, or of the VMM's own log; with `follow` until the machine ends.

        :raises NotFound: there is no such log yet
        """
        instance = await self._get(reference)
        path = self.rooms.directory(instance.id) / _LOG_FILES[source]
        if not path.exists():
            raise NotFound(f"{instance.name} has no {source} log yet", hint="start it first")

        async def ended() -> bool:
            current = await recovery.look(self.rooms, await self._get(instance.id))
            return current.vmm is None

        async for line in follow_file(path, tail=tail, follow=follow, ended=ended):
            yield line

    async def _running(self, reference: Reference) -> Instance:
        instance = await self._current(reference)
        require(Operation.EXEC, instance)
        return instance

    @contextlib.asynccontextmanager
    async def _session(self, reference: Reference) -> AsyncIterator[Session]:
        """A session port of a Running instance. No instance lock: sessions are many at once, and a capture does not wait for them."""
        instance = await self._running(reference)
        async with self.rooms.ports(instance.id).session(_PORT_DEADLINE_S) as session:
            yield session

    async def wait(self, reference: Reference, *, deadline_s: float) -> Instance:
        """Wait until the machine has ended by itself.

        :raises TimeoutError: it runs on
        """
        instance = await self._get(reference)
        if instance.vmm is not None:
            async with asyncio.timeout(deadline_s):
                await self.rooms.driver.wait_exit(self.rooms.directory(instance.id), instance.vmm)
        return await recovery.look(self.rooms, await self._get(instance.id))


def _checked(argv: Sequence[str]) -> Sequence[str]:
    if not argv:
        raise UsageError("there is no command to run", hint="give a program and its arguments")
    return check_argv(argv)
