"""The disk of a volume: sound, sparse, and with its journal written back before it is only read."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coppice.disk import ext4, volume
from coppice.disk.ext4 import fsck, needs_recovery, replay_journal
from coppice.errors import HostCannot, IntegrityError, MissingTool
from coppice.model import GIB, MIB
from coppice.vmm.process import start_ticks


def debugfs(disk: Path, *commands: str) -> str:
    """What e2fsprogs' debugger says to commands on an image."""
    done = subprocess.run(
        ["/usr/sbin/debugfs", "-w", "-f", "-", str(disk)],
        input="\n".join(commands).encode(),
        capture_output=True,
        check=True,
        timeout=30,
    )
    return done.stdout.decode()


def interrupted(disk: Path, data: Path) -> int:
    """Leave a block in the journal that is not at its place yet, as a machine that was killed does; return where it belongs."""
    data.write_bytes(b"journalled".ljust(4096, b"."))
    block = 3000
    debugfs(disk, "journal_open", f"journal_write -b {block} {data}", "journal_close")
    return block * 4096


@pytest.mark.parametrize("size", [16 * MIB, GIB, 64 * GIB])
def test_an_empty_volume_is_sound_and_takes_little_room(tmp_path: Path, size: int) -> None:
    """No more than is asked for beforehand; and the superblock has its backups, which an overlay saves."""
    disk = tmp_path / "data.raw"
    volume.create(disk, size)
    assert disk.stat().st_size == size
    assert disk.stat().st_blocks * 512 <= volume.empty_bytes(size)
    assert fsck(disk).clean
    assert [path.name for path in tmp_path.iterdir()] == ["data.raw"]
    if size > 128 * MIB:
        with disk.open("rb") as file:
            file.seek(32768 * 4096 + 0x38)
            assert file.read(2) == b"\x53\xef"


def test_each_has_a_uuid_of_its_own(tmp_path: Path) -> None:
    """Two of them in one machine are told apart by it."""
    uuids = set()
    for name in ("one", "two"):
        volume.create(tmp_path / name, 16 * MIB)
        uuids.add((tmp_path / name).read_bytes()[1024 + 0x68 : 1024 + 0x78])
    assert len(uuids) == 2


def test_what_the_journal_holds_is_written_back(tmp_path: Path) -> None:
    """Once: a second time there is nothing to do, and the file is not touched."""
    disk = tmp_path / "data.raw"
    volume.create(disk, 64 * MIB)
    assert not needs_recovery(disk)
    assert not replay_journal(disk)
    where = interrupted(disk, tmp_path / "block")
    assert needs_recovery(disk)
    assert b"journalled" not in disk.read_bytes()[where : where + 4096]
    assert replay_journal(disk)
    assert disk.read_bytes()[where:].startswith(b"journalled")
    assert not needs_recovery(disk)
    before = disk.stat().st_mtime_ns
    assert not replay_journal(disk)
    assert disk.stat().st_mtime_ns == before


@pytest.mark.parametrize("check", [replay_journal, fsck])
def test_a_journal_cannot_write_beyond_its_disk(tmp_path: Path, check: Callable[[Path], object]) -> None:
    """A guest writes its journal itself: a block that it claims to be at 12 GB would make the file that large, and fill the host."""
    disk = tmp_path / "data.raw"
    volume.create(disk, 64 * MIB)
    interrupted(disk, tmp_path / "block")
    content = disk.read_bytes()
    descriptor = content.index(b"\xc0\x3b\x39\x98\x00\x00\x00\x01")
    tag = content.index((3000).to_bytes(4, "big"), descriptor + 12)
    assert tag < descriptor + 4096
    disk.write_bytes(content[:tag] + (3_000_000).to_bytes(4, "big") + content[tag + 4 :])
    with contextlib.suppress(IntegrityError, HostCannot):
        check(disk)
    assert disk.stat().st_size == 64 * MIB
    assert {path.name for path in tmp_path.iterdir()} == {"data.raw", "block"}
    assert not (check is replay_journal and not needs_recovery(disk)), "it was taken for replayed"


def test_a_journal_that_cannot_be_replayed_is_said_so(tmp_path: Path) -> None:
    """A guest may have written anything: it is an error with a hint, and not a file system that is read in half."""
    disk = tmp_path / "data.raw"
    volume.create(disk, 64 * MIB)
    interrupted(disk, tmp_path / "block")
    with disk.open("r+b") as file:
        file.seek(1024)
        file.write(os.urandom(0x38))
    with pytest.raises((IntegrityError, HostCannot)):
        replay_journal(disk)


def test_without_its_tool_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without e2fsprogs is told what to install."""
    monkeypatch.setitem(ext4._ENVIRONMENT, "PATH", str(tmp_path / "nothing"))
    with pytest.raises(MissingTool, match="mke2fs"):
        volume.create(tmp_path / "data.raw", 16 * MIB)
    assert list(tmp_path.iterdir()) == []


SLOW = """#!/bin/sh
echo $$ > "$HERE/pid"
exec sleep 1000
"""
REPLAYS = """
import sys
from collections.abc import Callable
from pathlib import Path
from coppice.disk import ext4
ext4._ENVIRONMENT["PATH"], ext4._ENVIRONMENT["HERE"] = sys.argv[2] + ":/usr/bin:/bin", sys.argv[2]
ext4.replay_journal(Path(sys.argv[1]))
"""


async def test_a_replay_ends_with_its_host(tmp_path: Path) -> None:
    """A host is killed while e2fsck writes: the next machine that has the volume must not meet it there."""
    disk = tmp_path / "data.raw"
    volume.create(disk, 64 * MIB)
    interrupted(disk, tmp_path / "block")
    (tmp_path / "e2fsck").write_text(SLOW)
    (tmp_path / "e2fsck").chmod(0o755)
    host = await asyncio.create_subprocess_exec(sys.executable, "-c", REPLAYS, str(disk), str(tmp_path))
    async with asyncio.timeout(30):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)
        pid = int((tmp_path / "pid").read_text())
        ticks = start_ticks(pid)
        assert ticks is not None
        host.kill()
        await host.wait()
        while start_ticks(pid) == ticks:  # noqa: ASYNC110 - it is nobody's child that could be awaited
            await asyncio.sleep(0.01)
