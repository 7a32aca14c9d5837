"""What must hold of a data directory after a host process was killed in it, looked at from outside of the product where that can be."""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter
from pathlib import Path

from coppice.host import AsyncHost
from coppice.model import Instance, State
from crash.operations import SEED, STUMP, Operation
from fakes.hosting import assert_tidy, fingerprint, memory_of


def working_below(instances: Path) -> dict[str, set[int]]:
    """Every process, of whatever program, whose working directory is below `instances`; by the instance's id."""
    found: dict[str, set[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                directory = (entry / "cwd").readlink()
            except OSError:
                continue
            if directory.is_relative_to(instances):
                found.setdefault(directory.relative_to(instances).parts[0], set()).add(int(entry.name))
    return found


def assert_links(host: AsyncHost) -> None:
    """Each captured memory has exactly one link per instance and snapshot that is recorded to have it: none is lost, none is leaked."""
    layout, store = host.rooms.layout, host.rooms.store
    holders = [(layout.instance(vm.id) / "memory", vm.mem_file) for vm in store.instances()]
    holders += [(layout.snapshot(kept.id) / "memory", kept.mem_file) for kept in store.snapshots.all()]
    recorded: Counter[int] = Counter()
    links: dict[int, int] = {}
    for path, mem_file in holders:
        assert path.exists() == (mem_file is not None), f"{path} and its record differ"
        if mem_file is not None:
            status = path.stat()
            assert status.st_ino == mem_file.inode
            recorded[status.st_ino] += 1
            links[status.st_ino] = status.st_nlink
    assert links == dict(recorded), f"{links} links, {dict(recorded)} holders"


async def answer(host: AsyncHost, vm: Instance) -> tuple[str, str, str]:
    """A machine's own question: its name, what its memory knows, what its disk knows."""
    script = "hostname; cat /run/own 2>/dev/null || echo; cat /root/own 2>/dev/null || echo"
    result = await host.exec(vm, ["sh", "-c", script], timeout_s=60)
    assert result.exit_code == 0, result
    name, memory, disk = result.stdout.decode().splitlines()
    return name, memory, disk


async def survey(host: AsyncHost, operation: Operation, stump: tuple[int, int, int, str]) -> dict[str, str]:
    """Assert all that must hold, on a host that has just opened the data directory; return the state of each instance by name."""
    recorded = {vm.name: vm for vm in host.rooms.store.instances() if vm.name != STUMP}
    assert recorded.keys() <= operation.after.keys(), f"nobody asked for {recorded.keys() - operation.after.keys()}"
    for name, may_be in operation.after.items():
        state = recorded[name].state if name in recorded else None
        assert state in may_be, f"{name} is {state}, {recorded[name].exit_reason if name in recorded else ''}"
    snapshots = {kept.name for kept in host.rooms.store.snapshots.all()} - {SEED}
    assert operation.snapshots <= snapshots <= operation.snapshots | operation.may_have
    volumes = {each.name: each for each in host.rooms.store.volumes.all()}
    assert operation.volumes <= volumes.keys() <= operation.volumes | operation.may_have_volumes

    await assert_tidy(host, STUMP, *recorded)
    running = {vm.id: {vm.vmm.pid} for vm in recorded.values() if vm.vmm is not None}
    working = working_below(host.rooms.layout.instances.resolve())
    assert working == running, f"{working} work there, {running} are recorded"
    assert_links(host)
    (template,) = [vm for vm in host.rooms.store.instances() if vm.name == STUMP]
    assert template.state is State.TEMPLATE
    assert fingerprint(memory_of(host, template)) == stump

    for vm in recorded.values():
        await _comes_to_life(host, vm, operation)
    for each in volumes.values():
        if not each.attachments:
            await asyncio.to_thread(_assert_sound, host.rooms.layout.volume_disk(each.id))
    collected = await host.gc(dry_run=True)
    assert collected.removed == (), f"gc finds {collected.removed}"
    assert working_below(host.rooms.layout.instances.resolve()).keys() <= {vm.id for vm in recorded.values()}
    return {name: vm.state.value for name, vm in recorded.items()}


async def _comes_to_life(host: AsyncHost, vm: Instance, operation: Operation) -> None:
    """A machine that runs answers as itself; one that is captured does so once it is restored, and a fork of a template does."""
    knows = (operation.memory, operation.disk)
    if vm.state is State.TEMPLATE:
        async with host.forks(vm, 1) as (fork,):
            assert await answer(host, fork) == (fork.name, *knows)
        return
    if vm.state is State.STANDBY:
        await host.restore(vm)
    if vm.state is not State.STOPPED:
        assert await answer(host, vm) == (vm.hostname, *knows)
        for disk in vm.machine.volumes:
            mounted = ["mountpoint", "-q", disk.mount_path]
            assert (await host.exec(vm, mounted, timeout_s=60)).exit_code == 0, f"{disk.volume_name} is not mounted"


def _assert_sound(disk: Path) -> None:
    """The file system on a volume that nobody has is whole; one that a machine was killed with has its journal replayed first, as the next mount would."""
    checked = subprocess.run(
        ["e2fsck", "-f", "-p", str(disk)], capture_output=True, check=False, timeout=60
    )  # 0: whole; 1: its journal was replayed
    assert checked.returncode in (0, 1), checked
