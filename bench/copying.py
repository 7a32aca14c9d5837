"""The baseline: the same driver without sharing. A fork copies the mem-file, as tools without
copy-on-write do.

Everything else is the same: VMM, vmstate, agent, identity. So only the copy differs from a shared
fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from coppice.fork import fanout
from coppice.linux.clone import write_all
from coppice.linux.extents import data_ranges
from coppice.model import MachineSpec, Manifest, VmmProcess
from coppice.vmm import driver as files
from coppice.vmm.driver import Capabilities, Launch, Saved, VmmDriver

_ZEROS = bytes(1 << 20)


class CopyingDriver(VmmDriver):
    """Wraps a driver. Forks get a private copy, sparse and synced; with `full`, holes are written
    too.
    """

    def __init__(self, inner: VmmDriver, *, full: bool) -> None:
        """Make a driver. `filled_bytes` will have the bytes written into holes, by directory
        name.
        """
        self._inner = inner
        self._full = full
        self.filled_bytes: dict[str, int] = {}

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(self._inner.capabilities, maps_mem_file_privately=False)

    def vmm_bytes(self, machine: MachineSpec) -> int:
        return self._inner.vmm_bytes(machine)

    async def manifest(self, machine: MachineSpec) -> Manifest:
        return await self._inner.manifest(machine)

    async def boot(self, launch: Launch) -> VmmProcess:
        return await self._inner.boot(launch)

    async def restore(self, launch: Launch, *, paused: bool = False) -> VmmProcess:
        if self._full:
            filled = await asyncio.to_thread(fill_holes, launch.directory / files.MEMORY)
            self.filled_bytes[launch.directory.name] = filled
        return await self._inner.restore(launch, paused=paused)

    async def pause(self, directory: Path) -> None:
        await self._inner.pause(directory)

    async def resume(self, directory: Path) -> None:
        await self._inner.resume(directory)

    async def save(self, directory: Path) -> Saved:
        return await self._inner.save(directory)

    async def dial(self, directory: Path, port: int) -> socket.socket:
        return await self._inner.dial(directory, port)

    async def is_paused(self, directory: Path) -> bool:
        return await self._inner.is_paused(directory)

    def make_layer(self, path: Path, size_bytes: int) -> None:
        self._inner.make_layer(path, size_bytes)

    def merge_layers(self, base: Path, merged: Path, above: Sequence[Path]) -> None:
        self._inner.merge_layers(base, merged, above)

    def flatten_disk(self, base: Path, layers: Sequence[Path], out: Path) -> None:
        self._inner.flatten_disk(base, layers, out)

    async def disks_in_use(self, directory: Path) -> tuple[tuple[str, ...], ...]:
        return await self._inner.disks_in_use(directory)

    async def prepare_switch(self, directory: Path, disk: Sequence[str]) -> None:
        await self._inner.prepare_switch(directory, disk)

    async def finish_switch(self, directory: Path, disk: Sequence[str]) -> None:
        await self._inner.finish_switch(directory, disk)

    async def switch_layers(self, directory: Path, disks: Sequence[Sequence[str]]) -> None:
        await self._inner.switch_layers(directory, disks)

    async def replace_below(self, directory: Path, disk: Sequence[str]) -> None:
        await self._inner.replace_below(directory, disk)

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
    """Suppress the host's warnings about copying forks during the block."""
    logger = logging.getLogger(fanout.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def fill_holes(path: Path) -> int:
    """Write zeros into every hole of a private copy; return the bytes written.

    Then the whole file has been written once, as by a plain `cp`. Content and mode do not change.
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
