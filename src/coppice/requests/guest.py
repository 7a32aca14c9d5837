"""Requests inside a running guest: commands, files, logs."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from coppice.addresses import check_endpoint
from coppice.commands import check_bound, check_new_id, check_workdir
from coppice.model import MIB, ExecResult, FileStat, Instance
from coppice.model.guest import Connection, CopySession, ExecSession, Health, TerminalSize
from coppice.names import (
    check_command,
    check_env,
    check_host_path,
    check_limit,
    check_mode,
    check_reference,
    check_terminal,
    check_timeout,
)
from coppice.requests.base import PATH, SECRET, InstanceKey, InstanceRequest, R, StreamRequest

LogSource = Literal["console", "vmm"]
GuestPath = Annotated[str, Meta(description="A path in the guest.")]


class CommandRequest(InstanceRequest[R], frozen=True, kw_only=True):
    """The parameters of all requests that run a command."""

    argv: Annotated[Sequence[str], Meta(description="A list of words: the program and its arguments.")]
    env: Annotated[Mapping[str, str], Meta(description="Variables, added to the image's.", extra=SECRET)] = {}
    workdir: Annotated[str | None, Meta(description="Working directory, an absolute path. Default: the image's.")] = (
        None
    )
    user: Annotated[str | None, Meta(description="A user name, UID, or UID:GID. Default: the image's.")] = None
    timeout_s: Annotated[float | None, Meta(description="Seconds after which the command is killed.")] = None
    memory_limit_bytes: Annotated[
        int | None, Meta(description="The most memory of all its processes together; more kills them.")
    ] = None
    pids_limit: Annotated[int | None, Meta(description="The most processes and threads that it may have.")] = None

    def check(self) -> None:
        """Check the command and its limits."""
        super().check()
        check_command(self.argv)
        check_env(self.env)
        check_workdir(self.workdir)
        check_timeout(self.timeout_s)
        check_bound(self.memory_limit_bytes, "memory")
        check_bound(self.pids_limit, "processes")


class ExecRequest(CommandRequest[ExecResult], frozen=True, kw_only=True):
    """Run a command in a Running guest and collect its output.

    A command that fails is a result, not an error: see `exit_code`, which is 128+n if signal n
    ended it.

    :raises CommandNotFound: the program, the directory or the user does not exist
    :raises CommandNotStarted: the command cannot be started for another reason; the message names
        it
    :raises GuestTimeout: the command did not end within `timeout_s`, and was killed
    :raises GuestError: the command printed more than `max_output_bytes`
    """

    stdin: Annotated[bytes | None, Meta(description="Bytes for its standard input.", extra=SECRET)] = None
    max_output_bytes: Annotated[int, Meta(description="Limit of its output.")] = 64 * MIB

    def check(self) -> None:
        """Also check the limit."""
        super().check()
        check_limit(self.max_output_bytes)


class NewCommandRequest(CommandRequest[R], frozen=True, kw_only=True):
    """The parameters of all requests whose command has an id, and may have a terminal."""

    command: Annotated[
        str | None, Meta(description="Its id: letters, digits, `_`, `.` and `-`. Default: generated.")
    ] = None
    tty: Annotated[bool, Meta(description="Give the command a terminal.")] = False
    size: Annotated[TerminalSize | None, Meta(description="(rows, columns) of the terminal. Default: (24, 80).")] = None
    term: Annotated[str | None, Meta(description="Type of the terminal, as in TERM.")] = None

    def check(self) -> None:
        """Also check the id and the size."""
        super().check()
        if self.command is not None:
            check_new_id(self.command)
        if self.size is not None:
            check_terminal(self.size)


class OpenExecRequest(NewCommandRequest[ExecSession], StreamRequest[ExecSession], frozen=True, kw_only=True):
    """Start a command and open a session with it. Closing the session ends the command (SIGHUP).

    A session through a server that is restarted goes on with the next server, without loss of
    output, unless some of its input may be lost.

    :raises NameTaken: the machine has a command with this id
    """

    stdin: Annotated[bool, Meta(description="False: the command has no standard input.")] = True


class ConnectRequest(InstanceRequest[Connection], StreamRequest[Connection], frozen=True, kw_only=True):
    """Connect to a server in a Running guest: to a TCP port of its own loopback, or to a unix socket.

    It needs no network and no published port. The connection is closed at the end of the block. If
    it was lost before, the end of the block raises the error.

    :raises GuestRefused: nothing listens there, or the server broke the connection (`errno`)
    :raises IllegalTransition: the machine is not running
    """

    to: Annotated[
        int | str,
        Meta(description="A port, or `unix:` and the absolute path of a socket. `unix:@NAME`: an abstract socket."),
    ]

    def check(self) -> None:
        """Check the port or path too."""
        super().check()
        check_endpoint(self.to)


class OpenCopyRequest(InstanceRequest[CopySession], StreamRequest[CopySession], frozen=True, kw_only=True):
    """Open a session with a guest that copies files and trees. `cp_in` and `cp_out` use it."""

    has_method: ClassVar[bool] = False


class CpInRequest(InstanceRequest[int], frozen=True, kw_only=True):
    """Copy a file or directory of this machine into the guest, as `cp -r` does; return the bytes
    copied.

    `DIR/.`, as text, copies a directory's content. A destination that ends with a slash is a
    directory.

    :raises NotFound: the source does not exist
    :raises GuestRefused: the guest cannot make the copy
    """

    reports_progress: ClassVar[bool] = True

    host_path: Annotated[str, Meta(description="A path on this machine.", extra=PATH)]
    guest_path: GuestPath
    keep_owners: Annotated[bool, Meta(description="Keep the numeric owners of the files. Default: root.")] = False

    def check(self) -> None:
        """Check the path too."""
        super().check()
        check_host_path(self.host_path)


class CpOutRequest(InstanceRequest[int], frozen=True, kw_only=True):
    """Copy a file or directory of the guest to this machine, as `cp -r` does; return the bytes
    copied.

    Nothing is written outside `host_path`.

    :raises GuestRefused: the source does not exist, or cannot be read
    :raises UnsafePath: the guest sent a device, a path outside the destination, or a link that leads out of the copy
    """

    reports_progress: ClassVar[bool] = True

    guest_path: GuestPath
    host_path: Annotated[str, Meta(description="A path on this machine.", extra=PATH)]
    outside_links: Annotated[
        bool,
        Meta(
            description="Make symbolic links that lead out of the copy too. A program that reads the copy then reads "
            "files of this machine through them, and the guest chooses which."
        ),
    ] = False

    def check(self) -> None:
        """Check the path too."""
        super().check()
        check_host_path(self.host_path)


class ReadFileRequest(InstanceRequest[bytes], frozen=True, kw_only=True):
    """Return the content of a file of the guest."""

    path: GuestPath
    max_bytes: Annotated[int, Meta(description="A larger file is refused.")] = 64 * MIB

    def check(self) -> None:
        """Also check the limit."""
        super().check()
        check_limit(self.max_bytes)


class WriteFileRequest(InstanceRequest[None], frozen=True, kw_only=True):
    """Write a file in the guest atomically. Missing parent directories are made."""

    path: GuestPath
    data: Annotated[bytes, Meta(description="The content.", extra=SECRET)]
    mode: Annotated[int, Meta(description="Permission bits.")] = 0o644

    def check(self) -> None:
        """Also check the mode."""
        super().check()
        check_mode(self.mode)


class StatRequest(InstanceRequest[FileStat], frozen=True, kw_only=True):
    """Return the type, size, owner, mode and times of a path in the guest."""

    path: GuestPath
    follow_links: Annotated[bool, Meta(description="Describe the target of a symlink, not the link.")] = False


class HealthRequest(InstanceRequest[Health], frozen=True, kw_only=True):
    """Return the health that the agent reports: uptime, load, the state of the image's process."""


class LogsRequest(StreamRequest[AsyncIterator[bytes]], frozen=True, kw_only=True):
    """Yield lines of the guest's console, or of the VMM's log.

    :raises NotFound: the log does not exist yet
    """

    instance: InstanceKey
    source: Annotated[LogSource, Meta(description="Which log: the guest's console, or the VMM's own.")] = "console"
    tail: Annotated[int | None, Meta(description="Only the last so many lines.")] = None
    follow: Annotated[bool, Meta(description="Wait for new lines until the machine ends.")] = False

    def check(self) -> None:
        """Check the name and the number of lines."""
        check_reference(self.instance)
        if self.tail is not None:
            check_limit(self.tail)


class WaitRequest(InstanceRequest[Instance], frozen=True, kw_only=True):
    """Wait until the machine has ended by itself.

    :raises GuestTimeout: the machine still runs at the deadline
    """

    deadline_s: Annotated[float, Meta(description="How many seconds to wait at most.")]

    def check(self) -> None:
        """Also check the deadline."""
        super().check()
        check_timeout(self.deadline_s)


class WaitProcessRequest(InstanceRequest[Instance], frozen=True, kw_only=True):
    """Wait until the machine's process has ended, or the machine has.

    The record has the end of the process as `process_end`. It has none if the machine ended first:
    then see its `ending`. A machine that has ended already is returned at once.

    :raises IllegalTransition: the machine was put into standby, so its process goes on later
    :raises GuestTimeout: the process still runs at the deadline
    """

    positional: ClassVar[tuple[str, ...]] = ("deadline_s",)

    deadline_s: Annotated[float | None, Meta(description="How many seconds to wait at most.")] = None

    def check(self) -> None:
        """Also check the deadline."""
        super().check()
        check_timeout(self.deadline_s)


class ReadyRequest(InstanceRequest[Instance], frozen=True, kw_only=True):
    """Wait until the machine's service answers its health check. A machine is Running when its
    guest has its identity; its service may need longer.

    :raises UsageError: the machine has no health check
    :raises VmmDied: the machine ended meanwhile
    :raises GuestTimeout: the service did not answer in time; the message has the latest failure
    """

    deadline_s: Annotated[float, Meta(description="How many seconds to wait at most.")] = 60.0

    def check(self) -> None:
        """Also check the deadline."""
        super().check()
        check_timeout(self.deadline_s)
