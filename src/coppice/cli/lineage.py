"""Commands of the lineage: fork, which grows it, and tree, which draws it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from coppice.cli import complete, format, options, output, parse
from coppice.cli.context import Cli
from coppice.errors import exit_code_of

if TYPE_CHECKING:
    from rich.text import Text

    from coppice.host import AsyncHost
    from coppice.model import ForkReport, ForkResult, TreeNode


_WITH_STAGES = 97  # columns that a table of forks with all their stages takes beside the names


def fork(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Template, Standby or Stopped instance; with --from-running a Running one.",
            autocompletion=complete.sources,
        ),
    ],
    count: options.Count = None,
    name: options.ForkNames = None,
    target: options.Target = "running",
    atomic: options.Atomic = False,
    from_running: Annotated[
        bool,
        typer.Option(
            "--from-running", help="Fork a Running instance: it is paused for some milliseconds, and runs on."
        ),
    ] = False,
    payload: options.Payload = None,
    payloads: options.Payloads = None,
    tag: options.Tags = None,
    publish: options.Published = None,
    quiet: options.Quiet = False,
) -> None:
    """Grow forks that share the source's memory. Each is running when its guest has answered, as itself.

    A wide terminal, and --json, show what each stage took.
    The image's /etc/coppice/on-fork, if it has one, is run in each fork (but one that boots) before that counts as running; its payload is there by then.
    A fork that fails is undone and does not touch its siblings; the exit status then says why, as for any other command.
    """
    cli = Cli.of(ctx)
    tags, ports = parse.pairs(tag or (), "tag"), parse.publish(publish or ())
    shared, each = parse.forks_payloads(payload, payloads)

    async def work(host: AsyncHost) -> ForkReport:
        from coppice.model import State

        with cli.progress() as progress:
            return await host.fork(
                source,
                count=parse.fork_count(count, each, name or ()),
                names=tuple(name or ()),
                target=State(target.capitalize()),
                atomic=atomic,
                from_running=from_running,
                payload=shared,
                payloads=each,
                tags=tags,
                publish=ports,
                progress=progress,
            )

    show(cli, cli.call(work), quiet=quiet)


def show(cli: Cli, report: ForkReport, *, quiet: bool) -> None:
    """Print what became of a fan-out. Where a fork failed the program ends with the exit status of why, or with 1 where it is not for all the same."""
    cli.show(report, lambda: _print_names(report) if quiet else _print_report(report))
    if report.succeeded < report.count:
        statuses = {exit_code_of(result.error_code or "") for result in report.results if not result.ok}
        raise typer.Exit(statuses.pop() if len(statuses) == 1 else 1)


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
                ("SHARING", "left"), ("UNIQUE", "right"), ("DISK", "right"), *((("PORTS", "left"),) if with_ports else ()),
            ],
            [_row(result, stages, with_ports=with_ports) for result in grown],
        )  # fmt: skip
    unique = sum(result.memory.unique_bytes for result in grown if result.memory)
    cost = f", {format.size(unique)} of memory of their own" if any(result.memory for result in grown) else ""
    done = f"{report.succeeded} of {format.count(report.count, 'fork')} of {report.source_name}"
    output.line(f"{done} in {format.duration(report.wall_ms)}{cost}")
    if report.source_pause_ms is not None:
        output.line(f"{report.source_name} was paused for {format.duration(report.source_pause_ms)}, and runs on")
    for reason in dict.fromkeys(result.sharing_reason for result in grown if result.sharing_reason):
        output.complain(f"memory was copied, not shared: {reason}")
    _complain(report)


def _row(result: ForkResult, stages: Sequence[str], *, with_ports: bool) -> list[str | Text]:
    return [
        result.name,
        output.state(result.instance.state if result.instance else "Unknown"),
        format.duration(result.total_ms),
        *(format.duration(result.stages[stage]) if stage in result.stages else "-" for stage in stages),
        str(result.sharing or "-"),
        format.size(result.memory.unique_bytes) if result.memory else "-",
        format.size(result.disk_bytes_written),
        *([format.ports(result.instance.publish if result.instance else ())] if with_ports else []),
    ]


def _complain(report: ForkReport) -> None:
    for result in report.results:
        if not result.ok:
            output.complain(f"the fork {result.name} failed: {result.error}")


def tree(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Only this one and its forks.", autocompletion=complete.instances),
    ] = None,
) -> None:
    """Draw the lineage, and the memory that is shared in it.

    Each instance has its forks below it. The same INODE is the same memory file; LINKS counts its holders. UNIQUE is what an instance alone costs.
    """
    cli = Cli.of(ctx)
    roots = cli.call(lambda host: host.tree(name))

    def human() -> None:
        rows = [row for root in roots for row in _branch(root, "", "")]
        output.table(
            [
                ("NAME", "left"), ("STATE", "left"), ("FORKS", "right"), ("SHARED", "right"), ("UNIQUE", "right"),
                ("INODE", "right"), ("LINKS", "right"), ("SHARING", "left"),
            ],
            rows,
        )  # fmt: skip
        _summary(roots)

    cli.show(roots, human)


def _branch(node: TreeNode, lead: str, below: str) -> Iterator[list[str | Text]]:
    """The rows of one instance and its forks. `lead` is drawn before its own name, `below` before those of its forks."""
    memory = node.memory
    yield [
        lead + node.instance.name,
        output.state(node.instance.state),
        str(node.fork_count) if node.fork_count else "-",
        *(
            [
                format.size(memory.shared_bytes) if node.instance.vmm else "-",
                format.size(memory.unique_bytes) if node.instance.vmm else "-",
                str(memory.inode or "-"),
                str(memory.link_count),
                str(memory.sharing or "-"),
            ]
            if memory
            else ["-"] * 5
        ),
    ]
    for child in node.children:
        last = child is node.children[-1]
        yield from _branch(child, below + ("└── " if last else "├── "), below + ("    " if last else "│   "))


def _summary(roots: Sequence[TreeNode]) -> None:
    """What sharing saves: RAM that the running machines see, against what they hold."""
    nodes = list(roots)
    for node in nodes:
        nodes.extend(node.children)
    running = [node.memory for node in nodes if node.memory and node.instance.vmm]
    if len(running) > 1:
        mapped, unique = sum(memory.mapped_bytes for memory in running), sum(memory.unique_bytes for memory in running)
        output.line(
            f"{len(running)} running machines see {format.size(mapped)} of RAM; {format.size(unique)} is unique to one of them"
        )
