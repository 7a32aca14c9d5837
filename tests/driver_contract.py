"""The contract of vmm/driver.py as tests that any driver must pass: a subclass names the bench to run them on.

class TestMyDriver(DriverContract):
    @pytest.fixture
    def bench(self, ...) -> Bench: ...
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from coppice.disk.clone import clone_file
from coppice.disk.link import link_or_copy
from coppice.disk.overlay import OverlayStore
from coppice.errors import GuestTimeout, VmmDied, VmmError
from coppice.guest.client import AgentPorts, Health, Identity
from coppice.instance import directory as directories
from coppice.memory import memfile
from coppice.memory.report import mapping_is_shared
from coppice.model import MachineSpec, MemFile, Publish, VmmProcess
from coppice.names import new_id
from coppice.vmm import driver as files
from coppice.vmm.driver import Launch, VmmDriver


@dataclass(frozen=True)
class Bench:
    """A driver and what its machines are made of; every machine gets a directory below `instances`."""

    make_driver: Callable[[], VmmDriver]
    instances: Path
    machine: MachineSpec
    root: Path
    kernel: Path
    initrd: Path
    stub: tuple[Path, Path]
    overlays: OverlayStore
    patience_s: float

    async def launch(self, driver: VmmDriver) -> Launch:
        """A machine that is ready to be booted."""
        directory = self.instances / new_id()
        directories.create(directory)
        directories.place_root(directory, self.root)
        directories.place_overlay(directory, self.overlays, self.machine.overlay_bytes)
        directories.place_kernel(directory, self.kernel, self.initrd)
        manifest = await driver.manifest(self.machine)
        return Launch(directory=directory, machine=self.machine, mac="02:00:00:00:00:01", manifest=manifest)

    def fork(self, source: Launch, mem_file: MemFile) -> Launch:
        """A machine that is ready to be restored from a captured one, in a directory of its own."""
        directory = self.instances / new_id()
        directories.create(directory)
        for name in (files.ROOT_DISK, files.VMSTATE):
            link_or_copy(source.directory / name, directory / name)
        memfile.link(source.directory / files.MEMORY, directory / files.MEMORY, mem_file)
        clone_file(source.directory / files.OVERLAY_DISK, directory / files.OVERLAY_DISK)
        directories.place_kernel(directory, *self.stub)
        return msgspec.structs.replace(source, directory=directory)

    async def identify(self, launch: Launch, serial: int, hostname: str) -> None:
        """Wait for the guest, and tell it who it is."""
        identity = Identity(
            serial=serial, entropy=secrets.token_bytes(64), clock_ns=1_700_000_000 * 10**9, hostname=hostname, thaw=True
        )
        async with AgentPorts(launch.directory).control(self.patience_s) as control:
            await control.identity(identity)

    async def health(self, launch: Launch, patience_s: float | None = None) -> Health:
        """What the guest says of itself."""
        async with AgentPorts(launch.directory).control(patience_s or self.patience_s) as control:
            return await control.health()

    async def capture(self, driver: VmmDriver, launch: Launch, process: VmmProcess) -> MemFile:
        """Capture a machine on its first boot, and end it."""
        await driver.pause(launch.directory)
        await driver.save_devices(launch.directory)
        await driver.quit(launch.directory, process)
        (launch.directory / files.VMSTATE_NEW).rename(launch.directory / files.VMSTATE)
        return memfile.freeze(launch.directory / files.LIVE_MEMORY, launch.directory / files.MEMORY)


class DriverContract:
    """What every caller of a driver relies on."""

    @pytest.fixture
    def driver(self, bench: Bench) -> VmmDriver:
        """The driver of one test."""
        return bench.make_driver()

    async def test_a_boot_runs_in_its_directory_and_its_guest_answers(self, bench: Bench, driver: VmmDriver) -> None:
        """The process works in the instance's directory, is found there, and knows no absolute path to it (invariant 4)."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        assert driver.alive(process)
        assert Path(f"/proc/{process.pid}/cwd").readlink() == launch.directory
        assert bytes(launch.directory) not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert driver.find_orphans(bench.instances) == {launch.directory: [process]}
        await bench.identify(launch, 1, "first")
        assert (await bench.health(launch)).identity_serial == 1
        assert (launch.directory / files.LIVE_MEMORY).exists() == driver.capabilities.boots_in_file
        await driver.quit(launch.directory, process)

    async def test_the_end_is_certain_and_can_be_asked_for_again(self, bench: Bench, driver: VmmDriver) -> None:
        """After `quit` there is no process; whoever waited hears of it, and why in one line; a second `quit` does nothing."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        waiting = asyncio.create_task(driver.wait_exit(launch.directory, process))
        await asyncio.sleep(0)
        for _ in range(2):
            await driver.quit(launch.directory, process)
            assert not driver.alive(process)
        reason = await asyncio.wait_for(waiting, 10)
        assert reason
        assert "\n" not in reason
        assert driver.find_orphans(bench.instances) == {}
        assert (launch.directory / files.OVERLAY_DISK).exists()  # the directory is the caller's

    async def test_a_paused_machine_is_silent_until_it_is_resumed(self, bench: Bench, driver: VmmDriver) -> None:
        """Pause and resume can be repeated."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(launch, 1, "first")
        assert not await driver.is_paused(launch.directory)
        for _ in range(2):
            await driver.pause(launch.directory)
            assert await driver.is_paused(launch.directory)
        with pytest.raises(GuestTimeout):
            await bench.health(launch, patience_s=0.3)
        for _ in range(2):
            await driver.resume(launch.directory)
            assert not await driver.is_paused(launch.directory)
        assert (await bench.health(launch)).identity_serial == 1
        await driver.quit(launch.directory, process)

    async def test_saving_devices_changes_nothing_for_the_guest(self, bench: Bench, driver: VmmDriver) -> None:
        """The machine stays paused and can be resumed; the state names no directory, and can be saved again."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(launch, 1, "first")
        for _ in range(2):
            await driver.pause(launch.directory)
            await driver.save_devices(launch.directory)
            assert await driver.is_paused(launch.directory)
            saved = (launch.directory / files.VMSTATE_NEW).read_bytes()
            assert saved
            assert bytes(launch.directory.parent) not in saved
            await driver.resume(launch.directory)
            assert (await bench.health(launch)).identity_serial == 1
        await driver.quit(launch.directory, process)

    async def test_many_restores_of_one_capture(self, bench: Bench, driver: VmmDriver) -> None:
        """At once, each in a directory of its own, with the source's directory gone: they know what the guest knew, and share its memory."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(launch, 1, "first")
        mem_file = await bench.capture(driver, launch, process)
        digest = memfile.sha256(launch.directory / files.MEMORY)
        forks = [bench.fork(launch, mem_file) for _ in range(3)]
        shutil.rmtree(launch.directory)
        processes = await asyncio.gather(*(driver.restore(fork) for fork in forks))
        for number, (fork, restored) in enumerate(zip(forks, processes, strict=True), 2):
            await bench.identify(fork, number, f"fork-{number}")
            assert (await bench.health(fork)).identity_serial == number
            assert (
                mapping_is_shared(restored.pid, fork.directory / files.MEMORY, mem_file)
                == driver.capabilities.maps_mem_file_privately
            )
        for fork in forks:
            memfile.check(fork.directory / files.MEMORY, mem_file)
        assert memfile.sha256(forks[0].directory / files.MEMORY) == digest
        for fork, restored in zip(forks, processes, strict=True):
            await driver.quit(fork.directory, restored)

    async def test_a_paused_restore_runs_once_it_is_resumed(self, bench: Bench, driver: VmmDriver) -> None:
        """The VMM answers, the guest does not; by then the mem-file's name is not needed any more, and what it maps is that file."""
        if not driver.capabilities.restores_paused:
            return
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(launch, 1, "first")
        mem_file = await bench.capture(driver, launch, process)
        fork = bench.fork(launch, mem_file)
        restored = await driver.restore(fork, paused=True)
        assert await driver.is_paused(fork.directory)
        (fork.directory / files.MEMORY).unlink()
        with pytest.raises(GuestTimeout):
            await bench.health(fork, patience_s=0.3)
        await driver.resume(fork.directory)
        await bench.identify(fork, 2, "fork")
        assert not await driver.is_paused(fork.directory)
        assert (await bench.health(fork)).identity_serial == 2
        memfile.link(launch.directory / files.MEMORY, fork.directory / files.MEMORY, mem_file)
        assert (
            mapping_is_shared(restored.pid, fork.directory / files.MEMORY, mem_file)
            == driver.capabilities.maps_mem_file_privately
        )
        await driver.quit(fork.directory, restored)

    async def test_a_state_that_cannot_be_loaded_is_the_end_of_the_process(
        self, bench: Bench, driver: VmmDriver
    ) -> None:
        """The call raises, or the process ends and `wait_exit` says why; nothing is left running."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(launch, 1, "first")
        mem_file = await bench.capture(driver, launch, process)
        fork = bench.fork(launch, mem_file)
        state = fork.directory / files.VMSTATE
        saved = state.read_bytes()
        state.unlink()
        state.write_bytes(saved[: len(saved) // 2])
        try:
            restored = await driver.restore(fork)
        except (VmmError, ValueError):
            pass
        else:
            assert await asyncio.wait_for(driver.wait_exit(fork.directory, restored), bench.patience_s)
        assert driver.find_orphans(bench.instances) == {}

    async def test_a_port_that_was_picked_is_told(self, bench: Bench, driver: VmmDriver) -> None:
        """Of as many as were asked for; by whoever asks, as long as there is a VMM; all else is as it was asked for."""
        if not driver.capabilities.user_mode_network:
            return
        asked = (Publish(host_port=0, guest_port=80), Publish(host_port=0, guest_port=80, protocol="udp"))
        launch = msgspec.structs.replace(await bench.launch(driver), publish=asked)
        process = await driver.boot(launch)
        told = await bench.make_driver().published(launch.directory, asked)
        assert all(port.host_port for port in told)
        assert tuple(msgspec.structs.replace(port, host_port=0) for port in told) == asked
        await driver.quit(launch.directory, process)
        with pytest.raises(VmmDied):
            await asyncio.wait_for(driver.published(launch.directory, asked), 20)

    async def test_any_process_may_make_the_next_call(self, bench: Bench, driver: VmmDriver) -> None:
        """A driver keeps nothing between calls: another one finds, pauses, resumes and ends the machine."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        other = bench.make_driver()
        assert other.alive(process)
        assert other.find_orphans(bench.instances) == {launch.directory: [process]}
        await other.pause(launch.directory)
        assert await driver.is_paused(launch.directory)
        await driver.resume(launch.directory)
        await other.quit(launch.directory, process)
        assert not driver.alive(process)

    async def test_another_process_with_the_pid_is_not_it(self, bench: Bench, driver: VmmDriver) -> None:
        """Pid, start time and program must match."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        assert not driver.alive(msgspec.structs.replace(process, start_ticks=process.start_ticks - 1))
        assert not driver.alive(msgspec.structs.replace(process, executable="/usr/bin/other"))
        await driver.quit(launch.directory, msgspec.structs.replace(process, start_ticks=process.start_ticks - 1))
        assert driver.alive(process)
        await driver.quit(launch.directory, process)

    async def test_nobody_answers_for_a_vmm_that_is_gone(self, bench: Bench, driver: VmmDriver) -> None:
        """Every question to it is VmmDied, not a hang."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await driver.quit(launch.directory, process)
        for call in (driver.pause, driver.resume, driver.save_devices, driver.is_paused):
            with pytest.raises(VmmDied):
                await asyncio.wait_for(call(launch.directory), 20)

    async def test_a_cancelled_start_leaves_no_process(self, bench: Bench, driver: VmmDriver) -> None:
        """A call that does not return a process has left none, at whatever moment it was cancelled."""
        for delay_s in (0, 0.0005, 0.001, 0.002, 0.004):
            launch = await bench.launch(driver)
            starting = asyncio.create_task(driver.boot(launch))
            await asyncio.wait({starting}, timeout=delay_s)
            starting.cancel()
            outcome = (await asyncio.gather(starting, return_exceptions=True))[0]
            if isinstance(outcome, VmmProcess):
                await driver.quit(launch.directory, outcome)
            assert driver.find_orphans(bench.instances) == {}

    async def test_the_manifest_tells_machines_apart(self, bench: Bench, driver: VmmDriver) -> None:
        """It names the driver and the machine, and is the same for the same machine (but for the clock, measured anew each time)."""
        manifest = await driver.manifest(bench.machine)
        again = msgspec.structs.replace(await driver.manifest(bench.machine), tsc_khz=manifest.tsc_khz)
        assert again == manifest
        assert manifest.driver == driver.name
        assert (manifest.memory_bytes, manifest.cpus) == (bench.machine.memory_bytes, bench.machine.cpus)
        larger = msgspec.structs.replace(bench.machine, memory_bytes=bench.machine.memory_bytes * 2)
        assert await driver.manifest(larger) != manifest
