"""What every command has at hand: the global options, the host, and the choice between people and programs as readers."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import typer

from coppice.cli import output, progress
from coppice.errors import CoppiceError, HostCannot, NoSpace

if TYPE_CHECKING:
    from coppice.host import AsyncHost
    from coppice.model import ProgressSink

T = TypeVar("T")
HostFactory = Callable[["Cli"], "AsyncHost"]


def open_host(cli: Cli) -> AsyncHost:
    """The real host over the data directory that the user chose."""
    from coppice.host import AsyncHost

    # No spares: a command forks once.
    return AsyncHost(cli.home, accel=cli.accel, owner=cli.owner, background=cli.background, spares=0)


@dataclass(frozen=True)
class Cli:
    """The global options. `home` is None for the default data directory, `owner` for the operator."""

    home: Path | None = None
    accel: str = "auto"
    owner: str | None = None
    json: bool = False
    debug: bool = False
    background: Literal["detached", "off"] = "detached"  # a command does not wait for what it has started
    host_factory: HostFactory = open_host

    @staticmethod
    def of(context: typer.Context) -> Cli:
        """Those of the command that runs."""
        found = context.find_object(Cli)
        if found is None:
            raise RuntimeError("the command was invoked without the program around it")
        return found

    def call(self, work: Callable[[AsyncHost], Awaitable[T]], *, opened: bool = True) -> T:
        """Run `work` with the host, opened unless said otherwise. Signals cancel it and wait for its cleanup.

        :raises CoppiceError: what the work raised; an OSError becomes one
        :raises Interrupted: a signal ended it
        """

        from coppice.cli.interrupt import run_to_end

        async def whole() -> T:
            host = self.host_factory(self)
            async with host if opened else contextlib.nullcontext():
                return await work(host)

        try:
            return run_to_end(whole())
        except OSError as error:
            raise _of_the_host(error) from error

    def progress(self) -> AbstractContextManager[ProgressSink]:
        """A progress bar for the length of a block; none for programs."""
        return progress.shown(wanted=not self.json)

    def show(self, value: object, human: Callable[[], None]) -> None:
        """Print a result: as one JSON document, or by `human` for people."""
        if self.json:
            output.document(value)
        else:
            human()


def _of_the_host(error: OSError) -> CoppiceError:
    """An error of the operating system that no room gave a meaning to."""
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"there is no space left{where}", hint="free some, or set COPPICE_HOME to a larger file system")
    return HostCannot(
        f"{error.strerror or error}{where}", hint="`coppice doctor` checks this host; --debug shows where it happened"
    )
