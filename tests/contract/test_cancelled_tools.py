"""An operation that is cancelled while an external program hangs ends soon, and leaves neither the
program nor anything else.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coppice.boot import debian
from coppice.boot.kernel import KernelStore
from coppice.client import AsyncHost
from coppice.linux import e2fs
from coppice.model import MIB, State
from coppice.requests import RmRequest, RunRequest
from fakes.hosting import assert_tidy, boot, make
from image_archives import file, tar

SOON_S = 15.0  # on a loaded machine; each of the programs would hang for 1000 s


class Hanging:
    """A program that hangs; a test can await its start and see its end."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._bin = directory / "bin"
        self._bin.mkdir()
        self._started = directory / "started"
        os.mkfifo(self._started)
        path = f"{self._bin}:/usr/sbin:/usr/bin:/sbin:/bin"
        monkeypatch.setitem(e2fs.ENVIRONMENT, "PATH", path)
        monkeypatch.setitem(debian._ENVIRONMENT, "PATH", path)
        monkeypatch.setenv("PATH", path)

    def install(self, program: str) -> None:
        """Make this program hang, with a child that has its output open."""
        script = self._bin / program
        script.write_text(f'#!/bin/sh\nexec 9> "{self._started}"\necho started >&9\nsleep 1000 &\nwait\n')
        script.chmod(0o755)

    async def cut(self, work: Awaitable[object]) -> None:
        """Cancel the work when the program has started, and check that both end soon."""
        task = asyncio.ensure_future(work)
        started = await asyncio.to_thread(open, self._started, "rb", 0)
        with started:
            assert await asyncio.to_thread(started.read, 8) == b"started\n"
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=SOON_S)
            assert done, "the cancellation waits for the program"
            assert task.cancelled()
            assert await asyncio.to_thread(started.read) == b""  # the last process that had it open is gone


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hanging:
    """A place to install hanging programs; it is empty at first."""
    return Hanging(tmp_path, monkeypatch)


def archive(tmp_path: Path) -> Path:
    """Write a small archive for a volume."""
    path = tmp_path / "archive.tar"
    path.write_bytes(tar(file("a", b"data")))
    return path


async def empty_volume(host: AsyncHost, _: Path) -> None:
    await host.volumes.create("data", size_bytes=64 * MIB)


async def filled_volume(host: AsyncHost, tmp_path: Path) -> None:
    await host.volumes.create("data", size_bytes=64 * MIB, archive=archive(tmp_path))


async def new_machine(host: AsyncHost, _: Path) -> None:
    await host.call(RunRequest(image="tiny", name="oak", overlay_bytes=32 * MIB))


async def kernel(host: AsyncHost, _: Path) -> None:
    await KernelStore(host.local.rooms.layout.kernels).ensure_debian()


async def image(host: AsyncHost, _: Path) -> None:
    await host.images.build("new")


Work = Callable[[AsyncHost, Path], Awaitable[None]]


@pytest.mark.parametrize(
    ("program", "work"),
    [
        ("mke2fs", empty_volume),
        ("mke2fs", filled_volume),
        ("debugfs", filled_volume),
        ("mke2fs", new_machine),
        ("apt-cache", kernel),
        ("apt-get", image),
        ("mmdebstrap", image),
    ],
)
async def test_a_cancelled_tool_is_killed_and_its_work_undone(
    fake_host: AsyncHost, hanging: Hanging, tmp_path: Path, program: str, work: Work
) -> None:
    """The program is killed with its children, and the data directory is as before."""
    before = sorted(fake_host.home.rglob("*"))
    hanging.install(program)
    await hanging.cut(work(fake_host, tmp_path))
    assert await fake_host.volumes.ls() == []
    await assert_tidy(fake_host)
    ignored = {"coppice.db-wal", "coppice.db-shm"}
    after = sorted(fake_host.home.rglob("*"))
    assert [path for path in after if path.name not in ignored] == [p for p in before if p.name not in ignored]


async def test_a_cancelled_check_ends(fake_host: AsyncHost, hanging: Hanging) -> None:
    """The checked disks are unchanged, and no longer held."""
    await make(fake_host, State.STOPPED)
    hanging.install("e2fsck")
    await hanging.cut(fake_host.verify())
    await fake_host.call(RmRequest(instance="oak"))
    await assert_tidy(fake_host)
    await boot(fake_host)
