"""Several processes work on one real source at once: some order explains all outcomes, no call
waits for ever, and every remaining machine is whole.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.model import Instance, State
from coppice.requests import ExecRequest, ForkRequest, InspectRequest, LsRequest, RestoreRequest, RmRequest
from fakes.hosting import assert_tidy
from histories import FORKS, SOURCE, Call, World, explained, told
from history_pool import Processes
from machines import ask, digest, mem_file

PROCESSES, CALLS = 3, 12


def history(rng: random.Random) -> list[Call]:
    """Return the calls of one process.

    None removes the source, so that all calls have something to work on.
    """
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
async def test_three_processes_work_on_one_source(home: Path, host: AsyncHost, template: Instance, seed: int) -> None:
    """After parallel promotions, demotions, standbys, restores, forks and removals, each remaining
    machine answers with its name and its memory.
    """
    before = await digest(mem_file(host, template))
    others = {vm.name for vm in await host.call(LsRequest())}
    await host.call(ForkRequest(instance=template.id, names=[SOURCE], target=State.STANDBY, atomic=True))
    rng = random.Random(seed)
    histories = [history(rng) for _ in range(PROCESSES)]
    try:
        with Processes(PROCESSES, deadline_s=200.0) as processes:
            done = await asyncio.to_thread(processes.run, home, histories)
        found = {vm.name: vm for vm in await host.call(LsRequest()) if vm.name not in others}
        last = World(source=found[SOURCE].state.value, forks=frozenset(found.keys() - {SOURCE}))
        assert explained(World(source="Standby"), done, last), f"seed {seed}, to {last}\n{told(done)}"
        await assert_tidy(host, *others, *found)
        for vm in found.values():
            if vm.state is State.TEMPLATE:
                assert (await host.call(InspectRequest(instance=vm.id))).fork_count == len(last.forks)
                continue
            await host.call(RestoreRequest(instance=vm.id))
            assert (await host.call(ExecRequest(instance=vm.id, argv=["hostname"]))).stdout.decode().strip() == vm.name
            assert await ask(host, vm, "1 + 2") == "3"
        assert await digest(mem_file(host, template)) == before
    finally:
        for vm in reversed([vm for vm in await host.call(LsRequest()) if vm.name not in others]):
            await host.call(RmRequest(instance=vm.id))
