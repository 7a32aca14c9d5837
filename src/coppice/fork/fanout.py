"""Fan-out: create the children of one plan in parallel, each with its own outcome."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from coppice.completion import all_of, complete, in_thread
from coppice.errors import CoppiceError, HostCannot
from coppice.fork.hardware import hardware
from coppice.fork.place import place
from coppice.fork.plan import grown_from, plan
from coppice.fork.resting import Resting
from coppice.fork.spare import Spare, adopt
from coppice.linux.cgroups import usable_cpus
from coppice.linux.files import untranslated
from coppice.machine import activate, destroy, limits
from coppice.machine import directory as directories
from coppice.machine.rooms import Rooms
from coppice.model import (
    ForkReport,
    ForkResult,
    Instance,
    Limits,
    MemoryReport,
    Progress,
    ProgressSink,
    Sharing,
    Snapshot,
    State,
)
from coppice.requests import FanOut
from coppice.state import locks
from coppice.state.journal import JournalOperation
from coppice.timing import Stages

_log = logging.getLogger(__name__)

# More parallel starts would only take turns on the CPUs, and each guest would answer later.
_PARALLEL_PER_CPU = 2
# The syncs of forks that are not started wait for the disk, which carries out concurrent ones together.
_SYNCS_AT_ONCE = 16
_UNDER_WAY = 64  # each holds a lock file open, also those that wait for a slot or for their group


@functools.cache
def _parallel() -> int:
    return _PARALLEL_PER_CPU * usable_cpus()


async def fan_out(
    rooms: Rooms,
    source: Instance,
    request: FanOut,
    progress: ProgressSink,
    *,
    owner: str | None,
    record: Callable[[list[Instance]], Awaitable[list[Instance]]],
    parent: Instance | None = None,
    snapshot: Snapshot | None = None,
    spares: Sequence[Spare] = (),
) -> ForkReport:
    """Create all children of `source`, whose shared lock the caller holds. Every child that fails
    is undone.

    If the request is atomic, one failure undoes all children, and is raised.

    :param owner: the owner of the children; None is the operator, who leaves them to the source's
        owner
    :param record: records the children and their operation in the journal, if the host has the capacity;
        returns them as recorded
    :param parent: the parent to record, if it is not `source`: a running machine whose capture is
        `source`, or the existing instance that `snapshot` was made of
    :param snapshot: take the files from this snapshot, which `source` stands for
    :param spares: become the first children; a spare that keeps its lock was not used
    :raises CoppiceError: the plan is refused, or a child failed and the request is atomic
    """
    stages = Stages()
    named = source if snapshot else parent or source
    origin = rooms.layout.snapshot(snapshot.id) if snapshot else rooms.directory(source.id)
    driver, machine = await hardware(rooms, source, request)
    rooms.networks.check(machine, request.publish, request.egress)
    wanted = source.limits if request.limits is None else request.limits
    if request.target is State.RUNNING and wanted != Limits():
        await in_thread(limits.check, wanted, rooms.layout.home)
    vmm_bytes = rooms.drivers.named(driver).vmm_bytes(machine)  # the same for all
    children = [
        msgspec.structs.replace(child, driver=driver, machine=machine, vmm_bytes=vmm_bytes)
        for child in plan(source, request, named, owner)
    ]
    if snapshot is not None:
        children = [grown_from(snapshot, child, parent) for child in children]
    started = {child.name: spare for child, spare in zip(children, spares, strict=False)}
    children = [
        msgspec.structs.replace(child, id=started[child.name].id) if child.name in started else child
        for child in children
    ]
    try:
        children = await record(children)
    except asyncio.CancelledError:
        await complete(_destroy_all(rooms, children))
        raise
    together = request.atomic and len(children) > 1  # none remains if this process is killed before the last
    durable = request.target is not State.RUNNING  # one sync of the database serves all
    slots = asyncio.Semaphore(_SYNCS_AT_ONCE if durable else _parallel())
    under_way, resting = asyncio.Semaphore(_UNDER_WAY), Resting(rooms, done=not together)
    settled = 0

    async def child(instance: Instance, payload: bytes | None) -> ForkResult | CoppiceError:
        nonlocal settled
        try:
            with untranslated(f"fork {instance.name}"):  # an expected failure of one child: do not cancel the others
                spare = started.get(instance.name)
                async with under_way, _hold(rooms, instance, spare):
                    result: ForkResult | CoppiceError = await _grow(
                        rooms, origin, source, instance, request, payload, spare, slots, resting, done=not together
                    )
        except CoppiceError as error:
            result = error
        settled += 1
        fork = _failed(instance, result) if isinstance(result, CoppiceError) else result
        progress(Progress(stage="fork", done=settled, total=len(children), fork=fork))
        return result

    payloads = request.child_payloads
    works = [child(*each) for each in zip(children, payloads, strict=True)]
    tasks = [asyncio.create_task(work) for work in works] if len(works) > 1 else []
    try:
        outcomes = await asyncio.gather(*tasks) if tasks else [await works[0]]
        failure = next((outcome for outcome in outcomes if isinstance(outcome, CoppiceError)), None)
        if request.atomic and failure is not None:
            raise failure
        if together:
            made = [outcome.instance for outcome in outcomes if isinstance(outcome, ForkResult) and outcome.instance]
            await in_thread(rooms.store.finish, made, JournalOperation.FORK, durable=durable)
        elif durable:
            await in_thread(rooms.store.sync)
    except BaseException:
        await complete(_abandon(rooms, children, tasks))
        raise
    results = tuple(
        _failed(instance, outcome) if isinstance(outcome, CoppiceError) else outcome
        for instance, outcome in zip(children, outcomes, strict=True)
    )
    return ForkReport(
        source=named.id,
        source_name=named.name,
        count=len(results),
        succeeded=sum(result.ok for result in results),
        wall_ms=stages.total_ms,
        results=results,
        shared_random=source.shared_random if request.target is not State.STOPPED else (),
    )


@contextlib.asynccontextmanager
async def _hold(rooms: Rooms, child: Instance, spare: Spare | None) -> AsyncIterator[None]:
    """Hold a child's lock during the block. A spare's lock is held already; release it."""
    if spare is None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(locks.hold(rooms.layout.lock(child.id), what=child.name))
            except BaseException:  # the child is recorded, and nothing else would undo that
                await complete(destroy.destroy(rooms, child))
                raise
            yield
    else:
        descriptor = spare.give_lock()
        try:
            yield
        finally:
            locks.release(descriptor)


async def _grow(
    rooms: Rooms,
    origin: Path,
    source: Instance,
    child: Instance,
    request: FanOut,
    payload: bytes | None,
    spare: Spare | None,
    slots: asyncio.Semaphore,
    resting: Resting,
    *,
    done: bool,
) -> ForkResult:
    """Create one child: files; then, to Running, VMM, identity and checks. Undone on failure.

    :param slots: bound the work at the same time
    :param resting: records a child that is not started
    :param done: also end the child's operation in the journal
    """
    stages, target = Stages(), request.target
    memory: MemoryReport | None = None
    sharing: Sharing | None = None

    def files() -> tuple[directories.Placed, Instance, activate.Ready | None]:
        rooms.store.require(child)  # another process may have removed it before it was locked
        placed = adopt(rooms, spare, source) if spare else place(rooms, origin, source, child, target)
        own = msgspec.structs.replace(child, capture=placed.capture, disk_layers=placed.disk_layers)
        starts = target is State.RUNNING and spare is None and own.capture is not None
        return placed, own, activate.check(rooms, own) if starts else None

    def verify(child: Instance) -> None:
        nonlocal memory, sharing
        with stages.stage("verify"):
            memory = activate.memory_of(rooms, child) if request.measure else None
            sharing = memory.sharing if memory else activate.verified_sharing(rooms, child)

    try:
        async with slots:
            with stages.stage("place"):
                placed, child, checked = await in_thread(files)
                copied = child.capture.copied if child.capture else None
                if spare is not None and copied:
                    # The spare's VMM has mapped the source's mem-file, and a capture needs the child's own.
                    await rooms.driver(child).quit(rooms.directory(child.id), spare.process)
                    spare = None
            if copied:
                _log.warning("%s: the memory was copied, not linked: %s", child.name, copied.reason)
            sharing = directories.sharing_of(child.capture)
            if target is State.RUNNING:
                if child.capture is not None:
                    started = spare.process if spare else None
                    child = await activate.restore(
                        rooms, child, stages, payload, done=done, checked=checked, started=started, also=verify
                    )
                else:
                    child = await activate.boot(rooms, child, stages, payload, done=done, also=verify)
        if target is not State.RUNNING:
            child = msgspec.structs.replace(child, state=target)
            with stages.stage("record"):
                await resting.record(child)
    except BaseException:
        await complete(destroy.destroy(rooms, child))
        raise
    return ForkResult(
        name=child.name,
        ok=True,
        started_ahead=spare is not None,
        instance=child,
        sharing=sharing,
        sharing_reason=copied.reason if copied else "",
        memory=memory,
        disk_bytes_written=placed.bytes_written,
        stages=stages.ms,
        total_ms=stages.total_ms,
    )


def _failed(instance: Instance, error: CoppiceError) -> ForkResult:
    return ForkResult(name=instance.name, ok=False, error=str(error), error_code=error.code)


async def _abandon(
    rooms: Rooms, children: list[Instance], tasks: list[asyncio.Task[ForkResult | CoppiceError]]
) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await _destroy_all(rooms, children)


async def _destroy_all(rooms: Rooms, children: list[Instance]) -> None:
    # Complete children have no journal row any more. With one, a host process that dies now leaves
    # none of them.
    with contextlib.suppress(HostCannot):  # a full disk must not prevent their removal
        await in_thread(rooms.store.begin_removal, children)
    await all_of(destroy.destroy(rooms, child) for child in children)
