"""A running command in a guest, for blocking code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from coppice.client.portal import Portal
from coppice.model import MIB, ExecResult
from coppice.model.guest import ExecSession as AsyncExecSession
from coppice.model.guest import Exit, Stream


class ExecSession:
    """A running command. Iterate over it to read its output; then `wait` returns how it ended.

    The methods are thread-safe: one thread can send input while another reads the output. If
    nothing reads the output, the command blocks, as with a pipe.
    """

    def __init__(self, portal: Portal, session: AsyncExecSession) -> None:
        self._portal = portal
        self._session = session

    @property
    def id(self) -> str:
        """The command's id, to attach to it again."""
        return self._session.id

    @property
    def offset(self) -> int:
        """Offset of the next byte of output, counted over both streams. Another client can attach there."""
        return self._session.offset

    @property
    def dropped_bytes(self) -> int:
        """How much output this session has missed, because it was no longer kept. Known with the
        next output.
        """
        return self._session.dropped_bytes

    @property
    def pid(self) -> int:
        """The command's process id in the guest."""
        return self._session.pid

    def __iter__(self) -> Iterator[tuple[Stream, bytes]]:
        return self._portal.iterate(aiter(self._session))

    def send_stdin(self, data: bytes) -> None:
        """Send input to the command. Waits until the command reads it; drops it if the command has
        ended.
        """
        self._portal.call(self._session.send_stdin(data))

    def eof(self) -> None:
        """Close the command's standard input."""
        self._portal.call(self._session.eof())

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        self._portal.call(self._session.signal(number))

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal."""
        self._portal.call(self._session.resize(rows, columns))

    def leave(self) -> None:
        """Let the command run on when the session is closed."""
        self._portal.call(self._session.leave())

    def collect(
        self,
        stdin: bytes | None = None,
        *,
        on_stdout: Callable[[bytes], None] | None = None,
        on_stderr: Callable[[bytes], None] | None = None,
        max_output_bytes: int = 64 * MIB,
    ) -> ExecResult:
        """Send all of `stdin`, read all output, and wait for the end.

        `on_stdout` and `on_stderr` receive their stream's output instead, in the host's thread.

        :raises GuestTimeout: the command exceeded its timeout and was killed
        :raises GuestError: the command wrote more than `max_output_bytes`
        """
        return self._portal.call(
            self._session.collect(stdin, on_stdout=on_stdout, on_stderr=on_stderr, max_output_bytes=max_output_bytes)
        )

    def wait(self) -> Exit:
        """Wait until the command has ended. Unread output is discarded."""
        return self._portal.call(self._session.wait())
