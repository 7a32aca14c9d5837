"""A stateful VMM driver for whole lifecycles in milliseconds: real processes that map real mem-files, a guest in the test's own loop.

What it keeps is in the instance's directory, in the VMM process (its RAM, and whether it is paused), and nowhere else; so hosts in
several processes can work on one machine. Only the guest's voice needs the process that started it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Literal

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import VmmDied
from coppice.model import MachineSpec, Manifest, Publish, Record, VmmProcess
from coppice.vmm import driver as files
from coppice.vmm import process as processes
from coppice.vmm.driver import Capabilities, Launch, VmmDriver
from fakes.faults import Faults
from fakes.guest import FakeGuest
from fakes.pids import ended, is_paused
from fakes.ram import GuestState, Ram, make_ram

PROGRAM = "fake-vmm"
PID_FILE = "fake-vmm.json"

CAPABILITIES = Capabilities(
    maps_mem_file_privately=True,
    boots_in_file=True,
    restores_without_kernel=True,
    restores_paused=True,
    user_mode_network=True,
    relative_paths=True,
)

Kind = Literal["shared", "private", "anonymous"]


class DeviceState(Record, frozen=True, kw_only=True):
    """The fake's vmstate: the machine it belongs to, and the instant, by the generation of what the guest knew then."""

    machine: MachineSpec
    mac: str
    generation: int


class _Started(Record, frozen=True, kw_only=True):
    process: VmmProcess
    machine: MachineSpec
    mac: str
    publish: tuple[Publish, ...]


class FakeDriver(VmmDriver):
    """`program` is the compiled fake_vmm.c. Where it is to go wrong is planned with `faults`.

    With `copies_silently` a restore fills memory of its own instead of mapping the mem-file, and the capabilities do not say so.
    """

    def __init__(
        self, program: Path, *, capabilities: Capabilities = CAPABILITIES, copies_silently: bool = False
    ) -> None:
        self.faults = Faults()
        self.vmm_version = "1"
        self._program = program
        self._capabilities = capabilities
        self._copies_silently = copies_silently
        self._guests: dict[VmmProcess, asyncio.Task[None]] = {}

    @property
    def name(self) -> str:
        return "fake"

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

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
        await in_thread(make_ram, launch.directory / files.LIVE_MEMORY, launch.machine.memory_bytes)
        process = await self._start(launch, "shared", files.LIVE_MEMORY)
        return await self._started("booted", process)

    async def restore(self, launch: Launch, *, paused: bool = False) -> VmmProcess:
        await self.faults.reach("restore")
        kind: Kind = "anonymous" if self._copies_silently else "private"
        process = await self._start(launch, kind, files.MEMORY, paused=paused)
        return await self._started("restored", process, launch)

    async def _started(self, step: str, process: VmmProcess, restored: Launch | None = None) -> VmmProcess:
        try:
            if restored:
                await _load_devices(restored, process)
            await self.faults.reach(step, process)
        except BaseException:
            await processes.kill(process)
            raise
        return process

    async def _start(self, launch: Launch, kind: Kind, memory: str, *, paused: bool = False) -> VmmProcess:
        listeners = _listeners(launch.directory)
        try:
            process = await processes.start_in_thread(self._spawn, launch, kind, memory)
            if paused:  # before there is a guest that could say anything
                await complete(self._turn(process, signal.SIGUSR1, paused=True))
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        guest = FakeGuest(launch.directory, process, listeners, self.faults)
        self._guests[process] = asyncio.create_task(guest.live())
        return process

    def _spawn(self, launch: Launch, kind: Kind, memory: str) -> VmmProcess:
        log = launch.directory / files.VMM_LOG
        with log.open("a") as opened:
            opened.write(f"started {kind}\n")
        with (launch.directory / files.CONSOLE_LOG).open("a") as console:
            console.write("the fake guest runs\n")
        ready, tell = os.pipe()
        try:
            argv = [str(self._program), kind, memory, str(launch.machine.memory_bytes), str(tell)]
            try:
                process = processes.spawn(argv, cwd=launch.directory, log=log, pass_fds=[tell])
            finally:
                os.close(tell)
            if os.read(ready, 1) != b"\0":
                raise VmmDied(f"the fake VMM ended at once: {_last_line(log)}", hint="read fake_vmm.c")
        finally:
            os.close(ready)
        started = _Started(process=process, machine=launch.machine, mac=launch.mac, publish=_picked(launch))
        (launch.directory / PID_FILE).write_bytes(msgspec.json.encode(started))
        return process

    async def published(self, directory: Path, asked: tuple[Publish, ...]) -> tuple[Publish, ...]:
        return (await self._reach("published", directory)).publish

    async def pause(self, directory: Path) -> None:
        process = (await self._reach("pause", directory)).process
        await complete(self._turn(process, signal.SIGUSR1, paused=True))

    async def resume(self, directory: Path) -> None:
        process = (await self._reach("resume", directory)).process
        await complete(self._turn(process, signal.SIGUSR2, paused=False))

    async def _turn(self, process: VmmProcess, order: signal.Signals, *, paused: bool) -> None:
        """Give the order and see it obeyed: two orders at once could overtake each other."""
        os.kill(process.pid, order)
        while self.alive(process) and is_paused(process.pid) != paused:  # noqa: ASYNC110 - its name has no event
            await asyncio.sleep(0)

    async def save_devices(self, directory: Path) -> None:
        started = await self._reach("save_devices", directory)
        if not is_paused(started.process.pid):
            raise AssertionError("the devices of a machine that runs were to be saved")
        state = DeviceState(
            machine=started.machine, mac=started.mac, generation=Ram(started.process.pid).state.generation
        )
        (directory / files.VMSTATE_NEW).write_bytes(msgspec.json.encode(state))

    async def is_paused(self, directory: Path) -> bool:
        return is_paused((await self._reach("is_paused", directory)).process.pid)

    async def quit(self, directory: Path, process: VmmProcess) -> None:
        await self.faults.reach("quit", process)
        await processes.kill(process)

    async def wait_exit(self, directory: Path, process: VmmProcess) -> str:
        status = await processes.wait_exit(process)
        said = _last_line(directory / files.VMM_LOG)
        if not said.startswith("started"):
            return said
        return "exit status unknown" if status is None else f"signal {-status}"

    def alive(self, process: VmmProcess) -> bool:
        return processes.is_alive(process)

    def find_orphans(self, instances: Path) -> dict[Path, list[VmmProcess]]:
        return processes.by_working_directory(instances, [PROGRAM])

    async def _reach(self, step: str, directory: Path) -> _Started:
        """What runs in the directory, after the step's planned faults."""
        try:
            started = msgspec.json.decode((directory / PID_FILE).read_bytes(), type=_Started)
        except FileNotFoundError:
            raise VmmDied("no VMM was ever started here", hint="start one") from None
        await self.faults.reach(step, started.process)
        if not self.alive(started.process):
            raise VmmDied("the fake VMM has ended", hint="see the fault that was planned")
        return started

    def guest_state(self, directory: Path) -> GuestState:
        """What the guest that runs in this directory knows: a look behind the curtain, for tests."""
        started = msgspec.json.decode((directory / PID_FILE).read_bytes(), type=_Started)
        return Ram(started.process.pid).state

    def guests_that_ended(self) -> list[asyncio.Task[None]]:
        """What serves the guests whose VMM is gone: to be awaited before tasks or descriptors are counted."""
        return [task for process, task in self._guests.items() if not self.alive(process)]

    async def end(self, instances: Path) -> None:
        """Kill every VMM below the directory and see that its guest ends: at the end of a test nothing is left."""
        for found in (await asyncio.to_thread(self.find_orphans, instances)).values():
            for process in found:
                await processes.kill(process)
        await asyncio.gather(*self._guests.values())


async def _load_devices(launch: Launch, process: VmmProcess) -> None:
    """A vmstate that does not belong to this machine and to this very memory ends the VMM, as a real one would."""
    saved = msgspec.json.decode((launch.directory / files.VMSTATE).read_bytes(), type=DeviceState)
    instant = Ram(process.pid).state.generation
    if saved.machine != launch.machine or saved.generation != instant:
        with (launch.directory / files.VMM_LOG).open("a") as log:
            log.write(f"cannot load the vmstate: it is of {saved}, the memory is of generation {instant}\n")
        os.kill(process.pid, signal.SIGKILL)
        await ended(process)  # before its guest could answer


def _picked(launch: Launch) -> tuple[Publish, ...]:
    """A number for each port that may be any: nothing listens there, since nothing is behind it."""
    first = 10000 + int.from_bytes(launch.directory.name.encode()[-2:])
    return tuple(
        msgspec.structs.replace(port, host_port=port.host_port or first + number)
        for number, port in enumerate(launch.publish)
    )


def _listeners(directory: Path) -> list[socket.socket]:
    """A listening socket for each agent port; bound through /proc, since sun_path has 108 bytes."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    listeners: list[socket.socket] = []
    try:
        for port in range(files.PORTS):
            name = files.PORT_SOCKET.format(port)
            (directory / name).unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setblocking(False)
            listener.bind(f"/proc/self/fd/{descriptor}/{name}")
            listener.listen(1)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    finally:
        os.close(descriptor)
    return listeners


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return lines[-1] if lines else ""
