"""Clones of volumes on real machines: thin layers over the source's volume, which keep their data whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from coppice.client import AsyncHost
from coppice.machine import disk, disks
from coppice.machine.volumes import disk_of
from coppice.model import MIB, Instance, State, Volume, VolumeMount
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    GetRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    SnapshotRmRequest,
    StandbyRequest,
)
from machines import GUEST_MEMORY

DATA = 32 * MIB
READ = "sync; echo 3 >/proc/sys/vm/drop_caches; cat /cache/words; cksum </cache/data"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def without_reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each file system behave as one without reflinks."""
    monkeypatch.setattr(disk, "reflink_file", lambda *_, **__: False)


async def sh(host: AsyncHost, vm: Instance | str, script: str) -> str:
    """Run a shell script in the guest, which must succeed; return its output."""
    key = vm if isinstance(vm, str) else vm.id
    result = await host.call(ExecRequest(instance=key, argv=["sh", "-ec", script], timeout_s=120))
    assert result.exit_code == 0, result
    return result.stdout.decode().strip()


async def boot(host: AsyncHost, image: str, name: str, *, readonly: bool = False) -> Instance:
    """Return a Running machine with the volume `cache`."""
    mount = VolumeMount(volume="cache", mount_path="/cache", readonly=readonly)
    return await host.call(
        RunRequest(image=image, command=["sleep", "infinity"], name=name, memory_bytes=GUEST_MEMORY, volumes=[mount])
    )


async def fork(host: AsyncHost, source: str, name: str, target: State = State.RUNNING) -> Instance:
    """Return a fork with a clone of the volume, which has cost little."""
    running = (await host.call(GetRequest(instance=source))).state is State.RUNNING
    request = ForkRequest(
        instance=source, names=[name], target=target, from_running=running, volume_policy="clone", atomic=True
    )
    (result,) = (await host.call(request)).results
    assert result.instance is not None
    assert result.disk_bytes_written <= 2 * MIB  # a layer for each disk, or its merged layers
    return result.instance


@pytest.fixture
async def cache(host: AsyncHost) -> AsyncIterator[Volume]:
    """A volume, which is removed with all machines but the template."""
    before = {vm.id for vm in host.local.rooms.store.instances()}
    yield await host.volumes.create("cache", size_bytes=4 * DATA)
    for vm in host.local.rooms.store.instances():
        if vm.id not in before:
            await host.call(RmRequest(instance=vm.id))
    await host.volumes.rm("cache")


async def test_a_tree_of_clones(host: AsyncHost, image: str, cache: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks of a running and of a resting writer, and forks of these, share its data and keep their own words.

    They survive a standby, a snapshot, a restore in place and the removal of their ancestors. More captures than a
    disk may have layers have them merged. The volume has its writer's last word, for a writer and a reader.
    """
    monkeypatch.setattr(disk, "MOST", 3)
    await boot(host, image, "oak")
    digest = await sh(
        host, "oak", f"yes | head -c {DATA} >/cache/data; echo oak >/cache/words; cksum </cache/data; sync"
    )
    words = "oak"
    for number in range(disk.MOST + 1):
        await fork(host, "oak", f"f{number}", State.STOPPED)
        await sh(host, "oak", f"echo {number} >>/cache/words; sync")
        oak = await host.call(GetRequest(instance="oak"))
        assert all(len(each.layers) <= disk.MOST for each in disks.of(oak))
        assert oak.disk_layers["volume0"]
        words += f"\n{number}"
    await fork(host, "oak", "elm")
    assert await sh(host, "oak", READ) == await sh(host, "elm", READ) == f"{words}\n{digest}"
    await sh(host, "elm", "echo elm >>/cache/words; sync")
    await host.call(StandbyRequest(instance="elm"))
    await fork(host, "elm", "fir")
    await host.call(RestoreRequest(instance="elm"))
    assert await sh(host, "fir", READ) == await sh(host, "elm", READ) == f"{words}\nelm\n{digest}"
    kept = await host.call(SnapshotRequest(instance="elm", name="kept"))
    await sh(host, "elm", "rm /cache/data; echo lost >>/cache/words; sync")
    for each in ("f0", "f1", "f2", "f3"):
        await host.call(RmRequest(instance=each))
    await host.call(StandbyRequest(instance="oak"))
    (ash,) = (await host.call(SnapshotForkRequest(snapshot="kept", names=["ash"], atomic=True))).instances
    await host.call(SnapshotRestoreRequest(snapshot="kept", start=True))
    assert await sh(host, ash, READ) == await sh(host, "elm", READ) == f"{words}\nelm\n{digest}"
    await host.call(RestoreRequest(instance="oak"))
    await sh(host, "oak", "echo end >>/cache/words")
    for name in ("oak", "elm"):
        await host.call(RmRequest(instance=name))
    await host.call(SnapshotRmRequest(snapshot=kept.id))
    assert (await host.volumes.inspect("cache")).volume.layers
    assert await sh(host, "fir", READ) == f"{words}\nelm\n{digest}"
    await host.call(StandbyRequest(instance="fir"))
    assert (await host.verify()).differences == ()
    await boot(host, image, "next")
    assert await sh(host, "next", READ) == f"{words}\nend\n{digest}"
    await sh(host, "next", "echo next >>/cache/words")
    await host.call(RmRequest(instance="next"))
    await boot(host, image, "reader", readonly=True)
    assert (await host.volumes.inspect("cache")).volume.layers == ()
    assert await sh(host, "reader", READ) == f"{words}\nend\nnext\n{digest}"
    assert await sh(host, ash, READ) == f"{words}\nelm\n{digest}"


async def test_verify_finds_a_damaged_layer(host: AsyncHost, image: str, cache: Volume) -> None:
    """Of a clone, and of a volume."""
    await boot(host, image, "oak")
    elm = await fork(host, "oak", "elm")
    for name in ("oak", "elm"):
        await sh(host, name, f"yes {name} | head -c {MIB} >/cache/data; sync")
    elm = (await host.call(StandbyRequest(instance="elm"))).instance
    await host.call(RmRequest(instance="oak"))
    assert (await host.verify()).differences == ()
    volume = (await host.volumes.inspect("cache")).volume
    (clone,) = [each for each in disks.of(elm) if each.name == "volume0"]
    tops = (
        clone.paths(host.local.rooms.directory(elm.id))[-1],
        disk_of(volume).paths(host.local.rooms.layout.volume(volume.id))[-1],
    )
    for top in tops:
        await asyncio.to_thread(top.write_bytes, await asyncio.to_thread(damaged, top.read_bytes()))
    found = {(each.name, each.file) for each in (await host.verify()).differences}
    assert found >= {("elm", "volume0.raw"), ("cache", "data.raw")}


def damaged(content: bytes) -> bytes:
    """Return a qcow2 layer whose first table points beyond its end."""
    table = int.from_bytes(content[40:48], "big")
    return content[:table] + b"\x7f" * 64 + content[table + 64 :]
