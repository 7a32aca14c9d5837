# Written by tools/generate_client.py: change coppice.requests, then run it.

"""The manager of a machine's commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from coppice.client.aio.base import Bound
from coppice.client.backend import Backend
from coppice.model.guest import ExecSession, Exit, GuestCommand, StartedCommand
from coppice.requests import (
    CommandAttachRequest,
    CommandForgetRequest,
    CommandKillRequest,
    CommandLsRequest,
    CommandStartRequest,
    CommandWaitRequest,
)

if TYPE_CHECKING:
    pass


class AsyncCommands(Bound):
    """The commands of one machine that go on without their client."""

    def __init__(self, backend: Backend, machine_id: str) -> None:
        super().__init__(backend)
        self._machine_id = machine_id

    async def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        timeout_s: float | None = None,
        memory_limit_bytes: int | None = None,
        pids_limit: int | None = None,
        command: str | None = None,
        tty: bool = False,
        size: tuple[int, int] | None = None,
        term: str | None = None,
        stdin: bool = False,
        keep_bytes: int = 262144,
    ) -> StartedCommand:
        """Start a command that needs no client, and return its id and process id.

        It goes on until it ends, whatever happens to this host. The guest keeps its latest output.
        In a fork of the machine it goes on too.

        :param argv: A list of words: the program and its arguments.
        :param env: Variables, added to the image's.
        :param workdir: Working directory, an absolute path. Default: the image's.
        :param user: A user name, UID, or UID:GID. Default: the image's.
        :param timeout_s: Seconds after which the command is killed.
        :param memory_limit_bytes: The most memory of all its processes together; more kills them.
        :param pids_limit: The most processes and threads that it may have.
        :param command: Its id: letters, digits, `_`, `.` and `-`. Default: generated.
        :param tty: Give the command a terminal.
        :param size: (rows, columns) of the terminal. Default: (24, 80).
        :param term: Type of the terminal, as in TERM.
        :param stdin: Keep its standard input open for clients that attach.
        :param keep_bytes: How much of its latest output the guest keeps.
        :raises CommandNotFound: the program, the directory or the user does not exist
        :raises CommandNotStarted: the command cannot be started for another reason; the message
            names it
        :raises NameTaken: the machine has a command with this id
        """
        return await self._backend.call(
            CommandStartRequest(
                instance=self._machine_id,
                argv=argv,
                env={} if env is None else env,
                workdir=workdir,
                user=user,
                timeout_s=timeout_s,
                memory_limit_bytes=memory_limit_bytes,
                pids_limit=pids_limit,
                command=command,
                tty=tty,
                size=size,
                term=term,
                stdin=stdin,
                keep_bytes=keep_bytes,
            )
        )

    async def ls(self) -> list[GuestCommand]:
        """Return the commands that run in the guest and the latest 64 that have ended, oldest first.

        The machine's process is one of them, with the id `main`. Its output is in the console's
        log.
        """
        return await self._backend.call(CommandLsRequest(instance=self._machine_id))

    def attach(self, command: str, offset: int = 0, *, stdin: bool = False) -> AbstractAsyncContextManager[ExecSession]:
        """Open a session with a command that runs or has ended. Closing the session lets it run on.

        The session begins with the output from `offset` on, as far as it is kept. `dropped_bytes`
        of the session says how much is missing. While the session is open, no output is dropped:
        the command waits for a session that does not read.

        :param command: Id of the command.
        :param offset: Offset of the first byte of output, counted over both streams.
        :param stdin: Send its standard input. One client at a time can.
        :raises NotFound: the machine has no such command, or it ended long ago
        :raises Busy: another client sends the command's input
        """
        return self._backend.stream(
            CommandAttachRequest(instance=self._machine_id, command=command, offset=offset, stdin=stdin)
        )

    async def kill(self, command: str, signal: int | None = None) -> None:
        """End all processes that a command has started, or send it a signal.

        Without a signal: SIGTERM to each of the processes, half a second later SIGKILL, and wait
        for the end. With one: send it to the command's process group, and do not wait. A command
        that has ended stays as it is.

        :param command: Id of the command.
        :param signal: Number of a signal. Default: end the command.
        :raises NotFound: the machine has no such command, or it ended long ago
        """
        await self._backend.call(CommandKillRequest(instance=self._machine_id, command=command, signal=signal))

    async def wait(self, command: str, deadline_s: float | None = None) -> Exit:
        """Wait for the end of a command, and return how it ended.

        :param command: Id of the command.
        :param deadline_s: How many seconds to wait at most.
        :raises NotFound: the machine has no such command, or it ended long ago
        :raises GuestTimeout: it still runs at the deadline
        """
        return await self._backend.call(
            CommandWaitRequest(instance=self._machine_id, command=command, deadline_s=deadline_s)
        )

    async def forget(self, command: str) -> None:
        """Forget a command that has ended, with its output.

        :param command: Id of the command.
        :raises NotFound: the machine has no such command
        :raises InUse: it runs, or a client is attached to it
        """
        await self._backend.call(CommandForgetRequest(instance=self._machine_id, command=command))
