"""What all use cases share: the opened data directory, looking an instance up, holding it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from coppice.completion import all_of, complete, in_thread
from coppice.disk.atomic import os_errors
from coppice.disk.overlay import OverlayStore
from coppice.errors import Busy, NotFound
from coppice.guest.agent import agent_binary
from coppice.guest.kernel import KernelStore
from coppice.host.hashing import Background, Hashing
from coppice.host.spares import Spares, check_spares
from coppice.images.catalog import ImageCatalog
from coppice.instance import recovery
from coppice.instance.rooms import Deadlines, Rooms
from coppice.lifecycle import Operation, require
from coppice.model import Budgets, Image, Instance, State
from coppice.names import check_owner, check_reference
from coppice.ownership import may_use_image, require_instance
from coppice.store import locks
from coppice.store.budgets import load_budgets
from coppice.store.config import hashes_in_background
from coppice.store.layout import Layout, default_home
from coppice.store.store import Store
from coppice.vmm.driver import VmmDriver
from coppice.vmm.process import own_process
from coppice.vmm.qemu.driver import QemuDriver

Reference = str | Instance
"""How a caller names an instance: by name, by id, or by a record that it was given."""

RoomsOpener = Callable[[Layout, VmmDriver, Deadlines], Rooms]


def default_rooms(layout: Layout, driver: VmmDriver, deadlines: Deadlines) -> Rooms:
    """The rooms of a data directory whose directories are there. Blocks.

    :raises HostCannot: the database cannot be used, or the agent is not compiled
    """
    return Rooms(
        layout=layout,
        store=Store(layout.database, own_process()),
        driver=driver,
        images=ImageCatalog(layout.images),
        kernels=KernelStore(layout.kernels),
        overlays=OverlayStore(layout.overlays),
        agent=agent_binary(),
        deadlines=deadlines,
    )


class HostBase:
    """An opened data directory."""

    def __init__(
        self,
        home: Path | str | None = None,
        *,
        accel: str = "auto",
        owner: str | None = None,
        driver: VmmDriver | None = None,
        deadlines: Deadlines | None = None,
        budgets: Budgets | None = None,
        background: Background = "owned",
        spares: int = 1,
        open_rooms: RoomsOpener | None = None,
    ) -> None:
        """Prepare to use the data directory `home` (default: COPPICE_HOME and so on, see `default_home`).

        `owner` is whose things are made, seen and used; without one the host is the operator's, who may use all (see `coppice.ownership`).
        `accel` is `auto`, `kvm` or `tcg`; `driver` replaces QEMU altogether, and `open_rooms` everything that works in the data directory.
        `budgets` are used instead of those that config.toml and the environment say (see `coppice.store.budgets`).
        `background` says what becomes of the hashing of captures when the host is closed: `owned`, it ends, and the next host takes it up;
        `detached`, it goes on by itself; `off`, there is none. config.toml and the environment can switch it off too (see `coppice.store.config`).
        `spares` VMMs are started ahead, while the host is open, for each template that it has forked twice within half a minute, and is expected to fork
        again (see `coppice.fork.spare`). Each takes some 20 MiB; with 0 there are none.

        :raises InvalidName: the owner is not a name
        :raises UsageError: so many spares can never be
        """
        self._home = Path(home) if home is not None else default_home()
        self._owner = check_owner(owner)
        self._driver = driver or QemuDriver(accel)
        self._deadlines = deadlines or Deadlines()
        self._given_budgets = budgets
        self._budgets: Budgets | None = None
        self._open_rooms = open_rooms or default_rooms
        self._background = background
        self._spare_limit = check_spares(spares)
        self._opened: Rooms | None = None
        self._hashing: Hashing | None = None
        self._spares: Spares | None = None

    @property
    def home(self) -> Path:
        """The data directory."""
        return self._home

    @property
    def owner(self) -> str | None:
        """Whose things this host makes and sees; None: all of them."""
        return self._owner

    @property
    def rooms(self) -> Rooms:
        """The opened rooms.

        :raises RuntimeError: the host is used outside of its `with` block
        """
        if self._opened is None:
            raise RuntimeError("open the host first: `async with AsyncHost() as host:`")
        return self._opened

    @property
    def budgets(self) -> Budgets:
        """How much of the host the data directory may take.

        :raises RuntimeError: the host is used outside of its `with` block
        """
        if self._opened is None or self._budgets is None:
            raise RuntimeError("open the host first: `async with AsyncHost() as host:`")
        return self._budgets

    async def open(self) -> Self:
        """Open the data directory, making it where it is not there, and recover what was interrupted.

        :raises HostCannot: it cannot be used
        :raises UsageError: its config.toml, or a variable of the environment, cannot be understood
        """
        if self._opened is None:
            try:
                await in_thread(self._open)
                await recovery.recover(self.rooms)
                await recovery.sweep(self.rooms)
                self._hash().resume()
            except BaseException:
                await self.close()
                raise
        return self

    def _open(self) -> None:
        layout = Layout(self._home.absolute())
        layout.create()
        self._budgets = self._given_budgets or load_budgets(layout.home)
        background = self._background if hashes_in_background(layout.home) else "off"
        self._opened = self._open_rooms(layout, self._driver, self._deadlines)
        self._hashing = Hashing(self._opened, background)
        self._spares = Spares(self._opened, self._spare_limit, self._hold_template, self._require_room)

    def _hash(self) -> Hashing:
        """The background hashing of this host, once it is opened."""
        if self._hashing is None:
            raise AssertionError("only an opened host has captured anything")
        return self._hashing

    def _spare(self) -> Spares:
        """The spares of this host, once it is opened."""
        if self._spares is None:
            raise AssertionError("only an opened host has forked anything")
        return self._spares

    @contextlib.asynccontextmanager
    async def _hold_template(self, instance_id: str) -> AsyncIterator[Instance]:
        async with self._hold(instance_id, Operation.FORK, shared=True) as (instance, _):
            yield instance

    def _require_room(self, template: Instance) -> None:
        """Refuse to start a VMM ahead that there is no room for; what room is, `Admission` knows. Blocks."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close the data directory. Instances live on. Idempotent."""
        try:
            # A task that is cancelled before it has begun does nothing at all: not even what it would do in every case.
            await complete(all_of(part.close() for part in (self._hashing, self._spares) if part is not None))
        finally:
            self._hashing = self._spares = None
            if self._opened is not None:
                self._opened.store.close()
                self._opened = None

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _get(self, reference: Reference, *, to_fork: bool = False) -> Instance:
        """The instance as recorded now, if this host's owner may use it, or with `to_fork`, fork it."""
        key = reference.id if isinstance(reference, Instance) else check_reference(reference)
        found = await asyncio.to_thread(self.rooms.store.get, key)
        require_instance(self.owner, found, key, to_fork=to_fork)
        return found

    async def _current(self, reference: Reference, *, to_fork: bool = False) -> Instance:
        """The instance as it truly is: what a process that died left half-done is resolved first, and a VMM that ended is noticed."""
        found = await self._get(reference, to_fork=to_fork)
        if await recovery.is_interrupted(self.rooms, found):
            await recovery.recover(self.rooms, only=found.id)
            found = await self._get(found.id, to_fork=to_fork)
        return await recovery.look(self.rooms, found)

    def _usable(self, image: Image) -> bool:
        return may_use_image(self.owner, image)

    @contextlib.asynccontextmanager
    async def _hold(
        self, reference: Reference, operation: Operation, *, shared: bool = False
    ) -> AsyncIterator[tuple[Instance, State]]:
        """Hold an instance for an operation that is legal in its state; yield it with the state that the operation leads to.

        :raises IllegalTransition: the operation is not legal now
        :raises Busy: another operation holds it for too long
        :raises NoSpace: the disk is full
        """
        to_fork = operation is Operation.FORK
        instance = await self._current(reference, to_fork=to_fork)
        lock = self.rooms.layout.lock(instance.id)
        with os_errors(f"{operation} {instance.name}"):
            async with locks.hold(lock, shared=shared, deadline_s=self.rooms.deadlines.lock, what=instance.name):
                try:
                    instance = await asyncio.to_thread(self.rooms.store.get, instance.id)
                    if not shared:
                        instance = await recovery.look(self.rooms, instance, locked=True)
                    elif await recovery.is_interrupted(self.rooms, instance):  # its files are of two moments
                        raise Busy(
                            f"{instance.name} was being changed by a process that died",
                            hint=f"try again; `coppice inspect {instance.name}` shows what it is now",
                        )
                except NotFound:
                    lock.unlink(missing_ok=True)  # removed meanwhile, and taking the lock has made its file again
                    raise
                require_instance(self.owner, instance, instance.name, to_fork=to_fork)  # it may be public no longer
                yield instance, require(operation, instance)
