"""Commands on names in a running guest: files ls, stat, mkdir, mv, rm, watch."""

from __future__ import annotations

import stat as modes
from typing import TYPE_CHECKING, Annotated

import click

from coppice.cli import complete, format, output, several
from coppice.cli.context import Cli
from coppice.cli.declare import Argument, Commands, Option
from coppice.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coppice.client.backend import Backend
    from coppice.model import FileEvent, FileStat

files_app = Commands("files", help="List, make, move, remove and watch files in a Running guest.")
Place = Annotated[
    str, Argument(metavar="NAME:PATH", help="A machine, and a path in its guest.", autocompletion=complete.paths)
]
Places = Annotated[
    list[str],
    Argument(metavar="NAME:PATH", help="A machine, and a path in its guest.", autocompletion=complete.paths),
]
_TYPES = {"f": "-"}


def _place(text: str) -> tuple[str, str]:
    """Return the machine and the path of `NAME:PATH`."""
    name, colon, path = text.partition(":")
    if not name or not colon or not path:
        raise UsageError(f"{text!r} is not in an instance", hint="write NAME:PATH")
    return name, path


@files_app.declare("ls")
def ls(
    ctx: click.Context,
    places: Places,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print only the names.")] = False,
) -> None:
    """List directories by name, with kind, mode, owner, size and time. Links are not followed."""
    from coppice.requests import FileLsRequest

    named = {place: _place(place) for place in places}

    async def read(host: Backend, place: str) -> list[FileStat]:
        name, path = named[place]
        async with host.stream(FileLsRequest(instance=name, path=path)) as entries:
            return sorted([_shown(each) async for each in entries], key=lambda each: each.path)

    def document(place: str, found: list[FileStat]) -> object:
        return found if len(places) == 1 else {"name": place, "entries": found}

    def human(found: Mapping[str, list[FileStat]]) -> None:
        for number, (place, entries) in enumerate(found.items()):
            if number:
                output.line("")
            if len(places) > 1:
                output.line(f"{output.printable(place)}:")
            _list(entries, quiet=quiet)

    several.show(Cli.of(ctx), places, read, human, title="found", document=document)


def _list(found: list[FileStat], *, quiet: bool) -> None:
    if quiet:
        for each in found:
            output.line(output.printable(each.path.rpartition("/")[2]))
    else:
        output.table(
            [("MODE", "left"), ("OWNER", "left"), ("SIZE", "right"), ("MODIFIED", "left"), ("NAME", "left")],
            [
                [_mode(each), f"{each.uid}:{each.gid}", format.size(each.size_bytes), format.moment(each.mtime), _name(each)]
                for each in found
            ],
        )  # fmt: skip


def _shown(found: FileStat) -> FileStat:
    import msgspec

    from coppice.model import as_utf8

    link = found.link_target
    return msgspec.structs.replace(found, path=as_utf8(found.path), link_target=None if link is None else as_utf8(link))


def _mode(found: FileStat) -> str:
    return _TYPES.get(found.kind, found.kind) + modes.filemode(found.mode)[1:]


def _name(found: FileStat) -> str:
    name = output.printable(found.path.rpartition("/")[2] or found.path)
    return name if found.link_target is None else f"{name} -> {output.printable(found.link_target)}"


@files_app.declare("stat")
def stat(
    ctx: click.Context,
    places: Places,
    follow: Annotated[bool, Option("--dereference", "-L", help="Describe the target of a link.")] = False,
) -> None:
    """Print kind, mode, owner, size and time of paths."""
    from coppice.requests import StatRequest

    named = {place: _place(place) for place in places}

    def request(place: str) -> StatRequest:
        name, path = named[place]
        return StatRequest(instance=name, path=path, follow_links=follow)

    def line(answer: FileStat) -> str:
        found = _shown(answer)
        words = (
            _mode(found),
            f"{found.uid}:{found.gid}",
            format.size(found.size_bytes),
            format.moment(found.mtime),
            _name(found),
        )
        return "  ".join(words)

    def document(place: str, answer: FileStat) -> object:
        import msgspec

        found = _shown(answer)
        return found if len(places) == 1 else {"name": place, **msgspec.structs.asdict(found)}

    several.change(Cli.of(ctx), places, request, line, title="found", document=document)


@files_app.declare("mkdir")
def mkdir(
    ctx: click.Context,
    places: Places,
    parents: Annotated[
        bool, Option("--parents", "-p", help="Make missing parents too, and accept a directory that exists.")
    ] = False,
    mode: Annotated[str, Option("--mode", "-m", metavar="MODE", help="Permission bits, in octal.")] = "755",
) -> None:
    """Make directories, which belong to root."""
    from coppice.requests import FileMkdirRequest

    named = {place: _place(place) for place in places}
    try:
        bits = int(mode, 8)
    except ValueError:
        raise UsageError(f"{mode!r} is not a mode", hint="write it in octal, such as 750") from None

    async def make(host: Backend, place: str) -> None:
        name, path = named[place]
        await host.call(FileMkdirRequest(instance=name, path=path, parents=parents, mode=bits))

    def document(place: str, _: None) -> dict[str, str]:
        return {"name": place} if len(places) > 1 else {"path": named[place][1]}

    several.show(Cli.of(ctx), places, make, lambda _: None, document=document, in_order=True)  # one may be in another


@files_app.declare("mv")
def mv(
    ctx: click.Context,
    place: Place,
    destination: Annotated[
        str, Argument(metavar="PATH", help="The new path in the same guest, or a directory for it.")
    ],
    no_clobber: Annotated[bool, Option("--no-clobber", "-n", help="Fail if the new path exists.")] = False,
) -> None:
    """Move or rename a file or directory within a file system of the guest, atomically."""
    from coppice.requests import FileMvRequest

    cli = Cli.of(ctx)
    name, path = _place(place)
    destination = destination.removeprefix(f"{name}:")
    cli.request(FileMvRequest(instance=name, path=path, destination=destination, keep_existing=no_clobber))
    cli.show({"path": path, "destination": destination}, lambda: None)


@files_app.declare("rm")
def rm(
    ctx: click.Context,
    places: Places,
    recursive: Annotated[
        bool, Option("--recursive", "-r", "-R", help="Remove the content of directories too.")
    ] = False,
    force: Annotated[bool, Option("--force", "-f", help="Succeed if a path does not exist.")] = False,
) -> None:
    """Remove files, links and directories. Links are not followed."""
    from coppice.requests import FileRmRequest

    named = {place: _place(place) for place in places}

    def request(place: str) -> FileRmRequest:
        name, path = named[place]
        return FileRmRequest(instance=name, path=path, recursive=recursive, missing_ok=force)

    several.remove(Cli.of(ctx), places, request)


@files_app.declare("watch")
def watch(
    ctx: click.Context,
    place: Place,
    recursive: Annotated[bool, Option("--recursive", "-r", help="Watch all directories below too.")] = False,
) -> None:
    """Print the changes of a file or directory as they happen, until a signal, or until it is gone.

    The line `watching` comes first: later changes are printed. `overflow` means that the guest's kernel
    has dropped some. With --json: one JSON document per line.
    """
    from coppice.cli import terminal
    from coppice.requests import FileWatchRequest

    cli = Cli.of(ctx)
    name, path = _place(place)

    async def read(host: Backend) -> None:
        async with host.stream(FileWatchRequest(instance=name, path=path, recursive=recursive)) as events:
            async for event in events:
                output.write(_line(event, as_json=cli.json))

    cli.call(lambda host: terminal.while_read(1, read(host)))


def _line(event: FileEvent, *, as_json: bool) -> bytes:
    import msgspec

    from coppice.model import as_utf8, to_json

    path = as_utf8(event.path)
    if as_json:
        return to_json(msgspec.structs.replace(event, path=path)) + b"\n"
    slash = "/" if event.is_directory else ""
    return f"{event.kind}  {output.printable(path)}{slash}\n".encode()
