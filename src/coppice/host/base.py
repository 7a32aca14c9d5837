"""The base of all use cases: look up an instance, lock it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from coppice.completion import in_own_thread
from coppice.errors import Busy
from coppice.host import recovery
from coppice.host.opened import OpenedHost
from coppice.linux.files import untranslated
from coppice.machine.rooms import Rooms
from coppice.model import Budgets, Image, Instance, ProgressSink, State
from coppice.model.lifecycle import Operation, require
from coppice.model.ownership import may_use_image, require_instance
from coppice.state import locks

if TYPE_CHECKING:
    from coppice.host.hashing import Hashing
    from coppice.requests import ImagePullRequest


class UseCases:
    """A group of use cases. Each is a method with the name of its operation."""

    def __init__(self, host: OpenedHost) -> None:
        """`host` is the data directory of these use cases, which all groups share."""
        self._host = host

    @property
    def rooms(self) -> Rooms:
        """The stores and drivers of the data directory."""
        return self._host.rooms

    @property
    def owner(self) -> str | None:
        """The owner that the host is limited to; None: the operator, who sees everything."""
        return self._host.owner

    @property
    def budgets(self) -> Budgets:
        """The resources of the host that the data directory may take."""
        return self._host.budgets

    def _hash(self) -> Hashing:
        return self._host.hashing

    async def _get(self, key: str) -> Instance:
        """Return the recorded instance if this host's owner may use it."""
        found, _ = await self.rooms.store.look_up(key)
        require_instance(self.owner, found, key)
        return found

    async def _current(self, key: str, *, to_fork: bool = False) -> Instance:
        """Return the instance in its true state.

        First recover an operation that was interrupted, then check whether its VMM still runs.
        """
        found, entry = await self.rooms.store.look_up(key)
        require_instance(self.owner, found, key, to_fork=to_fork)
        if entry is not None and recovery.is_interrupted(entry):
            await recovery.recover(self.rooms, only=found.id)
            found, _ = await self.rooms.store.look_up(key)  # the recovery may have removed it
            require_instance(self.owner, found, key, to_fork=to_fork)
        return await recovery.look(self.rooms, found)

    async def _settled(self, instance: Instance) -> Instance:
        """Return an instance whose VMM has ended, after the operation that has ended it.

        Such an operation holds the lock until the outcome is recorded; until then, the record says
        that the machine runs.

        :raises NotFound: the operation has removed it
        :raises Busy: the operation takes longer than the deadline of the data directory
        """
        lock = self.rooms.layout.lock(instance.id)
        async with locks.hold(lock, deadline_s=self.rooms.deadlines.lock, what=instance.name):
            with locks.of_record(lock, instance.name):
                journaled = await self.rooms.store.look_up(instance.id)
                return await recovery.look_locked(self.rooms, *journaled)

    def _usable(self, image: Image) -> bool:
        return may_use_image(self.owner, image)

    async def _pull(self, request: ImagePullRequest, progress: ProgressSink) -> Image:
        from coppice.images.cache import LayerCache
        from coppice.images.catalog import BuildOptions
        from coppice.images.reference import parse_reference
        from coppice.images.registry import Access

        await self._require_reach(parse_reference(request.reference).registry)
        access = Access(
            platform=request.platform,
            credentials=request.credentials,
            saved_logins=self.owner is None,  # they are the operator's
            tls_verify=request.tls_verify,
        )
        return await self.rooms.images.pull(
            request.reference,
            access=access,
            name=request.name,
            cache=LayerCache(self.rooms.layout.blobs, self.owner),
            options=BuildOptions(owner=self.owner, public=request.public, tags=dict(request.tags)),
            progress=progress,
        )

    async def _require_reach(self, host: str) -> None:
        """Refuse a host that this host's owner may not have asked for images.

        :raises Forbidden: it has an address that is not public
        """
        if self._host.reach is not None:
            await in_own_thread(self._host.reach.require, host)

    @contextlib.asynccontextmanager
    async def _hold(
        self,
        key: str,
        operation: Operation,
        *,
        shared: bool = False,
        deadline_s: float | None = None,
        clones_volumes: bool = False,
    ) -> AsyncIterator[tuple[Instance, State]]:
        """Lock an instance for an operation. Yield the instance and the operation's target state.

        The deadline is that of the data directory, unless `deadline_s` is given.

        :param clones_volumes: as for `require`
        :raises IllegalTransition: the operation is not legal in the instance's state
        :raises Busy: another operation held the lock until the deadline
        :raises NoSpace: the disk is full
        """
        to_fork = operation is Operation.FORK
        # With the exclusive lock the true state is looked for under the lock.
        instance = await (self._current(key, to_fork=to_fork) if shared else self._get(key))
        lock = self.rooms.layout.lock(instance.id)
        end_s = self.rooms.deadlines.lock if deadline_s is None else deadline_s
        with untranslated(f"{operation} {instance.name}"):
            async with locks.hold(lock, shared=shared, deadline_s=end_s, what=instance.name):
                with locks.of_record(lock, instance.name):
                    instance, entry = await self.rooms.store.look_up(instance.id)
                    if not shared:
                        instance = await recovery.look_locked(self.rooms, instance, entry)
                    elif entry is not None and recovery.is_interrupted(entry):  # memory and disk may not match
                        raise Busy(
                            f"{instance.name} was being changed by a process that died",
                            hint=f"try again; `coppice inspect {instance.name}` shows its state",
                        )
                require_instance(
                    self.owner, instance, instance.name, to_fork=to_fork
                )  # its owner may have changed `public`
                yield instance, require(operation, instance, clones_volumes=clones_volumes)
