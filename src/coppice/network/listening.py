"""Networks whose published ports the VMM, or a helper of it, binds while it runs. They leave nothing on
the host.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from coppice.completion import in_thread
from coppice.model import Instance, Publish
from coppice.model.network import Nic
from coppice.network.ports import Picks, require_free
from coppice.network.provider import NetworkProvider


class ListeningNetwork(NetworkProvider):
    """The part that these networks share."""

    def __init__(self, database: Path | None = None) -> None:
        """`database` is as for `Picks`."""
        self._picks = Picks(database)

    @abstractmethod
    def nic(self, instance: Instance, forwards: tuple[Publish, ...]) -> Nic:
        """Return the NIC for the VMM, which forwards these ports."""

    async def attach(self, instance: Instance) -> tuple[Nic, ...]:
        forwards: tuple[Publish, ...] = ()
        if instance.publish:
            await in_thread(require_free, instance)
            forwards = await in_thread(self._picks.hold, instance)
        return (self.nic(instance, forwards),)

    async def published(self, instance: Instance) -> tuple[Publish, ...]:
        return self._picks.release(instance.id) or instance.publish

    async def detach(self, instance_id: str) -> None:
        """Hold no ports any more. The network ended with its VMM."""
        self._picks.release(instance_id)
