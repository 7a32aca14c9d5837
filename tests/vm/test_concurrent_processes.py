"""Several processes work on one real source at once: what each is told is explained by some order, nobody waits for ever, and all that is left is whole."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from coppice.host import AsyncHost
from coppice.model import Instance, State
from fakes.hosting import assert_tidy
from histories import FORKS, SOURCE, Call, World, explained, told
from history_pool import Processes
from machines import ask, digest, mem_file

PROCESSES, CALLS = 3, 12


def history(rng: random.Random) -> list[Call]:
    """What one process is to do; no source is removed, so that there is something to do to the end."""
    about_source = ("promote", "demote", "standby", "restore", "restore", "get")
    about_forks = ("fork", "fork", "rm")
    return [
        Call(what=rng.choice(about_source))
        if rng.random() < 0.6
        else Call(what=rng.choice(about_forks), name=rng.choice(FORKS))
        for _ in range(CALLS)
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
async def test_real_machines_in_three_hands(home: Path, host: AsyncHost, template: Instance, seed: int) -> None:
    """Promote, demote, standby, restore, fork and remove, all at once; then every survivor answers as itself, with the memory that it was grown from."""
    before = await digest(mem_file(host, template))
    others = {vm.name for vm in await host.ls()}
    await host.fork(template, names=[SOURCE], target=State.STANDBY, atomic=True)
    rng = random.Random(seed)
    histories = [history(rng) for _ in range(PROCESSES)]
    try:
        with Processes(PROCESSES, deadline_s=200.0) as processes:
            done = await asyncio.to_thread(processes.run, home, histories)
        found = {vm.name: vm for vm in await host.ls() if vm.name not in others}
        last = World(source=found[SOURCE].state.value, forks=frozenset(found.keys() - {SOURCE}))
        assert explained(World(source="Standby"), done, last), f"seed {seed}, to {last}\n{told(done)}"
        await assert_tidy(host, *others, *found)
        for vm in found.values():
            if vm.state is State.TEMPLATE:
                assert (await host.inspect(vm)).fork_count == len(last.forks)
                continue
            await host.restore(vm)
            assert (await host.exec(vm, ["hostname"])).stdout.decode().strip() == vm.name
            assert await ask(host, vm, "1 + 2") == "3"
        assert await digest(mem_file(host, template)) == before
    finally:
        for vm in reversed([vm for vm in await host.ls() if vm.name not in others]):
            await host.rm(vm)
