"""A network that leaves a file on the host for each attached instance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coppice import network
from coppice.model import Instance
from coppice.model.network import Nic
from coppice.network import Networks
from coppice.network.user import UserNetwork

SLOTS = "slots"


class SlotNetwork(UserNetwork):
    """Like the user-mode network, with a file per attached instance instead of a TAP device or
    namespace.
    """

    name = SLOTS

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    async def attach(self, instance: Instance) -> tuple[Nic, ...]:
        nics = await super().attach(instance)
        self._directory.mkdir(exist_ok=True)
        (self._directory / instance.id).touch()
        return nics

    async def detach(self, instance_id: str) -> None:
        await super().detach(instance_id)
        (self._directory / instance_id).unlink(missing_ok=True)

    def leftovers(self, known: Callable[[], set[str]]) -> set[str]:
        if not self._directory.exists():
            return set()
        return {path.name for path in self._directory.iterdir()} - known()


def fake_networks(home: Path) -> Networks:
    """Return the networks of every data directory, and a SlotNetwork."""
    return Networks([*network.standard(home).providers, SlotNetwork(home / SLOTS)])


def attached(home: Path) -> set[str]:
    """Return the ids of the attached instances."""
    return {path.name for path in (home / SLOTS).glob("*")}
