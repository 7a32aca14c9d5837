"""The context of every command: the global options, the host, and the choice of text or JSON
output.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import click

from coppice.cli import output, progress, start
from coppice.cli.declare import Values
from coppice.errors import CoppiceError, HostCannot, NoSpace

if TYPE_CHECKING:
    from coppice.client.backend import Backend
    from coppice.model import ProgressSink
    from coppice.requests import Request

T = TypeVar("T")
HostFactory = Callable[["Cli"], "Backend"]


def open_host(cli: Cli) -> Backend:
    """Return the real host over the chosen data directory, or that of the chosen server."""
    if cli.server is not None:
        from coppice.client.connecting import remote_backend

        return remote_backend(cli.server)
    from coppice.host import LocalBackend

    # No spares: a command forks only once.
    return LocalBackend(cli.home, vmm=cli.vmm, accel=cli.accel, owner=cli.owner, background=cli.background, spares=0)


@contextlib.asynccontextmanager
async def opened(host: Backend) -> AsyncIterator[Backend]:
    """Open a host for a block."""
    await host.open()
    try:
        yield host
    finally:
        await host.close()


class Cli(Values):
    """The global options. `home` None: the default data directory. `owner` None: the operator.

    `server` is the address of a server that carries out the requests. None: this machine.
    """

    home: Path | None = None
    vmm: str | None = None
    accel: str = "auto"
    owner: str | None = None
    server: str | None = None
    json: bool = False
    debug: bool = False
    background: Literal["detached", "off"] = "detached"  # a command does not wait for the hashing of its captures
    host_factory: HostFactory

    @staticmethod
    def of(context: click.Context) -> Cli:
        """Return the options of the running command."""
        found = context.find_object(Cli)
        if found is None:
            raise RuntimeError("the command was invoked without the program around it")
        return found

    def call(self, work: Callable[[Backend], Awaitable[T]], *, needs_data: bool = True) -> T:
        """Run `work` with the host, and open its data directory first if the work needs it.

        A signal cancels the work and waits for its cleanup.

        :raises CoppiceError: the error of the work; an OSError becomes a CoppiceError
        :raises Interrupted: a signal ended the work
        """
        from coppice.cli.interrupt import run_to_end

        async def whole() -> T:
            host = self.host_factory(self)
            start.collect_again()
            if not needs_data:
                return await work(host)
            async with opened(host):
                return await work(host)

        try:
            return run_to_end(whole())
        except OSError as error:
            raise of_the_host(error) from error

    def request(self, request: Request[T], *, needs_data: bool = True) -> T:
        """Carry out one operation, with a progress bar if it reports progress. Parameters are as in
        `call`.
        """
        return self.call(lambda host: self.carry_out(host, request), needs_data=needs_data)

    async def carry_out(self, host: Backend, request: Request[T]) -> T:
        """Carry out one operation with an open host, with a progress bar if it reports progress."""
        if not request.reports_progress:
            return await host.call(request)
        with self.progress() as progress:
            return await host.call(request, progress)

    def progress(self) -> AbstractContextManager[ProgressSink]:
        """Show a progress bar during a block, unless the output is JSON."""
        return progress.shown(wanted=not self.json)

    def show(self, value: object, human: Callable[[], None]) -> None:
        """Print a result: as one JSON document with --json, else by calling `human`."""
        if self.json:
            output.document(value)
        else:
            human()


def of_the_host(error: OSError) -> CoppiceError:
    """Return the error to show for an OSError that no lower layer translated."""
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"no disk space is left{where}", hint="free disk space, or set COPPICE_HOME to a larger file system"
        )
    return HostCannot(
        f"{error.strerror or error}{where}", hint="check this host with `coppice doctor`; --debug shows a traceback"
    )
