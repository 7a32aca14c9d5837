"""A stateful VMM driver for lifecycles in milliseconds: real processes and mem-files, and a guest
in the test's loop.

All its state is in the instance's directory and in the VMM process (its RAM, and whether it is
paused), so hosts in several processes can work on one machine. Only the guest's answers need the
process that started it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import VmmDied, VmmError
from coppice.linux.remap import lay_over
from coppice.machine.volumes import with_clones
from coppice.model import MIB, MachineSpec, Manifest, Record, VmmProcess
from coppice.model.network import Nic, NicBackend
from coppice.vmm import driver as files
from coppice.vmm import layers as memory_layers
from coppice.vmm import process as processes
from coppice.vmm import sockets, starting
from coppice.vmm.driver import Capabilities, Launch, Saved, VmmDriver
from fakes import disk
from fakes.faults import Faults
from fakes.guest import FakeGuest
from fakes.pids import ended, has_settled, is_paused, name_of
from fakes.ram import GuestState, Ram, make_ram

PROGRAM = "fake-vmm"
PID_FILE = "fake-vmm.json"
PORT_SOCKET = "port{}.sock"
_PORTS = tuple(PORT_SOCKET.format(port) for port in range(files.PORTS))

CAPABILITIES = Capabilities(
    maps_mem_file_privately=True,
    maps_layers=True,
    observable=True,
    boots_in_file=True,
    restores_paused=True,
    nic_backends=frozenset({NicBackend.USER_MODE}),
    layer_format=disk.FORMAT,
    switches_layers=True,
)
PERSONALITIES = ("file", "anonymous", "firecracker")  # for the last one see `fakes.doubled`
PERSONALITY = "COPPICE_FAKE_PERSONALITY"  # the environment variable, which child processes inherit
_ORDER_S = 30.0  # limit for a fake VMM to finish an order
_FIRST_RAM = "first-ram"  # the initial contents of anonymous RAM; removed once loaded

Kind = Literal["shared", "private", "anonymous", "copied"]


class DeviceState(Record, frozen=True, kw_only=True):
    """The fake's vmstate: the machine that it belongs to, and the instant, as the generation of the
    guest's state at that time.
    """

    machine: MachineSpec
    nics: int
    generation: int


class Started(Record, frozen=True, kw_only=True):
    process: VmmProcess
    machine: MachineSpec
    nics: tuple[Nic, ...]


class FakeDriver(VmmDriver):
    """`program` is the compiled fake_vmm.c. `faults` has the planned failures.

    With `personality` `file` its machines boot with RAM in LIVE_MEMORY. With `anonymous` RAM is in
    no file, and the VMM writes it on a save.

    With `copies_silently` a restore fills its own memory instead of mapping the mem-file, and the
    capabilities do not show it.

    With a `keeper` each guest is passed to it, and does not run in the event loop of this process.
    """

    def __new__(cls, _program: Path, personality: str | None = None, **options: object) -> FakeDriver:
        """Make the driver of the personality. No driver of a real VMM copies silently."""
        doubled = (personality or os.environ.get(PERSONALITY)) == "firecracker" and not options.get("copies_silently")
        if cls is FakeDriver and doubled:
            from fakes.doubled import DoubledDriver

            return super().__new__(DoubledDriver)
        return super().__new__(cls)

    def __init__(
        self,
        program: Path,
        personality: str | None = None,
        *,
        name: str = "fake",
        capabilities: Capabilities = CAPABILITIES,
        copies_silently: bool = False,
        keeper: Callable[[VmmProcess, FakeGuest], None] | None = None,
    ) -> None:
        self.faults = Faults()
        self.vmm_version = "1"
        self._program = program
        self._name = name
        self.personality = personality or os.environ.get(PERSONALITY, "file")
        self._capabilities = msgspec.structs.replace(capabilities, boots_in_file=self.personality == "file")
        self._copies_silently = copies_silently
        self._keeper = keeper
        self._guests: dict[VmmProcess, asyncio.Task[None]] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def vmm_bytes(self, machine: MachineSpec) -> int:
        return 32 * MIB

    async def manifest(self, machine: MachineSpec) -> Manifest:
        await self.faults.reach("manifest")
        return Manifest(
            driver=self.name,
            vmm_version=self.vmm_version,
            machine="fake",
            accel="none",
            cpu_model="none",
            cpu_flags="",
            kernel=machine.kernel,
            memory_bytes=machine.memory_bytes,
            cpus=machine.cpus,
        )

    async def boot(self, launch: Launch) -> VmmProcess:
        await self.faults.reach("boot")
        in_file = self._capabilities.boots_in_file
        memory = launch.directory / (files.LIVE_MEMORY if in_file else _FIRST_RAM)
        try:
            await in_thread(make_ram, memory, launch.machine.memory_bytes)
            process = await self._start(launch, "shared" if in_file else "anonymous", memory.name)
        finally:
            if not in_file:
                memory.unlink(missing_ok=True)
        return await self._started("booted", process)

    async def restore(self, launch: Launch, *, paused: bool = False) -> VmmProcess:
        await self.faults.reach("restore")
        kind: Kind = "copied" if self._copies_silently else "private"
        process = await self._start(launch, kind, files.MEMORY, paused=paused)
        return await self._started("restored", process, launch)

    async def _started(self, step: str, process: VmmProcess, restored: Launch | None = None) -> VmmProcess:
        try:
            if restored:
                if restored.layers and not self._copies_silently:
                    memory = restored.directory / files.MEMORY
                    await in_thread(lay_over, process.pid, memory, restored.layers)
                await _load_devices(restored, process)
            await self.faults.reach(step, process)
        except BaseException:
            await processes.kill(process)
            raise
        return process

    async def _start(self, launch: Launch, kind: Kind, memory: str, *, paused: bool = False) -> VmmProcess:
        # the guest has its own descriptors
        with sockets.listening(launch.directory, _PORTS) as bound:
            listeners = [listener.dup() for listener in bound.values()]
        for listener in listeners:
            listener.setblocking(False)
        try:
            process = await starting.start_in_thread(launch, self._spawn, kind, memory)
            if paused:  # before the guest can answer
                await complete(self._order(process, signal.SIGUSR1))
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        self.serve(process, FakeGuest(launch.directory, process, listeners, self.faults))
        return process

    def serve(self, process: VmmProcess, guest: FakeGuest) -> None:
        """Run the guest of a process in the test's event loop, or pass it to the keeper."""
        if self._keeper is not None:
            self._keeper(process, guest)
            return
        self._guests[process] = asyncio.create_task(guest.live())

    def _spawn(self, launch: Launch, kind: Kind, memory: str) -> VmmProcess:
        log = launch.directory / files.VMM_LOG
        with log.open("a") as opened:
            opened.write(f"started {kind}\n")
        with (launch.directory / files.CONSOLE_LOG).open("a") as console:
            console.write("the fake guest boots\n" if kind in ("shared", "anonymous") else "")
        ready, tell = os.pipe()
        try:
            argv = [str(self._program), kind, memory, str(launch.machine.memory_bytes), str(tell)]
            argv.append(files.MEMORY_NEW)
            try:
                with memory_layers.opened(launch) as opened:
                    process = starting.spawn(argv, cwd=launch.directory, log=log, pass_fds=[tell, *opened])
            finally:
                os.close(tell)
            if os.read(ready, 1) != b"\0":
                raise VmmDied(f"the fake VMM ended at once: {last_line(log)}", hint="read fake_vmm.c")
        finally:
            os.close(ready)
        started = Started(process=process, machine=launch.machine, nics=launch.nics)
        (launch.directory / PID_FILE).write_bytes(msgspec.json.encode(started))
        disk.launch(launch)
        return process

    def make_layer(self, path: Path, size_bytes: int) -> None:
        disk.make(path, size_bytes)

    def merge_layers(self, base: Path, merged: Path, above: Sequence[Path]) -> None:
        disk.merge(merged, above)

    def flatten_disk(self, base: Path, layers: Sequence[Path], out: Path) -> None:
        disk.flatten(base, layers, out)

    async def disks_in_use(self, directory: Path) -> tuple[tuple[str, ...], ...]:
        await self._reach("disks_in_use", directory)
        return tuple(disk.in_use(directory).values())

    async def prepare_switch(self, directory: Path, disk_files: Sequence[str]) -> None:
        self._require_running(await self._reach("prepare_switch", directory))
        disk.require_top(directory, disk_files, disk_files[-2])
        disk.open_next(directory, disk_files[-1])

    async def finish_switch(self, directory: Path, disk_files: Sequence[str]) -> None:
        self._require_running(await self._reach("finish_switch", directory))
        disk.require_top(directory, disk_files, disk_files[-1])

    def _require_running(self, started: Started) -> None:
        if is_paused(started.process.pid):
            raise AssertionError("what needs no pause was done in it")

    async def switch_layers(self, directory: Path, disks: Sequence[Sequence[str]]) -> None:
        started = await self._reach("switch_layers", directory)
        if not is_paused(started.process.pid):
            raise AssertionError("switch_layers was called on a running machine")
        for files_of_disk in disks:
            disk.require_top(directory, files_of_disk, files_of_disk[-2])
            disk.require_open(directory, files_of_disk[-1])
        disk.use(directory, *disks)
        await self.faults.reach("switched", started.process)

    async def replace_below(self, directory: Path, disk_files: Sequence[str]) -> None:
        started = await self._reach("replace_below", directory)
        disk.require_top(directory, disk_files, disk_files[-1])
        disk.use(directory, disk_files)
        await self.faults.reach("replaced", started.process)

    def check_layer(self, path: Path, size_bytes: int) -> None:
        assert path.stat().st_size == size_bytes

    async def dial(self, directory: Path, port: int) -> socket.socket:
        started = msgspec.json.decode((directory / PID_FILE).read_bytes(), type=Started)
        await self.faults.reach("dial", started.process)
        if not self.alive(started.process):  # its guest may not have noticed the end yet
            raise ConnectionRefusedError("the fake VMM has ended")
        return sockets.connect(directory, PORT_SOCKET.format(port))

    async def pause(self, directory: Path) -> None:
        process = (await self._reach("pause", directory)).process
        await complete(self._order(process, signal.SIGUSR1))

    async def resume(self, directory: Path) -> None:
        process = (await self._reach("resume", directory)).process
        await complete(self._order(process, signal.SIGUSR2))

    async def _order(self, process: VmmProcess, order: signal.Signals) -> None:
        """Send a signal after the effect of earlier ones, and wait for its effect. Two pending
        signals could overtake each other, and a killed host may have sent the earlier one.
        """
        await self._settle(process)
        if self.alive(process):
            os.kill(process.pid, order)
            await self._settle(process)

    async def _settle(self, process: VmmProcess) -> None:
        async with asyncio.timeout(_ORDER_S):
            while not has_settled(process.pid):  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0)

    async def save(self, directory: Path) -> Saved:
        started = await self._reach("save", directory)
        if not is_paused(started.process.pid):
            raise AssertionError("save was called on a running machine")
        ram = Ram(started.process.pid)
        state = DeviceState(machine=started.machine, nics=len(started.nics), generation=ram.state.generation)
        (directory / files.VMSTATE_NEW).write_bytes(msgspec.json.encode(state))
        if (directory / files.MEMORY).exists():
            saved = Saved.IN_PROCESS
        elif self._capabilities.boots_in_file:
            saved = Saved.IN_FILE
        else:
            saved = Saved.WRITTEN
            await complete(self._write_memory(started.process))
        await self.faults.reach("saved", started.process)
        return saved

    async def _write_memory(self, process: VmmProcess) -> None:
        await self._order(process, signal.SIGHUP)
        if name_of(process.pid) != "fake-saved":
            raise VmmError("the fake VMM could not write its memory", hint="see the planned fault")

    async def is_paused(self, directory: Path) -> bool:
        process = (await self._reach("is_paused", directory)).process
        await self._settle(process)
        return is_paused(process.pid)

    async def quit(self, directory: Path, process: VmmProcess) -> None:
        await self.faults.reach("quit", process)
        await processes.kill(process)

    async def wait_exit(self, directory: Path, process: VmmProcess) -> str:
        status = await processes.wait_exit(process)
        said = last_line(directory / files.VMM_LOG)
        if not said.startswith("started"):
            return said
        return "exit status unknown" if status is None else f"signal {-status}"

    def alive(self, process: VmmProcess) -> bool:
        return processes.is_alive(process)

    def find_orphans(self, instances: Path) -> dict[Path, list[VmmProcess]]:
        return processes.by_working_directory(instances, [PROGRAM])

    async def _reach(self, step: str, directory: Path) -> Started:
        """Return the process in the directory, after the step's planned faults."""
        try:
            started = msgspec.json.decode((directory / PID_FILE).read_bytes(), type=Started)
        except FileNotFoundError:
            raise VmmDied("no VMM was ever started here", hint="start one") from None
        await self.faults.reach(step, started.process)
        if not self.alive(started.process):
            raise VmmDied("the fake VMM has ended", hint="see the planned fault")
        return started

    def guest_state(self, directory: Path) -> GuestState:
        """Return the state in the RAM of the guest in this directory, for assertions."""
        started = msgspec.json.decode((directory / PID_FILE).read_bytes(), type=Started)
        return Ram(started.process.pid).state

    def change_guest(self, directory: Path, **changes: object) -> None:
        """Change the guest's state, as its owner would."""
        started = msgspec.json.decode((directory / PID_FILE).read_bytes(), type=Started)
        Ram(started.process.pid).change(**changes)

    def guests_that_ended(self) -> list[asyncio.Task[None]]:
        """Return the tasks of guests whose VMM has ended; await them before counting tasks or
        descriptors.
        """
        return [task for process, task in self._guests.items() if not self.alive(process)]

    async def end(self, instances: Path) -> None:
        """Kill every VMM below the directory and await the end of its guest, at the end of a
        test.
        """
        for found in (await asyncio.to_thread(self.find_orphans, instances)).values():
            for process in found:
                await processes.kill(process)
        await asyncio.gather(*self._guests.values())


async def _load_devices(launch: Launch, process: VmmProcess) -> None:
    """End the VMM if the vmstate does not belong to this machine and memory, as a real VMM does."""
    saved = msgspec.json.decode((launch.directory / files.VMSTATE).read_bytes(), type=DeviceState)
    instant = Ram(process.pid).state.generation
    machines = [with_clones(machine) for machine in (saved.machine, launch.machine)]  # a clone is the same device
    if machines[0] != machines[1] or (saved.nics, saved.generation) != (len(launch.nics), instant):
        with (launch.directory / files.VMM_LOG).open("a") as log:
            log.write(f"cannot load the vmstate: it is of {saved}, the memory is of generation {instant}\n")
        os.kill(process.pid, signal.SIGKILL)
        await ended(process)  # before its guest could answer


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return lines[-1] if lines else ""
