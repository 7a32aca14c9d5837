"""Volumes with real machines: what one has written the next one finds, forks share what they only read, and no fork makes a second writer."""

from __future__ import annotations

import asyncio
import gzip
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.disk.ext4 import fsck, needs_recovery
from coppice.errors import InUse
from coppice.host import AsyncHost
from coppice.model import MIB, Instance, State, Volume, VolumeMount
from coppice.names import MAX_VOLUMES
from image_archives import directory, file, hardlink, symlink, tar

MEMORY = 256 * MIB


@pytest.fixture
async def data(host: AsyncHost) -> AsyncIterator[Volume]:
    """An empty volume; at the end it goes with all that has it."""
    made = await host.volume_create("data", size_bytes=64 * MIB)
    yield made
    for holder in reversed((await host.volume_inspect(made)).volume.attachments):
        await (host.snapshot_rm if holder.holder == "snapshot" else host.rm)(holder.instance_id)
    await host.volume_rm(made)


def mounted(readonly: bool, path: str = "/srv/deep/data") -> list[VolumeMount]:
    """The volume at a path that no image has."""
    return [VolumeMount(volume="data", mount_path=path, readonly=readonly)]


async def boot(host: AsyncHost, image: str, name: str, volumes: list[VolumeMount], *command: str) -> Instance:
    """A machine with these volumes."""
    return await host.run(
        image, list(command) or ["sleep", "infinity"], name=name, memory_bytes=MEMORY, volumes=volumes
    )


async def shell(host: AsyncHost, vm: Instance, script: str, *, fails: bool = False) -> str:
    """What a script in the guest says, which succeeds unless it is to fail."""
    result = await host.exec(vm, ["sh", "-c", script], timeout_s=60)
    assert (result.exit_code != 0) is fails, result
    return (result.stdout + result.stderr).decode().strip()


def own_link(host: AsyncHost, vm: Instance) -> Path:
    """The machine's link to its first volume."""
    return host.rooms.directory(vm.id) / "volume0.raw"


async def test_a_volume_starts_with_an_archive(host: AsyncHost, image: str, tmp_path: Path) -> None:
    """A real guest finds what the archive says: owners, modes, links, attributes, contents; and it can write to it."""
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
    made = await host.volume_create("seeded", size_bytes=64 * MIB, archive=tmp_path / "data.tar.gz")
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
        await host.rm(vm)
    assert (await asyncio.to_thread(fsck, host.rooms.layout.volume_disk(made.id))).clean
    await host.volume_rm(made)


async def test_what_one_machine_wrote_the_next_one_finds(host: AsyncHost, image: str, data: Volume) -> None:
    """Removed while it runs, without a word to the guest's processes; the next one writes on, is powered off and leaves no journal behind; a third reads."""
    first = await boot(host, image, "first", mounted(False))
    await shell(host, first, "echo from the first > /srv/deep/data/note; seq 2000 > /srv/deep/data/numbers")
    await host.rm(first)
    disk = host.rooms.layout.volume_disk(data.id)
    assert needs_recovery(disk)  # it was not unmounted
    second = await boot(host, image, "second", mounted(False, "/data"))
    assert await shell(host, second, "cat /data/note; wc -l < /data/numbers") == "from the first\n2000"
    await shell(host, second, "echo from the second >> /data/note")
    await host.stop(second)
    assert (await host.get(second)).exit_reason == "powered off"
    assert not needs_recovery(disk)
    await host.start(second)
    await shell(host, second, "echo and again >> /data/note")
    await host.rm(second)
    third = await boot(host, image, "third", mounted(True, "/data"), "cp", "/data/note", "/tmp/seen")
    assert await shell(host, third, "cat /tmp/seen") == "from the first\nfrom the second\nand again"


async def test_memory_and_volume_are_of_one_instant(host: AsyncHost, image: str, data: Volume) -> None:
    """A process that counts, in its memory and into a file on the volume, goes to standby and comes back: none is lost, and none comes twice."""
    counts = "i=0; while :; do i=$((i+1)); echo $i >> /srv/deep/data/log; sleep 0.02; done"
    vm = await boot(host, image, "writer", mounted(False), "sh", "-c", counts)
    log = "sync; echo 3 > /proc/sys/vm/drop_caches; cat /srv/deep/data/log"
    seen = 0
    for _ in range(2):
        await shell(host, vm, f"until [ $(wc -l < /srv/deep/data/log) -gt {seen + 20} ]; do sleep 0.05; done")
        await host.standby(vm)
        await host.restore(vm)
        lines = (await shell(host, vm, log)).splitlines()
        assert [int(line) for line in lines] == list(range(1, len(lines) + 1))
        seen, before = len(lines), seen
        assert seen > before + 20
    report = await host.verify()
    assert report.differences == ()
    assert "data" in report.skipped


async def test_forks_share_a_volume_that_is_only_read(host: AsyncHost, image: str, data: Volume) -> None:
    """Four forks, each with its own link to the one inode, which nobody can write to: not the guest's processes, its root, or its kernel."""
    writer = await boot(host, image, "writer", mounted(False))
    await shell(host, writer, "echo shared > /srv/deep/data/note")
    await host.rm(writer)
    source = await boot(host, image, "source", mounted(True))
    await shell(host, source, "exec 3</srv/deep/data/note; cat <&3")
    kept = await host.snapshot_create(source)
    await host.standby(source)
    await host.promote(source)
    disk = host.rooms.layout.volume_disk(data.id)
    before = (disk.stat().st_ino, disk.stat().st_mtime_ns, await asyncio.to_thread(disk.read_bytes))
    forks = (await host.fork(source, count=4, names=["reader"], atomic=True)).instances
    assert {own_link(host, fork).stat().st_ino for fork in forks} == {before[0]}
    assert disk.stat().st_nlink == 1 + 1 + 1 + 4  # its own, the source's, the snapshot's, the forks'
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
    (again,) = (await host.fork(forks[0], names=["again"], from_running=True, atomic=True)).instances
    (later,) = (await host.snapshot_fork(kept, names=["later"], atomic=True)).instances
    for fork in (again, later):
        assert await shell(host, fork, "cat /srv/deep/data/note") == "shared"
    assert before == (disk.stat().st_ino, disk.stat().st_mtime_ns, await asyncio.to_thread(disk.read_bytes))
    with pytest.raises(InUse, match="reader-1"):
        await boot(host, image, "second-writer", mounted(False))
    for fork in (*forks, again, later):
        await host.rm(fork)


async def test_a_machine_with_a_writable_volume_is_not_forked(host: AsyncHost, image: str, data: Volume) -> None:
    """Running or captured: refused with the volume's name, and the machine goes on as if nothing had been asked."""
    vm = await boot(host, image, "writer", mounted(False))
    with pytest.raises(InUse, match="volume data"):
        await host.fork(vm, from_running=True)
    with pytest.raises(InUse, match="volume data"):
        await host.snapshot_create(vm)
    await shell(host, vm, "echo on > /srv/deep/data/note")
    await host.standby(vm)
    for target in (State.RUNNING, State.STANDBY, State.STOPPED):
        with pytest.raises(InUse, match="volume data"):
            await host.fork(vm, count=2, target=target)
    with pytest.raises(InUse, match="volume data"):
        await host.promote(vm)
    await host.restore(vm)
    assert await shell(host, vm, "cat /srv/deep/data/note") == "on"
    assert [each.name for each in (await host.volume_inspect(data)).volume.attachments] == ["writer"]


async def test_as_many_volumes_as_a_machine_can_have(host: AsyncHost, image: str) -> None:
    """Each at its path, below each other too, whatever is on it; also after a capture."""
    names = [f"many-{number}" for number in range(MAX_VOLUMES)]
    paths = ["/data/sub", "/data", *(f"/many/{number}" for number in range(2, MAX_VOLUMES))]
    mounts = [VolumeMount(volume=name, mount_path=path) for name, path in zip(names, paths, strict=True)]
    for name in names:
        await host.volume_create(name, size_bytes=16 * MIB)
    try:
        for attempt in range(2):
            vm = await boot(host, image, "many", mounts)
            script = "; ".join(
                f"cat {path}/name 2>/dev/null; echo {name} > {path}/name"
                for name, path in zip(names, paths, strict=True)
            )
            said = await shell(host, vm, script)
            assert said.split() == (names if attempt else [])
            await host.standby(vm)
            await host.restore(vm)
            assert (await shell(host, vm, "cat " + " ".join(f"{path}/name" for path in paths))).split() == names
            await host.stop(vm)
            await host.rm(vm)
    finally:
        for name in names:
            for holder in (await host.volume_inspect(name)).volume.attachments:
                await host.rm(holder.instance_id)
            await host.volume_rm(name)


async def test_a_volume_that_looks_like_a_root_is_not_taken_for_one(host: AsyncHost, image: str, data: Volume) -> None:
    """A guest may write anything to its volume: the next machine still boots from its own root, and says what is wrong with the volume."""
    disk = host.rooms.layout.volume_disk(data.id)
    with disk.open("r+b") as file:
        file.seek(1024)
        file.write((0xE0F5E1E2).to_bytes(4, "little") + bytes(1020))
    with pytest.raises(Exception, match="volumes: /srv/deep/data"):
        await boot(host, image, "fooled", mounted(False))
    assert (await host.volume_inspect(data)).volume.attachments == ()
