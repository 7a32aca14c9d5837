"""A fork shares its template's memory by hard link, and the template never changes."""

from __future__ import annotations

import asyncio

import pytest

from coppice.client import AsyncHost
from coppice.errors import IllegalTransition, InUse
from coppice.host.lifecycle import Lifecycle
from coppice.model import MIB, Instance, Sharing, State
from coppice.requests import (
    DemoteRequest,
    ExecRequest,
    ForkRequest,
    GetRequest,
    InspectRequest,
    RestoreRequest,
    RmRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from machines import ask, digest, mem_file


async def test_each_fork_is_a_link_to_the_templates_memory(host: AsyncHost, template: Instance) -> None:
    """A fork has the template's inode; each fork adds one link, and each removal takes one away."""
    path = mem_file(host, template)
    links = path.stat().st_nlink
    report = await host.call(ForkRequest(instance=template.id, count=3, measure=True))
    try:
        assert report.succeeded == 3
        for result in report.results:
            assert result.instance is not None
            assert result.sharing is Sharing.HARDLINK
            assert mem_file(host, result.instance).stat().st_ino == path.stat().st_ino
            assert result.memory is not None
            assert result.memory.inode == path.stat().st_ino
        await host.local.group(Lifecycle)._spare().settled()  # a starting spare has a link until it has mapped the file
        assert path.stat().st_nlink == links + 3
        assert (await host.call(InspectRequest(instance=template.id))).fork_count == 3
    finally:
        for left, fork in enumerate(report.instances, 1):
            await host.call(RmRequest(instance=fork.id))
            assert path.stat().st_nlink == links + 3 - left
    assert (await host.call(InspectRequest(instance=template.id))).fork_count == 0


async def test_a_fork_costs_little(host: AsyncHost, template: Instance) -> None:
    """A fresh fork of a 512 MiB guest has at most 2 MiB of its own RAM and wrote at most 1 MiB."""
    report = await host.call(ForkRequest(instance=template.id, count=4, atomic=True, measure=True))
    try:
        for result in report.results:
            assert result.memory is not None
            assert result.memory.mapped_bytes == 512 * MIB
            assert result.memory.unique_bytes <= 2 * MIB
            assert result.memory.shared_bytes > 0
            assert result.disk_bytes_written <= MIB
            assert result.instance is not None
            directory = host.local.rooms.directory(result.instance.id)
            own = sum(f.stat().st_blocks * 512 for f in directory.iterdir() if f.is_file() and f.stat().st_nlink == 1)
            assert own <= MIB
    finally:
        await asyncio.gather(*(host.call(RmRequest(instance=fork.id)) for fork in report.instances))


async def test_the_template_never_changes(host: AsyncHost, template: Instance) -> None:
    """Inode, time and SHA-256 of the mem-file stay the same while forks run, dirty memory, are
    captured and removed.
    """
    path = mem_file(host, template)
    before = (path.stat().st_ino, path.stat().st_mtime_ns, await digest(path))
    assert path.stat().st_mode & 0o777 == 0o444
    report = await host.call(ForkRequest(instance=template.id, count=2, atomic=True))
    first, second = report.instances
    await ask(host, first, "len(globals().setdefault('blob', os.urandom(32 << 20)))")
    await host.call(StandbyRequest(instance=first.id))
    await host.call(RestoreRequest(instance=first.id))
    assert await ask(host, first, "6 * 7") == "42"
    await host.call(StopRequest(instance=second.id, grace_s=0))
    await asyncio.gather(host.call(RmRequest(instance=first.id)), host.call(RmRequest(instance=second.id)))
    assert (path.stat().st_ino, path.stat().st_mtime_ns, await digest(path)) == before


async def test_warm_state_is_inherited_and_answers_differ(host: AsyncHost, template: Instance) -> None:
    """Sixteen forks evaluate different expressions in the process that was warm in the template,
    without an import.
    """
    async with (await host.get(template.id)).fork(16, atomic=True) as forks:
        answers = await asyncio.gather(
            *(ask(host, fork, f"int(numpy.arange({n + 1}).sum())") for n, fork in enumerate(forks))
        )
    assert answers == [str(n * (n + 1) // 2) for n in range(16)]


async def test_a_template_is_fork_only(host: AsyncHost, template: Instance, vm: Instance) -> None:
    """A template is not restored, captured or used for `exec`; while it has forks, it is not
    demoted or removed.
    """
    with pytest.raises(IllegalTransition):
        await host.call(RestoreRequest(instance=template.id))
    with pytest.raises(IllegalTransition):
        await host.call(ExecRequest(instance=template.id, argv=["true"]))
    with pytest.raises(IllegalTransition):
        await host.call(StandbyRequest(instance=template.id))
    for refused in (DemoteRequest(instance=template.id), RmRequest(instance=template.id)):
        with pytest.raises(InUse, match=vm.name):
            await host.call(refused)
    assert (await host.call(GetRequest(instance=template.id))).state is State.TEMPLATE


async def test_fork_to_standby_and_stopped(host: AsyncHost, template: Instance) -> None:
    """A fork may be in standby with its memory, or stopped with its disk alone; both start later
    under their own names.
    """
    parked = (await host.call(ForkRequest(instance=template.id, names=["parked"], target=State.STANDBY))).instances[0]
    bare = (await host.call(ForkRequest(instance=template.id, names=["bare"], target=State.STOPPED))).instances[0]
    try:
        assert parked.state is State.STANDBY
        assert parked.vmm is None
        assert mem_file(host, parked).stat().st_ino == mem_file(host, template).stat().st_ino
        assert bare.state is State.STOPPED
        assert not mem_file(host, bare).exists()
        await host.call(RestoreRequest(instance=parked.id))
        assert await ask(host, parked, "2 ** 10") == "1024"
        await host.call(StartRequest(instance=bare.id))
        for instance in (parked, bare):
            told = await host.call(ExecRequest(instance=instance.id, argv=["hostname"]))
            assert told.stdout.decode().strip() == instance.name
    finally:
        await asyncio.gather(host.call(RmRequest(instance=parked.id)), host.call(RmRequest(instance=bare.id)))
