"""The command line of the benchmarks: `python -m bench fan-out`, `capture` and `tree`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Generic, Literal, NamedTuple, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from bench.capture import CapturePlan, measure_capture
from bench.fanout import FanOutPlan, cases, measure_fan_out
from bench.plot import plot_capture, plot_fan_out
from bench.records import Cache, CaptureBenchReport, FanOutReport, Method, TreeReport, write_report
from bench.report import capture_table, fan_out_table, tree_table
from bench.tree import TreePlan, measure_tree
from bench.trial import Say
from coppice.cli.context import Cli, open_host
from coppice.client import AsyncHost
from coppice.errors import UsageError
from coppice.model import MIB
from coppice.names import check_count, check_machine, parse_size

R = TypeVar("R", FanOutReport, CaptureBenchReport, TreeReport)

app = typer.Typer(
    help="Measure forks and captures on this host, and compare them with cold boots and copies.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

_MEMORY = ["256M", "1G", "4G"]
_COUNTS = [1, 4, 16]
_DIRTIED = ["0", "16M", "64M"]

_Home = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", envvar="COPPICE_HOME", help="Data directory.", file_okay=False),
]
_Accel = Annotated[
    Literal["auto", "kvm", "tcg"],
    typer.Option("--accel", envvar="COPPICE_ACCEL", help="Run guests by KVM, or emulate them (tcg)."),
]
_Kernel = Annotated[
    str | None,
    typer.Option("--kernel", metavar="KEY", help="Guest kernel, see `coppice kernel ls`. Default: Debian's."),
]
_Vmm = Annotated[str | None, typer.Option("--vmm", help="VMM of the machines: qemu or firecracker.")]
_Network = Annotated[str | None, typer.Option("--network", help="Network of the machines. Default: the host's.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the report with all samples as JSON.")]
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

_TREE_MEMORY = ["512M", "4G"]
_TreeMemory = Annotated[
    list[str],
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Guest RAM; repeatable.",
        show_default=", ".join(_TREE_MEMORY),
        default_factory=lambda: list(_TREE_MEMORY),
    ),
]
_Levels = Annotated[int, typer.Option("--levels", min=1, help="Generations.")]
_DirtyLevel = Annotated[str, typer.Option("--dirty", metavar="SIZE", help="Memory that each level fills.")]
_QUICK_MEMORY = (256 * MIB,)
_TABLE_WIDTH = 150  # columns; a narrower terminal wraps


@app.command("fan-out")
def fan_out(
    *,
    image: _Image = "debian",
    kernel: _Kernel = None,
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
    network: _Network = None,
    home: _Home = None,
    vmm: _Vmm = None,
    accel: _Accel = "auto",
    as_json: _Json = False,
) -> None:
    """Time until N machines answer: cold boot, copying forks, and shared forks, interleaved in one
    run.
    """
    plan = FanOutPlan(
        image=image,
        kernel=kernel,
        network=network,
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
    results = _Results(fan_out_table, plot_fan_out, output, plot)
    _measure(_on(home, accel, as_json, vmm), lambda host, say: measure_fan_out(host, plan, say), results)


@app.command("capture")
def capture(
    *,
    image: _Image = "debian",
    kernel: _Kernel = None,
    memory: _Memory,
    dirty: _Dirty,
    rounds: _Rounds = 5,
    output: _Output = None,
    plot: _Plot = None,
    quick: _Quick = False,
    home: _Home = None,
    accel: _Accel = "auto",
    as_json: _Json = False,
) -> None:
    """Total and pause time of a standby, for a booted machine and for forks with dirty memory."""
    plan = CapturePlan(
        image=image,
        kernel=kernel,
        memory_bytes=_sizes(memory),
        dirty_bytes=tuple(map(parse_size, dirty)),
        rounds=rounds,
    )
    if quick:
        plan = msgspec.structs.replace(plan, memory_bytes=_QUICK_MEMORY, dirty_bytes=(0, MIB), rounds=1)
    results = _Results(capture_table, plot_capture, output, plot)
    _measure(_on(home, accel, as_json), lambda host, say: measure_capture(host, plan, say), results)


@app.command("tree")
def tree(
    *,
    image: _Image = "debian",
    kernel: _Kernel = None,
    memory: _TreeMemory,
    levels: _Levels = 6,
    dirty: _DirtyLevel = "16M",
    rounds: _Rounds = 3,
    output: _Output = None,
    quick: _Quick = False,
    home: _Home = None,
    accel: _Accel = "auto",
    as_json: _Json = False,
) -> None:
    """Disk, page cache and time of generations of forks: layered memory, and whole mem-files."""
    plan = TreePlan(
        image=image,
        kernel=kernel,
        memory_bytes=_sizes(memory),
        levels=levels,
        dirtied_bytes=parse_size(dirty),
        rounds=rounds,
    )
    if quick:
        plan = msgspec.structs.replace(plan, memory_bytes=_QUICK_MEMORY, levels=2, dirtied_bytes=MIB, rounds=1)
    results = _Results(tree_table, None, output, None)
    _measure(_on(home, accel, as_json), lambda host, say: measure_tree(host, plan, say), results)


def _sizes(texts: list[str]) -> tuple[int, ...]:
    sizes = tuple(map(parse_size, texts))
    for size in sizes:
        check_machine(1, size, 1 << 30)
    return sizes


class _Results(NamedTuple, Generic[R]):
    """The destinations of a report."""

    table: Callable[[R], Table]
    draw: Callable[[R, Path], None] | None
    output: Path | None
    plot: Path | None


def _on(home: Path | None, accel: str, as_json: bool, vmm: str | None = None) -> Cli:
    """Return the host to measure on. No background work runs during the measurement."""
    return Cli(home=home, vmm=vmm, accel=accel, json=as_json, background="off", host_factory=open_host)


def _measure(cli: Cli, run: Callable[[AsyncHost, Say], Awaitable[R]], results: _Results[R]) -> None:
    for path in (results.output, results.plot):  # checked before twenty minutes of measuring
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"there is no directory {path.parent}", hint=f"run `mkdir -p {path.parent}`")
    status = Console(stderr=True)
    report = cli.call(
        lambda host: run(AsyncHost(backend=host), lambda line: status.print(line, style="dim", highlight=False))
    )
    if results.output is not None:
        write_report(report, results.output)
    if results.plot is not None and results.draw is not None:
        results.draw(report, results.plot)
    cli.show(report, lambda: Console(width=max(Console().width, _TABLE_WIDTH)).print(results.table(report)))
