"""What a server adds to a fork: by HTTP on TCP with a token, against the library in this process.

    python -m bench.server --home DIR --image IMAGE --output benchmarks/server.json

Both make the same forks of one template in turn, in one run. Compare figures within one run only.
CPU time is that of the client and of the server, without the VMMs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from bench.accounting import host_facts
from bench.records import HostFacts, write_report
from coppice.client import AsyncHost
from coppice.client.connecting import connect_async
from coppice.model import Record, State
from coppice.requests import ForkRequest, RmRequest
from coppice.server.auth import load_key, make_token

_TEMPLATE = "server-bench"
_START_S = 60.0


class Cost(Record, frozen=True, kw_only=True):
    """Milliseconds of one fork. `outside_median_ms` is the part of the wall time before and after the fork itself,
    which a busy host disturbs least.
    """

    wall_median_ms: float
    wall_least_ms: float
    outside_median_ms: float
    cpu_mean_ms: float
    wall_samples_ms: tuple[float, ...]


class Compared(Record, frozen=True, kw_only=True):
    """Forks to one state. `added_wall_ms` is the median of the differences of neighbours."""

    library: Cost
    http: Cost
    added_wall_ms: float
    added_outside_ms: float
    added_cpu_ms: float


class ServerReport(Record, frozen=True, kw_only=True):
    """Figures by the state of the forks."""

    host: HostFacts
    samples: int
    forks: dict[str, Compared]


@contextlib.asynccontextmanager
async def serving(home: Path) -> AsyncIterator[tuple[int, str]]:
    """Run `coppice serve` for a block. Yield its process id and its address."""
    command = (
        sys.executable,
        "-m",
        "coppice",
        "--home",
        str(home),
        "serve",
        "--spares",
        "0",
        "--listen",
        "127.0.0.1:0",
    )
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        if process.stdout is None:
            raise AssertionError("the output is a pipe")
        async with asyncio.timeout(_START_S):
            line = (await process.stdout.readline()).decode()
        yield process.pid, line.split()[-1]
    finally:
        process.terminate()
        await process.wait()


def cpu_ms_of(pid: int) -> float:
    """Return the CPU time so far of the threads of a process."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in threads) / 1e6


async def compare(library: AsyncHost, http: AsyncHost, server: int, target: State, samples: int) -> Compared:
    """Fork in turn by both ways, and remove each fork."""
    walls: dict[str, list[float]] = {"library": [], "http": []}
    outside: dict[str, list[float]] = {"library": [], "http": []}
    cpus: dict[str, float] = {"library": 0.0, "http": 0.0}

    async def fork(way: str, host: AsyncHost, spent: Callable[[], float], name: str) -> None:
        begin, before = time.perf_counter(), spent()
        report = await host.call(ForkRequest(instance=_TEMPLATE, names=[name], target=target))
        walls[way].append((time.perf_counter() - begin) * 1000)
        cpus[way] += spent() - before
        outside[way].append(walls[way][-1] - report.wall_ms)
        if not report.succeeded:
            raise RuntimeError(report.results[0].error)
        await library.call(RmRequest(instance=name))

    def own() -> float:
        return time.process_time() * 1000

    ways: list[Callable[[str], Awaitable[None]]] = [
        lambda name: fork("library", library, own, name),
        lambda name: fork("http", http, lambda: own() + cpu_ms_of(server), name),
    ]
    for number in range(samples + 2):
        for way in ways if number % 2 else reversed(ways):  # each begins as often as the other
            await way(f"{_TEMPLATE}-{number}")
        if number == 1:  # two of each to warm up
            for each in walls:
                walls[each].clear()
                outside[each].clear()
                cpus[each] = 0.0
    costs = {
        way: Cost(
            wall_median_ms=round(statistics.median(walls[way]), 2),
            wall_least_ms=round(min(walls[way]), 2),
            outside_median_ms=round(statistics.median(outside[way]), 2),
            cpu_mean_ms=round(cpus[way] / samples, 2),
            wall_samples_ms=tuple(round(each, 2) for each in walls[way]),
        )
        for way in walls
    }
    differences = [http_ms - library_ms for http_ms, library_ms in zip(walls["http"], walls["library"], strict=True)]
    return Compared(
        library=costs["library"],
        http=costs["http"],
        added_wall_ms=round(statistics.median(differences), 2),
        added_outside_ms=round(costs["http"].outside_median_ms - costs["library"].outside_median_ms, 2),
        added_cpu_ms=round(costs["http"].cpu_mean_ms - costs["library"].cpu_mean_ms, 2),
    )


async def measure(home: Path, image: str, samples: int) -> ServerReport:
    """Make a template, compare, and remove it."""
    async with AsyncHost(home, spares=0) as library:
        facts = await host_facts(library)
        template = await (await library.run(image, name=_TEMPLATE, memory_bytes=128 << 20)).freeze()
        try:
            async with serving(home) as (pid, address):
                token = make_token(load_key(home), owner=None)
                async with connect_async(address, token=token) as http:
                    forks = {
                        str(target): await compare(library, http, pid, target, samples)
                        for target in (State.STANDBY, State.RUNNING)
                    }
        finally:
            await template.rm()
    return ServerReport(host=facts, samples=samples, forks=forks)


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description="What a server adds to a fork.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--image", default="debian")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report = asyncio.run(measure(options.home, options.image, options.samples))
    for target, found in report.forks.items():
        sys.stdout.write(
            f"{target}: {found.added_wall_ms:+.1f} ms wall ({found.added_outside_ms:+.1f} ms outside of the fork itself), "
            f"{found.added_cpu_ms:+.1f} ms CPU by HTTP\n"
        )
    if options.output is not None:
        write_report(report, options.output)


if __name__ == "__main__":
    main()
