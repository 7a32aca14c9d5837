"""Fake machines of one personality. Their guests live in a process that is not killed."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coppice.client import AsyncHost
from coppice.model import PAGE_SIZE, Instance
from coppice.requests import ExecRequest
from crash.kinds import Kind
from fakes.driver import FakeDriver
from fakes.hosting import ask
from fakes.keeping import hand_over
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import DEADLINES, IMAGE, open_rooms


class FakeKind(Kind):
    """Machines of one fake driver.

    :param program: the compiled fake VMM
    :param channel: the file descriptor of the socket through which hosts hand over their guests
    """

    quick = True
    image = IMAGE
    memory_bytes = MEMORY_BYTES
    overlay_bytes = OVERLAY_BYTES

    def __init__(self, program: Path, driver: FakeDriver, channel: int) -> None:
        self.driver = driver
        self.name = f"fake, {driver.personality}"
        self.descriptors = [channel]
        self._program = program

    @classmethod
    def of_host(cls, program: str, channel: str, *, driver_name: str = "fake") -> FakeKind:
        """Make the kind in a host process from its command-line arguments."""
        to_keeper = socket.socket(fileno=int(channel))
        driver = FakeDriver(Path(program), name=driver_name, keeper=lambda _, guest: hand_over(to_keeper, guest))
        return cls(Path(program), driver, int(channel))

    @property
    def arguments(self) -> Sequence[str]:
        return [str(self._program), *map(str, self.descriptors)]

    @property
    def options(self) -> Mapping[str, Any]:
        return {"driver": self.driver, "deadlines": DEADLINES, "open_rooms": open_rooms}

    async def learn(self, host: AsyncHost, name: str, *volumes: str) -> None:
        await ask(host, name, "remember", "own", name)
        await ask(host, name, "save", name)
        for number in range(len(volumes)):
            await ask(host, name, "save", name, f"volume{number}")

    async def dirty(self, host: AsyncHost, name: str, size_bytes: int) -> None:
        await ask(host, name, "dirty", f"{size_bytes // PAGE_SIZE}")

    async def answer(self, host: AsyncHost, vm: Instance) -> tuple[str, str, str]:
        recalled = await host.call(ExecRequest(instance=vm.id, argv=["recall", "own"], timeout_s=20))
        memory = recalled.stdout.decode().rstrip("\n")
        return await ask(host, vm, "hostname"), memory, await ask(host, vm, "load")

    async def has_mounted(self, host: AsyncHost, vm: Instance, path: str) -> bool:
        mounts = self.driver.guest_state(host.local.rooms.directory(vm.id)).mounts
        return path in {mount.split(" ", 2)[2] for mount in mounts}

    async def text_on(self, host: AsyncHost, vm: Instance, path: str) -> str:
        (number,) = [number for number, each in enumerate(vm.machine.volumes) if each.mount_path == path]
        return await ask(host, vm, "load", f"volume{number}")
