# Written by tools/generate_client.py from client/aio: change that, then run it.

"""Base classes of handles and managers: the backend, and a machine's last known record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coppice.client.aio.machine import AsyncMachine
from coppice.client.blocking.twin import Twin
from coppice.model import Instance, State

if TYPE_CHECKING:
    pass


class MachineBase(Twin[AsyncMachine]):
    """A machine of a backend, with its last known record. Two handles of one machine are equal."""

    @property
    def record(self) -> Instance:
        """The machine's last known record. Methods of this handle that get a new one update it."""
        return self._twin.record

    @property
    def id(self) -> str:
        """The machine's id."""
        return self._twin.id

    @property
    def name(self) -> str:
        """The machine's name."""
        return self._twin.name

    @property
    def state(self) -> State:
        """The machine's last known state; `refresh` updates it."""
        return self._twin.state
