"""Disks of real forks: a fork writes nothing of its source's disk, and keeps its own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import VmmError
from coppice.machine import disk, disks
from coppice.model import MIB, Instance, State
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    GetRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    SnapshotRmRequest,
    StandbyRequest,
    StartRequest,
)

DATA = 16 * MIB


async def sh(host: AsyncHost, vm: Instance, script: str) -> str:
    """Run a shell script in the guest, which must succeed; return its output."""
    result = await host.call(ExecRequest(instance=vm.id, argv=["sh", "-ec", script], timeout_s=120))
    assert result.exit_code == 0, result
    return result.stdout.decode().strip()


@pytest.mark.timeout(300)
async def test_a_fork_of_a_full_disk_writes_little(
    host: AsyncHost, vm: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forks at each level share the files below their own; each reads the data and keeps its words.

    The deepest one has as many layers as a disk may have. They are merged once, in it, before its first fork.
    """
    monkeypatch.setattr(disk, "reflink_file", lambda *_, **__: False)
    made: list[Instance] = []
    digest = await sh(host, vm, f"yes | head -c {DATA} >/root/data; echo oak >/root/word; cksum </root/data")
    vm = (await host.call(StandbyRequest(instance=vm.id))).instance
    try:
        source = vm
        for word in ("ash", "elm", "fir"):
            report = await host.call(ForkRequest(instance=source.id, atomic=True))
            (fork,) = report.instances
            made.append(fork)
            assert report.results[0].disk_bytes_written <= 64 << 10
            written = disks.paths(host.local.rooms.directory(fork.id), disks.of(fork))[-1]
            assert await sh(host, fork, "cksum </root/data") == digest
            await sh(host, fork, f"echo {word} >>/root/word; sync")
            assert written.stat().st_blocks * 512 <= 2 * MIB
            if word == "fir":
                monkeypatch.setattr(disk, "MOST", len(disks.of(fork)[0].layers))
            source = (await host.call(StandbyRequest(instance=fork.id))).instance
        assert len(disks.of(vm)[0].layers) + 3 == disk.MOST
        report = await host.call(ForkRequest(instance=source.id, count=2, atomic=True))
        made += report.instances
        assert len(disks.of(await host.call(GetRequest(instance=source.id)))[0].layers) == 1
        for result in report.results:
            assert result.disk_bytes_written <= 64 << 10
            assert await sh(host, made[-1], "cat /root/word; cksum </root/data") == f"oak\nash\nelm\nfir\n{digest}"
        ash = await host.call(RestoreRequest(instance=made[0].id))
        assert (ash.state, await sh(host, ash, "cat /root/word")) == (State.RUNNING, "oak\nash")
        await sh(host, ash, "echo more >>/root/word; sync")
        elm = await host.call(RestoreRequest(instance=made[1].id))
        assert await sh(host, elm, "cat /root/word; cksum </root/data") == f"oak\nash\nelm\n{digest}"
        await host.call(StandbyRequest(instance=ash.id))
        assert (await host.verify()).differences == ()
    finally:
        await asyncio.gather(*(host.call(RmRequest(instance=each.id)) for each in made))


def opened_for_writing(vm: Instance, directory: Path) -> set[str]:
    """Return the names of the disk files of a machine that its VMM has open for writing."""
    assert vm.vmm is not None
    proc = Path(f"/proc/{vm.vmm.pid}")
    found: dict[str, set[int]] = {}
    for path in disks.paths(directory, disks.of(vm)):
        for descriptor in (proc / "fd").iterdir():
            if descriptor.exists() and descriptor.samefile(path):
                flags = (proc / "fdinfo" / descriptor.name).read_text().split("flags:")[1].split()[0]
                found.setdefault(path.name, set()).add(int(flags, 8) & os.O_ACCMODE)
    assert found.keys() == set(disks.of(vm)[0].files)
    return {name for name, modes in found.items() if modes != {os.O_RDONLY}}


@pytest.mark.timeout(300)
async def test_a_running_machine_goes_on_in_a_new_layer(
    host: AsyncHost, vm: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live fork and a live snapshot copy nothing of the disk. The VMM can write to its topmost layer alone.

    More captures than a disk may have layers have them merged while the machine runs, and nothing is lost.
    """
    monkeypatch.setattr(disk, "MOST", 3)
    directory = host.local.rooms.directory(vm.id)
    digest = await sh(host, vm, f"yes | head -c {MIB} >/root/data; echo 0 >/root/word; cksum </root/data")
    made: list[Instance] = []
    kept = None
    try:
        for number in range(1, disk.MOST + 3):
            top = disks.paths(directory, disks.of(vm))[-1]
            before = top.stat().st_ino
            target = State.RUNNING if number == disk.MOST else State.STOPPED
            request = ForkRequest(instance=vm.id, from_running=True, target=target, atomic=True)
            made += (await host.call(request)).instances
            vm = await host.call(GetRequest(instance=vm.id))
            assert len(disks.of(vm)[0].layers) <= disk.MOST
            own = host.local.rooms.directory(made[-1].id)
            assert before in {path.stat().st_ino for path in disks.paths(own, disks.of(made[-1]))}
            assert opened_for_writing(vm, directory) == {disks.of(vm)[0].files[-1]}
            await sh(host, vm, f"echo {number} >>/root/word; sync")
        kept = await host.call(SnapshotRequest(instance=vm.id))
        await sh(host, vm, "echo end >>/root/word; rm /root/data; sync")
        (late,) = (await host.call(SnapshotForkRequest(snapshot=kept.id, atomic=True))).instances
        made.append(late)
        read = "sync; echo 3 >/proc/sys/vm/drop_caches; cat /root/word; cksum </root/data"
        words = [str(number) for number in range(disk.MOST + 3)]
        assert (await sh(host, late, read)).split("\n") == [*words, digest]
        assert (await sh(host, made[disk.MOST - 1], read)).split("\n") == [*words[: disk.MOST], digest]
        await host.call(StandbyRequest(instance=vm.id))
        vm = await host.call(RestoreRequest(instance=vm.id))
        assert (await sh(host, vm, "cat /root/word")).split("\n") == [*words, "end"]
        await host.call(StandbyRequest(instance=vm.id))
        assert (await host.verify()).differences == ()
    finally:
        if kept is not None:
            await host.call(SnapshotRmRequest(snapshot=kept.id))
        await asyncio.gather(*(host.call(RmRequest(instance=each.id)) for each in made))


@pytest.mark.timeout(300)
async def test_a_switch_that_was_not_finished_is_finished_by_the_next(
    host: AsyncHost, vm: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure after the pause leaves a VMM that can write to the file below, which no fork has then."""
    directory, driver = host.local.rooms.directory(vm.id), host.local.rooms.driver(vm)
    request = ForkRequest(instance=vm.id, from_running=True, target=State.STOPPED, atomic=True)
    (first,) = (await host.call(request)).instances
    made = [first.id]
    try:

        async def refuse(*_: object) -> None:
            raise VmmError("QEMU refused", hint="try again")

        with monkeypatch.context() as patch:
            patch.setattr(type(driver), "finish_switch", refuse)
            with pytest.raises(VmmError):
                await host.call(request)
        vm = await host.call(GetRequest(instance=vm.id))
        assert vm.state is State.RUNNING
        assert opened_for_writing(vm, directory) == set(disks.of(vm)[0].files[-2:])
        await sh(host, vm, "echo more >/root/word; sync")
        made += [fork.id for fork in (await host.call(request)).instances]
        vm = await host.call(GetRequest(instance=vm.id))
        assert opened_for_writing(vm, directory) == {disks.of(vm)[0].files[-1]}
        assert await sh(host, vm, "cat /root/word") == "more"
        fork = await host.call(StartRequest(instance=made[-1]))
        assert await sh(host, fork, "cat /root/word") == "more"
    finally:
        await asyncio.gather(*(host.call(RmRequest(instance=each)) for each in made))
