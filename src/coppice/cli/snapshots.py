"""Commands of snapshots, and verify, which checks all that was captured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from coppice.cli import complete, format, lineage, options, output, parse, several
from coppice.cli.context import Cli

if TYPE_CHECKING:
    from coppice.host import AsyncHost, SnapshotInspection
    from coppice.model import ForkReport, Snapshot, VerifyReport

snapshot_app = typer.Typer(rich_markup_mode=None)
SnapshotName = Annotated[
    str, typer.Argument(metavar="SNAPSHOT", help="Name or id of a snapshot.", autocompletion=complete.snapshots)
]
SnapshotNames = Annotated[
    list[str], typer.Argument(metavar="SNAPSHOT", help="Names or ids of snapshots.", autocompletion=complete.snapshots)
]


@snapshot_app.command("create")
def create(
    ctx: typer.Context,
    instance: options.Name,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the snapshot; generated where it is not given.")
    ] = None,
    kind: Annotated[
        Literal["standby", "stopped"] | None,
        typer.Option("--kind", help="Memory and disk, or the disk alone. Default: standby, unless it is Stopped."),
    ] = None,
    tag: options.Tags = None,
) -> None:
    """Keep an instance as it is now; print the snapshot's name.

    One that runs is paused for some milliseconds, and runs on. A snapshot never changes, and outlives its instance.
    """
    cli = Cli.of(ctx)
    tags = parse.pairs(tag or (), "tag")

    async def work(host: AsyncHost) -> Snapshot:
        from coppice.model import SnapshotKind

        wanted = SnapshotKind(kind.capitalize()) if kind is not None else None
        return await host.snapshot_create(instance, name=name, kind=wanted, tags=tags)

    made = cli.call(work)
    cli.show(made, lambda: output.line(made.name))


@snapshot_app.command("ls")
def ls(
    ctx: typer.Context,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", metavar="NAME", help="Only those of this instance.", autocompletion=complete.instances
        ),
    ] = None,
    tag: options.TagFilter = None,
    quiet: options.Quiet = False,
) -> None:
    """List snapshots, the oldest first."""
    cli = Cli.of(ctx)
    tags = parse.pairs(tag or (), "tag")
    found = cli.call(lambda host: host.snapshot_ls(source=source, tags=tags))

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
                    output.state(snapshot.kind),
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

    cli.show(found, human)


@snapshot_app.command("inspect")
def inspect(ctx: typer.Context, names: SnapshotNames) -> None:
    """Show all that is known of snapshots. With --json: always a list."""
    several.inspect(Cli.of(ctx), names, lambda host, name: host.snapshot_inspect(name), _details)


def _details(found: SnapshotInspection) -> list[output.Field]:
    snapshot = found.snapshot
    mem_file = snapshot.mem_file
    return [
        ("Name", snapshot.name),
        ("Id", snapshot.id),
        ("Kind", output.state(snapshot.kind)),
        ("Source", snapshot.source_name + ("" if found.source_lives else " (gone)")),
        ("Created", f"{format.moment(snapshot.created_at)} ({format.age(snapshot.created_at)} ago)"),
        ("Captured", format.moment(snapshot.captured_at) if snapshot.captured_at else None),
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


@snapshot_app.command("restore")
def restore(
    ctx: typer.Context,
    snapshot: SnapshotName,
    start: Annotated[bool, typer.Option("--start", help="Let it run at once.")] = False,
) -> None:
    """Take the snapshot's instance back to that moment. What it has in memory and on its disk now is lost.

    It is ended if it runs, and is Standby afterwards: Stopped, where the snapshot has no memory.
    """
    cli = Cli.of(ctx)
    instance = cli.call(lambda host: host.snapshot_restore(snapshot, start=start))
    cli.show(instance, lambda: output.line(f"{instance.name} is {instance.state}"))


@snapshot_app.command("fork")
def fork(
    ctx: typer.Context,
    snapshot: SnapshotName,
    count: options.Count = None,
    name: options.ForkNames = None,
    target: options.Target = "running",
    atomic: options.Atomic = False,
    payload: options.Payload = None,
    payloads: options.Payloads = None,
    tag: options.Tags = None,
    publish: options.Published = None,
    quiet: options.Quiet = False,
) -> None:
    """Grow forks from a snapshot, as `coppice fork` does from an instance: payloads, published ports and all."""
    cli = Cli.of(ctx)
    tags, ports = parse.pairs(tag or (), "tag"), parse.publish(publish or ())
    shared, each = parse.forks_payloads(payload, payloads)

    async def work(host: AsyncHost) -> ForkReport:
        from coppice.model import State

        with cli.progress() as progress:
            return await host.snapshot_fork(
                snapshot,
                count=parse.fork_count(count, each, name or ()),
                names=tuple(name or ()),
                target=State(target.capitalize()),
                atomic=atomic,
                payload=shared,
                payloads=each,
                tags=tags,
                publish=ports,
                progress=progress,
            )

    lineage.show(cli, cli.call(work), quiet=quiet)


@snapshot_app.command("rm")
def rm(ctx: typer.Context, names: SnapshotNames) -> None:
    """Remove snapshots. Their instances and forks keep what they have.

    If one cannot be removed, the others still are; the exit status is then the first failure's.
    """
    several.remove(Cli.of(ctx), names, lambda host, name: host.snapshot_rm(name))


def verify(ctx: typer.Context) -> None:
    """Check every captured mem-file and every disk at rest, volumes included; name what differs.

    Mem-files by SHA-256, size, inode and mode, disks by e2fsck. A SHA-256 that is not known yet is recorded. Nothing is changed.
    Exit status 1 if something differs.
    """
    cli = Cli.of(ctx)

    async def work(host: AsyncHost) -> VerifyReport:
        with cli.progress() as progress:
            return await host.verify(progress=progress)

    report = cli.call(work)

    def human() -> None:
        output.line(
            f"{format.count(report.mem_files, 'mem-file')} and {format.count(report.disks, 'disk')} checked, "
            f"{format.size(report.bytes_hashed)} hashed, {format.count(report.recorded, 'new SHA-256 sum')} recorded"
        )
        if report.skipped:
            output.line(f"not checked, because in use: the disks of {', '.join(report.skipped)}")
        for difference in report.differences:
            output.complain(f"{difference.file} of the {difference.holder} {difference.name}: {difference.detail}")

    cli.show(report, human)
    if report.differences:
        raise typer.Exit(1)
