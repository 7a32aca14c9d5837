"""Guests on layered memory compute the right things, at each level of a tree, and what they share never changes."""

from __future__ import annotations

import hashlib
from array import array

import pytest

from coppice.client import AsyncHost
from coppice.linux.files import allocated_bytes
from coppice.machine import directory as directories
from coppice.model import MIB, Instance, Sharing
from coppice.requests import ForkRequest, InspectRequest, RestoreRequest, RmRequest, StandbyRequest
from machines import ask, digest, mem_file

DEPTH = 3
WORDS = 512 << 10  # of 8 bytes each: 4 MiB
HOLD = "os.__dict__.setdefault('held', []).append(numpy.arange({words}, dtype='u8') * {salt}) or len(os.held)"
SUMS = "[__import__('hashlib').sha256(words).hexdigest() for words in os.held]"
CHANGE = "os.held[0].__setitem__(slice(1000, 200000), {salt})"


def model(*salts: int) -> str:
    """What the guest says of memory that it filled with these."""
    return repr([hashlib.sha256(array("Q", (number * salt for number in range(WORDS)))).hexdigest() for salt in salts])


def count(instance: Instance) -> int:
    return len(instance.capture.layers) if instance.capture else -1


@pytest.mark.timeout(300)
async def test_each_level_of_a_tree_has_all_that_was_written_above_it(host: AsyncHost, template: Instance) -> None:
    """Three captures, one upon the other: each writes what it dirtied, and the digests of all memory are right in two forks of each."""
    base = mem_file(host, template)
    before = await digest(base)
    made = template
    grown: list[str] = []
    try:
        for level in range(1, DEPTH + 1):
            (vm,) = (await host.call(ForkRequest(instance=made.id, atomic=True))).instances
            grown.append(vm.id)
            assert await ask(host, vm, HOLD.format(words=WORDS, salt=level)) == str(level)
            done = await host.call(StandbyRequest(instance=vm.id))
            made = done.instance
            assert count(made) == level
            assert done.capture.dirty_bytes >= 4 * MIB
            assert done.capture.ram_bytes_written <= 1.2 * done.capture.dirty_bytes
            assert mem_file(host, made).samefile(base)
            async with (await host.get(made.id)).fork(2, atomic=True) as forks:
                for fork in forks:
                    assert await ask(host, fork, SUMS) == model(*range(1, level + 1))
                    memory = (await host.call(InspectRequest(instance=fork.id))).memory
                    assert memory is not None
                    assert (memory.sharing, memory.layers) == (Sharing.HARDLINK, level)
                    assert memory.unique_bytes < 16 * MIB
        for older in grown[:-1]:
            await host.call(RmRequest(instance=older))
        await host.call(RestoreRequest(instance=made.id))
        assert await ask(host, made, SUMS) == model(*range(1, DEPTH + 1))
        await host.call(StandbyRequest(instance=made.id))
        assert await digest(base) == before
        assert (await host.verify()).differences == ()
    finally:
        for each in reversed(await host.ls()):
            if each.id in grown:
                await each.rm()


@pytest.mark.timeout(300)
async def test_a_running_machine_on_layers_is_forked(host: AsyncHost, vm: Instance) -> None:
    """The fork has the layers of its source and a new one; what the source then changes of its oldest memory, the fork does not see."""
    await ask(host, vm, HOLD.format(words=WORDS, salt=5))
    await host.call(StandbyRequest(instance=vm.id))
    await host.call(RestoreRequest(instance=vm.id))
    await ask(host, vm, HOLD.format(words=WORDS, salt=6))
    async with (await host.get(vm.id)).fork(2, from_running=True, atomic=True) as forks:
        assert [count(fork.record) for fork in forks] == [2, 2]
        await ask(host, vm, CHANGE.format(salt=0))
        for fork in forks:
            assert await ask(host, fork, SUMS) == model(5, 6)
        assert await ask(host, vm, SUMS) != model(5, 6)
    changed = await ask(host, vm, SUMS)
    parked = (await host.call(StandbyRequest(instance=vm.id))).instance
    assert count(parked) == 2
    newest = directories.memory_paths(host.local.rooms.directory(vm.id), parked.capture)[-1] if parked.capture else None
    assert newest is not None
    assert allocated_bytes(newest) < 64 * MIB
    await host.call(RestoreRequest(instance=vm.id))
    assert await ask(host, vm, SUMS) == changed
