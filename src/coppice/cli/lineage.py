"""Commands of the lineage: fork, which adds to it, and tree, which draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click

from coppice.cli import complete, format, loadable, options, output, table
from coppice.cli.context import Cli
from coppice.cli.declare import Argument, Option, ProgramExit
from coppice.errors import kind_of

if TYPE_CHECKING:
    from coppice.client.backend import Backend
    from coppice.model import ForkReport, ForkResult, TreeNode


_WITH_STAGES = 107  # columns of a table of forks with all their stages, without the names


def fork(
    ctx: click.Context,
    source: Annotated[
        str,
        Argument(
            metavar="SOURCE",
            help="A Template, Standby or Stopped instance; with --from-running a Running one.",
            autocompletion=complete.sources,
        ),
    ],
    forks: options.ForkOptions,
    from_running: Annotated[
        bool,
        Option(
            "--from-running",
            help="Fork a Running instance. It is paused, and then continues.",
        ),
    ] = False,
    volume_policy: Annotated[
        Literal["refuse", "clone"],
        Option(
            "--volume-policy",
            help="Of volumes that the source writes to: refuse to fork it, or give each fork a clone of its own, which "
            "is removed with the fork.",
        ),
    ] = "refuse",
    quiet: options.Quiet = False,
) -> None:
    """Grow forks that share the source's memory. Each is Running when its guest has confirmed its
    new identity.

    If the image has /etc/coppice/on-fork, each fork runs it first, except forks that boot. The
    payload is in place before that. A fork that fails is undone and does not affect the others; the
    exit status then has the reason. A wide terminal and --json show the time of each stage.
    """
    from coppice.requests import ForkRequest

    cli = Cli.of(ctx)
    request = forks.request(ForkRequest, instance=source, from_running=from_running, volume_policy=volume_policy)
    report = cli.request(request)
    forks.warn_without_server(cli)
    show(cli, report, quiet=quiet)


def show(cli: Cli, report: ForkReport, *, quiet: bool) -> None:
    """Print the report of a fan-out.

    If forks failed, end the program with the exit status of their error, or 1 if their errors
    differ.
    """
    cli.show(report, lambda: _print_names(report) if quiet else _print_report(report))
    if report.succeeded < report.count:
        statuses = {kind_of(result.error_code or "").exit_code for result in report.results if not result.ok}
        raise ProgramExit(statuses.pop() if len(statuses) == 1 else 1)


def _print_names(report: ForkReport) -> None:
    for result in report.results:
        if result.ok:
            output.line(result.name)
    _complain(report)


def _print_report(report: ForkReport) -> None:
    grown = [result for result in report.results if result.ok]
    if grown:
        wide = output.width() >= _WITH_STAGES + max(len(result.name) for result in grown)
        stages = list(dict.fromkeys(stage for result in grown for stage in result.stages)) if wide else []
        with_ports = any(result.instance.publish for result in grown if result.instance)
        output.table(
            [
                ("NAME", "left"), ("STATE", "left"), ("TOTAL", "right"), *((stage.upper(), "right") for stage in stages),
                ("SHARING", "left"), ("UNIQUE", "right"), ("OVERHEAD", "right"), ("DISK", "right"),
                *((("PORTS", "left"),) if with_ports else ()),
            ],
            [_row(result, stages, with_ports=with_ports) for result in grown],
        )  # fmt: skip
    measured = [result.memory for result in grown if result.memory]
    unique = format.size(sum(memory.unique_bytes for memory in measured))
    overhead = format.size(sum(memory.vmm_overhead_bytes for memory in measured))
    cost = f", {unique} of unique memory, {overhead} of VMM overhead" if measured else ""
    done = f"{report.succeeded} of {format.count(report.count, 'fork')} of {report.source_name}"
    output.line(f"{done} in {format.duration(report.wall_ms)}{cost}")
    if report.source_pause_ms is not None:
        output.line(f"{report.source_name} was paused for {format.duration(report.source_pause_ms)}")
    for reason in dict.fromkeys(result.sharing_reason for result in grown if result.sharing_reason):
        output.complain(f"memory was copied, not shared: {reason}")
    if grown:
        output.warn_of_shared_random(report.source_name, report.shared_random)
    _complain(report)


def _row(result: ForkResult, stages: Sequence[str], *, with_ports: bool) -> list[str]:
    return [
        result.name,
        table.state(format.state(result.instance) if result.instance else "Unknown"),
        format.duration(result.total_ms),
        *(format.duration(result.stages[stage]) if stage in result.stages else "-" for stage in stages),
        str(result.sharing or "-"),
        format.size(result.memory.unique_bytes) if result.memory else "-",
        format.size(result.memory.vmm_overhead_bytes) if result.memory else "-",
        format.size(result.disk_bytes_written),
        *([format.ports(result.instance.publish if result.instance else ())] if with_ports else []),
    ]


def _complain(report: ForkReport) -> None:
    for result in report.results:
        if not result.ok:
            output.complain(f"the fork {result.name} failed: {result.error}")


def tree(
    ctx: click.Context,
    names: Annotated[
        list[str] | None,
        Argument(metavar="NAME", help="Draw only these and their forks.", autocompletion=complete.instances),
    ] = None,
) -> None:
    """Draw the lineage, and the memory that it shares.

    Each instance is followed by its forks. Instances with the same INODE share a memory file; LINKS
    counts its holders. UNIQUE is the memory of this instance alone, and OVERHEAD that of its VMM process.
    """
    cli = Cli.of(ctx)

    async def work(host: Backend) -> tuple[list[TreeNode], dict[str, str]]:
        from coppice.requests import TreeRequest, UnloadableRequest

        found = [node for name in names or (None,) for node in await host.call(TreeRequest(instance=name))]
        return found, await host.call(UnloadableRequest(holders=[node.instance.id for node in found]))

    nodes, reasons = cli.call(work)

    def human() -> None:
        rows = [_row_of(node, lead, reasons) for node, lead in zip(nodes, _leads(nodes), strict=True)]
        output.table(
            [
                ("NAME", "left"), ("STATE", "left"), ("FORKS", "right"), ("SHARED", "right"), ("UNIQUE", "right"),
                ("OVERHEAD", "right"), ("INODE", "right"), ("LINKS", "right"), ("SHARING", "left"),
            ],
            rows,
        )  # fmt: skip
        _summary(nodes)
        loadable.explain({node.instance.id: node.instance.name for node in nodes}, reasons)

    cli.show([_document(node, reasons) for node in nodes] if cli.json else None, human)


def _leads(nodes: Sequence[TreeNode]) -> list[str]:
    """Return the lines to draw before each name."""
    leads: list[str] = []
    later: set[int] = set()  # levels at which another fork of the same parent follows
    for node in reversed(nodes):
        bars = "".join("│   " if level in later else "    " for level in range(1, node.depth))
        leads.append(bars + ("├── " if node.depth in later else "└── ") if node.depth else "")
        later = {level for level in later if level < node.depth} | ({node.depth} if node.depth else set())
    return leads[::-1]


def _document(node: TreeNode, reasons: Mapping[str, str]) -> dict[str, Any]:
    return {
        "instance": loadable.marked(node.instance, reasons),
        "depth": node.depth,
        "fork_count": node.fork_count,
        "memory": node.memory,
    }


def _row_of(node: TreeNode, lead: str, reasons: Mapping[str, str]) -> list[str]:
    memory = node.memory
    return [
        lead + node.instance.name,
        loadable.state(format.state(node.instance), node.instance, reasons),
        str(node.fork_count) if node.fork_count else "-",
        *(
            [
                format.size(memory.shared_bytes) if node.instance.vmm else "-",
                format.size(memory.unique_bytes) if node.instance.vmm else "-",
                format.size(memory.vmm_overhead_bytes) if node.instance.vmm else "-",
                str(memory.inode or "-"),
                str(memory.link_count),
                str(memory.sharing or "-"),
            ]
            if memory
            else ["-"] * 6
        ),
    ]


def _summary(nodes: Sequence[TreeNode]) -> None:
    """Print what sharing saves: the RAM that running machines see, and the memory that they use."""
    running = [node.memory for node in nodes if node.memory and node.instance.vmm]
    if len(running) > 1:
        mapped, unique, overhead = (
            format.size(sum(getattr(memory, field) for memory in running))
            for field in ("mapped_bytes", "unique_bytes", "vmm_overhead_bytes")
        )
        output.line(
            f"{len(running)} running machines see {mapped} of RAM; {unique} is unique to one of them, "
            f"and their VMMs take {overhead}"
        )
