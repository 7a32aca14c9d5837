"""Base classes of handles and managers: the backend, and a machine's last known record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

from coppice.client.backend import Backend, Opening
from coppice.client.joining import Connecting
from coppice.model import Image, Instance, ProgressSink, Snapshot, State, Volume, no_progress
from coppice.model.kernel import Kernel

if TYPE_CHECKING:
    from coppice.client.aio.forks import AsyncForks
    from coppice.client.aio.machine import AsyncMachine
    from coppice.requests import ConnectRequest, ForkRequest, Request, RunRequest, SnapshotForkRequest


class Bound:
    """An object whose methods make requests to a backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def _made(self, request: RunRequest, progress: ProgressSink) -> Opening[AsyncMachine]:
        async def made() -> AsyncMachine:
            return self._machine(await self._backend.call(request, progress))

        return Opening(made())

    def _grown(self, request: ForkRequest | SnapshotForkRequest, progress: ProgressSink) -> Opening[AsyncForks]:
        async def grown() -> AsyncForks:
            from coppice.client.aio.forks import AsyncForks

            return AsyncForks(self._backend, await self._backend.call(request, progress))

        return Opening(grown())

    def _grown_one(self, request: ForkRequest | SnapshotForkRequest, progress: ProgressSink) -> Opening[AsyncMachine]:
        async def grown() -> AsyncMachine:
            report = await self._backend.call(request, progress)
            return self._machine(report.instances[0])

        return Opening(grown())

    def _connected(self, request: ConnectRequest) -> Connecting:
        return Connecting(self._backend.stream(request))

    def _machine(self, record: Instance) -> AsyncMachine:
        from coppice.client.aio.machine import AsyncMachine

        return AsyncMachine(self._backend, record)

    async def _machine_of(self, request: Request[Instance], progress: ProgressSink = no_progress) -> AsyncMachine:
        return self._machine(await self._backend.call(request, progress))

    async def _machines_of(self, request: Request[list[Instance]]) -> list[AsyncMachine]:
        return [self._machine(record) for record in await self._backend.call(request)]


class MachineBase(Bound):
    """A machine of a backend, with its last known record. Two handles of one machine are equal."""

    def __init__(self, backend: Backend, record: Instance) -> None:
        super().__init__(backend)
        self._record = record

    @property
    def record(self) -> Instance:
        """The machine's last known record. Methods of this handle that get a new one update it."""
        return self._record

    @property
    def id(self) -> str:
        """The machine's id."""
        return self._record.id

    @property
    def name(self) -> str:
        """The machine's name."""
        return self._record.name

    @property
    def state(self) -> State:
        """The machine's last known state; `refresh` updates it."""
        return self._record.state

    def _became(self, record: Instance) -> Self:
        self._record = record
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.state}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MachineBase) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)


def key_of(thing: str | Snapshot | Volume | Image | Kernel) -> str:
    """Return the key that a request uses for an object, which may be a record or already a key."""
    if isinstance(thing, Snapshot | Volume):
        return thing.id
    if isinstance(thing, Image):
        return thing.digest
    return thing.key if isinstance(thing, Kernel) else thing


def text_of(path: Path | str) -> str:
    """Return a path as text for a request. The request refuses other types."""
    return os.fspath(path) if isinstance(path, os.PathLike) else path
