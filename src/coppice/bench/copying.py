"""The baseline: the same driver, told not to share. A fork then copies the mem-file, as tools without copy-on-write forks do.

Everything else is the product's own: the same VMM, the same vmstate, the same agent, the same identity. So the difference between this and
a shared fork is the copy and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from coppice.disk.clone import write_all
from coppice.disk.extents import data_ranges
from coppice.fork import fanout
from coppice.model import MachineSpec, Manifest, Publish, VmmProcess
from coppice.vmm import driver as files
from coppice.vmm.driver import Capabilities, Launch, VmmDriver

_ZEROS = bytes(1 << 20)


class CopyingDriver(VmmDriver):
    """Wraps a driver. Forks get a private copy: sparse and synced, as the host makes it; with `full`, its holes are written too."""

    def __init__(self, inner: VmmDriver, *, full: bool) -> None:
        """`filled_bytes` says what was written into the holes of the copy that each instance has, by its directory's name."""
        self._inner = inner
        self._full = full
        self.filled_bytes: dict[str, int] = {}

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(self._inner.capabilities, maps_mem_file_privately=False)

    async def manifest(self, machine: MachineSpec) -> Manifest:
        return await self._inner.manifest(machine)

    async def boot(self, launch: Launch) -> VmmProcess:
        return await self._inner.boot(launch)

    async def restore(self, launch: Launch, *, paused: bool = False) -> VmmProcess:
        if self._full:
            filled = await asyncio.to_thread(fill_holes, launch.directory / files.MEMORY)
            self.filled_bytes[launch.directory.name] = filled
        return await self._inner.restore(launch, paused=paused)

    async def published(self, directory: Path, asked: tuple[Publish, ...]) -> tuple[Publish, ...]:
        return await self._inner.published(directory, asked)

    async def pause(self, directory: Path) -> None:
        await self._inner.pause(directory)

    async def resume(self, directory: Path) -> None:
        await self._inner.resume(directory)

    async def save_devices(self, directory: Path) -> None:
        await self._inner.save_devices(directory)

    async def is_paused(self, directory: Path) -> bool:
        return await self._inner.is_paused(directory)

    async def quit(self, directory: Path, process: VmmProcess) -> None:
        await self._inner.quit(directory, process)

    async def wait_exit(self, directory: Path, process: VmmProcess) -> str:
        return await self._inner.wait_exit(directory, process)

    def alive(self, process: VmmProcess) -> bool:
        return self._inner.alive(process)

    def find_orphans(self, instances: Path) -> dict[Path, list[VmmProcess]]:
        return self._inner.find_orphans(instances)


@contextlib.contextmanager
def expected_copies() -> Iterator[None]:
    """Keep the host from warning that forks copy, for the length of a block: here that is the point."""
    logger = logging.getLogger(fanout.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def fill_holes(path: Path) -> int:
    """Write zeros into every hole of a private copy; returns the bytes written.

    Data and holes together are then the whole file, written once: what a plain `cp` of it costs. The content stays the same, and so does the mode.
    """
    mode = path.stat().st_mode & 0o777
    path.chmod(0o600)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        written = position = 0
        for start, length in [*data_ranges(descriptor, size), (size, 0)]:
            written += start - position
            while position < start:
                count = min(len(_ZEROS), start - position)
                write_all(descriptor, memoryview(_ZEROS)[:count], position)
                position += count
            position = start + length
        return written
    finally:
        os.fchmod(descriptor, mode)
        os.close(descriptor)
