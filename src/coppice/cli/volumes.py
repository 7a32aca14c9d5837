"""Commands of volumes: create, ls, inspect, rm. `run --volume` attaches one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coppice.cli import complete, format, options, output, parse, several
from coppice.cli.context import Cli

if TYPE_CHECKING:
    from coppice.host import AsyncHost, VolumeInspection
    from coppice.model import Attachment, Volume

volume_app = typer.Typer(rich_markup_mode=None)
VolumeNames = Annotated[
    list[str], typer.Argument(metavar="VOLUME", help="Names or ids of volumes.", autocompletion=complete.volumes)
]


@volume_app.command("create")
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the volume.")],
    size: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="How much it can hold, such as 512M or 20G.")
    ] = "1G",
    archive: Annotated[
        Path | None,
        typer.Option("--from", metavar="TAR", help="What it starts with: a tar archive, compressed or not."),
    ] = None,
    tag: options.Tags = None,
) -> None:
    """Make a volume, empty or with the contents of an archive; print its name.

    It is a disk with an ext4 file system that takes room as it is filled. `coppice run IMAGE --volume NAME:PATH` attaches it.
    """
    from coppice.names import parse_size

    cli = Cli.of(ctx)
    size_bytes, tags = parse_size(size), parse.pairs(tag or (), "tag")

    async def work(host: AsyncHost) -> Volume:
        with cli.progress() as progress:
            return await host.volume_create(name, size_bytes=size_bytes, archive=archive, tags=tags, progress=progress)

    made = cli.call(work)
    cli.show(made, lambda: output.line(made.name))


@volume_app.command("ls")
def ls(ctx: typer.Context, tag: options.TagFilter = None, quiet: options.Quiet = False) -> None:
    """List volumes, the oldest first, with who has them."""
    cli = Cli.of(ctx)
    tags = parse.pairs(tag or (), "tag")
    found = cli.call(lambda host: host.volume_ls(tags=tags))

    def human() -> None:
        if quiet:
            for volume in found:
                output.line(volume.name)
            return
        output.table(
            [
                ("NAME", "left"), ("SIZE", "right"), ("ATTACHED TO", "left"), ("AGE", "right"), ("OWNER", "left"), ("TAGS", "left"),
            ],
            [
                [
                    volume.name,
                    format.size(volume.size_bytes),
                    _holders(volume.attachments),
                    format.age(volume.created_at),
                    volume.owner or "-",
                    format.tags(volume.tags),
                ]
                for volume in found
            ],
            optional=("OWNER", "TAGS"),
        )  # fmt: skip

    cli.show(found, human)


def _holders(attachments: tuple[Attachment, ...]) -> str:
    if len(attachments) > 3:
        return f"{len(attachments)}, read-only"
    return ", ".join(f"{each.name}{' (ro)' if each.readonly else ''}" for each in attachments) or "-"


@volume_app.command("inspect")
def inspect(ctx: typer.Context, names: VolumeNames) -> None:
    """Show all that is known of volumes. With --json: always a list."""
    several.inspect(Cli.of(ctx), names, lambda host, name: host.volume_inspect(name), _details)


def _details(found: VolumeInspection) -> list[output.Field]:
    volume = found.volume
    return [
        ("Name", volume.name),
        ("Id", volume.id),
        ("Created", f"{format.moment(volume.created_at)} ({format.age(volume.created_at)} ago)"),
        ("Owner", volume.owner),
        ("Tags", format.tags(volume.tags) if volume.tags else None),
        ("Disk", f"{format.size(found.disk_bytes)} of {format.size(volume.size_bytes)} allocated"),
        *(("Attached to", _attachment(each)) for each in volume.attachments),
        ("File", f"{found.disk}, {format.count(found.link_count, 'link')}"),
    ]


def _attachment(attachment: Attachment) -> str:
    holder = "the snapshot " if attachment.holder == "snapshot" else ""
    how = "read-only" if attachment.readonly else "for writing"
    return f"{holder}{attachment.name}, at {output.printable(attachment.mount_path)}, {how}"


@volume_app.command("rm")
def rm(ctx: typer.Context, names: VolumeNames) -> None:
    """Remove volumes and all that is on them. Refused for one that an instance or a snapshot has.

    If one cannot be removed, the others still are; the exit status is then the first failure's.
    """
    several.remove(Cli.of(ctx), names, lambda host, name: host.volume_rm(name))
