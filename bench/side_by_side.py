"""Two checkouts of Coppice, measured in turns: CPU time of the host per operation, and of commands.

    python -m bench.side_by_side --before DIR --home DIR --image IMAGE --output benchmarks/host-cpu-side-by-side.json

Runs `bench.host_cpu` and `bench.client_cpu` of the checkout DIR and of this one, alternately. The speed
of a shared host changes from minute to minute. So each figure is a ratio: of a host's operation to a
fixed loop in the same process, and of a command to `python -c 'import asyncio'` in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.client_cpu import ClientCpuReport
from bench.host_cpu import HostCpuReport
from bench.records import HostFacts, write_report
from coppice.model import Record

_HERE = Path(__file__).parents[1]
_ASYNCIO = "python -c 'import asyncio'"
Ratios = dict[str, list[float]]


class Compared(Record, frozen=True, kw_only=True):
    """Medians over all rounds."""

    before: float
    after: float


class SideBySide(Record, frozen=True, kw_only=True):
    """Figures of both checkouts, by operation and number of other instances, and by command."""

    facts: HostFacts | None
    rounds: int
    loop_ms: Compared  # CPU time of the fixed loop: the speed of this machine
    host_ms: dict[str, Compared]  # CPU time of an operation
    host: dict[str, Compared]  # CPU time of an operation, as a share of a fixed loop
    forks_per_second: dict[str, Compared]  # Standby forks in one request; not a ratio
    commands: dict[str, Compared]  # CPU time of a command, as a multiple of importing asyncio
    raw: dict[str, tuple[HostCpuReport, ...]]  # the report of each round, before and after


def ran(tree: Path, module: str, arguments: Sequence[str]) -> bytes:
    """Run a benchmark of a checkout, and return its report."""
    env = {**os.environ, "PYTHONPATH": f"{tree / 'src'}:{tree}"}
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "report.json"
        command = [sys.executable, "-m", module, *arguments, "--output", str(output)]
        subprocess.run(command, env=env, cwd=tree, check=True, stdout=subprocess.DEVNULL)
        return output.read_bytes()


def host_figures(report: HostCpuReport) -> tuple[Ratios, Ratios]:
    """Return CPU milliseconds and forks per second, by what was measured."""
    spent_ms: Ratios = {}
    rates: Ratios = {}
    for others, spent in report.spent.items():
        for name, each in spent.items():
            spent_ms[f"{name}, {others} others"] = [each.median_ms]
        for batch in report.batches[others]:
            what = f"{batch.count} Standby forks, {others} others"
            spent_ms[f"each of {what}"] = [batch.cpu_ms_per_fork]
            rates[what] = [batch.forks_per_second]
    return spent_ms, rates


def shares(report: HostCpuReport) -> Ratios:
    """Return the CPU times as shares of the fixed loop."""
    return {name: [each / report.loop_ms for each in values] for name, values in host_figures(report)[0].items()}


def command_ratios(report: ClientCpuReport) -> Ratios:
    """Return the CPU times of commands as multiples of importing asyncio."""
    unit = report.costs[_ASYNCIO].median_ms
    return {name: [cost.median_ms / unit] for name, cost in report.costs.items() if name.startswith("coppice")}


def compared(before: Sequence[Ratios], after: Sequence[Ratios]) -> dict[str, Compared]:
    """Return the medians of what both checkouts measured."""

    def median(rounds: Sequence[Ratios], name: str) -> float:
        return round(statistics.median(value for each in rounds for value in each[name]), 4)

    names = [name for name in after[0] if name in before[0]]
    return {name: Compared(before=median(before, name), after=median(after, name)) for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both checkouts in turns, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout, with its compiled parts")
    parser.add_argument("--home", required=True, help="data directory with the image")
    parser.add_argument("--before-home", help="that of the other checkout, if its schema is an older one")
    parser.add_argument("--image", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=5, help="of each round")
    parser.add_argument("--batches", type=int, nargs="*", default=[100])
    parser.add_argument("--no-commands", action="store_true", help="measure the host alone")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    homes = {options.before: options.before_home or options.home, _HERE: options.home}
    hosts: dict[Path, list[HostCpuReport]] = {}
    commands: dict[Path, list[Ratios]] = {}
    for _ in range(options.rounds):
        for tree in (options.before, _HERE):
            where = ["--home", homes[tree], "--image", options.image, "--samples", str(options.samples)]
            host = ran(tree, "bench.host_cpu", [*where, "--batches", *map(str, options.batches)])
            hosts.setdefault(tree, []).append(msgspec.json.decode(host, type=HostCpuReport))
            if options.no_commands:
                continue
            client = ran(tree, "bench.client_cpu", where)
            commands.setdefault(tree, []).append(command_ratios(msgspec.json.decode(client, type=ClientCpuReport)))
    before, after = hosts[options.before], hosts[_HERE]
    report = SideBySide(
        facts=after[0].host,
        rounds=options.rounds,
        loop_ms=compared([{"": [each.loop_ms]} for each in before], [{"": [each.loop_ms]} for each in after])[""],
        host_ms=compared([host_figures(each)[0] for each in before], [host_figures(each)[0] for each in after]),
        host=compared([shares(each) for each in before], [shares(each) for each in after]),
        forks_per_second=compared(
            [host_figures(each)[1] for each in before], [host_figures(each)[1] for each in after]
        ),
        raw={"before": tuple(before), "after": tuple(after)},
        commands={} if options.no_commands else compared(commands[options.before], commands[_HERE]),
    )
    for figures in (report.host_ms, report.forks_per_second, report.commands):
        for name, each in figures.items():
            sys.stdout.write(f"{name:40} before {each.before:8.3f}  after {each.after:8.3f}\n")
    if options.output:
        write_report(report, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
