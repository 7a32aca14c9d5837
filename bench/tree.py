"""The tree benchmark: generations of forks, each of which dirties memory and is captured.

Each tree is grown by two methods in one run, level by level in turns, and several times: with layered
memory, and with whole mem-files, as for a VMM that cannot map layers.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench import accounting
from bench.records import Level, Tree, TreeReport
from bench.trial import Guest, Say, answer, dirty, make_template, tagged
from coppice.client import AsyncHost, AsyncMachine
from coppice.machine import directory as directories
from coppice.model import GIB, MIB, Record
from coppice.vmm.driver import Capabilities, VmmDriver

METHODS = ("layers", "whole files")


class TreePlan(Record, frozen=True, kw_only=True):
    """The plan. Each level is a fork of the level above, captured after it has dirtied memory."""

    image: str
    kernel: str | None = None  # key of a guest kernel; None is Debian's
    memory_bytes: tuple[int, ...] = (512 * MIB, 4 * GIB)
    levels: int = 6
    dirtied_bytes: int = 16 * MIB
    rounds: int = 3


async def measure_tree(host: AsyncHost, plan: TreePlan, say: Say) -> TreeReport:
    """Run the whole plan. All its machines are removed, also on failure.

    :raises NotFound: there is no such image
    """
    facts = await accounting.host_facts(host)
    trees: list[Tree] = []
    guest_kernel = ""
    for memory_bytes in plan.memory_bytes:
        async with tagged(host) as tags:
            say(f"{memory_bytes // MIB} MiB: booting the template")
            guest = Guest(image=plan.image, kernel=plan.kernel, memory_bytes=memory_bytes)
            template = await make_template(host, guest, tags)
            guest_kernel = template.record.machine.kernel
            levels: dict[str, list[list[Level]]] = {method: [[] for _ in range(plan.levels)] for method in METHODS}
            for round_number, number in itertools.product(range(1, plan.rounds + 1), range(1, plan.levels + 1)):
                if number == 1:
                    latest = dict.fromkeys(METHODS, template)
                for method in METHODS:
                    with _memory_as(host, method):
                        latest[method], level = await _grow(host, latest[method], plan.dirtied_bytes, number, tags)
                    levels[method][number - 1].append(level)
                    say(
                        f"{memory_bytes // MIB} MiB, {method}, round {round_number}, level {number} of {plan.levels}: "
                        f"{level.dirty_bytes / MIB:.1f} MiB dirty, {level.written_bytes / MIB:.1f} MiB written, "
                        f"fork {level.fork_ms:.0f} ms, capture {level.capture_ms:.0f} ms"
                    )
            trees += [
                await _measure(host, method, memory_bytes, template, list(map(_median, levels[method])), latest[method])
                for method in METHODS
            ]
    return TreeReport(
        host=facts,
        image=plan.image,
        guest_kernel=guest_kernel,
        dirtied_bytes=plan.dirtied_bytes,
        trees=tuple(trees),
    )


def _median(rounds: list[Level]) -> Level:
    """Return a level with the median times of all rounds, and what the last one wrote."""
    times = {
        name: statistics.median(getattr(level, name) for level in rounds)
        for name in ("fork_ms", "answered_ms", "pause_ms", "capture_ms")
    }
    return msgspec.structs.replace(
        rounds[-1],
        **times,
        fork_samples_ms=tuple(level.fork_ms for level in rounds),
        capture_samples_ms=tuple(level.capture_ms for level in rounds),
    )


@contextlib.contextmanager
def _memory_as(host: AsyncHost, method: str) -> Iterator[None]:
    """Use the host's driver as it is, or as one that cannot map layers."""
    drivers = host.local.rooms.drivers
    real = drivers.chosen
    if method == "whole files":
        drivers.choose(_without_layers(real))
    try:
        yield
    finally:
        drivers.choose(real)


def _without_layers(driver: VmmDriver) -> VmmDriver:
    able = msgspec.structs.replace(driver.capabilities, maps_layers=False)

    def capabilities(_: VmmDriver) -> Capabilities:
        return able

    unable = copy.copy(driver)
    unable.__class__ = type("Unable", (type(driver),), {"capabilities": property(capabilities)})
    return unable


async def _grow(
    host: AsyncHost, parent: AsyncMachine, dirtied_bytes: int, number: int, tags: dict[str, str]
) -> tuple[AsyncMachine, Level]:
    """Fork, dirty, capture; return the captured machine."""
    begin = time.perf_counter()
    machine = await parent.fork_one(tags=tags)
    fork_ms = (time.perf_counter() - begin) * 1000
    await answer(machine)
    answered_ms = (time.perf_counter() - begin) * 1000
    await dirty(machine, dirtied_bytes)
    report = await machine.standby()
    capture = machine.record.capture
    if capture is None:
        raise AssertionError("a machine in standby has a capture")
    newest = directories.memory_paths(host.local.rooms.directory(machine.id), capture)[-1]
    return machine, Level(
        number=number,
        fork_ms=fork_ms,
        answered_ms=answered_ms,
        pause_ms=report.pause_ms,
        capture_ms=report.total_ms,
        dirty_bytes=report.dirty_bytes,
        written_bytes=report.ram_bytes_written,
        file_bytes=newest.stat().st_blocks * 512,
        extents=capture.layers[-1].extents if capture.layers else 0,
        layers=len(capture.layers),
    )


async def _measure(
    host: AsyncHost, method: str, memory_bytes: int, template: AsyncMachine, levels: list[Level], last: AsyncMachine
) -> Tree:
    """Count what the tree has on disk and in the page cache, from its last machine up to the template."""
    files: dict[int, Path] = {}
    base = host.local.rooms.directory(template.id) / "memory"
    machine = last
    while machine.id != template.id:
        capture, directory = machine.record.capture, host.local.rooms.directory(machine.id)
        if capture is None or machine.record.parent is None:
            raise AssertionError("each machine of the tree was captured, and is a fork")
        files |= {path.stat().st_ino: path for path in directories.memory_paths(directory, capture)}
        machine = await host.get(machine.record.parent)
    files[base.stat().st_ino] = base
    return Tree(
        method=method,
        memory_bytes=memory_bytes,
        base_bytes=base.stat().st_blocks * 512,
        disk_bytes=sum(path.stat().st_blocks * 512 for path in files.values()),
        cached_bytes=sum(accounting.cached_bytes(path) for path in files.values()),
        levels=tuple(levels),
    )
