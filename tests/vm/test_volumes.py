"""Volumes with real machines: the next machine finds what the last one wrote, forks share read-only
volumes, and no fork makes a second writer.
"""

from __future__ import annotations

import asyncio
import gzip
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import InUse
from coppice.model import MIB, Instance, State, Volume, VolumeMount
from coppice.names import MAX_VOLUMES
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    GetRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    SnapshotRmRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from coppice.volumes.ext4 import fsck, needs_recovery
from image_archives import directory, file, hardlink, symlink, tar

MEMORY = 256 * MIB


@pytest.fixture
async def data(host: AsyncHost) -> AsyncIterator[Volume]:
    """An empty volume; it is removed at the end with all its holders."""
    made = await host.volumes.create("data", size_bytes=64 * MIB)
    yield made
    for holder in reversed((await host.volumes.inspect(made)).volume.attachments):
        kept = holder.holder == "snapshot"
        key = holder.instance_id
        await host.call(SnapshotRmRequest(snapshot=key) if kept else RmRequest(instance=key))
    await host.volumes.rm(made)


def mounted(readonly: bool, path: str = "/srv/deep/data") -> list[VolumeMount]:
    """Return a mount of the volume at a path that no image has."""
    return [VolumeMount(volume="data", mount_path=path, readonly=readonly)]


async def boot(host: AsyncHost, image: str, name: str, volumes: list[VolumeMount], *command: str) -> Instance:
    """Start a machine with these volumes."""
    return await host.call(
        RunRequest(
            image=image, command=list(command) or ["sleep", "infinity"], name=name, memory_bytes=MEMORY, volumes=volumes
        )
    )


async def shell(host: AsyncHost, vm: Instance, script: str, *, fails: bool = False) -> str:
    """Return the output of a script in the guest, which must succeed unless `fails`."""
    result = await host.call(ExecRequest(instance=vm.id, argv=["sh", "-c", script], timeout_s=60))
    assert (result.exit_code != 0) is fails, result
    return (result.stdout + result.stderr).decode().strip()


def own_link(host: AsyncHost, vm: Instance) -> Path:
    """Return the machine's link to its first volume."""
    return host.local.rooms.directory(vm.id) / "volume0.raw"


async def test_a_volume_starts_with_an_archive(host: AsyncHost, image: str, tmp_path: Path) -> None:
    """A real guest finds the archive's owners, modes, links, attributes and contents, and can write
    to the volume.
    """
    members = [
        directory("./", 0o1777),
        file("dir/note", b"from the archive", mode=0o640, uid=70_000, gid=7, mtime=1_234_567_890),
        hardlink("hard", "dir/note"),
        symlink("soft", "dir/note"),
        file('a "name"\nof two lines', b"odd"),
        file("sparse", bytes(8 * MIB) + b"end"),
    ]
    members[1][0].pax_headers = {"SCHILY.xattr.user.note": "hello", "SCHILY.xattr.trusted.note": "root's"}
    (tmp_path / "data.tar.gz").write_bytes(gzip.compress(tar(*members)))
    made = await host.volumes.create("seeded", size_bytes=64 * MIB, archive=tmp_path / "data.tar.gz")
    mount = VolumeMount(volume="seeded", mount_path="/srv/data")
    vm = await boot(host, image, "reader", [mount])
    try:
        assert await shell(
            host, vm, "cd /srv/data && stat -c '%a %u %g %h %Y' dir/note && cat hard && readlink soft"
        ) == ("640 70000 7 2 1234567890\nfrom the archivedir/note")
        assert await shell(host, vm, "stat -c %a /srv/data && cat '/srv/data/a \"name\"\nof two lines'") == "1777\nodd"
        assert await shell(host, vm, "tail -c 3 /srv/data/sparse && du -k /srv/data/sparse | cut -f1") == "end4"
        script = "import os; print(*(os.getxattr('/srv/data/soft', name).decode() for name in ('user.note', 'trusted.note')))"
        assert await shell(host, vm, f'python3 -c "{script}"') == "hello root's"
        await shell(
            host,
            vm,
            "echo more >> /srv/data/hard && mkdir /srv/data/new && sync && dmesg | grep -i 'ext4.*error'",
            fails=True,
        )
        assert await shell(host, vm, "cat /srv/data/dir/note") == "from the archivemore"
    finally:
        await host.call(RmRequest(instance=vm.id))
    assert (await asyncio.to_thread(fsck, host.local.rooms.layout.volume_disk(made.id))).clean
    await host.volumes.rm(made)


async def test_the_next_machine_finds_what_the_last_one_wrote(host: AsyncHost, image: str, data: Volume) -> None:
    """The first machine is removed while it runs.

    The second one writes on and is powered off, which leaves a clean journal. The third reads.
    """
    first = await boot(host, image, "first", mounted(False))
    await shell(host, first, "echo from the first > /srv/deep/data/note; seq 2000 > /srv/deep/data/numbers")
    await host.call(RmRequest(instance=first.id))
    disk = host.local.rooms.layout.volume_disk(data.id)
    assert needs_recovery(disk)  # the volume was not unmounted
    second = await boot(host, image, "second", mounted(False, "/data"))
    assert await shell(host, second, "cat /data/note; wc -l < /data/numbers") == "from the first\n2000"
    await shell(host, second, "echo from the second >> /data/note")
    await host.call(StopRequest(instance=second.id))
    assert (await host.call(GetRequest(instance=second.id))).exit_reason == "powered off"
    assert not needs_recovery(disk)
    await host.call(StartRequest(instance=second.id))
    await shell(host, second, "echo and again >> /data/note")
    await host.call(RmRequest(instance=second.id))
    third = await boot(host, image, "third", mounted(True, "/data"), "cp", "/data/note", "/tmp/seen")
    assert (
        await shell(host, third, "until [ $(wc -l < /tmp/seen) = 3 ]; do sleep 0.05; done 2>/dev/null; cat /tmp/seen")
        == "from the first\nfrom the second\nand again"
    )


async def test_memory_and_volume_are_of_one_instant(host: AsyncHost, image: str, data: Volume) -> None:
    """A process that counts into a file on the volume continues after standby and restore without a
    gap or a repetition.
    """
    counts = "i=0; while :; do i=$((i+1)); echo $i >> /srv/deep/data/log; sleep 0.02; done"
    vm = await boot(host, image, "writer", mounted(False), "sh", "-c", counts)
    log = "sync; echo 3 > /proc/sys/vm/drop_caches; cat /srv/deep/data/log"
    seen = 0
    for _ in range(2):
        await shell(host, vm, f"until [ $(wc -l < /srv/deep/data/log) -gt {seen + 20} ]; do sleep 0.05; done")
        await host.call(StandbyRequest(instance=vm.id))
        await host.call(RestoreRequest(instance=vm.id))
        lines = (await shell(host, vm, log)).splitlines()
        assert [int(line) for line in lines] == list(range(1, len(lines) + 1))
        seen, before = len(lines), seen
        assert seen > before + 20
    report = await host.verify()
    assert report.differences == ()
    assert "data" in report.skipped


async def test_forks_share_a_read_only_volume(host: AsyncHost, image: str, data: Volume) -> None:
    """Each of four forks has its own link to the one inode, to which no process, root user or
    kernel of a guest can write.
    """
    writer = await boot(host, image, "writer", mounted(False))
    await shell(host, writer, "echo shared > /srv/deep/data/note")
    await host.call(RmRequest(instance=writer.id))
    source = await boot(host, image, "source", mounted(True))
    await shell(host, source, "exec 3</srv/deep/data/note; cat <&3")
    kept = await host.call(SnapshotRequest(instance=source.id))
    await host.call(StandbyRequest(instance=source.id))
    await host.call(PromoteRequest(instance=source.id))
    disk = host.local.rooms.layout.volume_disk(data.id)
    before = (disk.stat().st_ino, disk.stat().st_mtime_ns, await asyncio.to_thread(disk.read_bytes))
    forks = (await host.call(ForkRequest(instance=source.id, count=4, names=["reader"], atomic=True))).instances
    assert {own_link(host, fork).stat().st_ino for fork in forks} == {before[0]}
    assert disk.stat().st_nlink == 1 + 1 + 1 + 4  # links of the volume, the source, the snapshot and the forks
    for fork in forks:
        assert await shell(host, fork, "cat /srv/deep/data/note") == "shared"
    says = await shell(host, forks[0], "touch /srv/deep/data/x", fails=True)
    assert "Read-only file system" in says
    await shell(host, forks[1], "mount -o remount,rw /srv/deep/data", fails=True)
    device = await shell(host, forks[2], "grep -l volume0 /sys/block/vd*/serial")
    node = "/dev/" + device.split("/")[3]
    await shell(host, forks[2], f"dd if=/dev/zero of={node} bs=4096 count=1 conv=fsync", fails=True)
    assert forks[3].vmm is not None
    opened = [path for path in Path(f"/proc/{forks[3].vmm.pid}/fd").iterdir() if path.exists() and path.samefile(disk)]
    flags = [
        int((path.parents[1] / "fdinfo" / path.name).read_text().split("flags:")[1].split()[0], 8) for path in opened
    ]
    assert flags
    assert all(each & os.O_ACCMODE == os.O_RDONLY for each in flags)
    (again,) = (
        await host.call(ForkRequest(instance=forks[0].id, names=["again"], from_running=True, atomic=True))
    ).instances
    (later,) = (await host.call(SnapshotForkRequest(snapshot=kept.id, names=["later"], atomic=True))).instances
    for fork in (again, later):
        assert await shell(host, fork, "cat /srv/deep/data/note") == "shared"
    assert before == (disk.stat().st_ino, disk.stat().st_mtime_ns, await asyncio.to_thread(disk.read_bytes))
    with pytest.raises(InUse, match="reader-1"):
        await boot(host, image, "second-writer", mounted(False))
    for fork in (*forks, again, later):
        await host.call(RmRequest(instance=fork.id))


async def test_a_machine_with_a_writable_volume_is_not_forked(host: AsyncHost, image: str, data: Volume) -> None:
    """The refusal names the volume, and the machine runs on undisturbed."""
    vm = await boot(host, image, "writer", mounted(False))
    with pytest.raises(InUse, match="volume data"):
        await host.call(ForkRequest(instance=vm.id, from_running=True))
    with pytest.raises(InUse, match="volume data"):
        await host.call(SnapshotRequest(instance=vm.id))
    await shell(host, vm, "echo on > /srv/deep/data/note")
    await host.call(StandbyRequest(instance=vm.id))
    for target in (State.RUNNING, State.STANDBY, State.STOPPED):
        with pytest.raises(InUse, match="volume data"):
            await host.call(ForkRequest(instance=vm.id, count=2, target=target))
    with pytest.raises(InUse, match="volume data"):
        await host.call(PromoteRequest(instance=vm.id))
    await host.call(RestoreRequest(instance=vm.id))
    assert await shell(host, vm, "cat /srv/deep/data/note") == "on"
    assert [each.name for each in (await host.volumes.inspect(data)).volume.attachments] == ["writer"]


async def test_forks_of_a_writer_have_clones(host: AsyncHost, image: str, data: Volume) -> None:
    """Two forks of a running machine go on with the warm cache on its volume, each on a clone of its own.

    A fork to Stopped boots from a clone that has all that the guest had written.
    """
    vm = await boot(host, image, "writer", mounted(False))
    await shell(host, vm, "cd /srv/deep/data; seq 20000 > cache; echo warm > note")
    request = ForkRequest(
        instance=vm.id, names=["clone"], count=2, from_running=True, volume_policy="clone", atomic=True
    )
    forks = (await host.call(request)).instances
    try:
        cached = await shell(host, vm, "cksum < /srv/deep/data/cache")
        read = "sync; echo 3 > /proc/sys/vm/drop_caches; cksum < /srv/deep/data/cache; cat /srv/deep/data/note"
        for fork in forks:
            await shell(host, fork, f"echo {fork.name} >> /srv/deep/data/note")
        await shell(host, vm, "echo on >> /srv/deep/data/note")
        for fork in forks:
            assert await shell(host, fork, read) == f"{cached}\nwarm\n{fork.name}"
        assert await shell(host, vm, read) == f"{cached}\nwarm\non"
        await host.call(StandbyRequest(instance=forks[0].id))
        await host.call(RestoreRequest(instance=forks[0].id))
        assert await shell(host, forks[0], read) == f"{cached}\nwarm\n{forks[0].name}"
        await shell(host, vm, "echo unsynced >> /srv/deep/data/note")
        request = ForkRequest(
            instance=vm.id, names=["later"], from_running=True, target=State.STOPPED, volume_policy="clone", atomic=True
        )
        forks += (await host.call(request)).instances
        await host.call(StartRequest(instance="later"))
        assert await shell(host, forks[-1], read) == f"{cached}\nwarm\non\nunsynced"
        await host.call(StandbyRequest(instance="later"))
        await host.call(StandbyRequest(instance=vm.id))
        assert (await host.verify()).differences == ()
        assert [each.name for each in (await host.volumes.inspect(data)).volume.attachments] == ["writer"]
    finally:
        for fork in forks:
            await host.call(RmRequest(instance=fork.id))


async def test_the_largest_number_of_volumes(host: AsyncHost, image: str) -> None:
    """Each is mounted at its path, also below another one, with any content and after a capture."""
    names = [f"many-{number}" for number in range(MAX_VOLUMES)]
    paths = ["/data/sub", "/data", *(f"/many/{number}" for number in range(2, MAX_VOLUMES))]
    mounts = [VolumeMount(volume=name, mount_path=path) for name, path in zip(names, paths, strict=True)]
    for name in names:
        await host.volumes.create(name, size_bytes=16 * MIB)
    try:
        for attempt in range(2):
            vm = await boot(host, image, "many", mounts)
            script = "; ".join(
                f"cat {path}/name 2>/dev/null; echo {name} > {path}/name"
                for name, path in zip(names, paths, strict=True)
            )
            said = await shell(host, vm, script)
            assert said.split() == (names if attempt else [])
            await host.call(StandbyRequest(instance=vm.id))
            await host.call(RestoreRequest(instance=vm.id))
            assert (await shell(host, vm, "cat " + " ".join(f"{path}/name" for path in paths))).split() == names
            await host.call(StopRequest(instance=vm.id))
            await host.call(RmRequest(instance=vm.id))
    finally:
        for name in names:
            for holder in (await host.volumes.inspect(name)).volume.attachments:
                await host.call(RmRequest(instance=holder.instance_id))
            await host.volumes.rm(name)


async def test_a_volume_that_looks_like_a_root_is_not_booted(host: AsyncHost, image: str, data: Volume) -> None:
    """A guest may write anything to its volume.

    The next machine still boots from its own root, and reports the broken volume.
    """
    disk = host.local.rooms.layout.volume_disk(data.id)
    with disk.open("r+b") as file:
        file.seek(1024)
        file.write((0xE0F5E1E2).to_bytes(4, "little") + bytes(1020))
    with pytest.raises(Exception, match="volumes: /srv/deep/data"):
        await boot(host, image, "fooled", mounted(False))
    assert (await host.volumes.inspect(data)).volume.attachments == ()
