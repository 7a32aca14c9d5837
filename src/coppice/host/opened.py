"""An opened data directory: its budgets, its stores and drivers, and its background work."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from coppice import network
from coppice.agent.c import agent_binary
from coppice.agent.random import guest_files
from coppice.arguments import checked
from coppice.completion import all_of, complete, in_thread
from coppice.errors import UsageError
from coppice.host import recovery
from coppice.machine.rooms import Deadlines, Rooms
from coppice.model import Budgets
from coppice.names import check_owner, check_spares
from coppice.state.layout import Layout, data_directory
from coppice.state.settings import asked_budgets, hashes_in_background
from coppice.state.store import Store
from coppice.vmm.process import own_process
from coppice.vmm.registry import DEFAULT, Drivers

if TYPE_CHECKING:
    from coppice.host.hashing import Hashing
    from coppice.host.spares import Spares
    from coppice.images.reach import PublicHosts
    from coppice.vmm.driver import VmmDriver

RoomsOpener = Callable[[Layout, Drivers, Deadlines], Rooms]
Background = Literal["owned", "detached", "off"]
"""When the host is closed, background work ends (`owned`) or continues (`detached`). `off`: no
work.
"""


def default_rooms(layout: Layout, drivers: Drivers, deadlines: Deadlines) -> Rooms:
    """Return the rooms of a data directory whose subdirectories exist. Blocks.

    :raises HostCannot: the database cannot be used, or the agent is not compiled
    """
    networks = network.standard(layout.home)
    store = Store(layout.database, own_process(), networks.allocate)
    return Rooms(
        layout=layout,
        store=store,
        drivers=drivers,
        networks=networks,
        agent=agent_binary(),
        guest_files=guest_files(),
        deadlines=deadlines,
    )


class OpenedHost:
    """A data directory, once it is open."""

    @checked
    def __init__(
        self,
        home: Path | str | None = None,
        *,
        vmm: str | None = None,
        accel: str = "auto",
        owner: str | None = None,
        driver: VmmDriver | None = None,
        deadlines: Deadlines | None = None,
        budgets: Budgets | None = None,
        background: Background = "owned",
        spares: int | None = None,
        open_rooms: RoomsOpener | None = None,
    ) -> None:
        """Prepare to use the data directory `home` (default: that of the command line).

        `owner` limits the host to one owner: it makes, sees and uses only that owner's records.
        Without an owner the host belongs to the operator, who may use everything (see
        `coppice.model.ownership`).
        `vmm` names the driver of new machines (default: `qemu`). Existing machines keep the driver
        that their records name. `accel` is `auto`, `kvm` or `tcg`.
        `driver` replaces the registered driver of the same name, and is used for new machines.
        `open_rooms` replaces the stores and drivers of the data directory.
        `budgets` replace the budgets from config.toml and the environment (see
        `coppice.state.budgets`).
        `background` says what happens to the hashing of captures when the host is closed. `owned`:
        it ends, and the next host continues it. `detached`: it continues by itself. `off`: captures
        are not hashed. config.toml and the environment can also switch it off (see
        `coppice.state.settings`).
        `spares` is the number of VMMs that are started ahead for each template. Default: as many as
        forks of it were requested within one second lately, at most 16 (a fan-out counts in full when one
        of its size was requested twice). The host starts them after it has
        forked the template twice within half a minute, and ends them when it is closed (see
        `coppice.fork.spare`). Each takes about 20 MiB. 0: none.

        :raises InvalidName: the owner is not a valid name
        :raises UsageError: there is no such VMM or accelerator, the number of spares is out of range, the
            path of the data directory is not UTF-8, or a value has another type
        """
        self._home = data_directory(home)
        self._owner = check_owner(owner)
        self.drivers = Drivers((vmm or DEFAULT) if driver is None else driver, accel=accel)
        self._deadlines = deadlines or Deadlines()
        self._given_budgets = budgets
        self._asked_budgets: dict[str, float] = {}
        self._budgets: Budgets | None = None
        self._open_rooms = open_rooms or default_rooms
        self.reach: PublicHosts | None = None  # limits the hosts that images come from; None: any
        self._background = background
        self._hashes = False
        self.spare_limit = check_spares(spares)
        self.spares: Spares | None = None  # made by the first operation that needs them
        self._opened: Rooms | None = None
        self._hashing: Hashing | None = None

    @property
    def home(self) -> Path:
        """The data directory."""
        return self._home

    @property
    def owner(self) -> str | None:
        """The owner that this host is limited to; None: the operator, who sees everything."""
        return self._owner

    @property
    def rooms(self) -> Rooms:
        """The opened rooms.

        :raises UsageError: the host is not open
        """
        if self._opened is None:
            raise UsageError("the host is not open", hint="open it first: `with coppice.Host() as host:`")
        return self._opened

    @property
    def budgets(self) -> Budgets:
        """The resources of the host that the data directory may take.

        :raises UsageError: the host is not open
        """
        home = self.rooms.layout.home
        if self._budgets is None:
            from coppice.state.budgets import with_defaults  # reads dozens of files, and few commands need a budget

            self._budgets = with_defaults(self._asked_budgets, home)
        return self._budgets

    async def open(self) -> Self:
        """Open the data directory, create it if it does not exist, and recover interrupted
        operations.

        :raises HostCannot: the data directory cannot be used
        :raises UsageError: its config.toml, or an environment variable, is invalid
        """
        if self._opened is None:
            try:
                if await in_thread(self._open):
                    await recovery.recover(self.rooms)
                    await recovery.sweep(self.rooms)
                    await self._expire()
                if self._hashes and self._background == "owned":
                    self.hashing.resume()
            except BaseException:
                await self.close()
                raise
        return self

    async def _expire(self) -> None:
        """Do what was asked for instances whose lifetime ended while no server ran."""
        if expired := await in_thread(self.rooms.store.supervised.expired, time.time()):
            from coppice.host.upkeep import Upkeep

            await Upkeep(self).expire_now(expired)

    def _open(self) -> bool:
        """Open the rooms. Return whether something is to be recovered, removed or expired.

        One call in a thread asks all, since most commands find nothing.
        """
        layout = Layout(self._home)
        layout.create()
        self._budgets = self._given_budgets
        if self._budgets is None:
            self._asked_budgets = asked_budgets(layout.home)
        self._hashes = hashes_in_background(layout.home)
        self._opened = rooms = self._open_rooms(layout, self.drivers, self._deadlines)
        return recovery.is_needed(rooms) or bool(rooms.store.supervised.expired(time.time()))

    @property
    def hashing(self) -> Hashing:
        """The background hashing of captures. It is imported at its first use."""
        if self._hashing is None:
            from coppice.host.hashing import Hashing

            self._hashing = Hashing(self.rooms, self._background if self._hashes else "off")
        return self._hashing

    async def close(self) -> None:
        """Close the data directory. Instances live on. Idempotent."""
        try:
            # `complete`: a task that is cancelled before its first step would run no cleanup at
            # all.
            parts = [part.close() for part in (self._hashing, self.spares) if part is not None]
            if self._opened is not None:
                parts.append(self._opened.disconnect())
            await complete(all_of(parts))
        finally:
            self._hashing = self.spares = None
            if self._opened is not None:
                self._opened.store.close()
                self._opened = None

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
