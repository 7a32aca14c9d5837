"""The cost of a fork on a real Firecracker: the time until a command has ended, and memory.

The log has the figures (`--log-cli-level=INFO`).
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from bench import accounting
from coppice.client import AsyncHost
from coppice.machine import activate
from coppice.model import MIB, Instance, State
from coppice.model.kernel import Kernel
from coppice.requests import PromoteRequest, RunRequest, StandbyRequest
from coppice.vmm import program as programs
from coppice.vmm.firecracker import api, config, driver
from coppice.vmm.firecracker import host as firecracker_host

_log = logging.getLogger(__name__)
MOST_MEMORY = 8 * MIB
ROUNDS = 9

pytestmark = [pytest.mark.quiet, pytest.mark.timeout(300)]


@pytest.fixture
async def small(host: AsyncHost, image: str, kernel: Kernel) -> AsyncIterator[Instance]:
    """A template of 256 MiB in which only a `sleep` runs."""
    vm = await host.call(
        RunRequest(
            image=image,
            command=["sleep", "infinity"],
            name="small",
            memory_bytes=256 * MIB,
            kernel=kernel.key,
            network="none",
        )
    )
    await (await host.get(vm.id)).exec(["true"])
    await host.call(StandbyRequest(instance=vm.id))
    yield await host.call(PromoteRequest(instance=vm.id))
    await (await host.get(vm.id)).rm()


async def test_the_time_and_memory_of_forks(host: AsyncHost, small: Instance) -> None:
    """One fork, then 16 and 64 in parallel: all answer, and each costs little memory."""
    template = await host.get(small.id)
    for count in (1, 16, 64):
        walls = []
        memory: list[float] = []
        for _ in range(ROUNDS if count == 1 else 3):
            before = accounting.available_bytes()
            begin = time.perf_counter()
            async with template.fork(count, atomic=True) as forks:
                codes = [result.exit_code for result in await asyncio.gather(*(fork.exec(["true"]) for fork in forks))]
                walls.append((time.perf_counter() - begin) * 1000)
                memory.append((before - accounting.available_bytes()) / count)
                assert codes == [0] * count
                assert all(fork.record.state is State.RUNNING for fork in forks)
        _log.info(
            "%s",
            f"{count} at once: p50 {statistics.median(walls):.0f} ms, {statistics.median(memory) / MIB:.1f} MiB each",
        )
        if count > 1:
            assert statistics.median(memory) <= MOST_MEMORY


async def test_the_steps_of_a_restore(host: AsyncHost, small: Instance) -> None:
    """Measure two steps apart from all else: from spawn to API socket, and load with resume; and the CPU
    time of this process for the first of them.
    """
    rooms = host.local.rooms
    spawns, loads, spent = [], [], []
    for _ in range(ROUNDS):
        (fork,) = await (await host.get(small.id)).fork(1, target=State.STANDBY)
        record = (await host.get(fork.record.id)).record
        assert record.capture is not None
        launch = await activate.launch(rooms, msgspec.structs.replace(record, manifest=record.capture.manifest))
        begin, begin_cpu = time.perf_counter(), time.process_time()
        process = await asyncio.to_thread(driver.start, launch, firecracker_host.program())
        spawned = time.perf_counter()
        spent.append((time.process_time() - begin_cpu) * 1000)
        release = programs.release(launch.manifest.vmm_version)
        await api.ask(launch.directory, *config.restore(launch, release, paused=False))
        loads.append((time.perf_counter() - spawned) * 1000)
        spawns.append((spawned - begin) * 1000)
        await driver.FirecrackerDriver().quit(launch.directory, process)
        await fork.rm()
    _log.info(
        "%s",
        f"spawn to API socket p50 {statistics.median(spawns):.1f} ms, of which this process has used "
        f"{statistics.median(spent):.1f} ms of CPU; load with resume {statistics.median(loads):.1f} ms",
    )
