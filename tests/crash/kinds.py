"""The differences between kinds of machines: how a host opens their data directory, which image
they boot, and how their guests are asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coppice.client import AsyncHost
from coppice.model import MIB, Instance
from coppice.requests import ExecRequest
from machines import IMAGE


class Kind(ABC):
    """One kind of machines."""

    name: str  # in the report
    quick: bool  # a kill takes less than a second, also in an operation that boots a machine
    image: str
    memory_bytes: int
    overlay_bytes: int
    descriptors: Sequence[int] = ()  # file descriptors that a process with a host inherits

    @property
    @abstractmethod
    def arguments(self) -> Sequence[str]:
        """The arguments from which a process with a host makes the same kind."""

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of a host of these machines."""
        return {}

    def host(self, home: Path) -> AsyncHost:
        """Return a host over the data directory, not yet opened."""
        return AsyncHost(home, **self.options)

    @abstractmethod
    async def learn(self, host: AsyncHost, name: str, *volumes: str) -> None:
        """Write the machine's name into its memory and onto its disk.

        :param volumes: paths of its volumes, onto which the name is written too
        """

    @abstractmethod
    async def dirty(self, host: AsyncHost, name: str, size_bytes: int) -> None:
        """Let the machine write to so much of its memory."""

    @abstractmethod
    async def answer(self, host: AsyncHost, vm: Instance) -> tuple[str, str, str]:
        """Return a machine's name, the text in its memory, and the text on its disk."""

    @abstractmethod
    async def has_mounted(self, host: AsyncHost, vm: Instance, path: str) -> bool:
        """Return whether something is mounted at the path."""

    @abstractmethod
    async def text_on(self, host: AsyncHost, vm: Instance, path: str) -> str:
        """Return the text on the volume that is mounted at the path."""


class RealKind(Kind):
    """Machines of QEMU with Debian."""

    name = "QEMU"
    quick = False
    image = IMAGE
    memory_bytes = 192 * MIB
    overlay_bytes = 256 * MIB

    @property
    def arguments(self) -> Sequence[str]:
        return ()

    async def learn(self, host: AsyncHost, name: str, *volumes: str) -> None:
        script = (
            f"echo {name} >/run/own; for place in /root {' '.join(volumes)}; do echo {name} >$place/own; done; sync"
        )
        assert (await host.call(ExecRequest(instance=name, argv=["sh", "-c", script], timeout_s=60))).exit_code == 0

    async def dirty(self, host: AsyncHost, name: str, size_bytes: int) -> None:
        script = f"head -c {size_bytes} /dev/urandom >/run/fill"
        assert (await host.call(ExecRequest(instance=name, argv=["sh", "-c", script], timeout_s=60))).exit_code == 0

    async def answer(self, host: AsyncHost, vm: Instance) -> tuple[str, str, str]:
        script = "hostname; cat /run/own 2>/dev/null || echo; cat /root/own 2>/dev/null || echo"
        result = await host.call(ExecRequest(instance=vm.id, argv=["sh", "-c", script], timeout_s=60))
        assert result.exit_code == 0, result
        name, memory, disk = result.stdout.decode().splitlines()
        return name, memory, disk

    async def has_mounted(self, host: AsyncHost, vm: Instance, path: str) -> bool:
        request = ExecRequest(instance=vm.id, argv=["mountpoint", "-q", path], timeout_s=60)
        return (await host.call(request)).exit_code == 0

    async def text_on(self, host: AsyncHost, vm: Instance, path: str) -> str:
        request = ExecRequest(instance=vm.id, argv=["cat", f"{path}/own"], timeout_s=60)
        return (await host.call(request)).stdout.decode().rstrip("\n")
