"""Throughput of guests' networks between two namespaces: `--network nat` compared with user mode.

    python -m bench.network --home DIR [--output benchmarks/network.json]

The guest's VMM, its slot and their host are in one namespace; iperf3's server is in another, behind
a veth pair. This host's own network is not changed. Needs root, and iperf3 on this host; an image
with iperf3 is built for the guest. The networks take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pyroute2 import IPRoute

from bench import accounting
from bench.records import HostFacts, write_report
from bench.trial import tagged
from coppice.client import AsyncHost, AsyncMachine
from coppice.errors import GuestError, NotFound
from coppice.linux import netns
from coppice.model import MIB, Record
from coppice.names import new_name

IMAGE = "debian-iperf3"
NETWORKS = ("user", "nat")
HOST, WORLD = "203.0.113.1", "203.0.113.2"
Direction = Literal["sent", "received"]


class Throughput(Record, frozen=True, kw_only=True):
    """One network in one direction, as seen by the guest, with one TCP connection per sample."""

    network: str
    direction: Direction
    median_mbit_s: float
    samples_mbit_s: tuple[float, ...]


class NetworkReport(Record, frozen=True, kw_only=True):
    """One run."""

    schema: Literal["coppice.bench.network/1"] = "coppice.bench.network/1"
    host: HostFacts
    seconds: int  # per sample
    throughput: tuple[Throughput, ...]
    ratios: dict[Direction, float]  # nat divided by user mode


@contextlib.contextmanager
def world() -> Iterator[None]:
    """Make two namespaces, a host and the world outside it.

    This process moves to the host's namespace, and an iperf3 server runs in the world's.
    """
    host, beyond = (netns.RUNTIME / f"cpbench-{os.getpid()}-{name}" for name in ("host", "world"))
    server: subprocess.Popen[bytes] | None = None
    try:
        netns.create(beyond, lambda: None)
        netns.create(host, lambda: _connect(beyond))
        netns.apart(beyond, lambda: _address("eth0", WORLD))
        server = netns.apart(beyond, _serve)
        netns.enter(host)
        yield
    finally:
        if server is not None:
            server.kill()
            server.wait()
        netns.remove(host)
        netns.remove(beyond)


def _connect(beyond: Path) -> None:
    descriptor = os.open(beyond, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with IPRoute() as kernel:
            kernel.link("add", ifname="up0", kind="veth", peer={"ifname": "eth0", "net_ns_fd": descriptor})
    finally:
        os.close(descriptor)
    _address("lo", None)
    _address("up0", HOST)
    with IPRoute() as kernel:
        kernel.route("add", dst="default", gateway=WORLD)


def _address(name: str, address: str | None) -> None:
    with IPRoute() as kernel:
        (link,) = kernel.link_lookup(ifname=name)
        kernel.link("set", index=link, state="up")
        if address:
            kernel.addr("add", index=link, address=address, prefixlen=24)


def _serve() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["iperf3", "--server"], stdout=subprocess.DEVNULL)


async def build(home: Path) -> None:
    """Make the image unless it exists."""
    async with AsyncHost(home) as host:
        try:
            await host.images.inspect(IMAGE)
        except NotFound:
            await host.images.build(IMAGE, suite="bookworm", include=["iperf3"])


async def measure(home: Path, rounds: int, seconds: int) -> NetworkReport:
    """Measure each network in both directions, in turns.

    :raises GuestError: iperf3 failed in a guest
    """
    taken: dict[tuple[str, Direction], list[float]] = {}
    async with AsyncHost(home, background="off") as host, machines(host) as guests:
        for _ in range(rounds):
            for network, machine in guests.items():
                taken.setdefault((network, "sent"), []).append(await _run(machine, seconds))
                taken.setdefault((network, "received"), []).append(await _run(machine, seconds, "--reverse"))
        facts = await accounting.host_facts(host)
    medians = {key: statistics.median(samples) for key, samples in taken.items()}
    directions: tuple[Direction, ...] = ("sent", "received")
    return NetworkReport(
        host=facts,
        seconds=seconds,
        throughput=tuple(
            Throughput(
                network=network,
                direction=direction,
                median_mbit_s=round(medians[network, direction], 1),
                samples_mbit_s=tuple(round(sample, 1) for sample in samples),
            )
            for (network, direction), samples in taken.items()
        ),
        ratios={each: round(medians["nat", each] / medians["user", each], 2) for each in directions},
    )


@contextlib.asynccontextmanager
async def machines(host: AsyncHost) -> AsyncIterator[dict[str, AsyncMachine]]:
    """Yield one machine per network, for the length of a block."""
    async with tagged(host) as tags:
        yield {
            network: await host.run(
                IMAGE, ["sleep", "infinity"], name=new_name(network), memory_bytes=256 * MIB, network=network, tags=tags
            )
            for network in NETWORKS
        }


async def _run(machine: AsyncMachine, seconds: int, *words: str) -> float:
    argv = ["iperf3", "--client", WORLD, "--json", "--time", str(seconds), *words]
    result = await machine.exec(argv, timeout_s=seconds + 60)
    if result.exit_code:
        raise GuestError(
            f"iperf3 failed in {machine.name}: {result.stdout.decode(errors='replace')[-500:]}",
            hint="see iperf3's message above",
        )
    return float(json.loads(result.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="data directory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="seconds per sample")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    asyncio.run(build(options.home))
    with world():
        report = asyncio.run(measure(options.home, options.rounds, options.seconds))
    for row in report.throughput:
        sys.stdout.write(f"{row.network:5} {row.direction:9} {row.median_mbit_s:9.1f} Mbit/s\n")
    sys.stdout.write("".join(f"nat to user mode, {each}: {ratio}\n" for each, ratio in report.ratios.items()))
    if options.output:
        write_report(report, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
