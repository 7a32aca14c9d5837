"""`coppice storage`: a file system with reflinks for the data directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from coppice.cli import format, output
from coppice.cli.context import Cli
from coppice.cli.declare import Commands, Option
from coppice.errors import UsageError

if TYPE_CHECKING:
    from coppice.storage import Storage

storage_app = Commands("storage", help="Give the data directory a file system with reflinks. Needs root.")
Size = Annotated[str, Option("--size", metavar="SIZE", help="Size of the file system, such as 100G.")]


@storage_app.declare("init")
def init(ctx: click.Context, size: Size) -> None:
    """Make an XFS in a sparse file next to the data directory, and mount it there.

    Forks then share the blocks of their source's disk. The file takes the space that is used in it,
    and gives it back. A mount unit of systemd mounts it again after a reboot.
    """
    from coppice import storage
    from coppice.names import parse_size

    cli, home = _home(ctx)
    _show(cli, storage.init(home, parse_size(size)))


@storage_app.declare("grow")
def grow(ctx: click.Context, size: Size) -> None:
    """Enlarge the file system. Machines go on."""
    from coppice import storage
    from coppice.names import parse_size

    cli, home = _home(ctx)
    _show(cli, storage.grow(home, parse_size(size)))


@storage_app.declare("remove")
def remove(ctx: click.Context) -> None:
    """Unmount the file system and remove its file. Refused while it has machines or images."""
    from coppice import storage

    _, home = _home(ctx)
    storage.remove(home)


def _home(ctx: click.Context) -> tuple[Cli, Path]:
    from coppice.state.layout import data_directory

    cli = Cli.of(ctx)
    if cli.server is not None:
        raise UsageError("storage is made on the server's machine", hint="run the command there, without --host")
    return cli, data_directory(cli.home)


def _show(cli: Cli, made: Storage) -> None:
    def human() -> None:
        output.line(f"{made.home} is on {made.file}, {format.size(made.size_bytes)}")

    cli.show(made, human)
