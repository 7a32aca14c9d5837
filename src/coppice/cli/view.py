"""Commands that show instances: ls, inspect, stats; and gc, which removes leftovers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import click

from coppice.cli import complete, format, loadable, options, output, parse, several, table
from coppice.cli.context import Cli
from coppice.cli.declare import Argument, Option

if TYPE_CHECKING:
    from coppice.client.backend import Backend
    from coppice.model import BudgetUse, Instance, MemoryReport, Usage, VolumeDisk
    from coppice.model.inspection import Inspection


def ls(
    ctx: click.Context,
    state: Annotated[
        list[str] | None,
        Option(
            "--state",
            metavar="STATE",
            help="List only instances in this state, such as running; repeatable.",
            autocompletion=complete.states,
        ),
    ] = None,
    tag: options.TagFilter = None,
    quiet: options.Quiet = False,
    everything: options.All = False,
) -> None:
    """List instances, oldest first.

    `!` after a state: its capture can no longer be loaded here; the reason is below the list.
    """
    from coppice.requests import LsRequest, UnloadableRequest

    del everything
    cli = Cli.of(ctx)
    wanted, tags = parse.states(state or ()), parse.pairs(tag or (), "tag")

    async def work(host: Backend) -> tuple[list[Instance], dict[str, str]]:
        found = await host.call(LsRequest(state=wanted[0] if len(wanted) == 1 else None, tags=tags))
        found = [instance for instance in found if not wanted or instance.state in wanted]
        if quiet and not cli.json:
            return found, {}
        return found, await host.call(UnloadableRequest(holders=[instance.id for instance in found]))

    instances, reasons = cli.call(work)

    def human() -> None:
        if quiet:
            for instance in instances:
                output.line(instance.name)
            return
        output.table(
            [
                ("NAME", "left"), ("STATE", "left"), ("IMAGE", "left"), ("CPUS", "right"), ("MEMORY", "right"), ("AGE", "right"),
                ("PARENT", "left"), ("HEALTH", "left"), ("OWNER", "left"), ("PORTS", "left"), ("TAGS", "left"),
            ],
            [
                [
                    instance.name,
                    loadable.state(format.state(instance), instance, reasons),
                    instance.image_name,
                    str(instance.machine.cpus),
                    format.size(instance.machine.memory_bytes),
                    format.age(instance.created_at),
                    instance.parent_name or "-",
                    (instance.vmm and instance.observed and instance.observed.health) or "-",
                    instance.owner or "-",
                    format.ports(instance.publish),
                    format.tags(instance.tags),
                ]
                for instance in instances
            ],
            optional=("HEALTH", "OWNER", "PORTS", "TAGS"),
        )  # fmt: skip
        loadable.explain({instance.id: instance.name for instance in instances}, reasons)

    cli.show([loadable.marked(instance, reasons) for instance in instances] if cli.json else None, human)


def _volumes(disks: tuple[VolumeDisk, ...]) -> str:
    return ", ".join(
        f"{disk.volume_name} at {output.printable(disk.mount_path)}{' (read-only)' if disk.readonly else ' (a clone of its own)' if disk.private else ''}"
        for disk in disks
    )


def inspect(ctx: click.Context, names: options.Names) -> None:
    """Show all fields of instances. With --json: always a list."""
    from coppice.requests import InspectRequest

    several.inspect(Cli.of(ctx), names, lambda name: InspectRequest(instance=name), _details)


def _details(found: Inspection) -> list[output.Field]:
    import shlex

    from coppice.flow import named
    from coppice.model import Egress

    instance, memory = found.instance, found.memory
    process = instance.process
    return [
        ("Name", instance.name),
        ("Id", instance.id),
        ("State", table.state(instance.state)),
        ("Ended", output.printable(instance.exit_reason or "") or None),
        ("Process ended", _process_end(instance)),
        ("Created", f"{format.moment(instance.created_at)} ({format.age(instance.created_at)} ago)"),
        ("Started", format.moment(instance.started_at) if instance.started_at else None),
        ("Policies", format.policies(instance.supervision) or None),
        ("Health", _health(instance)),
        ("Restarts", _restarts(instance)),
        ("Captured", format.moment(instance.capture.captured_at) if instance.capture else None),
        ("Image", f"{instance.image_name} ({instance.image})"),
        (
            "Machine",
            f"{format.count(instance.machine.cpus, 'CPU')}, {format.size(instance.machine.memory_bytes)} of RAM",
        ),
        ("Kernel", instance.machine.kernel),
        ("VMM", _vmm(instance)),
        ("Process", output.printable(shlex.join(process.argv)) or None),
        ("Notice", f"of forks to {output.printable(named(process.notify))}" if process.notify is not None else None),
        ("User", output.printable(process.user) or None),
        ("Directory", output.printable(process.workdir)),
        ("Environment", output.printable(", ".join(f"{key}={value}" for key, value in process.env.items())) or None),
        ("Host name", instance.hostname),
        ("Tags", format.tags(instance.tags) if instance.tags else None),
        ("Network", instance.machine.network),
        ("Egress", format.egress(instance.egress) if instance.egress != Egress() else None),
        ("Limits", format.limits(instance.limits) or None),
        ("Used", _used(memory.usage) if memory and memory.usage else None),
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
        ("Layers", _layers(instance)),
        ("SHA-256", format.digest(instance.mem_file.sha256) if instance.mem_file else None),
        ("Sharing", _sharing(instance)),
        ("Disk", f"{format.size(found.disk_bytes)} of {format.size(instance.machine.overlay_bytes)} allocated"),
        ("Files", found.directory),
    ]


def _process_end(instance: Instance) -> str | None:
    from coppice.model.instance import said

    end = instance.process_end
    return f"it {said(end)}, at {format.moment(end.at)}" if end else None


def _health(instance: Instance) -> str | None:
    seen = instance.observed
    if seen is None or seen.health is None or instance.vmm is None:
        return None
    return f"{seen.health} ({output.printable(seen.health_error)})" if seen.failures else seen.health


def _restarts(instance: Instance) -> str | None:
    seen = instance.observed
    if seen is None or not (seen.attempts or seen.next_attempt_at):
        return None
    following = f", next at {format.moment(seen.next_attempt_at)}" if seen.next_attempt_at else ""
    return f"{format.count(seen.attempts, 'attempt')} in a row{', gave up' if seen.gave_up else following}"


def _vmm(instance: Instance) -> str:
    manifest, process = instance.capture.manifest if instance.capture else instance.manifest, instance.vmm
    version = f"{manifest.driver} {manifest.vmm_version}, {manifest.accel}" if manifest else instance.driver
    return f"{version}, pid {process.pid}" if process else version


def _memory(memory: MemoryReport) -> str:
    return (
        f"{format.size(memory.shared_bytes)} shared, {format.size(memory.unique_bytes)} unique, "
        f"{format.size(memory.vmm_overhead_bytes)} VMM overhead"
    )


def _used(usage: Usage) -> str:
    return (
        f"{format.size(usage.memory_bytes)} of memory, {usage.cpu_s:.1f} s of CPU time, "
        f"{format.count(usage.tasks, 'thread')}"
    )


def _layers(instance: Instance) -> str | None:
    layers = instance.capture.layers if instance.capture else ()
    total = sum(layer.data_bytes for layer in layers)
    return f"{len(layers)}, with {format.size(total)} of its memory" if layers else None


def _sharing(instance: Instance) -> str | None:
    if instance.capture is None:
        return None
    file = instance.capture.copied or instance.capture.mem_file
    return f"{file.sharing}: {file.reason}" if file.reason else str(file.sharing)


def stats(
    ctx: click.Context,
    names: Annotated[
        list[str] | None,
        Argument(metavar="NAME", help="Show only these instances.", autocompletion=complete.instances),
    ] = None,
    budget: Annotated[
        bool, Option("--budget", help="Show the budgets of this data directory and their use instead.")
    ] = False,
    once: options.Once = False,
) -> None:
    """Show the memory of instances, as the kernel accounts it, and their traffic.

    SHARED: resident pages of the mem-file itself. UNIQUE: the memory of this instance alone.
    OVERHEAD: the VMM process without guest RAM. CHARGED: what counts for its memory limit. RECEIVED
    and SENT: bytes on the network `nat` since the VMM's start; on another one, where only the guest
    counts, since its first boot, and only of instances that are named.
    """
    from coppice.requests import BudgetRequest, StatsRequest

    del once
    cli = Cli.of(ctx)
    if budget:
        use = cli.request(BudgetRequest())
        cli.show(use, lambda: output.fields(_budget(use)))
        return

    async def work(host: Backend) -> dict[str, MemoryReport]:
        found: dict[str, MemoryReport] = {}
        for name in names or (None,):
            reports = await host.call(StatsRequest(instance=name))
            found |= reports
        return found

    reports = cli.call(work)

    def human() -> None:
        running = [report for report in reports.values() if report.vmm_overhead_bytes]
        rows: list[list[str]] = [
            [
                each,
                format.size(report.mapped_bytes),
                *(
                    format.size(size) if report in running else "-"  # without a VMM there is only the memory file
                    for size in (report.shared_bytes, report.unique_bytes, report.vmm_overhead_bytes)
                ),
                str(report.inode or "-"),
                str(report.link_count),
                str(report.sharing or "-"),
                format.size(report.usage.memory_bytes) if report.usage else "-",
                *(
                    (format.size(traffic.received_bytes), format.size(traffic.sent_bytes))
                    if (traffic := report.traffic)
                    else ("-", "-")
                ),
            ]
            for each, report in reports.items()
        ]
        if len(running) > 1:
            mapped, unique, overhead = (
                sum(getattr(report, field) for report in running)
                for field in ("mapped_bytes", "unique_bytes", "vmm_overhead_bytes")
            )
            rows.append(["(running)", format.size(mapped), "", format.size(unique), format.size(overhead), *[""] * 6])
        output.table(
            [
                ("NAME", "left"), ("RAM", "right"), ("SHARED", "right"), ("UNIQUE", "right"), ("OVERHEAD", "right"),
                ("INODE", "right"), ("LINKS", "right"), ("SHARING", "left"), ("CHARGED", "right"),
                ("RECEIVED", "right"), ("SENT", "right"),
            ],
            rows,
            optional=("CHARGED", "RECEIVED", "SENT"),
        )  # fmt: skip

    cli.show(reports, human)


def _budget(use: BudgetUse) -> list[tuple[str, str]]:
    return [
        ("Instances", f"{use.instances} of {use.max_instances}, {use.running} running"),
        (
            "Memory",
            f"{format.size(use.memory_bytes)} of {format.size(use.memory_limit_bytes)} reserved, at "
            f"{use.memory_overcommit:g} times over-commit; {format.size(use.measured_bytes or 0)} in use",
        ),
        ("Disk", f"{format.size(use.disk_free_bytes)} free, of which {format.size(use.disk_floor_bytes)} are kept"),
    ]


def gc(
    ctx: click.Context,
    dry_run: Annotated[bool, Option("--dry-run", help="Only report what would be removed.")] = False,
    caches: Annotated[
        bool,
        Option(
            "--caches",
            help="Also remove unused content that can be made or fetched again: fetched kernels, boot files, empty "
            "disks, unnamed images.",
        ),
    ] = False,
) -> None:
    """Remove leftovers of killed processes. Nothing that is in use is removed."""
    from coppice.requests import GcRequest

    cli = Cli.of(ctx)
    report = cli.request(GcRequest(dry_run=dry_run, caches=caches))

    def human() -> None:
        for path in report.removed:
            output.line(path)
        verb = "would be freed" if report.dry_run else "freed"
        output.line(f"{format.count(len(report.removed), 'leftover')}, {format.size(report.bytes_freed)} {verb}")

    cli.show(report, human)
