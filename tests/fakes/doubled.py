"""The Firecracker driver over a double of Firecracker: the driver's own code, a real process, and
the guest of the fakes.

For the tests it is one more personality of the fake driver.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from coppice.completion import in_thread
from coppice.model import VmmProcess
from coppice.model.network import Nic, NicBackend
from coppice.vmm import driver as files
from coppice.vmm import process as processes
from coppice.vmm import sockets
from coppice.vmm.driver import Launch, Saved
from coppice.vmm.firecracker.driver import FirecrackerDriver
from fakes import disk
from fakes.driver import PID_FILE, FakeDriver, Started, last_line
from fakes.driver import PROGRAM as FAKE_PROGRAM
from fakes.guest import FakeGuest
from fakes.ram import Ram, make_ram, write_first

PROGRAM = "firecracker"
GUEST_SOCKET = "guest.sock"
VERSION = "FIRECRACKER_DOUBLE_VERSION"
FACTS = Path(__file__).parent.parent / "data" / "firecracker-v1.16.1.json"
_HIGHEST = (1 << 63) - 1


class DoubledDriver(FakeDriver):
    """`program` is the fake VMM's; the double is in the same directory."""

    def __init__(self, program: Path, *_: Any, **options: Any) -> None:
        super().__init__(program, "firecracker", **options)
        self._capabilities = msgspec.structs.replace(self._capabilities, layer_format="", switches_layers=False)
        # It opens no device, so it runs as its own user on every host.
        self._real = FirecrackerDriver(program=lambda: str(program.with_name(PROGRAM)), groups_for=lambda *_: ())

    async def boot(self, launch: Launch) -> VmmProcess:
        await self.faults.reach("boot")
        # like the other fakes it needs space, if only for a moment
        first = launch.directory / "first-ram"
        try:
            await in_thread(make_ram, first, launch.machine.memory_bytes)
        finally:
            first.unlink(missing_ok=True)
        return await self._run("booted", launch, self._real.boot(_as_double(launch)), first=True)

    async def restore(self, launch: Launch, *, paused: bool = False) -> VmmProcess:
        await self.faults.reach("restore")
        return await self._run("restored", launch, self._real.restore(_as_double(launch), paused=paused), first=False)

    async def _run(self, step: str, launch: Launch, starting: Any, *, first: bool) -> VmmProcess:
        with (launch.directory / files.CONSOLE_LOG).open("a") as console:
            console.write("the fake guest boots\n" if first else "")
        with sockets.listening(launch.directory, [GUEST_SOCKET]) as bound:
            listener = bound[GUEST_SOCKET].dup()
            (launch.directory / GUEST_SOCKET).chmod(0o666)  # the double runs as another user
        listener.setblocking(False)
        try:
            process: VmmProcess = await starting
            try:
                if first:
                    await in_thread(write_first, Ram(process.pid))
                started = Started(process=process, machine=launch.machine, nics=launch.nics)
                await in_thread((launch.directory / PID_FILE).write_bytes, msgspec.json.encode(started))
                await in_thread(disk.launch, launch)
                guest = HandedOver(launch.directory, process, [listener], self.faults)
                self.serve(process, guest)
            except BaseException:
                await processes.kill(process)
                raise
        except BaseException:
            listener.close()
            raise
        try:
            await self.faults.reach(step, process)
        except BaseException:
            await processes.kill(process)
            raise
        return process

    async def dial(self, directory: Path, port: int) -> socket.socket:
        if (directory / PID_FILE).exists():
            started = msgspec.json.decode((directory / PID_FILE).read_bytes(), type=Started)
            await self.faults.reach("dial", started.process)
        return await self._real.dial(directory, port)

    async def pause(self, directory: Path) -> None:
        await self._reach("pause", directory)
        await self._real.pause(directory)

    async def resume(self, directory: Path) -> None:
        await self._reach("resume", directory)
        await self._real.resume(directory)

    async def save(self, directory: Path) -> Saved:
        started = await self._reach("save", directory)
        saved = await self._real.save(directory)
        await self.faults.reach("saved", started.process)
        return saved

    async def is_paused(self, directory: Path) -> bool:
        await self._reach("is_paused", directory)
        return await self._real.is_paused(directory)

    async def wait_exit(self, directory: Path, process: VmmProcess) -> str:
        said = await self._real.wait_exit(directory, process)
        last = last_line(directory / files.VMM_LOG)  # the fake guest's message when it powers off
        return said if last.startswith("20") else last

    def find_orphans(self, instances: Path) -> dict[Path, list[VmmProcess]]:
        return processes.by_working_directory(instances, [PROGRAM, FAKE_PROGRAM])


class HandedOver(FakeGuest):
    """A guest that gets its connections from the double, each with the number of its port."""

    async def live(self) -> None:
        self._waiting: list[asyncio.Queue[socket.socket]] = [asyncio.Queue() for _ in range(files.PORTS)]
        try:
            await super().live()
        finally:
            for queue in self._waiting:
                while not queue.empty():
                    queue.get_nowait().close()

    def _servings(self) -> list[Coroutine[Any, Any, None]]:
        return [self._take(), *super()._servings()]

    async def _take(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self.listeners[0])
            with connection:
                connection.setblocking(True)  # the message has arrived: it is sent at once
                number, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, connection, 1, 1)
            if number and descriptors:
                self._waiting[number[0]].put_nowait(socket.socket(fileno=descriptors[0]))

    async def _accept(self, port: int) -> socket.socket:
        return await self._waiting[port].get()


def _as_double(launch: Launch) -> Launch:
    """Use the double's version, whatever version a test gave the driver, and TAPs, which are never
    opened.

    The double runs in the network namespace of its slot, if it has one.
    """
    manifest = msgspec.structs.replace(launch.manifest, vmm_version=os.environ.get(VERSION, "1.16.1"))
    nics = tuple(Nic(backend=NicBackend.TAP, mac=nic.mac, tap="tap0", namespace=nic.namespace) for nic in launch.nics)
    # The control groups of these tests are directories, in which no process can be.
    return msgspec.structs.replace(launch, manifest=manifest, nics=nics, cgroup=None)


def compile_double(directory: Path) -> None:
    """Compile the double, with the facts of the API document."""
    document = json.loads(FACTS.read_text())
    rows = [
        f'{{"{fact["request"]}", "{fact["field"]}", "{fact["type"]}", {int(fact["required"])}, '
        f'"{"".join(f"|{word}" for word in [*fact["enum"], ""]) if "enum" in fact else ""}", '
        f"{fact.get('minimum', 0)}LL, {fact.get('maximum', _HIGHEST)}LL}},"
        for fact in document["fields"]
    ]
    requests = ", ".join(f'"{request}"' for request in document["requests"])
    (directory / "facts.h").write_text(
        f"static const char *const requests[] = {{{requests}}};\n"
        + "static const struct fact facts[] = {\n"
        + "\n".join(rows)
        + "\n};\n"
    )
    source = Path(__file__).parent / "firecracker.c"
    command = ["gcc", "-O1", "-static", "-Wall", "-Wextra", "-Werror", f"-I{directory}"]
    subprocess.run([*command, "-o", str(directory / PROGRAM), str(source)], check=True, timeout=60)
