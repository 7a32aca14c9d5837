"""Commands of snapshots, and verify, which checks all captures and disks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import click

from coppice.cli import complete, format, lineage, loadable, options, output, parse, several, table
from coppice.cli.context import Cli
from coppice.cli.declare import Argument, Commands, Option, ProgramExit

if TYPE_CHECKING:
    from coppice.client.backend import Backend
    from coppice.model import Snapshot
    from coppice.model.inspection import SnapshotInspection

snapshot_app = Commands(
    "snapshot",
    {"schedule": "coppice.cli.automation:schedule_app"},
    help="Save states of instances, and go back to them.",
)
SnapshotName = Annotated[
    str, Argument(metavar="SNAPSHOT", help="Name or id of a snapshot.", autocompletion=complete.snapshots)
]
SnapshotNames = Annotated[
    list[str], Argument(metavar="SNAPSHOT", help="Names or ids of snapshots.", autocompletion=complete.snapshots)
]


@snapshot_app.declare("create")
def create(
    ctx: click.Context,
    instances: options.Names,
    name: Annotated[
        str | None, Option("--name", help="Name of the snapshot, if it is one. Default: generated.")
    ] = None,
    kind: Annotated[
        Literal["standby", "stopped"] | None,
        Option("--kind", help="Save memory and disk, or only the disk. Default: standby, unless it is Stopped."),
    ] = None,
    tag: options.Tags = None,
) -> None:
    """Save the current states of instances; print the snapshots' names.

    A Running instance is paused, and then continues. A
    snapshot never changes, and outlives its instance.
    """
    from coppice.model import SnapshotKind
    from coppice.requests import SnapshotRequest

    options.refuse_one_name(name, instances)
    tags = parse.pairs(tag or (), "tag")
    wanted = SnapshotKind(kind.capitalize()) if kind is not None else None
    several.change(
        Cli.of(ctx),
        instances,
        lambda instance: SnapshotRequest(instance=instance, name=name, kind=wanted, tags=tags),
        lambda made: made.name,
    )


@snapshot_app.declare("ls")
def ls(
    ctx: click.Context,
    source: Annotated[
        str | None,
        Option(
            "--source", metavar="NAME", help="List only snapshots of this instance.", autocompletion=complete.instances
        ),
    ] = None,
    tag: options.TagFilter = None,
    quiet: options.Quiet = False,
) -> None:
    """List snapshots, oldest first."""
    from coppice.requests import SnapshotLsRequest, UnloadableRequest

    cli = Cli.of(ctx)
    tags = parse.pairs(tag or (), "tag")

    async def work(host: Backend) -> tuple[list[Snapshot], dict[str, str]]:
        found = await host.call(SnapshotLsRequest(source=source, tags=tags))
        if quiet and not cli.json:
            return found, {}
        return found, await host.call(UnloadableRequest(holders=[each.id for each in found]))

    found, reasons = cli.call(work)

    def human() -> None:
        if quiet:
            for snapshot in found:
                output.line(snapshot.name)
            return
        output.table(
            [
                ("NAME", "left"), ("KIND", "left"), ("SOURCE", "left"), ("IMAGE", "left"), ("MEMORY", "right"),
                ("SIZE", "right"), ("AGE", "right"), ("TAGS", "left"),
            ],
            [
                [
                    snapshot.name,
                    loadable.state(snapshot.kind, snapshot, reasons),
                    snapshot.source_name,
                    snapshot.image_name,
                    format.size(snapshot.machine.memory_bytes),
                    format.size(snapshot.size_bytes),
                    format.age(snapshot.created_at),
                    format.tags(snapshot.tags),
                ]
                for snapshot in found
            ],
        )  # fmt: skip
        loadable.explain({snapshot.id: snapshot.name for snapshot in found}, reasons)

    cli.show([loadable.marked(snapshot, reasons) for snapshot in found] if cli.json else None, human)


@snapshot_app.declare("inspect")
def inspect(ctx: click.Context, names: SnapshotNames) -> None:
    """Show all fields of snapshots. With --json: always a list."""
    from coppice.requests import SnapshotInspectRequest

    several.inspect(Cli.of(ctx), names, lambda name: SnapshotInspectRequest(snapshot=name), _details)


def _details(found: SnapshotInspection) -> list[output.Field]:
    snapshot = found.snapshot
    mem_file = snapshot.mem_file
    return [
        ("Name", snapshot.name),
        ("Id", snapshot.id),
        ("Kind", table.state(snapshot.kind)),
        ("Source", snapshot.source_name + ("" if found.source_lives else " (gone)")),
        ("Created", f"{format.moment(snapshot.created_at)} ({format.age(snapshot.created_at)} ago)"),
        ("Captured", format.moment(snapshot.capture.captured_at) if snapshot.capture else None),
        ("Image", f"{snapshot.image_name} ({snapshot.image})"),
        (
            "Machine",
            f"{format.count(snapshot.machine.cpus, 'CPU')}, {format.size(snapshot.machine.memory_bytes)} of RAM",
        ),
        ("Kernel", snapshot.machine.kernel),
        ("Tags", format.tags(snapshot.tags) if snapshot.tags else None),
        ("Forks", f"{len(found.forks)} ({', '.join(found.forks)})" if found.forks else None),
        (
            "Memory",
            f"{format.size(found.memory_bytes)} allocated, inode {mem_file.inode}, {format.count(found.link_count, 'link')}"
            if mem_file
            else None,
        ),
        ("SHA-256", format.digest(mem_file.sha256) if mem_file else None),
        ("Disk", f"{format.size(found.disk_bytes)} of {format.size(snapshot.machine.overlay_bytes)} allocated"),
        ("SHA-256", format.digest(snapshot.disk_sha256) + " (disk)"),
        ("Files", found.directory),
    ]


@snapshot_app.declare("restore")
def restore(
    ctx: click.Context,
    names: SnapshotNames,
    start: Annotated[bool, Option("--start", help="Start the instance afterwards.")] = False,
) -> None:
    """Reset instances to their snapshots. Their current memory and disks are lost.

    A Running instance is ended. Each is Standby afterwards, or Stopped if its snapshot has no
    memory.
    """
    from coppice.requests import SnapshotRestoreRequest

    several.change(Cli.of(ctx), names, lambda name: SnapshotRestoreRequest(snapshot=name, start=start), several.is_now)


@snapshot_app.declare("fork")
def fork(
    ctx: click.Context,
    snapshot: SnapshotName,
    forks: options.ForkOptions,
    quiet: options.Quiet = False,
) -> None:
    """Grow forks from a snapshot, as `coppice fork` does from an instance. Options are the same."""
    from coppice.requests import SnapshotForkRequest

    cli = Cli.of(ctx)
    report = cli.request(forks.request(SnapshotForkRequest, snapshot=snapshot))
    forks.warn_without_server(cli)
    lineage.show(cli, report, quiet=quiet)


@snapshot_app.declare("rm")
def rm(ctx: click.Context, names: SnapshotNames, force: options.Force = False) -> None:
    """Remove snapshots. Their instances and forks keep their memory and disks.

    If one cannot be removed, the others still are. The exit status is then that of the first
    failure.
    """
    from coppice.requests import SnapshotRmRequest

    several.remove(Cli.of(ctx), names, lambda name: SnapshotRmRequest(snapshot=name), force=force)


def verify(ctx: click.Context) -> None:
    """Check that captured mem-files and disks at rest, volumes included, are unchanged.

    Compare SHA-256, size, inode and mode of mem-files, and run e2fsck on disks. A SHA-256 that was
    not computed yet is recorded. No file is changed. Exit status 1 if a file differs, or if a disk
    could not be checked because the file system is full.
    """
    from coppice.requests import VerifyRequest

    cli = Cli.of(ctx)
    report = cli.request(VerifyRequest())

    def human() -> None:
        output.line(
            f"{format.count(report.mem_files, 'mem-file')} and {format.count(report.disks, 'disk')} checked, "
            f"{format.size(report.bytes_hashed)} hashed, {format.count(report.recorded, 'new SHA-256 sum')} recorded"
        )
        if report.skipped:
            output.line(f"not checked because they are in use: the disks of {', '.join(report.skipped)}")
        if report.no_space:
            output.complain(
                f"not checked because the disk is full: the disks of {', '.join(report.no_space)}; "
                "free disk space, and run `coppice verify` again"
            )
        for difference in report.differences:
            output.complain(f"{difference.file} of the {difference.holder} {difference.name}: {difference.detail}")

    cli.show(report, human)
    if report.differences or report.no_space:
        raise ProgramExit(1)
