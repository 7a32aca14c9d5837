"""The disk of a volume is sound and sparse, and its journal is replayed before a read-only use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coppice.errors import HostCannot, IntegrityError, MissingTool
from coppice.linux import e2fs
from coppice.model import GIB, MIB
from coppice.vmm.process import start_ticks
from coppice.volumes import disk as volume
from coppice.volumes.ext4 import fsck, needs_recovery, replay_journal


def debugfs(disk: Path, *commands: str) -> str:
    """Return the output of e2fsprogs' debugger for commands on an image."""
    done = subprocess.run(
        ["/usr/sbin/debugfs", "-w", "-f", "-", str(disk)],
        input="\n".join(commands).encode(),
        capture_output=True,
        check=True,
        timeout=30,
    )
    return done.stdout.decode()


def interrupted(disk: Path, data: Path) -> int:
    """Leave a block in the journal that is not at its place yet, as a killed machine does; return
    where it belongs.
    """
    data.write_bytes(b"journalled".ljust(4096, b"."))
    block = 3000
    debugfs(disk, "journal_open", f"journal_write -b {block} {data}", "journal_close")
    return block * 4096


@pytest.mark.parametrize("size", [16 * MIB, GIB, 64 * GIB])
def test_an_empty_volume_is_sound_and_small(tmp_path: Path, size: int) -> None:
    """A new volume occupies no more than its estimate, and its superblock has backups, which an
    overlay omits.
    """
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


def test_each_volume_has_its_own_uuid(tmp_path: Path) -> None:
    """A machine with two volumes tells them apart by UUID."""
    uuids = set()
    for name in ("one", "two"):
        volume.create(tmp_path / name, 16 * MIB)
        uuids.add((tmp_path / name).read_bytes()[1024 + 0x68 : 1024 + 0x78])
    assert len(uuids) == 2


def test_the_journal_is_replayed_once(tmp_path: Path) -> None:
    """The first call writes the journal's blocks back; the second has nothing to do and does not
    touch the file.
    """
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
    """The guest writes the journal: a block with an offset of 12 GB would grow the file that far
    and fill the host's disk.
    """
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
    assert not (check is replay_journal and not needs_recovery(disk)), "the journal was reported as replayed"


def test_a_journal_that_cannot_be_replayed_is_an_error(tmp_path: Path) -> None:
    """A guest may have written anything: a broken journal is an error with a hint, not a file
    system that is read anyway.
    """
    disk = tmp_path / "data.raw"
    volume.create(disk, 64 * MIB)
    interrupted(disk, tmp_path / "block")
    with disk.open("r+b") as file:
        file.seek(1024)
        file.write(os.urandom(0x38))
    with pytest.raises((IntegrityError, HostCannot)):
        replay_journal(disk)


def test_without_e2fsprogs_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host without e2fsprogs the error names the package."""
    monkeypatch.setitem(e2fs.ENVIRONMENT, "PATH", str(tmp_path / "nothing"))
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
from coppice.linux import e2fs
from coppice.volumes import ext4
e2fs.ENVIRONMENT["PATH"], e2fs.ENVIRONMENT["HERE"] = sys.argv[2] + ":/usr/bin:/bin", sys.argv[2]
ext4.replay_journal(Path(sys.argv[1]))
"""


async def test_a_replay_ends_with_its_host(tmp_path: Path) -> None:
    """If the host process is killed during a replay, e2fsck ends too: it must not write while the
    next machine uses the volume.
    """
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
        while start_ticks(pid) == ticks:  # noqa: ASYNC110 - it is not a child, so it cannot be awaited
            await asyncio.sleep(0.01)
