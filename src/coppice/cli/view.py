"""Commands that look: ls, inspect, stats; and gc, which tidies what nothing owns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from coppice.cli import complete, format, options, output, parse, several
from coppice.cli.context import Cli

if TYPE_CHECKING:
    from rich.text import Text

    from coppice.host import AsyncHost, Inspection
    from coppice.model import BudgetUse, Instance, MemoryReport, VolumeDisk


def ls(
    ctx: typer.Context,
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            metavar="STATE",
            help="Only those in this state, such as running; repeatable.",
            autocompletion=complete.states,
        ),
    ] = None,
    tag: options.TagFilter = None,
    quiet: options.Quiet = False,
) -> None:
    """List instances, the oldest first."""
    cli = Cli.of(ctx)
    wanted, tags = parse.states(state or ()), parse.pairs(tag or (), "tag")

    async def work(host: AsyncHost) -> list[Instance]:
        if len(wanted) == 1:
            return await host.ls(state=wanted[0], tags=tags)
        return [instance for instance in await host.ls(tags=tags) if not wanted or instance.state in wanted]

    instances = cli.call(work)

    def human() -> None:
        if quiet:
            for instance in instances:
                output.line(instance.name)
            return
        output.table(
            [
                ("NAME", "left"), ("STATE", "left"), ("IMAGE", "left"), ("CPUS", "right"), ("MEMORY", "right"), ("AGE", "right"),
                ("PARENT", "left"), ("OWNER", "left"), ("PORTS", "left"), ("TAGS", "left"),
            ],
            [
                [
                    instance.name,
                    output.state(instance.state),
                    instance.image_name,
                    str(instance.machine.cpus),
                    format.size(instance.machine.memory_bytes),
                    format.age(instance.created_at),
                    instance.parent_name or "-",
                    instance.owner or "-",
                    format.ports(instance.publish),
                    format.tags(instance.tags),
                ]
                for instance in instances
            ],
            optional=("OWNER", "PORTS", "TAGS"),
        )  # fmt: skip

    cli.show(instances, human)


def _volumes(disks: tuple[VolumeDisk, ...]) -> str:
    return ", ".join(
        f"{disk.volume_name} at {output.printable(disk.mount_path)}{' (read-only)' if disk.readonly else ''}"
        for disk in disks
    )


def inspect(ctx: typer.Context, names: options.Names) -> None:
    """Show all that is known of instances. With --json: always a list."""
    several.inspect(Cli.of(ctx), names, lambda host, name: host.inspect(name), _details)


def _details(found: Inspection) -> list[output.Field]:
    import shlex

    instance, memory = found.instance, found.memory
    process = instance.process
    return [
        ("Name", instance.name),
        ("Id", instance.id),
        ("State", output.state(instance.state)),
        ("Ended", output.printable(instance.exit_reason or "") or None),
        ("Created", f"{format.moment(instance.created_at)} ({format.age(instance.created_at)} ago)"),
        ("Started", format.moment(instance.started_at) if instance.started_at else None),
        ("Captured", format.moment(instance.captured_at) if instance.captured_at else None),
        ("Image", f"{instance.image_name} ({instance.image})"),
        (
            "Machine",
            f"{format.count(instance.machine.cpus, 'CPU')}, {format.size(instance.machine.memory_bytes)} of RAM",
        ),
        ("Kernel", instance.machine.kernel),
        ("VMM", _vmm(instance)),
        ("Process", output.printable(shlex.join(process.argv)) or None),
        ("User", output.printable(process.user) or None),
        ("Directory", output.printable(process.workdir)),
        ("Environment", output.printable(", ".join(f"{key}={value}" for key, value in process.env.items())) or None),
        ("Host name", instance.hostname),
        ("Tags", format.tags(instance.tags) if instance.tags else None),
        ("Ports", format.ports(instance.publish) if instance.publish else None),
        ("Volumes", _volumes(instance.machine.volumes) or None),
        ("Owner", instance.owner),
        ("Public", "other owners may fork it" if instance.public else None),
        ("Parent", instance.parent_name),
        ("Forks", f"{found.fork_count} ({', '.join(found.forks)})" if found.forks else None),
        ("Memory", _memory(memory) if memory else None),
        (
            "Mem-file",
            f"inode {memory.inode}, {format.count(memory.link_count, 'link')}" if memory and memory.inode else None,
        ),
        ("SHA-256", format.digest(instance.mem_file.sha256) if instance.mem_file else None),
        ("Sharing", _sharing(instance)),
        ("Disk", f"{format.size(found.disk_bytes)} of {format.size(instance.machine.overlay_bytes)} allocated"),
        ("Files", found.directory),
    ]


def _vmm(instance: Instance) -> str:
    manifest, process = instance.manifest, instance.vmm
    version = f"{manifest.driver} {manifest.vmm_version}, {manifest.accel}" if manifest else instance.driver
    return f"{version}, pid {process.pid}" if process else version


def _memory(memory: MemoryReport) -> str:
    return (
        f"{format.size(memory.shared_bytes)} shared, {format.size(memory.unique_bytes)} unique, "
        f"{format.size(memory.vmm_overhead_bytes)} VMM overhead"
    )


def _sharing(instance: Instance) -> str | None:
    file = instance.mem_file
    if file is None:
        return None
    return f"{file.sharing}: {file.reason}" if file.reason else str(file.sharing)


def stats(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One instance; otherwise all.", autocompletion=complete.instances),
    ] = None,
    budget: Annotated[
        bool, typer.Option("--budget", help="Show how much of the budgets of this data directory is in use instead.")
    ] = False,
) -> None:
    """Show the memory of instances, as the kernel accounts it.

    SHARED: resident pages of the mem-file itself. UNIQUE: what this instance alone costs. OVERHEAD: the VMM process beside guest RAM.
    """
    cli = Cli.of(ctx)
    if budget:
        use = cli.call(lambda host: host.budget())
        cli.show(use, lambda: output.fields(_budget(use)))
        return
    reports = cli.call(lambda host: host.stats(name))

    def human() -> None:
        running = [report for report in reports.values() if report.vmm_overhead_bytes]
        rows: list[list[str | Text]] = [
            [
                each,
                format.size(report.mapped_bytes),
                *(
                    format.size(size) if report in running else "-"  # without a VMM a memory file is all there is
                    for size in (report.shared_bytes, report.unique_bytes, report.vmm_overhead_bytes)
                ),
                str(report.inode or "-"),
                str(report.link_count),
                str(report.sharing or "-"),
            ]
            for each, report in reports.items()
        ]
        if len(running) > 1:
            mapped, unique, overhead = (
                sum(getattr(report, field) for report in running)
                for field in ("mapped_bytes", "unique_bytes", "vmm_overhead_bytes")
            )
            rows.append(["(running)", format.size(mapped), "", format.size(unique), format.size(overhead), "", "", ""])
        output.table(
            [
                ("NAME", "left"), ("RAM", "right"), ("SHARED", "right"), ("UNIQUE", "right"), ("OVERHEAD", "right"),
                ("INODE", "right"), ("LINKS", "right"), ("SHARING", "left"),
            ],
            rows,
        )  # fmt: skip

    cli.show(reports, human)


def _budget(use: BudgetUse) -> list[tuple[str, str | Text]]:
    return [
        ("Instances", f"{use.instances} of {use.max_instances}, {use.running} running"),
        (
            "Memory",
            f"{format.size(use.memory_bytes)} of {format.size(use.memory_limit_bytes)}, at {use.memory_overcommit:g} times over-commit",
        ),
        ("Disk", f"{format.size(use.disk_free_bytes)} free, of which {format.size(use.disk_floor_bytes)} are kept"),
    ]


def gc(
    ctx: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    caches: Annotated[
        bool,
        typer.Option(
            "--caches",
            help="Also what no instance or snapshot uses and can be had again: fetched kernels, boot files, empty disks, unnamed images.",
        ),
    ] = False,
) -> None:
    """Remove what nothing owns: leftovers of killed processes.

    What is in use is never touched.
    """
    cli = Cli.of(ctx)
    report = cli.call(lambda host: host.gc(dry_run=dry_run, caches=caches))

    def human() -> None:
        for path in report.removed:
            output.line(path)
        verb = "would be freed" if report.dry_run else "freed"
        output.line(f"{format.count(len(report.removed), 'leftover')}, {format.size(report.bytes_freed)} {verb}")

    cli.show(report, human)
