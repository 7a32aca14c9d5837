"""A command in a guest, for blocking code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from coppice.guest.process import ExecSession as AsyncExecSession
from coppice.guest.process import Exit, Stream
from coppice.model import MIB, ExecResult
from coppice.portal import Portal


class ExecSession:
    """A running command. Iterate over it for its output; then `wait` says how it ended.

    Any thread may call it: one can send input while another takes the output. Output that nobody takes stops the command, as a pipe would.
    """

    def __init__(self, portal: Portal, session: AsyncExecSession) -> None:
        self._portal = portal
        self._session = session

    @property
    def pid(self) -> int:
        """Process id in the guest."""
        return self._session.pid

    def __iter__(self) -> Iterator[tuple[Stream, bytes]]:
        return self._portal.iterate(aiter(self._session))

    def send_stdin(self, data: bytes) -> None:
        """Give the command something to read; waits while it does not read. What is sent after its end is dropped."""
        self._portal.call(self._session.send_stdin(data))

    def eof(self) -> None:
        """Close the command's standard input."""
        self._portal.call(self._session.eof())

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        self._portal.call(self._session.signal(number))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its new size."""
        self._portal.call(self._session.resize(rows, columns))

    def collect(
        self,
        stdin: bytes | None = None,
        *,
        on_stdout: Callable[[bytes], None] | None = None,
        on_stderr: Callable[[bytes], None] | None = None,
        max_output_bytes: int = 64 * MIB,
    ) -> ExecResult:
        """Send all of `stdin`, take all output, and wait for the end. What has a sink goes there, in the host's thread.

        :raises GuestTimeout: it ran longer than its timeout, and was ended
        :raises GuestError: it wrote more than `max_output_bytes`
        """
        return self._portal.call(
            self._session.collect(stdin, on_stdout=on_stdout, on_stderr=on_stderr, max_output_bytes=max_output_bytes)
        )

    def wait(self) -> Exit:
        """Wait for the end. Output that was not taken is thrown away."""
        return self._portal.call(self._session.wait())
