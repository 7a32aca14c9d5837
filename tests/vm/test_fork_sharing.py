"""A fork shares its template's memory by hard link, and the template never changes."""

from __future__ import annotations

import asyncio

import pytest

from coppice.errors import IllegalTransition, InUse
from coppice.host import AsyncHost
from coppice.model import MIB, Instance, Sharing, State
from machines import ask, digest, mem_file


async def test_forks_have_the_templates_inode_and_give_it_back(host: AsyncHost, template: Instance) -> None:
    """Hard link, not copy: the inode is the template's; each fork is one link more, each removal one less."""
    path = mem_file(host, template)
    links = path.stat().st_nlink
    report = await host.fork(template, count=3)
    try:
        assert report.succeeded == 3
        for result in report.results:
            assert result.instance is not None
            assert result.sharing is Sharing.HARDLINK
            assert mem_file(host, result.instance).stat().st_ino == path.stat().st_ino
            assert result.memory is not None
            assert result.memory.inode == path.stat().st_ino
        await host._spare().settled()  # a VMM that is just being started ahead has a link until it has mapped the file
        assert path.stat().st_nlink == links + 3
        assert (await host.inspect(template)).fork_count == 3
    finally:
        for left, fork in enumerate(report.instances, 1):
            await host.rm(fork)
            assert path.stat().st_nlink == links + 3 - left
    assert (await host.inspect(template)).fork_count == 0


async def test_a_fork_costs_little(host: AsyncHost, template: Instance) -> None:
    """A fresh fork of a 512 MiB guest has at most 2 MiB of its own RAM, and wrote at most 1 MiB to disk."""
    report = await host.fork(template, count=4, atomic=True)
    try:
        for result in report.results:
            assert result.memory is not None
            assert result.memory.mapped_bytes == 512 * MIB
            assert result.memory.unique_bytes <= 2 * MIB
            assert result.memory.shared_bytes > 0
            assert result.disk_bytes_written <= MIB
            assert result.instance is not None
            directory = host.rooms.directory(result.instance.id)
            own = sum(f.stat().st_blocks * 512 for f in directory.iterdir() if f.is_file() and f.stat().st_nlink == 1)
            assert own <= MIB
    finally:
        await asyncio.gather(*(host.rm(fork) for fork in report.instances))


async def test_the_template_never_changes(host: AsyncHost, template: Instance) -> None:
    """Inode and SHA-256 of the template's mem-file are the same after its forks ran, dirtied memory, were captured and removed."""
    path = mem_file(host, template)
    before = (path.stat().st_ino, path.stat().st_mtime_ns, await digest(path))
    assert path.stat().st_mode & 0o777 == 0o444
    report = await host.fork(template, count=2, atomic=True)
    first, second = report.instances
    await ask(host, first, "len(globals().setdefault('blob', os.urandom(32 << 20)))")
    await host.standby(first)
    await host.restore(first)
    assert await ask(host, first, "6 * 7") == "42"
    await host.stop(second, grace_s=0)
    await asyncio.gather(host.rm(first), host.rm(second))
    assert (path.stat().st_ino, path.stat().st_mtime_ns, await digest(path)) == before


async def test_warm_state_is_inherited_and_answers_differ(host: AsyncHost, template: Instance) -> None:
    """Sixteen forks evaluate different expressions in the process that was warm in the template: no import, own answers."""
    async with host.forks(template, 16) as forks:
        answers = await asyncio.gather(
            *(ask(host, fork, f"int(numpy.arange({n + 1}).sum())") for n, fork in enumerate(forks))
        )
    assert answers == [str(n * (n + 1) // 2) for n in range(16)]


async def test_a_template_is_fork_only(host: AsyncHost, template: Instance, vm: Instance) -> None:
    """A template is not started, restored, stopped, exec'd into or captured; with forks it is not demoted or removed."""
    with pytest.raises(IllegalTransition):
        await host.restore(template)
    with pytest.raises(IllegalTransition):
        await host.exec(template, ["true"])
    with pytest.raises(IllegalTransition):
        await host.standby(template)
    for refused in (host.demote, host.rm):
        with pytest.raises(InUse, match=vm.name):
            await refused(template)
    assert (await host.get(template)).state is State.TEMPLATE


async def test_fork_to_standby_and_stopped(host: AsyncHost, template: Instance) -> None:
    """A fork may be parked with its memory, or as a disk alone; both come to life later, as themselves."""
    parked = (await host.fork(template, names=["parked"], target=State.STANDBY)).instances[0]
    bare = (await host.fork(template, names=["bare"], target=State.STOPPED)).instances[0]
    try:
        assert parked.state is State.STANDBY
        assert parked.vmm is None
        assert mem_file(host, parked).stat().st_ino == mem_file(host, template).stat().st_ino
        assert bare.state is State.STOPPED
        assert not mem_file(host, bare).exists()
        await host.restore(parked)
        assert await ask(host, parked, "2 ** 10") == "1024"
        await host.start(bare)
        for instance in (parked, bare):
            told = await host.exec(instance, ["hostname"])
            assert told.stdout.decode().strip() == instance.name
    finally:
        await asyncio.gather(host.rm(parked), host.rm(bare))
