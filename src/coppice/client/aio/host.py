"""AsyncHost: the entry point, which makes and finds machines."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from coppice.arguments import checked
from coppice.client.aio.operations import HostOperations
from coppice.client.backend import R
from coppice.errors import UsageError
from coppice.model import Instance, ProgressSink, no_progress
from coppice.requests import Request, StreamRequest

if TYPE_CHECKING:
    from coppice.client.aio.images import AsyncImages, AsyncKernels
    from coppice.client.aio.machine import AsyncMachine
    from coppice.client.aio.managers import AsyncSnapshots, AsyncVolumes
    from coppice.host import LocalBackend


class AsyncHost(HostOperations):
    """One data directory and all its records, for asyncio.

        async with AsyncHost() as host:
            vm = await host.run("debian", ["sleep", "infinity"])

    Any number of hosts, in any number of processes, can be open over the same data directory.
    """

    @cached_property
    def images(self) -> AsyncImages:
        """Images: build, import, list, tag and remove them."""
        from coppice.client.aio.images import AsyncImages

        return AsyncImages(self._backend)

    @cached_property
    def kernels(self) -> AsyncKernels:
        """Kernels: add, fetch, list and remove them."""
        from coppice.client.aio.images import AsyncKernels

        return AsyncKernels(self._backend)

    @cached_property
    def volumes(self) -> AsyncVolumes:
        """Volumes: make, list and remove disks that outlive machines."""
        from coppice.client.aio.managers import AsyncVolumes

        return AsyncVolumes(self._backend)

    @cached_property
    def snapshots(self) -> AsyncSnapshots:
        """Snapshots: list, fork, restore and remove saved states of machines."""
        from coppice.client.aio.managers import AsyncSnapshots

        return AsyncSnapshots(self._backend)

    @property
    def local(self) -> LocalBackend:
        """The backend of this machine.

        :raises UsageError: a server carries out the requests
        """
        from coppice.host import LocalBackend

        if not isinstance(self._backend, LocalBackend):
            raise UsageError(
                "this host has no data directory on this machine: a server carries out its requests",
                hint="use `coppice.Host()` on the server's machine",
            )
        return self._backend

    @property
    def home(self) -> Path:
        """The data directory.

        :raises UsageError: a server carries out the requests, and has the data directory
        """
        return self.local.home

    @checked
    def machine(self, record: Instance) -> AsyncMachine:
        """Return the handle of a machine from its record, without a request.

        :param record: A record of the machine.
        """
        return self._machine(record)

    @checked
    async def call(self, request: Request[R], progress: ProgressSink = no_progress) -> R:
        """Carry out any operation of `coppice.requests`, and return its result as plain data.

        :param request: The operation with its parameters.
        :param progress: Called with each step of the work.
        """
        return await self._backend.call(request, progress)

    @checked
    def stream(self, request: StreamRequest[R]) -> AbstractAsyncContextManager[R]:
        """Open a result that is used inside a block: a running command, a log.

        :param request: The operation with its parameters.
        """
        return self._backend.stream(request)

    async def open(self) -> Self:
        """Open the data directory, create it if it does not exist, and recover interrupted
        operations.

        :raises HostCannot: the data directory cannot be used
        :raises UsageError: its config.toml, or an environment variable, is invalid
        """
        await self._backend.open()
        return self

    async def close(self) -> None:
        """Close the data directory. Machines keep running. Idempotent."""
        await self._backend.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
