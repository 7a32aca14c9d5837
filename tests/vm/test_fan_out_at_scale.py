"""Many forks at once, and how fast: ratios within one run, since the machine is shared."""

from __future__ import annotations

import asyncio
import statistics
import time

import pytest

from coppice.host import AsyncHost
from coppice.model import GIB, MIB, Instance
from machines import WARM_SERVER, ask, mem_file, warm_up

FORK_LIMIT_MS = 300
BOOT_RATIO = 10  # a guard with room for a noisy machine: 13 to 17 was seen, see docs/benchmarks.md
RAM_RATIO = 1.2


async def fork_and_answer(host: AsyncHost, source: Instance) -> float:
    """Milliseconds from the call to a command's answer in a new fork; the fork is removed."""
    begin = time.perf_counter()
    (fork,) = (await host.fork(source, atomic=True)).instances
    try:
        assert (await host.exec(fork, ["/bin/true"])).exit_code == 0
        return (time.perf_counter() - begin) * 1000
    finally:
        await host.rm(fork)


async def boot_and_answer(host: AsyncHost, image: str, memory_bytes: int) -> tuple[Instance, float]:
    """A machine without a warm process, and milliseconds from the call to a command's answer in it."""
    begin = time.perf_counter()
    vm = await host.run(image, ["sleep", "infinity"], memory_bytes=memory_bytes)
    assert (await host.exec(vm, ["/bin/true"])).exit_code == 0
    return vm, (time.perf_counter() - begin) * 1000


async def template_of(host: AsyncHost, vm: Instance) -> Instance:
    await host.standby(vm)
    return await host.promote(vm)


@pytest.mark.quiet
@pytest.mark.timeout(600)
async def test_a_fork_is_fast_and_does_not_grow_with_ram(host: AsyncHost, image: str) -> None:
    """Fork to answered, against a cold boot of an empty machine; a guest of 4 GiB forks within 1.2x of one of 256 MiB.

    Ratios within the run, and of absolute times the best: the machine is shared, and a median of milliseconds says as much of the neighbours. What the
    medians are on a quiet machine is in docs/benchmarks.md.
    """
    first, boot_ms = await boot_and_answer(host, image, 256 * MIB)
    second, _ = await boot_and_answer(host, image, 4 * GIB)
    small, large = await template_of(host, first), await template_of(host, second)
    boots = [boot_ms]
    forks: dict[str, list[float]] = {small.name: [], large.name: []}
    try:
        for _ in range(3):  # interleaved: what else the machine does hits all alike
            for _ in range(7):
                for source in (small, large):
                    forks[source.name].append(await fork_and_answer(host, source))
            vm, boot_ms = await boot_and_answer(host, image, 256 * MIB)
            boots.append(boot_ms)
            await host.rm(vm)
        boot, fork, fork_large = (statistics.median(times) for times in (boots, forks[small.name], forks[large.name]))
        told = f"p50: cold boot {boot:.0f} ms, fork {fork:.0f} ms, fork of 4 GiB {fork_large:.0f} ms"
        print(told)  # noqa: T201  (shown with the failure)
        assert min(forks[small.name]) <= FORK_LIMIT_MS, told
        assert boot / fork >= BOOT_RATIO, told
        assert fork_large <= RAM_RATIO * fork, told
    finally:
        await asyncio.gather(host.rm(small), host.rm(large))


@pytest.mark.quiet
@pytest.mark.timeout(600)
async def test_a_fork_saves_the_boot_and_the_warm_up(host: AsyncHost, image: str) -> None:
    """From the call to the answer of a process that has numpy loaded: a fork is many times faster than a cold boot with its warm-up."""
    begin = time.perf_counter()
    source = await host.run(image, ["python3", "-c", WARM_SERVER], memory_bytes=256 * MIB)
    await warm_up(host, source)
    cold_ms = (time.perf_counter() - begin) * 1000
    await template_of(host, source)
    forks: list[float] = []
    for number in range(9):
        begin = time.perf_counter()
        (fork,) = (await host.fork(source, atomic=True)).instances
        assert await ask(host, fork, f"int(numpy.arange({number + 1}).sum())") == str(number * (number + 1) // 2)
        forks.append((time.perf_counter() - begin) * 1000)
        await host.rm(fork)
    await host.rm(source)
    told = f"cold boot and warm-up {cold_ms:.0f} ms, fork p50 {statistics.median(forks):.0f} ms"
    print(told)  # noqa: T201  (shown with the failure)
    assert cold_ms / statistics.median(forks) >= BOOT_RATIO, told


@pytest.mark.timeout(600)
async def test_sixty_four_forks_alive_together(host: AsyncHost, image: str) -> None:
    """64 forks of a 128 MiB guest are alive together, each answers its own question, and then nothing is left of them."""
    source = await host.run(image, ["python3", "-c", WARM_SERVER.replace(", numpy", "").replace('"numpy": numpy, ', "")],
                            memory_bytes=128 * MIB)  # fmt: skip
    await warm_up(host, source)
    await host.standby(source)
    await host.promote(source)
    report = await host.fork(source, count=64)
    assert [result.error for result in report.results if not result.ok] == []
    forks = report.instances
    assert mem_file(host, source).stat().st_nlink == 65
    assert len({fork.vmm.pid for fork in forks if fork.vmm}) == 64
    asked = asyncio.Semaphore(8)

    async def question(number: int, fork: Instance) -> str:
        async with asked:
            return await ask(host, fork, f"{number} * {number} + os.getpid() * 0")

    answers = await asyncio.gather(*(question(number, fork) for number, fork in enumerate(forks)))
    assert answers == [str(number * number) for number in range(64)]
    assert all(host.rooms.driver.alive(fork.vmm) for fork in forks if fork.vmm)
    await asyncio.gather(*(host.rm(fork) for fork in forks))
    assert mem_file(host, source).stat().st_nlink == 1
    await host.rm(source)
    gone = {instance.id for instance in (*forks, source)}
    layout = host.rooms.layout
    assert not gone & {instance.id for instance in host.rooms.store.instances()}
    assert not gone & {entry.name.strip(".").removesuffix(".removed") for entry in layout.instances.iterdir()}
    assert not gone & {entry.stem for entry in layout.locks.iterdir()}
    assert not gone & {path.name for path in host.rooms.driver.find_orphans(layout.instances)}
