# Written by tools/generate_client.py from client/aio: change that, then run it.

"""Operations inside a machine, and what can be read of it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from coppice.client.blocking.base import MachineBase
from coppice.client.session import ExecSession
from coppice.model import ExecResult, FileStat, ProgressSink, no_progress
from coppice.model.guest import Health
from coppice.model.inspection import Inspection

if TYPE_CHECKING:
    pass


class MachineGuest(MachineBase):
    """Commands, connections, files, logs and archives of a machine."""

    def export(self, path: Path | str, *, bare: bool = False, progress: ProgressSink = no_progress) -> int:
        """Write a template or Standby instance to an archive; return the bytes of the archive.

        The archive has the memory, device state, disk, image and kernel, without their holes. The
        instance cannot be removed or changed meanwhile. An existing file is replaced when the
        archive is whole.

        :param path: A path on this machine.
        :param bare: Leave out the image and the kernel; only a host that has both can import the
            archive.
        :param progress: Called with each step of the work.
        :raises IllegalTransition: the instance is not a template or in standby
        :raises NotSupported: it has volumes
        :raises IntegrityError: a captured file has changed
        """
        return self._portal.call(self._twin.export(path, bare=bare, progress=progress))

    def exec(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        timeout_s: float | None = None,
        memory_limit_bytes: int | None = None,
        pids_limit: int | None = None,
        stdin: bytes | None = None,
        max_output_bytes: int = 64 << 20,
    ) -> ExecResult:
        """Run a command in a Running guest and collect its output.

        A command that fails is a result, not an error: see `exit_code`, which is 128+n if signal n
        ended it.

        :param argv: A list of words: the program and its arguments.
        :param env: Variables, added to the image's.
        :param workdir: Working directory, an absolute path. Default: the image's.
        :param user: A user name, UID, or UID:GID. Default: the image's.
        :param timeout_s: Seconds after which the command is killed.
        :param memory_limit_bytes: The most memory of all its processes together; more kills them.
        :param pids_limit: The most processes and threads that it may have.
        :param stdin: Bytes for its standard input.
        :param max_output_bytes: Limit of its output.
        :raises CommandNotFound: the program, the directory or the user does not exist
        :raises CommandNotStarted: the command cannot be started for another reason; the message
            names it
        :raises GuestTimeout: the command did not end within `timeout_s`, and was killed
        :raises GuestError: the command printed more than `max_output_bytes`
        """
        return self._portal.call(
            self._twin.exec(
                argv,
                env=env,
                workdir=workdir,
                user=user,
                timeout_s=timeout_s,
                memory_limit_bytes=memory_limit_bytes,
                pids_limit=pids_limit,
                stdin=stdin,
                max_output_bytes=max_output_bytes,
            )
        )

    @contextlib.contextmanager
    def open_exec(
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
        stdin: bool = True,
    ) -> Iterator[ExecSession]:
        """Start a command and open a session with it. Closing the session ends the command (SIGHUP).

        A session through a server that is restarted goes on with the next server, without loss of
        output, unless some of its input may be lost.

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
        :param stdin: False: the command has no standard input.
        :raises NameTaken: the machine has a command with this id
        """
        with self._portal.within(
            self._twin.open_exec(
                argv,
                env=env,
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
            )
        ) as opened:
            yield ExecSession(self._portal, opened)

    @contextlib.contextmanager
    def connect(self, to: int | str) -> Iterator[socket.socket]:
        """Connect to a server in a Running guest: to a TCP port of its own loopback, or to a unix
        socket.

        It needs no network and no published port. The connection is closed at the end of the block.
        If it was lost before, the end of the block raises the error.

        :param to: A port, or `unix:` and the absolute path of a socket. `unix:@NAME`: an abstract
            socket.
        :raises GuestRefused: nothing listens there, or the server broke the connection (`errno`)
        :raises IllegalTransition: the machine is not running
        """
        with self._portal.within(self._twin.connect(to).as_socket()) as opened:
            yield opened

    def cp_in(
        self, host_path: Path | str, guest_path: str, *, keep_owners: bool = False, progress: ProgressSink = no_progress
    ) -> int:
        """Copy a file or directory of this machine into the guest, as `cp -r` does; return the bytes
        copied.

        `DIR/.`, as text, copies a directory's content. A destination that ends with a slash is a
        directory.

        :param host_path: A path on this machine.
        :param guest_path: A path in the guest.
        :param keep_owners: Keep the numeric owners of the files. Default: root.
        :param progress: Called with each step of the work.
        :raises NotFound: the source does not exist
        :raises GuestRefused: the guest cannot make the copy
        """
        return self._portal.call(self._twin.cp_in(host_path, guest_path, keep_owners=keep_owners, progress=progress))

    def cp_out(
        self,
        guest_path: str,
        host_path: Path | str,
        *,
        outside_links: bool = False,
        progress: ProgressSink = no_progress,
    ) -> int:
        """Copy a file or directory of the guest to this machine, as `cp -r` does; return the bytes
        copied.

        Nothing is written outside `host_path`.

        :param guest_path: A path in the guest.
        :param host_path: A path on this machine.
        :param outside_links: Make symbolic links that lead out of the copy too. A program that
            reads the copy then reads files of this machine through them, and the guest chooses
            which.
        :param progress: Called with each step of the work.
        :raises GuestRefused: the source does not exist, or cannot be read
        :raises UnsafePath: the guest sent a device, a path outside the destination, or a link that
            leads out of the copy
        """
        return self._portal.call(
            self._twin.cp_out(guest_path, host_path, outside_links=outside_links, progress=progress)
        )

    def read_file(self, path: str, *, max_bytes: int = 64 << 20) -> bytes:
        """Return the content of a file of the guest.

        :param path: A path in the guest.
        :param max_bytes: A larger file is refused.
        """
        return self._portal.call(self._twin.read_file(path, max_bytes=max_bytes))

    def write_file(self, path: str, data: bytes, *, mode: int = 420) -> None:
        """Write a file in the guest atomically. Missing parent directories are made.

        :param path: A path in the guest.
        :param data: The content.
        :param mode: Permission bits.
        """
        self._portal.call(self._twin.write_file(path, data, mode=mode))

    def stat(self, path: str, *, follow_links: bool = False) -> FileStat:
        """Return the type, size, owner, mode and times of a path in the guest.

        :param path: A path in the guest.
        :param follow_links: Describe the target of a symlink, not the link.
        """
        return self._portal.call(self._twin.stat(path, follow_links=follow_links))

    def health(self) -> Health:
        """Return the health that the agent reports: uptime, load, the state of the image's process."""
        return self._portal.call(self._twin.health())

    def logs(
        self, *, source: Literal["console", "vmm"] = "console", tail: int | None = None, follow: bool = False
    ) -> Iterator[bytes]:
        """Yield lines of the guest's console, or of the VMM's log.

        :param source: Which log: the guest's console, or the VMM's own.
        :param tail: Only the last so many lines.
        :param follow: Wait for new lines until the machine ends.
        :raises NotFound: the log does not exist yet
        """
        return self._portal.iterate(self._twin.logs(source=source, tail=tail, follow=follow))

    def wait(self, deadline_s: float) -> Self:
        """Wait until the machine has ended by itself.

        :param deadline_s: How many seconds to wait at most.
        :raises GuestTimeout: the machine still runs at the deadline
        """
        self._portal.call(self._twin.wait(deadline_s))
        return self

    def wait_process(self, deadline_s: float | None = None) -> Self:
        """Wait until the machine's process has ended, or the machine has.

        The record has the end of the process as `process_end`. It has none if the machine ended
        first: then see its `ending`. A machine that has ended already is returned at once.

        :param deadline_s: How many seconds to wait at most.
        :raises IllegalTransition: the machine was put into standby, so its process goes on later
        :raises GuestTimeout: the process still runs at the deadline
        """
        self._portal.call(self._twin.wait_process(deadline_s))
        return self

    def ready(self, *, deadline_s: float = 60.0) -> Self:
        """Wait until the machine's service answers its health check. A machine is Running when its
        guest has its identity; its service may need longer.

        :param deadline_s: How many seconds to wait at most.
        :raises UsageError: the machine has no health check
        :raises VmmDied: the machine ended meanwhile
        :raises GuestTimeout: the service did not answer in time; the message has the latest failure
        """
        self._portal.call(self._twin.ready(deadline_s=deadline_s))
        return self

    def inspect(self) -> Inspection:
        """Return one instance with its forks, its disk, and its memory as the kernel accounts it."""
        return self._portal.call(self._twin.inspect())
