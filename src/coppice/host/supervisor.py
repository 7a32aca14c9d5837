"""The supervisor: it decides when to look at each instance, and `Upkeep` does it.

It sleeps until the earliest deadline of any instance, or until a process writes to the database.
All its state is in the database, so another process can go on at any time. One process at a time
supervises a data directory: it holds the lock of the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

from coppice.completion import in_thread
from coppice.errors import Busy, CoppiceError, NotFound
from coppice.host import LocalBackend
from coppice.host.activity import idle_s
from coppice.host.endings import Endings
from coppice.host.ports import Ports
from coppice.host.schedules import Schedules
from coppice.host.upkeep import Next, Upkeep
from coppice.linux.inotify import Inotify
from coppice.model import Instance, State, VmmProcess
from coppice.requests import RestoreRequest
from coppice.state import locks

_log = logging.getLogger(__name__)
_LEASE_S: Final = 5.0  # between two attempts to become the supervisor: a free flock is no event
_SOON_S: Final = 1.0
_CALM_S: Final = 0.1  # from a change to the look at it
_AGAIN_S: Final = 30.0  # after a failure
_LONGEST_S: Final = 60.0  # of one sleep: the clock of the day may be set, or the host be suspended
_AT_ONCE: Final = 64
_SNAPSHOTS_AT_ONCE: Final = 4  # they take long, and no wake of a machine waits for them


class Clock:
    """The time of day. Tests have their own."""

    def now(self) -> float:
        """Return the seconds since the epoch."""
        return time.time()

    async def wait(self, event: asyncio.Event, until: float) -> None:
        """Return when the event is set, or at a time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(until - self.now(), _LONGEST_S)):
                await event.wait()


class Supervisor:
    """Looks after the instances of one data directory."""

    def __init__(self, host: LocalBackend, clock: Clock | None = None) -> None:
        """`host` is open as long as the supervisor runs, and supervises the instances that its
        owner may use.
        """
        self._host = host
        self._clock = clock or Clock()
        self._upkeep = host.group(Upkeep)
        self._changed = asyncio.Event()
        self._deadlines: list[tuple[float, str]] = []
        self._latest = self._clock.now()
        self._due: dict[str, float] = {}  # the valid deadline of each instance; others are outdated
        self._attending: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        self._ends: dict[str, tuple[VmmProcess, asyncio.Task[None]]] = {}  # of VMMs
        self._ports = Ports(self._wake)
        self._waking: dict[str, asyncio.Task[None]] = {}
        self._schedules = host.group(Schedules)
        self._scheduled: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._snapshot_slots = asyncio.Semaphore(_SNAPSHOTS_AT_ONCE)
        self._endings = Endings(host.rooms, host.owner)

    async def run(self) -> None:
        """Supervise until this task is cancelled. Wait while another process does it."""
        async with self._lease():
            while True:
                try:
                    await self._supervise()
                except CoppiceError as error:
                    _log.error("instances are not supervised: %s", error)
                finally:
                    await self._end()
                await self._clock.wait(asyncio.Event(), self._clock.now() + _AGAIN_S)

    @contextlib.asynccontextmanager
    async def _lease(self) -> AsyncIterator[None]:
        path = self._host.rooms.layout.supervisor_lock(self._host.owner)
        while (descriptor := locks.try_lock(path)) is None:
            await self._clock.wait(asyncio.Event(), self._clock.now() + _LEASE_S)
        try:
            yield
        finally:
            locks.release(descriptor)

    async def _supervise(self) -> None:
        store = self._host.rooms.store
        async with self._ports.served(store.path.parent, self._host.owner):
            await self._follow()

    async def _follow(self) -> None:
        store = self._host.rooms.store
        with self._watching(store.path.with_name(f"{store.path.name}-wal")), self._endings.watched():
            last = await in_thread(store.events.newest)
            self._endings.follow(await in_thread(store.supervised.running))
            for key in await in_thread(store.supervised.ids):
                self._attend(key)
            while True:
                self._changed.clear()
                more = True
                while more:
                    changes = await in_thread(store.supervised.changes, last)
                    touched = changes.supervised | (changes.others & self._known())
                    if changes.lost:
                        touched |= await in_thread(store.supervised.ids) | self._known()
                        self._endings.follow(await in_thread(store.supervised.running))
                    self._endings.follow(changes.running)
                    self._endings.drop((changes.supervised | changes.others) - changes.running)
                    for key in touched:
                        self._attend(key)
                    last, more = changes.last, changes.more
                for key in self._pop_due():
                    self._attend(key)
                scheduled = await self._attend_schedules()
                until = min([self._clock.now() + _LONGEST_S, *scheduled, *(at for at, _ in self._deadlines[:1])])
                await self._clock.wait(self._changed, until)
                await asyncio.sleep(_CALM_S)  # an operation commits several times, and is not delayed by looks

    @contextlib.contextmanager
    def _watching(self, log: Path) -> Iterator[None]:
        """Wake at each commit of any process: it is written to the write-ahead log."""
        loop = asyncio.get_running_loop()
        with Inotify(log) as watch:

            def changed() -> None:
                watch.drain()
                self._changed.set()

            loop.add_reader(watch, changed)
            try:
                yield
            finally:
                loop.remove_reader(watch)

    def _known(self) -> set[str]:
        return {*self._due, *self._attending, *self._ends}

    def _pop_due(self) -> Iterator[str]:
        """Yield the instances whose deadline is now or earlier. Drop outdated deadlines.

        If the clock was set back, all deadlines are of another time: yield every instance. Those
        that are being looked after return such a deadline too: look after them again.
        """
        now = self._clock.now()
        set_back, self._latest = now < self._latest - _SOON_S, now
        if set_back:
            self._again.update(self._attending)
        while self._deadlines and (
            set_back or self._deadlines[0][0] <= now or self._due.get(self._deadlines[0][1]) != self._deadlines[0][0]
        ):
            at, key = heapq.heappop(self._deadlines)
            if self._due.get(key) == at:
                del self._due[key]
                yield key

    def _attend(self, key: str) -> None:
        """Look after an instance now, or again if it is being looked after."""
        if key in self._attending:
            self._again.add(key)
            return
        self._attending[key] = asyncio.create_task(self._look(key), name=f"supervise {key}")

    async def _look(self, key: str) -> None:
        try:
            following = await self._look_after(key)
        finally:
            del self._attending[key]
        self._await_end(key, following.running)
        self._due.pop(key, None)
        due = following.at
        if due is not None:
            self._due[key] = due
            heapq.heappush(self._deadlines, (due, key))
        if key in self._again:
            self._again.discard(key)
            self._attend(key)
        self._changed.set()

    async def _attend_schedules(self) -> list[float]:
        """Look after the snapshot schedules that are due. Return the time of the next one, if there is one."""
        schedules = self._host.rooms.store.supervised.schedules
        due, following = await in_thread(schedules.due, self._clock.now(), self._host.owner)
        for key in due:
            if key not in self._scheduled:
                self._scheduled[key] = asyncio.create_task(self._carry_out(key), name=f"schedule of {key}")
        return [] if following is None else [following]

    async def _carry_out(self, key: str) -> None:
        try:
            async with self._snapshot_slots:
                await self._schedules.attend_schedule(key, self._clock.now())
        except Exception as error:
            _log.warning("the snapshot schedule of %s: %s", key, error, exc_info=not isinstance(error, CoppiceError))
            await self._clock.wait(asyncio.Event(), self._clock.now() + _AGAIN_S)
        finally:
            del self._scheduled[key]
            self._changed.set()

    async def _look_after(self, key: str) -> Next:
        try:
            async with self._slots:
                following = await self._upkeep.attend(key, self._clock.now())
        except NotFound:
            following = Next()
        except CoppiceError as error:
            _log.warning("cannot look after %s: %s", key, error)
            following = Next(at=self._clock.now() + _AGAIN_S)
        except Exception:
            _log.exception("cannot look after %s", key)
            following = Next(at=self._clock.now() + _AGAIN_S)
        try:
            await self._hold_ports(key, following.instance)
        except Busy:
            return following.by(self._clock.now() + _SOON_S)
        except CoppiceError as error:
            _log.warning("%s", error)
            return following.by(self._clock.now() + _AGAIN_S)
        return following

    async def _hold_ports(self, key: str, instance: Instance | None) -> None:
        """Hold the ports of a machine in automatic standby; pass connections on to one that runs.

        :raises Busy: the machine is being changed
        :raises HostCannot: another program uses a port
        """
        if instance is None or not idle_s(instance):
            self._ports.drop(key)
        elif instance.state is State.STANDBY:
            # An operation that holds the lock may be starting it, and had the ports released.
            descriptor = locks.try_lock(self._host.rooms.layout.lock(key), create=False)
            if descriptor is None:
                raise Busy(f"{instance.name} is being changed", hint="wait for it")
            try:
                current, _ = await self._host.rooms.store.look_up(key)
                if current.state is not State.STANDBY:
                    raise Busy(f"{instance.name} was changed", hint="look at it again")
                self._ports.hold(instance)
            finally:
                locks.release(descriptor)
        elif instance.state is State.INITIALIZING:
            return  # its connections wait
        elif instance.state is State.RUNNING:
            self._ports.deliver(instance)
        else:
            self._ports.drop(key)

    def _wake(self, key: str) -> None:
        """Restore a machine whose port got a connection."""
        if key not in self._waking:
            self._waking[key] = asyncio.create_task(self._restore(key), name=f"wake {key}")

    async def _restore(self, key: str) -> None:
        try:
            async with self._slots:
                await self._upkeep.restore(RestoreRequest(instance=key))
        except CoppiceError as error:
            _log.warning("cannot wake %s: %s", key, error)
            self._ports.drop(key)
        finally:
            del self._waking[key]
        self._attend(key)

    def _await_end(self, key: str, running: Instance | None) -> None:
        """Look after an instance again when its VMM ends. None: no longer."""
        process, task = self._ends.get(key, (None, None))
        wanted = running.vmm if running else None
        if process == wanted and not (task and task.done()):
            return
        if task is not None:
            task.cancel()
            del self._ends[key]
        if running is not None and wanted is not None:
            self._ends[key] = wanted, asyncio.create_task(self._at_end(running, wanted), name=f"end of {key}")

    async def _at_end(self, instance: Instance, process: VmmProcess) -> None:
        rooms = self._host.rooms
        with contextlib.suppress(CoppiceError):
            await rooms.driver(instance).wait_exit(rooms.directory(instance.id), process)
        self._attend(instance.id)

    async def _end(self) -> None:
        """Cancel the work under way, and wait for its cleanup."""
        await self._endings.close()
        self._again.clear()
        under_way = (*self._attending.values(), *self._waking.values(), *self._scheduled.values())
        tasks = [*under_way, *(task for _, task in self._ends.values())]
        self._ends.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for each in (self._attending, self._waking, self._scheduled):
            each.clear()  # a task that was cancelled before its first step has not left its own place
