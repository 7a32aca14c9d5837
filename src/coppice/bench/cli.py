"""`coppice bench`: measure what a fork and a capture cost on this host."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from coppice.bench.capture import CapturePlan, measure_capture
from coppice.bench.fanout import FanOutPlan, cases, measure_fan_out
from coppice.bench.plot import plot_capture, plot_fan_out
from coppice.bench.records import Cache, CaptureBenchReport, FanOutReport, Method
from coppice.bench.report import capture_table, fan_out_table
from coppice.bench.trial import Say
from coppice.cli.context import Cli
from coppice.disk.atomic import os_errors, publish, temporary_beside
from coppice.errors import UsageError
from coppice.host import AsyncHost
from coppice.model import MIB, to_json
from coppice.names import check_count, check_machine, parse_size

R = TypeVar("R", FanOutReport, CaptureBenchReport)

app = typer.Typer(
    help="Measure what forks and captures cost here, beside what they replace.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,  # the program has it
    context_settings={"help_option_names": ["--help", "-h"]},
)

_MEMORY = ["256M", "1G", "4G"]
_COUNTS = [1, 4, 16]
_DIRTIED = ["0", "16M", "64M"]

_Image = Annotated[str, typer.Option("--image", help="Image to boot; it must have coreutils.")]
_Memory = Annotated[
    list[str],
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Guest RAM; repeatable.",
        show_default=", ".join(_MEMORY),
        default_factory=lambda: list(_MEMORY),
    ),
]
_Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write all samples to this JSON file.")]
_Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the result into this PNG file.")]
_Quick = Annotated[bool, typer.Option("--quick", help="The smallest run that still measures everything once.")]
_Count = Annotated[
    list[int],
    typer.Option(
        "--count",
        "-n",
        help="Machines at once; repeatable.",
        show_default=", ".join(map(str, _COUNTS)),
        default_factory=lambda: list(_COUNTS),
    ),
]
_Methods = Annotated[
    list[Method],
    typer.Option(
        "--method", help="Only this method; repeatable.", show_default="all", default_factory=lambda: list(Method)
    ),
]
_Caches = Annotated[
    list[Cache],
    typer.Option(
        "--cache",
        help="Page cache before each round; repeatable.",
        show_default="both",
        default_factory=lambda: list(Cache),
    ),
]
_Dirty = Annotated[
    list[str],
    typer.Option(
        "--dirty",
        metavar="SIZE",
        help="Memory that a fork fills before it is captured; repeatable.",
        show_default=", ".join(_DIRTIED),
        default_factory=lambda: list(_DIRTIED),
    ),
]
_Samples = Annotated[int, typer.Option("--samples", min=1, help="Machines per case, at least.")]
_Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Rounds per case, at least.")]
_Workload = Annotated[
    str, typer.Option("--workload", metavar="SIZE", help="Memory that each machine fills when it is up.")
]
_CopyLimit = Annotated[
    str, typer.Option("--copy-limit", metavar="SIZE", help="Skip rounds of full copies that would write more.")
]

_QUICK_MEMORY = (256 * MIB,)
_TABLE_WIDTH = 150  # columns; a narrower terminal wraps, and a file does not


@app.command("fan-out")
def fan_out(
    context: typer.Context,
    *,
    image: _Image = "debian",
    count: _Count,
    memory: _Memory,
    method: _Methods,
    cache: _Caches,
    samples: _Samples = 8,
    rounds: _Rounds = 2,
    workload: _Workload = "16M",
    copy_limit: _CopyLimit = "4G",
    output: _Output = None,
    plot: _Plot = None,
    quick: _Quick = False,
) -> None:
    """Time until N machines answer: cold boot, copying forks, and shared forks, interleaved in one run."""
    plan = FanOutPlan(
        image=image,
        counts=tuple(check_count(number) for number in count),
        memory_bytes=_sizes(memory),
        methods=tuple(method),
        caches=tuple(cache),
        samples=samples,
        min_rounds=rounds,
        workload_bytes=parse_size(workload),
        copy_limit_bytes=parse_size(copy_limit),
    )
    if quick:
        plan = msgspec.structs.replace(
            plan, counts=(2,), memory_bytes=_QUICK_MEMORY, samples=1, min_rounds=1, workload_bytes=MIB
        )
    if next(cases(plan, _QUICK_MEMORY[0]), None) is None:
        raise UsageError(
            f"with a cold page cache there is nothing to measure of {', '.join(method)}", hint="add --cache warm"
        )
    _measure(context, lambda host, say: measure_fan_out(host, plan, say), fan_out_table, plot_fan_out, output, plot)


@app.command("capture")
def capture(
    context: typer.Context,
    *,
    image: _Image = "debian",
    memory: _Memory,
    dirty: _Dirty,
    rounds: _Rounds = 5,
    output: _Output = None,
    plot: _Plot = None,
    quick: _Quick = False,
) -> None:
    """Time that a standby takes, and how long the guest stands still: just booted, and forked with dirty memory."""
    plan = CapturePlan(
        image=image, memory_bytes=_sizes(memory), dirty_bytes=tuple(map(parse_size, dirty)), rounds=rounds
    )
    if quick:
        plan = msgspec.structs.replace(plan, memory_bytes=_QUICK_MEMORY, dirty_bytes=(0, MIB), rounds=1)
    _measure(context, lambda host, say: measure_capture(host, plan, say), capture_table, plot_capture, output, plot)


def _sizes(texts: list[str]) -> tuple[int, ...]:
    sizes = tuple(map(parse_size, texts))
    for size in sizes:
        check_machine(1, size, 1 << 30)
    return sizes


def _measure(
    context: typer.Context,
    run: Callable[[AsyncHost, Say], Awaitable[R]],
    table: Callable[[R], Table],
    draw: Callable[[R, Path], None],
    output: Path | None,
    plot: Path | None,
) -> None:
    cli = dataclasses.replace(Cli.of(context), background="off")  # nothing else is to run
    for path in (output, plot):  # better now than after twenty minutes
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"there is no directory {path.parent}", hint="make it first")
    status = Console(stderr=True)
    report = cli.call(lambda host: run(host, lambda line: status.print(line, style="dim", highlight=False)))
    if output is not None:
        write_report(report, output)
    if plot is not None:
        draw(report, plot)
    cli.show(report, lambda: Console(width=max(Console().width, _TABLE_WIDTH)).print(table(report)))


def write_report(report: FanOutReport | CaptureBenchReport, path: Path) -> None:
    """Write a report as indented JSON, whole or not at all.

    :raises CoppiceError: it cannot be written
    """
    temporary = temporary_beside(path)
    with os_errors(f"write {path}"):
        try:
            temporary.write_bytes(msgspec.json.format(to_json(report), indent=1) + b"\n")
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
