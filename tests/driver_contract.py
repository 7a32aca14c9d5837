"""The contract of vmm/driver.py as tests that any driver must pass: a subclass names the bench to
run them on.

class TestMyDriver(DriverContract):
    @pytest.fixture
    def bench(self, ...) -> Bench: ...
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec
import pytest

from coppice.errors import GuestTimeout, VmmDied, VmmError
from coppice.machine import directory as directories
from coppice.memory import memfile
from coppice.model import MemLayer, VmmProcess
from coppice.vmm import driver as files
from coppice.vmm.driver import Saved, VmmDriver
from driver_bench import Bench
from memory_helpers import mapping_is_shared


class DriverContract:
    """The properties of a driver that every caller relies on."""

    @pytest.fixture
    def driver(self, bench: Bench) -> VmmDriver:
        """Return the driver of one test."""
        return bench.make_driver()

    async def test_a_boot_runs_in_its_directory_and_its_guest_answers(self, bench: Bench, driver: VmmDriver) -> None:
        """The process works in the instance's directory, is found there, and knows no absolute path
        to it (invariant 4).
        """
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        assert driver.alive(process)
        assert Path(f"/proc/{process.pid}/cwd").readlink() == launch.directory
        assert bytes(launch.directory) not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert driver.find_orphans(bench.instances) == {launch.directory: [process]}
        await bench.identify(driver, launch, 1, "first")
        assert (await bench.health(driver, launch)).identity_serial == 1
        assert (launch.directory / files.LIVE_MEMORY).exists() == driver.capabilities.boots_in_file
        await driver.quit(launch.directory, process)

    async def test_quit_is_certain_and_can_be_repeated(self, bench: Bench, driver: VmmDriver) -> None:
        """After `quit` there is no process, and a waiting caller gets the reason in one line; a
        second `quit` does nothing.
        """
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
        # the directory belongs to the caller
        assert (launch.directory / files.OVERLAY_DISK).exists()

    async def test_a_paused_machine_is_silent_until_it_is_resumed(self, bench: Bench, driver: VmmDriver) -> None:
        """Pause and resume can be repeated."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(driver, launch, 1, "first")
        assert not await driver.is_paused(launch.directory)
        for _ in range(2):
            await driver.pause(launch.directory)
            assert await driver.is_paused(launch.directory)
        with pytest.raises(GuestTimeout):
            await bench.health(driver, launch, patience_s=0.3)
        for _ in range(2):
            await driver.resume(launch.directory)
            assert not await driver.is_paused(launch.directory)
        assert (await bench.health(driver, launch)).identity_serial == 1
        await driver.quit(launch.directory, process)

    async def test_saving_devices_changes_nothing_for_the_guest(self, bench: Bench, driver: VmmDriver) -> None:
        """The machine stays paused and can be resumed; the state names no directory, and can be
        saved again.
        """
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(driver, launch, 1, "first")
        for _ in range(2):
            await driver.pause(launch.directory)
            await driver.save(launch.directory)
            assert await driver.is_paused(launch.directory)
            saved = (launch.directory / files.VMSTATE_NEW).read_bytes()
            assert saved
            assert bytes(launch.directory.parent) not in saved
            await driver.resume(launch.directory)
            assert (await bench.health(driver, launch)).identity_serial == 1
        await driver.quit(launch.directory, process)

    async def test_save_reports_where_the_memory_is(self, bench: Bench, driver: VmmDriver) -> None:
        """A machine that was captured twice, after a boot and after a restore, keeps all of its
        state; the first capture never changes.
        """
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(driver, launch, 1, "first")
        await driver.pause(launch.directory)
        saved = await driver.save(launch.directory)
        assert (saved is Saved.IN_FILE) == driver.capabilities.boots_in_file
        size = (launch.directory / (files.LIVE_MEMORY if saved is Saved.IN_FILE else files.MEMORY_NEW)).stat().st_size
        assert size == bench.machine.memory_bytes
        await driver.resume(launch.directory)
        first = await bench.capture(driver, launch, process)
        digest = memfile.sha256(launch.directory / files.MEMORY)
        fork = bench.fork(launch, first)
        restored = await driver.restore(fork)
        await bench.identify(driver, fork, 2, "second")
        second = await bench.capture(driver, fork, restored, first)
        again = bench.fork(fork, second)
        restored = await driver.restore(again)
        await bench.identify(driver, again, 3, "third")
        assert (await bench.health(driver, again)).identity_serial == 3
        memfile.check(launch.directory / files.MEMORY, first)
        assert memfile.sha256(launch.directory / files.MEMORY) == digest
        await driver.quit(again.directory, restored)

    async def test_a_restore_maps_the_layers_of_its_memory(self, bench: Bench, driver: VmmDriver) -> None:
        """Before the guest runs: it knows what was captured at each level. The names of the files
        are not needed once the VMM answers, and no file changes.
        """
        if not driver.capabilities.maps_layers:
            return
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(driver, launch, 1, "first")
        base = await bench.capture(driver, launch, process)
        machine, layers = launch, tuple[MemLayer, ...]()
        for serial in (2, 3, 4):
            machine = bench.fork(machine, base, layers)
            process = await driver.restore(machine)
            await bench.identify(driver, machine, serial, f"level-{serial}")
            layers = await bench.capture_layer(driver, machine, process, base, layers)
        paths = [machine.directory / name for name in (files.MEMORY, *directories.LAYERS[:3])]
        digests = [memfile.sha256(path) for path in paths]
        fork = bench.fork(machine, base, layers)
        assert {layer.file for layer in fork.layers} >= {directories.LAYERS[2]}
        process = await driver.restore(fork, paused=driver.capabilities.restores_paused)
        assert await driver.is_paused(fork.directory) == driver.capabilities.restores_paused
        for name in (files.MEMORY, *directories.LAYERS[:3]):
            (fork.directory / name).unlink()
        await driver.resume(fork.directory)
        assert (await bench.health(driver, fork)).identity_serial == 4
        await bench.identify(driver, fork, 5, "fork")
        assert (await bench.health(driver, fork)).identity_serial == 5
        await driver.quit(fork.directory, process)
        assert [memfile.sha256(path) for path in paths] == digests

    async def test_layers_of_a_state_that_cannot_be_loaded_leave_no_process(
        self, bench: Bench, driver: VmmDriver
    ) -> None:
        """As without layers: the call raises, or the process ends."""
        if not driver.capabilities.maps_layers:
            return
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(driver, launch, 1, "first")
        base = await bench.capture(driver, launch, process)
        machine = bench.fork(launch, base)
        process = await driver.restore(machine)
        await bench.identify(driver, machine, 2, "second")
        fork = bench.fork(machine, base, await bench.capture_layer(driver, machine, process, base))
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

    async def test_a_port_can_be_dialled_while_the_machine_runs(self, bench: Bench, driver: VmmDriver) -> None:
        """Any process can dial it; a missing machine gives an OSError, after which callers try
        again.
        """
        launch = await bench.launch(driver)
        with pytest.raises((ConnectionError, FileNotFoundError)):
            await driver.dial(launch.directory, 0)
        process = await driver.boot(launch)
        await bench.identify(driver, launch, 1, "first")
        for port in (0, files.PORTS - 1):
            with await bench.make_driver().dial(launch.directory, port) as connected:
                assert connected.getblocking() is False
        await driver.quit(launch.directory, process)
        with pytest.raises((ConnectionError, FileNotFoundError)):
            await driver.dial(launch.directory, 0)

    async def test_many_restores_of_one_capture(self, bench: Bench, driver: VmmDriver) -> None:
        """Restores run concurrently, each in its own directory, after the source's directory is
        removed: the guests keep the captured state, and share its memory.
        """
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(driver, launch, 1, "first")
        mem_file = await bench.capture(driver, launch, process)
        digest = memfile.sha256(launch.directory / files.MEMORY)
        forks = [bench.fork(launch, mem_file) for _ in range(3)]
        shutil.rmtree(launch.directory)
        processes = await asyncio.gather(*(driver.restore(fork) for fork in forks))
        for number, (fork, restored) in enumerate(zip(forks, processes, strict=True), 2):
            await bench.identify(driver, fork, number, f"fork-{number}")
            assert (await bench.health(driver, fork)).identity_serial == number
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
        """The VMM answers but the guest does not. The mem-file's name is not needed any more after
        the restore, and the mapping is that file.
        """
        if not driver.capabilities.restores_paused:
            return
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(driver, launch, 1, "first")
        mem_file = await bench.capture(driver, launch, process)
        fork = bench.fork(launch, mem_file)
        restored = await driver.restore(fork, paused=True)
        assert await driver.is_paused(fork.directory)
        (fork.directory / files.MEMORY).unlink()
        with pytest.raises(GuestTimeout):
            await bench.health(driver, fork, patience_s=0.3)
        await driver.resume(fork.directory)
        await bench.identify(driver, fork, 2, "fork")
        assert not await driver.is_paused(fork.directory)
        assert (await bench.health(driver, fork)).identity_serial == 2
        memfile.link(launch.directory / files.MEMORY, fork.directory / files.MEMORY, mem_file)
        assert (
            mapping_is_shared(restored.pid, fork.directory / files.MEMORY, mem_file)
            == driver.capabilities.maps_mem_file_privately
        )
        await driver.quit(fork.directory, restored)

    async def test_a_state_that_cannot_be_loaded_ends_the_process(self, bench: Bench, driver: VmmDriver) -> None:
        """The call raises, or the process ends and `wait_exit` gives the reason; no process is
        left.
        """
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await bench.identify(driver, launch, 1, "first")
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

    async def test_any_process_may_make_the_next_call(self, bench: Bench, driver: VmmDriver) -> None:
        """A driver keeps no state between calls: another one finds, pauses, resumes and ends the
        machine.
        """
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

    async def test_another_process_with_the_pid_is_not_the_vmm(self, bench: Bench, driver: VmmDriver) -> None:
        """Pid, start time and program must match."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        assert not driver.alive(msgspec.structs.replace(process, start_ticks=process.start_ticks - 1))
        assert not driver.alive(msgspec.structs.replace(process, executable="/usr/bin/other"))
        await driver.quit(launch.directory, msgspec.structs.replace(process, start_ticks=process.start_ticks - 1))
        assert driver.alive(process)
        await driver.quit(launch.directory, process)

    async def test_calls_to_a_vmm_that_has_ended_fail(self, bench: Bench, driver: VmmDriver) -> None:
        """Every call raises VmmDied instead of hanging."""
        launch = await bench.launch(driver)
        process = await driver.boot(launch)
        await driver.quit(launch.directory, process)
        for call in (driver.pause, driver.resume, driver.save, driver.is_paused):
            with pytest.raises(VmmDied):
                await asyncio.wait_for(call(launch.directory), 20)

    async def test_a_cancelled_start_leaves_no_process(self, bench: Bench, driver: VmmDriver) -> None:
        """A cancelled call leaves no process, whatever the moment of its cancellation."""
        for delay_s in (0, 0.0005, 0.001, 0.002, 0.004):
            launch = await bench.launch(driver)
            starting = asyncio.create_task(driver.boot(launch))
            await asyncio.wait({starting}, timeout=delay_s)
            starting.cancel()
            outcome = (await asyncio.gather(starting, return_exceptions=True))[0]
            if isinstance(outcome, VmmProcess):
                await driver.quit(launch.directory, outcome)
            assert driver.find_orphans(bench.instances) == {}

    async def test_the_manifest_distinguishes_machines(self, bench: Bench, driver: VmmDriver) -> None:
        """It names the driver and the machine, and is the same for the same machine, except for the
        clock, which is measured each time.
        """
        manifest = await driver.manifest(bench.machine)
        again = msgspec.structs.replace(await driver.manifest(bench.machine), tsc_khz=manifest.tsc_khz)
        assert again == manifest
        assert manifest.driver == driver.name
        assert (manifest.memory_bytes, manifest.cpus) == (bench.machine.memory_bytes, bench.machine.cpus)
        larger = msgspec.structs.replace(bench.machine, memory_bytes=bench.machine.memory_bytes * 2)
        assert await driver.manifest(larger) != manifest
