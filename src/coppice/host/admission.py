"""Admission: refuse an operation that exceeds a budget, before its first side effect.

The counts are read in the transaction that records the new instance. Of two callers at once, only
one gets the last place. Each estimate is an upper bound:

* memory: for each running machine, its RAM divided by the over-commit factor, and what its driver
  says that its VMM may take;
* disk: the bytes that the operation itself may write. A boot may fill the guest's RAM file. A
  capture of a fork may write all of its RAM. Without reflinks, a fork of a VMM that needs raw disks
  copies the allocated part of its source's overlay, a capture of its running machine too, and both
  the volumes that are cloned. A new volume takes the size of an empty file system. Overlays and volumes
  grow later without a check; the disk floor reserves space for that.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import msgspec

from coppice.completion import in_thread
from coppice.errors import Busy, CoppiceError, NoSpace
from coppice.fork.plan import takes_memory
from coppice.host import recovery
from coppice.host.base import UseCases
from coppice.host.spares import Spares
from coppice.linux.files import untranslated
from coppice.machine import disk, disks
from coppice.machine.rooms import Rooms
from coppice.model import GIB, MIB, Budgets, BudgetUse, Instance, MachineSpec, Record, State, Volume
from coppice.model.lifecycle import Operation
from coppice.requests import BudgetRequest, FanOut, ForkRequest
from coppice.state import locks
from coppice.state.budgets import use_of, worst_case
from coppice.state.journal import JournalOperation
from coppice.vmm import driver as files
from coppice.vmm.driver import VmmDriver
from coppice.volumes.disk import empty_bytes

_log = logging.getLogger(__name__)

_MERGE_LOCK_S = 1.0  # until forks that are made now are placed; longer ones are not waited for


class Demand(Record, frozen=True, kw_only=True):
    """The resources that an operation asks for."""

    what: str  # the subject of error messages
    instances: int = 0
    ram_bytes: int = 0  # the total RAM of the machines that it starts
    vmm_bytes: int = 0  # what their VMMs may take
    disk_bytes: int = 0
    clone_bytes: int = 0  # written only if the file system has no reflinks


class Admission(UseCases):
    """The budget check before every operation that makes or starts something."""

    async def budget(self, _: BudgetRequest) -> BudgetUse:
        """Compare the budgets with the recorded use, and with the memory that the kernel accounts."""
        return await in_thread(self._measured_use)

    def _measured_use(self) -> BudgetUse:
        from coppice.host.view import measured

        use = _budget_use(self.rooms, self.budgets)
        running = [instance for instance in self.rooms.store.instances() if instance.vmm is not None]
        reports = measured(self.rooms, running).values()
        own_bytes = sum(report.unique_bytes + report.vmm_overhead_bytes for report in reports)
        return msgspec.structs.replace(use, measured_bytes=own_bytes)

    async def _admit(self, demand: Callable[[], Demand]) -> Callable[[], None]:
        """Check a demand against the budgets. Return the check, which the recording transaction
        repeats.

        :param demand: returns the demand; may block
        :raises NoSpace: a budget is exceeded; the message names it
        """
        try:
            return await in_thread(self._checked, demand)
        except NoSpace:
            await self._make_room()
        return await in_thread(self._checked, demand)

    def _checked(self, demand: Callable[[], Demand]) -> Callable[[], None]:
        check = partial(_check, self.rooms, self.budgets, demand())
        check()
        return check

    async def _record_forks(self, demand: Callable[[], Demand], children: list[Instance]) -> list[Instance]:
        """Record the children of a fork, if the budgets admit their demand. Return them as recorded.

        :param demand: as for `_admit`
        :raises NoSpace: a budget is exceeded; the message names it
        :raises NameTaken: a name is in use; the message says which
        """

        def record() -> list[Instance]:
            check = partial(_check, self.rooms, self.budgets, demand())
            return self.rooms.store.create(children, JournalOperation.FORK, check)

        try:
            return await in_thread(record)
        except NoSpace:
            await self._make_room()
        return await in_thread(record)

    async def _make_room(self) -> None:
        """Give up what takes memory and is not needed: machines that have ended, and spares."""
        await self._settle_dead()
        await self._spare().give_way()

    def _spare(self) -> Spares:
        if self._host.spares is None:
            limit = self._host.spare_limit
            self._host.spares = Spares(self.rooms, limit, self._hold_template, self._require_budget)
        return self._host.spares

    @contextlib.asynccontextmanager
    async def _hold_template(self, instance_id: str) -> AsyncIterator[Instance]:
        async with self._hold_source(instance_id, Operation.FORK) as (instance, _):
            yield instance

    @contextlib.asynccontextmanager
    async def _hold_source(
        self, key: str, operation: Operation, *, clones_volumes: bool = False
    ) -> AsyncIterator[tuple[Instance, State]]:
        """Lock an instance at rest of which others are made, shared, as `_hold` does.

        If its disks are full, merge their layers first, or each of the others would have to.
        """
        held = partial(self._hold, key, operation, shared=True, clones_volumes=clones_volumes)
        async with contextlib.AsyncExitStack() as stack:
            source, target = await stack.enter_async_context(held())
            if source.vmm is None and disks.are_full(source):
                await stack.aclose()
                with contextlib.suppress(Busy):  # others are made of it now, and each merges the layers for itself
                    await self._merge(source)
                source, target = await stack.enter_async_context(held())
            yield source, target

    async def _merge(self, source: Instance) -> None:
        lock = self.rooms.layout.lock(source.id)
        with untranslated(f"merge the disk layers of {source.name}"):
            async with locks.hold(lock, deadline_s=_MERGE_LOCK_S, what=source.name):
                with locks.of_record(lock, source.name):
                    current = await recovery.look_locked(self.rooms, *await self.rooms.store.look_up(source.id))
                if current.vmm is None:
                    await self._merged(current)

    async def _merged(self, instance: Instance) -> Instance:
        """Merge the layers of full disks of an instance at rest, which the caller has locked, if there is space for it.

        With reflinks a fork of a full disk needs no layer, and nothing is merged.
        """
        from coppice.machine import rest_disk  # imported late: few disks are full

        if not disks.are_full(instance) or await in_thread(_has_reflinks, self.rooms):
            return instance
        try:
            await self._admit(partial(_demand_of_merge, self.rooms, instance))
        except NoSpace as error:
            _log.warning("%s", error)
            return instance
        return await rest_disk.merge(self.rooms, instance)

    def _require_budget(self, template: Instance) -> None:
        _check(self.rooms, self.budgets, demand_of_forks(self.rooms, template, FanOut()))

    async def _settle_dead(self) -> None:
        await recovery.recover(self.rooms)
        for instance in await in_thread(self.rooms.store.instances):
            with contextlib.suppress(CoppiceError):  # locked by another process: count it as recorded
                await recovery.look(self.rooms, instance)


def _budget_use(rooms: Rooms, budgets: Budgets) -> BudgetUse:
    disk = os.statvfs(rooms.layout.home)
    return use_of(budgets, rooms.store.load(), disk.f_bavail * disk.f_frsize)


def _check(rooms: Rooms, budgets: Budgets, demand: Demand) -> None:
    use = _budget_use(rooms, budgets)
    where = f"{rooms.layout.home}/config.toml"
    if demand.instances and use.instances + demand.instances > use.max_instances:
        raise NoSpace(
            f"{demand.what} would raise the number of instances to {use.instances + demand.instances} "
            f"(the limit is {use.max_instances})",
            hint=f"remove some with `coppice rm`, or raise max_instances in {where} or COPPICE_MAX_INSTANCES",
        )
    more = worst_case(budgets, demand.ram_bytes, demand.vmm_bytes)
    if more and use.memory_bytes + more > use.memory_limit_bytes:
        raise NoSpace(
            f"{demand.what} may need {_size(more)} of memory; "
            f"{_size(use.memory_limit_bytes - use.memory_bytes)} of {_size(use.memory_limit_bytes)} are left "
            f"({use.running} running)",
            hint=f"`coppice stop` or `coppice standby` some, or raise memory or memory_overcommit in {where}",
        )
    free = use.disk_free_bytes - use.disk_floor_bytes
    wanted = demand.disk_bytes + demand.clone_bytes
    if wanted > free and demand.clone_bytes and _has_reflinks(rooms):
        wanted = demand.disk_bytes
    if wanted and wanted > free:
        raise NoSpace(
            f"{demand.what} may write {_size(wanted)}; {_size(free)} are free above the floor of "
            f"{_size(use.disk_floor_bytes)}",
            hint=f"free space with `coppice rm` and `coppice gc --caches`, or lower disk_floor in {where} "
            "or COPPICE_DISK_FLOOR",
        )


def _has_reflinks(rooms: Rooms) -> bool:
    """Tell whether the file system of the data directory has reflinks."""
    from coppice.linux.reflinks import has_reflinks  # imported late: few operations come near the limit

    with contextlib.suppress(CoppiceError):
        return has_reflinks(rooms.layout.home)
    return False


def _size(count: int) -> str:
    count = max(0, count)
    if count < MIB:
        return f"{count >> 10} KiB"
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count // MIB} MiB"


def demand_of_run(driver: VmmDriver, machine: MachineSpec, *, start: bool, clone_bytes: int = 0) -> Demand:
    """Return the demand of a new instance of an image.

    :param clone_bytes: the most that placing its volumes writes
    """
    if not start:
        return Demand(what="this instance", instances=1, clone_bytes=clone_bytes)
    ram_bytes = machine.memory_bytes
    disk_bytes = ram_bytes if driver.capabilities.boots_in_file else 0
    return Demand(
        what="this instance",
        instances=1,
        ram_bytes=ram_bytes,
        vmm_bytes=driver.vmm_bytes(machine),
        disk_bytes=disk_bytes,
        clone_bytes=clone_bytes,
    )


def demand_of_activation(rooms: Rooms, instance: Instance, *, boot: bool) -> Demand:
    """Return the demand of starting or restoring an instance. Blocks."""
    ram_bytes, driver, directory = instance.machine.memory_bytes, rooms.driver(instance), rooms.directory(instance.id)
    in_file = boot and driver.capabilities.boots_in_file
    return Demand(
        what=instance.name,
        ram_bytes=ram_bytes,
        vmm_bytes=instance.vmm_bytes,
        disk_bytes=ram_bytes if in_file else 0,
        clone_bytes=sum(disk.bytes_of_own(directory, each, driver) for each in disks.of(instance)),
    )


def demand_of_capture(rooms: Rooms, instance: Instance) -> Demand:
    """Return the demand of putting an instance into standby."""
    return Demand(what=f"standby of {instance.name}", disk_bytes=_captured_bytes(rooms, instance))


def _demand_of_merge(rooms: Rooms, instance: Instance) -> Demand:
    directory = rooms.directory(instance.id)
    return Demand(
        what=f"a merge of the disk layers of {instance.name}",
        disk_bytes=sum(disk.bytes_of_merge(directory, each) for each in disks.of(instance)),
    )


def _captured_bytes(rooms: Rooms, instance: Instance) -> int:
    """Return the bytes that a capture of a running machine may write.

    That is all RAM, or nothing if the machine booted in a file that already holds its RAM.
    """
    in_file = instance.mem_file is None and rooms.driver(instance).capabilities.boots_in_file
    return 0 if in_file else instance.machine.memory_bytes


def demand_of_volume(volume: Volume, archive: Path | None) -> Demand:
    """Return the demand of a new volume, empty or with the content of an archive. Blocks.

    The content counts twice: it exists unpacked and in the volume for a time. A compressed archive
    may need more.
    """
    content = archive.stat().st_size if archive is not None and archive.is_file() else 0
    return Demand(what=f"the volume {volume.name}", disk_bytes=empty_bytes(volume.size_bytes) + 2 * content)


def demand_of_snapshot(rooms: Rooms, source: Instance) -> Demand:
    """Return the demand of a snapshot: the capture of a running instance, and a clone of the disk.
    Blocks.
    """
    directory = rooms.directory(source.id)
    return Demand(
        what=f"the snapshot of {source.name}",
        disk_bytes=_captured_bytes(rooms, source) if source.state is State.RUNNING else 0,
        clone_bytes=sum(
            (disk.bytes_of_running if source.state is State.RUNNING else disk.bytes_of_share)(
                directory, each, rooms.driver(source)
            )
            for each in disks.of(source)
        ),
    )


def demand_of_forks(
    rooms: Rooms, source: Instance, request: FanOut, origin: Path | None = None, *, ahead: int = 0
) -> Demand:
    """Return the demand of a fan-out. Blocks.

    `origin` is the directory of a snapshot, if the forks are made from its files. A fork of a
    running source includes its capture. `ahead` of the forks are made from spares, which already
    have their disks.
    """
    directory, ram_bytes = origin or rooms.directory(source.id), source.machine.memory_bytes
    # A fork of a running machine makes one more instance, which exists until the forks are made.
    captured = 1 if isinstance(request, ForkRequest) and request.from_running else 0
    with_memory = bool(captured) or takes_memory(source, request.target)
    running = request.count if request.target is State.RUNNING else 0
    driver = rooms.driver(source)
    own = driver if request.vmm is None else rooms.drivers.wanted(request.vmm)
    written = disks.of(source)
    clone_bytes = sum(disk.bytes_of_fork(directory, each, (driver, own)) for each in written) * (request.count - ahead)
    if captured:
        clone_bytes += sum(disk.bytes_of_running(directory, each, driver) for each in written)
    able = driver.capabilities
    if with_memory and source.capture is not None and source.capture.layers and not able.maps_layers:
        clone_bytes += ram_bytes * request.count  # each gets a copy of all memory
    elif with_memory and not able.maps_mem_file_privately:
        with contextlib.suppress(FileNotFoundError):
            clone_bytes += (directory / files.MEMORY).stat().st_blocks * 512 * request.count
    booted = running if not with_memory and able.boots_in_file else 0
    return Demand(
        what="this fork" if request.count == 1 else f"these {request.count} forks",
        instances=request.count + captured,
        ram_bytes=(running + captured) * ram_bytes,
        vmm_bytes=(running + captured) * own.vmm_bytes(source.machine),
        disk_bytes=booted * ram_bytes + (_captured_bytes(rooms, source) if captured else 0),
        clone_bytes=clone_bytes,
    )
