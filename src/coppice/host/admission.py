"""Admission: what would not fit into the budgets is refused before its first side effect.

The counts are those of the database, looked at in the transaction that records what is new: so of two callers at once only one gets the last place.
Each kind of worst case is an estimate from above, and said so:

* memory: of each machine that runs, its RAM divided by the over-commit factor, and 32 MiB for its VMM;
* disk: what an operation itself may write. A boot may fill the file that is the guest's RAM; a capture of a fork may write all of its RAM; a fork
  copies what its source's overlay has allocated, where the file system has no reflinks; a volume is made with what an empty file system takes. Overlays and
  volumes grow later without being asked about: the floor is for that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from coppice.completion import in_thread
from coppice.disk import volume as disks
from coppice.disk.atomic import temporary_beside
from coppice.disk.clone import clone_file
from coppice.errors import CoppiceError, NoSpace
from coppice.fork.plan import ForkRequest, takes_memory
from coppice.host.base import HostBase
from coppice.instance import directory as directories
from coppice.instance import recovery
from coppice.instance.rooms import Rooms
from coppice.model import GIB, MIB, Budgets, BudgetUse, Instance, Record, State, Volume
from coppice.store.budgets import use_of, worst_case
from coppice.vmm import driver as files


class Demand(Record, frozen=True, kw_only=True):
    """What an operation asks for."""

    what: str  # for people
    instances: int = 0
    machines: int = 0  # that run because of it
    ram_bytes: int = 0  # of all these machines
    disk_bytes: int = 0
    clone_bytes: int = 0  # written only where the file system has no reflinks


class Admission(HostBase):
    """The guard before every operation that makes or starts something."""

    async def budget(self) -> BudgetUse:
        """What the budgets of the data directory are, and how much of them is in use by all owners."""
        return await in_thread(_budget_use, self.rooms, self.budgets)

    async def _admit(self, demand: Demand) -> Callable[[], None]:
        """Refuse what does not fit; return the check, to be made again inside of the transaction that records it.

        :raises NoSpace: a budget is spent; the message says which
        """
        check = partial(_check, self.rooms, self.budgets, demand)
        try:
            await in_thread(check)
        except NoSpace:
            await self._settle_the_dead()  # they do not count
            await self._spare().give_way()
            await in_thread(check)
        return check

    def _require_room(self, template: Instance) -> None:
        _check(self.rooms, self.budgets, demand_of_forks(self.rooms, template, ForkRequest()))

    async def _settle_the_dead(self) -> None:
        await recovery.recover(self.rooms)
        for instance in await in_thread(self.rooms.store.instances):
            with contextlib.suppress(CoppiceError):  # in other hands: it counts as it is recorded
                await recovery.look(self.rooms, instance)


def _budget_use(rooms: Rooms, budgets: Budgets) -> BudgetUse:
    disk = os.statvfs(rooms.layout.home)
    return use_of(budgets, rooms.store.load(), disk.f_bavail * disk.f_frsize)


def _check(rooms: Rooms, budgets: Budgets, demand: Demand) -> None:
    use = _budget_use(rooms, budgets)
    where = f"{rooms.layout.home}/config.toml"
    if demand.instances and use.instances + demand.instances > use.max_instances:
        raise NoSpace(
            f"with {demand.what} there would be {use.instances + demand.instances} instances, and {use.max_instances} are the most",
            hint=f"remove some, or raise max_instances in {where} or COPPICE_MAX_INSTANCES",
        )
    more = worst_case(budgets, demand.machines, demand.ram_bytes)
    if more and use.memory_bytes + more > use.memory_limit_bytes:
        raise NoSpace(
            f"{demand.what} may come to need {_size(more)} of memory, and {_size(use.memory_limit_bytes - use.memory_bytes)} of "
            f"{_size(use.memory_limit_bytes)} are left beside the {use.running} that run",
            hint=f"stop some or put them into standby, or raise memory or memory_overcommit in {where}",
        )
    room = use.disk_free_bytes - use.disk_floor_bytes
    wanted = demand.disk_bytes + demand.clone_bytes
    if wanted > room and demand.clone_bytes and _has_reflinks(rooms):
        wanted = demand.disk_bytes
    if wanted and wanted > room:
        raise NoSpace(
            f"{demand.what} may write {_size(wanted)}, and {_size(room)} are left above the floor of {_size(use.disk_floor_bytes)}",
            hint=f"free some with `coppice rm` and `coppice gc --caches`, or lower disk_floor in {where} or COPPICE_DISK_FLOOR",
        )


def _has_reflinks(rooms: Rooms) -> bool:
    """Whether a clone of a file costs nothing. Tried, but only where it decides."""
    probe = temporary_beside(rooms.layout.overlays / "probe")
    clone = temporary_beside(probe)
    try:
        probe.write_bytes(b"\xa5" * MIB)
        return clone_file(probe, clone).method == "reflink"
    except (OSError, CoppiceError):
        return False
    finally:
        probe.unlink(missing_ok=True)
        clone.unlink(missing_ok=True)


def _size(count: int) -> str:
    return f"{max(0, count) / GIB:.1f} GiB" if count >= GIB else f"{max(0, count) // MIB} MiB"


def demand_of_run(memory_bytes: int, *, start: bool) -> Demand:
    """Of a new instance of an image."""
    if not start:
        return Demand(what="this instance", instances=1)
    return Demand(what="this instance", instances=1, machines=1, ram_bytes=memory_bytes, disk_bytes=memory_bytes)


def demand_of_activation(instance: Instance, *, boot: bool) -> Demand:
    """Of an instance that is started or restored."""
    ram_bytes = instance.machine.memory_bytes
    return Demand(what=instance.name, machines=1, ram_bytes=ram_bytes, disk_bytes=ram_bytes if boot else 0)


def demand_of_capture(instance: Instance) -> Demand:
    """Of putting an instance into standby. A machine that has run since its boot has its RAM in its file already."""
    private = instance.mem_file is not None
    return Demand(what=f"standby of {instance.name}", disk_bytes=instance.machine.memory_bytes if private else 0)


def demand_of_volume(volume: Volume, archive: Path | None) -> Demand:
    """Of a new volume: empty, or with an archive's content, which is there twice meanwhile, and may be larger than the archive. Blocks."""
    content = archive.stat().st_size if archive is not None and archive.is_file() else 0
    return Demand(what=f"the volume {volume.name}", disk_bytes=disks.empty_bytes(volume.size_bytes) + 2 * content)


def demand_of_snapshot(rooms: Rooms, source: Instance) -> Demand:
    """Of keeping an instance as it is: the capture of one that runs, and a clone of the disk. Blocks."""
    private = source.state is State.RUNNING and source.mem_file is not None
    return Demand(
        what=f"the snapshot of {source.name}",
        disk_bytes=source.machine.memory_bytes if private else 0,
        clone_bytes=directories.overlay_bytes(rooms.directory(source.id)),
    )


def demand_of_forks(
    rooms: Rooms, source: Instance, request: ForkRequest, origin: Path | None = None, *, ahead: int = 0
) -> Demand:
    """Of a fan-out, from the files of a snapshot where `origin` is its directory; with the capture between, where the source runs on. Blocks.

    Of the forks, `ahead` have their disks already: they are made of spares.
    """
    directory, ram_bytes = origin or rooms.directory(source.id), source.machine.memory_bytes
    with_memory = request.from_running or takes_memory(source, request.target)
    running = request.count if request.target is State.RUNNING else 0
    captured = 1 if request.from_running else 0  # an instance while the forks are made
    clone_bytes = directories.overlay_bytes(directory) * (request.count - ahead + captured)
    if with_memory and not rooms.driver.capabilities.maps_mem_file_privately:
        with contextlib.suppress(FileNotFoundError):
            clone_bytes += (directory / files.MEMORY).stat().st_blocks * 512 * request.count
    booted = 0 if with_memory else running
    return Demand(
        what="this fork" if request.count == 1 else f"these {request.count} forks",
        instances=request.count + captured,
        machines=running + captured,
        ram_bytes=(running + captured) * ram_bytes,
        disk_bytes=booted * ram_bytes + (ram_bytes if captured and source.mem_file is not None else 0),
        clone_bytes=clone_bytes,
    )
