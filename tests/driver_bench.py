"""A driver with the parts of its machines, for the tests of the contract of drivers."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from coppice.agent.client import AgentPorts, Identity
from coppice.content.overlay import OverlayStore
from coppice.errors import GuestTimeout, VmmDied
from coppice.linux.clone import clone_file
from coppice.linux.link import link_or_copy
from coppice.machine import directory as directories
from coppice.memory import memfile
from coppice.memory.capture import PrivateCapture
from coppice.memory.layers import ranges_over
from coppice.model import MachineSpec, MemFile, MemLayer, VmmProcess
from coppice.model.guest import Health
from coppice.model.network import Nic
from coppice.names import new_id
from coppice.vmm import driver as files
from coppice.vmm.driver import Launch, Saved, VmmDriver
from memory_helpers import capture_private


@dataclass(frozen=True)
class Bench:
    """A driver and the parts of its machines; every machine gets a directory below `instances`."""

    make_driver: Callable[[], VmmDriver]
    instances: Path
    machine: MachineSpec
    root: Path
    kernel: Path
    initrd: Path
    stub: tuple[Path, Path]
    overlays: OverlayStore
    patience_s: float
    nics: tuple[Nic, ...] = ()

    async def launch(self, driver: VmmDriver) -> Launch:
        """Return a machine that is ready to boot."""
        directory = self.instances / new_id()
        directories.create(directory)
        directories.place_root(directory, self.root)
        directories.place_overlay(directory, self.overlays, self.machine.overlay_bytes)
        directories.place_kernel(directory, self.kernel, self.initrd)
        manifest = await driver.manifest(self.machine)
        return Launch(
            directory=directory,
            machine=self.machine,
            disks=directories.devices(self.machine),
            nics=self.nics,
            manifest=manifest,
        )

    def fork(self, source: Launch, mem_file: MemFile, above: Sequence[MemLayer] = ()) -> Launch:
        """Return a machine that is ready to be restored from a captured one, in its own directory.

        `above` are the layers over the mem-file.
        """
        directory = self.instances / new_id()
        directories.create(directory)
        for name in (files.ROOT_DISK, files.VMSTATE):
            link_or_copy(source.directory / name, directory / name)
        memfile.link(source.directory / files.MEMORY, directory / files.MEMORY, mem_file)
        for name, layer in zip(directories.LAYERS, above, strict=False):
            memfile.link(source.directory / name, directory / name, layer)
        clone_file(source.directory / files.OVERLAY_DISK, directory / files.OVERLAY_DISK)
        directories.place_kernel(directory, *self.stub)
        over = ranges_over(directory / files.MEMORY, above)
        return msgspec.structs.replace(source, directory=directory, layers=over)

    async def identify(self, driver: VmmDriver, launch: Launch, serial: int, hostname: str) -> None:
        """Wait for the guest, and give it its identity."""
        identity = Identity(
            serial=serial, entropy=secrets.token_bytes(64), clock_ns=1_700_000_000 * 10**9, hostname=hostname, thaw=True
        )
        ports = AgentPorts(launch.directory, partial(driver.dial, launch.directory))
        may_lose = driver.loses_connections(launch.manifest)
        await ports.identify(lambda: identity, self.patience_s, may_lose=may_lose)

    async def health(self, driver: VmmDriver, launch: Launch, patience_s: float | None = None) -> Health:
        """Return the guest's health."""
        ports = AgentPorts(launch.directory, partial(driver.dial, launch.directory))
        if patience_s is None and driver.loses_connections(launch.manifest):
            for _ in range(3):
                with contextlib.suppress(VmmDied, GuestTimeout):
                    async with ports.control(5.0) as control:
                        return await control.health()
        async with ports.control(patience_s or self.patience_s) as control:
            return await control.health()

    async def capture(
        self, driver: VmmDriver, launch: Launch, process: VmmProcess, base: MemFile | None = None
    ) -> MemFile:
        """Capture a machine, with its memory from where `save` reports it, and end it. `base` is
        the mem-file that it was restored from.
        """
        directory = launch.directory
        await driver.pause(directory)
        saved = await driver.save(directory)
        whole = directory / (files.LIVE_MEMORY if saved is Saved.IN_FILE else files.MEMORY_NEW)
        if saved is Saved.IN_PROCESS:
            assert base is not None
            capture_private(process.pid, directory / files.MEMORY, base, whole)
        await driver.quit(directory, process)
        (directory / files.VMSTATE_NEW).rename(directory / files.VMSTATE)
        return memfile.freeze(whole, directory / files.MEMORY)

    async def capture_layer(
        self, driver: VmmDriver, launch: Launch, process: VmmProcess, base: MemFile, below: Sequence[MemLayer] = ()
    ) -> tuple[MemLayer, ...]:
        """Capture a restored machine as a layer over its memory, and end it; return all of its
        layers.
        """
        directory = launch.directory
        await driver.pause(directory)
        assert await driver.save(directory) is Saved.IN_PROCESS
        new = directory / files.MEMORY_NEW
        with PrivateCapture(directory / files.MEMORY, base, new, below, layered=True) as work:
            work.prepare()
            work.collect(process.pid)
            taken = work.finish()
        assert len(taken.layers) == len(below) + 1
        await driver.quit(directory, process)
        (directory / files.VMSTATE_NEW).rename(directory / files.VMSTATE)
        new.rename(directory / directories.LAYERS[len(below)])
        return taken.layers
