"""Commands of volumes: create, ls, inspect, rm. `run --volume` attaches one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from coppice.cli import complete, format, options, output, parse, several
from coppice.cli.context import Cli
from coppice.cli.declare import Argument, Commands, Option

if TYPE_CHECKING:
    from coppice.model import Attachment
    from coppice.model.inspection import VolumeInspection

volume_app = Commands("volume", help="Make, list and remove disks that outlive instances.")
VolumeNames = Annotated[
    list[str], Argument(metavar="VOLUME", help="Names or ids of volumes.", autocompletion=complete.volumes)
]


@volume_app.declare("create")
def create(
    ctx: click.Context,
    names: Annotated[list[str], Argument(metavar="NAME", help="Names of volumes.")],
    size: Annotated[str, Option("--size", metavar="SIZE", help="Size of the disk, such as 512M or 20G.")] = "1G",
    archive: Annotated[
        Path | None,
        Option("--from", metavar="TAR", help="The first content: a tar archive, compressed or not."),
    ] = None,
    tag: options.Tags = None,
) -> None:
    """Make volumes, empty or with the content of an archive; print their names.

    A volume is a disk with an ext4 file system, allocated as it is filled. `coppice run IMAGE --volume
    NAME:PATH` attaches it.
    """
    from coppice.names import parse_size
    from coppice.requests import VolumeCreateRequest

    size_bytes, tags = parse_size(size), parse.pairs(tag or (), "tag")
    content = str(archive) if archive else None
    several.change(
        Cli.of(ctx),
        names,
        lambda name: VolumeCreateRequest(name=name, size_bytes=size_bytes, archive=content, tags=tags),
        lambda made: made.name,
    )


@volume_app.declare("ls")
def ls(ctx: click.Context, tag: options.TagFilter = None, quiet: options.Quiet = False) -> None:
    """List volumes, oldest first, with the instances and snapshots that hold them."""
    from coppice.requests import VolumeLsRequest

    cli = Cli.of(ctx)
    tags = parse.pairs(tag or (), "tag")
    found = cli.request(VolumeLsRequest(tags=tags))

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


@volume_app.declare("inspect")
def inspect(ctx: click.Context, names: VolumeNames) -> None:
    """Show all fields of volumes. With --json: always a list."""
    from coppice.requests import VolumeInspectRequest

    several.inspect(Cli.of(ctx), names, lambda name: VolumeInspectRequest(volume=name), _details)


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


@volume_app.declare("rm")
def rm(ctx: click.Context, names: VolumeNames, force: options.Force = False) -> None:
    """Remove volumes and their content. Refused for a volume that an instance or a snapshot holds.

    If one cannot be removed, the others still are. The exit status is then that of the first
    failure.
    """
    from coppice.requests import VolumeRmRequest

    several.remove(Cli.of(ctx), names, lambda name: VolumeRmRequest(volume=name), force=force)
