"""Commands that move templates between hosts: export, import."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import click

from coppice.cli import complete, format, output
from coppice.cli.context import Cli
from coppice.cli.declare import Argument, Option
from coppice.errors import UsageError

if TYPE_CHECKING:
    from coppice.client.backend import Backend

_STDIN, _STDOUT = "/dev/stdin", 1
_STREAM = "-"


def export(
    ctx: click.Context,
    name: Annotated[str, Argument(metavar="NAME", help="Name or id of a template.", autocompletion=complete.templates)],
    out: Annotated[
        str | None,
        Option("--output", "-o", metavar="FILE", help="The archive. `-`: standard output. Default: NAME.coppice."),
    ] = None,
    bare: Annotated[
        bool, Option("--bare", help="Leave out the image and the kernel, for a host that has both.")
    ] = False,
) -> None:
    """Write a template to an archive: memory, device state, disk, image and kernel.

    An instance in standby can be exported too. `coppice import` makes a template of the archive, on
    a host with the same VMM and, under KVM, the same CPU. The archive contains everything in the
    guest's memory, secrets too.
    """
    from coppice.requests import ExportRequest

    cli = Cli.of(ctx)
    if out == _STREAM:
        _to_output(cli, name, bare=bare)
        return
    path = out or f"{name}.coppice"
    size = cli.request(ExportRequest(instance=name, path=path, bare=bare))
    cli.show({"path": path, "bytes": size}, lambda: output.line(f"{path} has {format.size(size)}"))


def _to_output(cli: Cli, name: str, *, bare: bool) -> None:
    from coppice.cli import terminal
    from coppice.requests import OpenExportRequest

    if cli.json or sys.stdout.isatty():
        where = "JSON" if cli.json else "a terminal"
        raise UsageError(f"an archive cannot be written to {where}", hint="use `-o FILE`, or a pipe")

    async def send(host: Backend) -> None:
        async with host.stream(OpenExportRequest(instance=name, bare=bare)) as archive:
            async for piece in archive:
                output.write(piece)

    cli.call(lambda host: terminal.while_read(_STDOUT, send(host)))


def import_(
    ctx: click.Context,
    file: Annotated[
        str | None, Argument(metavar="FILE", help="An archive. `-`, and the default: standard input.")
    ] = None,
    name: Annotated[
        str | None, Option("--name", metavar="NAME", help="Name of the template. Default: its name in the archive.")
    ] = None,
) -> None:
    """Make a template of an archive that `coppice export` wrote.

    Every file is compared with its digest first. The image and the kernel are kept too, unless they
    are here already. Import only archives that you trust: the VMM loads their device state.
    """
    from coppice.requests import ImportTemplateRequest

    cli = Cli.of(ctx)
    if file in (None, _STREAM) and sys.stdin.isatty():
        raise UsageError("an archive cannot be read from a terminal", hint="give FILE, or use a pipe")
    path = _STDIN if file is None or file == _STREAM else file
    made = cli.request(ImportTemplateRequest(path=path, name=name))
    cli.show(made, lambda: output.line(f"{made.name} is {made.state}"))
