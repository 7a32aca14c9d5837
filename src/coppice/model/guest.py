"""A guest's report on itself, and the interface of a command that runs in it."""

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Literal, Protocol

from coppice.model.instance import ProcessEnd
from coppice.model.record import MIB, Record
from coppice.model.reports import ExecResult, FileStat

Stream = Literal["stdout", "stderr"]
TerminalSize = tuple[int, int]  # rows, columns
Source = bytes | AsyncIterable[bytes]
OutputSink = Callable[[bytes], Awaitable[None] | None]

MAX_COLLECTED = 64 * MIB
KEPT_BYTES = MIB // 4
"""Of the output of a command, for clients that attach later, unless the client chooses."""
MAX_KEPT = 64 * MIB
FLUSH_S = 5.0  # for which the end of a connection waits until the guest has its data


class Health(Record, frozen=True, kw_only=True):
    """The report of a guest's PID 1, which is the agent."""

    uptime_ms: int
    identity_serial: int  # 0: it has received no identity yet
    agent_version: str
    process_pid: int | None  # of the image's process; None if it was not started
    process_end: ProcessEnd | None  # None until it has ended
    load: float  # average of one minute


class Exit(Record, frozen=True, kw_only=True):
    """How a command ended. `exit_code` is 128+n if signal n ended it."""

    exit_code: int
    timed_out: bool
    out_of_memory: bool = False  # its memory limit ended it
    signal: int | None = None  # the one that ended it; None: it exited


class StartedCommand(Record, frozen=True, kw_only=True):
    """A command that has been started in a guest."""

    id: str
    pid: int


class GuestCommand(Record, frozen=True, kw_only=True):
    """A command that runs in a guest, or that has ended there and is remembered."""

    id: str
    argv: tuple[str, ...]  # the beginning of it, if it is long
    pid: int
    user: str | None  # None: the image's
    tty: bool
    stdin: bool  # a client can send input
    started_at: float  # the guest's clock, in seconds since the epoch
    attached: bool  # a client is attached
    output_bytes: int  # of both streams together, since its beginning
    dropped_bytes: int  # of these, at their beginning: no longer kept
    exit_code: int | None  # None: it runs
    timed_out: bool
    out_of_memory: bool
    ended_at: float | None


class Unpacked(Record, frozen=True, kw_only=True):
    """How much a guest has unpacked."""

    members: int
    content_bytes: int


class CopySession(Protocol):
    """The part of a session with a guest that copies files and trees. Calls must not overlap."""

    async def stat(self, path: str, *, follow: bool = False) -> FileStat:
        """Return the status of a path; of a link itself unless `follow`.

        :raises GuestRefused: the path does not exist (`errno` ENOENT)
        """

    async def tree_in(self, directory: str, records: Source) -> Unpacked:
        """Make a tree below a directory. No entry can leave the directory.

        :raises GuestRefused: an entry cannot be made; the entries before it remain
        """

    def tree_out(self, path: str, *, contents: bool = False) -> AsyncIterator[bytes]:
        """Yield the records of a file or tree. The guest packs it, so it is not trustworthy.

        :param contents: pack the entries of the directory instead of the directory itself
        :raises GuestRefused: the path cannot be read
        """


class Connection(Protocol):
    """A stream of bytes to a server in a guest. Its two directions end separately."""

    async def receive(self) -> bytes:
        """Return the next bytes from the server; nothing after their end.

        :raises GuestRefused: the server broke the connection (`errno` ECONNRESET)
        :raises VmmDied: the machine ended
        """

    async def send(self, data: bytes) -> None:
        """Send bytes to the server. Waits while the server does not read.

        :raises GuestRefused: the server has closed the connection (`errno` EPIPE)
        """

    async def eof(self) -> None:
        """End the direction to the server. Idempotent."""


class ExecSession(Protocol):
    """A running command. Iterate over it for its output; then `wait` returns how it ended.

    A command whose output is not read blocks when the buffers are full, as with a pipe.
    """

    @property
    def id(self) -> str:
        """Id of the command, to attach to it again."""

    @property
    def pid(self) -> int:
        """Process id in the guest."""

    @property
    def offset(self) -> int:
        """Offset of the next byte of output, counted over both streams. Another client can attach there."""

    @property
    def dropped_bytes(self) -> int:
        """How much output this session has missed, because it was no longer kept. Known with the
        next output.
        """

    def __aiter__(self) -> AsyncIterator[tuple[Stream, bytes]]:
        """Yield the command's output as it arrives, until the command has ended."""

    async def send_stdin(self, data: bytes) -> None:
        """Send data to the command's standard input.

        Waits while the command does not read. Data sent after its end is dropped.
        """

    async def eof(self) -> None:
        """Close the command's standard input."""

    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal."""

    async def leave(self) -> None:
        """Let the command run on when the session is closed."""

    async def collect(
        self,
        stdin: Source | None = None,
        *,
        on_stdout: OutputSink | None = None,
        on_stderr: OutputSink | None = None,
        max_output_bytes: int = MAX_COLLECTED,
    ) -> ExecResult:
        """Send all of `stdin`, take all output, and wait for the end. A stream with a sink is not
        collected.

        :raises GuestTimeout: the command ran longer than its timeout, and was ended
        :raises GuestError: the command wrote more than `max_output_bytes`
        """

    async def wait(self) -> Exit:
        """Wait for the end and return it. Unread output is discarded."""
