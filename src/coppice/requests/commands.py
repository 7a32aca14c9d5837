"""Requests about commands that go on without their client."""

from typing import Annotated, ClassVar

from msgspec import Meta

from coppice.commands import check_command_id, check_kept, check_signal
from coppice.model.guest import KEPT_BYTES, ExecSession, Exit, GuestCommand, StartedCommand
from coppice.names import check_limit, check_timeout
from coppice.requests.base import InstanceRequest, R, StreamRequest
from coppice.requests.guest import NewCommandRequest

CommandKey = Annotated[str, Meta(description="Id of the command.")]


class OneCommandRequest(InstanceRequest[R], frozen=True, kw_only=True):
    """The parameters of all requests about one command.

    :raises NotFound: the machine has no such command, or it ended long ago
    """

    command: CommandKey

    def check(self) -> None:
        """Check the id too."""
        super().check()
        check_command_id(self.command)


class CommandStartRequest(NewCommandRequest[StartedCommand], frozen=True, kw_only=True):
    """Start a command that needs no client, and return its id and process id.

    It goes on until it ends, whatever happens to this host. The guest keeps its latest output. In
    a fork of the machine it goes on too.

    :raises CommandNotFound: the program, the directory or the user does not exist
    :raises CommandNotStarted: the command cannot be started for another reason; the message names
        it
    :raises NameTaken: the machine has a command with this id
    """

    stdin: Annotated[bool, Meta(description="Keep its standard input open for clients that attach.")] = False
    keep_bytes: Annotated[int, Meta(description="How much of its latest output the guest keeps.")] = KEPT_BYTES

    def check(self) -> None:
        """Also check the amount."""
        super().check()
        check_kept(self.keep_bytes)


class CommandLsRequest(InstanceRequest[list[GuestCommand]], frozen=True, kw_only=True):
    """Return the commands that run in the guest and the latest 64 that have ended, oldest first.

    The machine's process is one of them, with the id `main`. Its output is in the console's log.
    """


class CommandAttachRequest(OneCommandRequest[ExecSession], StreamRequest[ExecSession], frozen=True, kw_only=True):
    """Open a session with a command that runs or has ended. Closing the session lets it run on.

    The session begins with the output from `offset` on, as far as it is kept. `dropped_bytes` of the
    session says how much is missing. While the session is open, no output is dropped: the command
    waits for a session that does not read.

    :raises NotFound: the machine has no such command, or it ended long ago
    :raises Busy: another client sends the command's input
    """

    positional: ClassVar[tuple[str, ...]] = ("offset",)

    offset: Annotated[int, Meta(description="Offset of the first byte of output, counted over both streams.")] = 0
    stdin: Annotated[bool, Meta(description="Send its standard input. One client at a time can.")] = False

    def check(self) -> None:
        """Also check the offset."""
        super().check()
        check_limit(self.offset)


class CommandKillRequest(OneCommandRequest[None], frozen=True, kw_only=True):
    """End all processes that a command has started, or send it a signal.

    Without a signal: SIGTERM to each of the processes, half a second later SIGKILL, and wait for the
    end. With one: send it to the command's process group, and do not wait. A command that has ended
    stays as it is.

    :raises NotFound: the machine has no such command, or it ended long ago
    """

    positional: ClassVar[tuple[str, ...]] = ("signal",)

    signal: Annotated[int | None, Meta(description="Number of a signal. Default: end the command.")] = None

    def check(self) -> None:
        """Also check the signal."""
        super().check()
        if self.signal is not None:
            check_signal(self.signal)


class CommandWaitRequest(OneCommandRequest[Exit], frozen=True, kw_only=True):
    """Wait for the end of a command, and return how it ended.

    :raises NotFound: the machine has no such command, or it ended long ago
    :raises GuestTimeout: it still runs at the deadline
    """

    positional: ClassVar[tuple[str, ...]] = ("deadline_s",)

    deadline_s: Annotated[float | None, Meta(description="How many seconds to wait at most.")] = None

    def check(self) -> None:
        """Also check the deadline."""
        super().check()
        check_timeout(self.deadline_s)


class CommandForgetRequest(OneCommandRequest[None], frozen=True, kw_only=True):
    """Forget a command that has ended, with its output.

    :raises NotFound: the machine has no such command
    :raises InUse: it runs, or a client is attached to it
    """
