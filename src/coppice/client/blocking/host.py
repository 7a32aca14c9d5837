# Written by tools/generate_client.py from client/aio: change that, then run it.

"""Host: the entry point, which makes and finds machines."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from coppice.client.backend import R
from coppice.client.blocking.images import Images, Kernels
from coppice.client.blocking.managers import Snapshots, Volumes
from coppice.client.blocking.operations import HostOperations
from coppice.model import Instance, ProgressSink, no_progress
from coppice.requests import Request

if TYPE_CHECKING:
    from coppice.client.blocking.machine import Machine
    from coppice.host import LocalBackend


class Host(HostOperations):
    """One data directory and all its records, for programs without asyncio.

        with Host() as host:
            vm = host.run("debian", ["sleep", "infinity"])

    Any number of hosts, in any number of processes, can be open over the same data directory.
    """

    @property
    def images(self) -> Images:
        """Images: build, import, list, tag and remove them."""
        return Images(self._portal, self._twin.images)

    @property
    def kernels(self) -> Kernels:
        """Kernels: add, fetch, list and remove them."""
        return Kernels(self._portal, self._twin.kernels)

    @property
    def volumes(self) -> Volumes:
        """Volumes: make, list and remove disks that outlive machines."""
        return Volumes(self._portal, self._twin.volumes)

    @property
    def snapshots(self) -> Snapshots:
        """Snapshots: list, fork, restore and remove saved states of machines."""
        return Snapshots(self._portal, self._twin.snapshots)

    @property
    def local(self) -> LocalBackend:
        """The backend of this machine.

        :raises UsageError: a server carries out the requests
        """
        return self._twin.local

    @property
    def home(self) -> Path:
        """The data directory.

        :raises UsageError: a server carries out the requests, and has the data directory
        """
        return self._twin.home

    def machine(self, record: Instance) -> Machine:
        """Return the handle of a machine from its record, without a request.

        :param record: A record of the machine.
        """
        return self._machine(self._twin.machine(record))

    def call(self, request: Request[R], progress: ProgressSink = no_progress) -> R:
        """Carry out any operation of `coppice.requests`, and return its result as plain data.

        :param request: The operation with its parameters.
        :param progress: Called with each step of the work.
        """
        return self._portal.call(self._twin.call(request, progress))

    def open(self) -> Self:
        """Open the data directory, create it if it does not exist, and recover interrupted
        operations.

        :raises HostCannot: the data directory cannot be used
        :raises UsageError: its config.toml, or an environment variable, is invalid
        """
        self._portal.call(self._twin.open())
        return self

    def close(self) -> None:
        """Close the data directory. Machines keep running. Idempotent."""
        try:
            self._portal.call(self._twin.close())
        finally:
            self._portal.close()

    def __enter__(self) -> Self:
        try:
            return self.open()
        except BaseException:
            self._portal.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
