"""Fan-out: the children of one plan, grown in parallel, each with its own outcome."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec

from coppice.completion import all_of, complete, in_thread
from coppice.disk.atomic import os_errors
from coppice.errors import CoppiceError, HostCannot
from coppice.fork.place import place
from coppice.fork.plan import OPERATION, ForkRequest, grown_from, plan
from coppice.fork.spare import Spare, adopt
from coppice.instance import activate, destroy
from coppice.instance import directory as directories
from coppice.instance.rooms import Rooms
from coppice.model import ForkReport, ForkResult, Instance, Progress, ProgressSink, Sharing, Snapshot, State
from coppice.store import locks
from coppice.timing import Stages

_log = logging.getLogger(__name__)

# More starts at once than this only take turns on the CPUs, and each then waits longer for its answer.
_PARALLEL_PER_CPU = 2


async def fan_out(
    rooms: Rooms,
    source: Instance,
    request: ForkRequest,
    progress: ProgressSink,
    *,
    owner: str | None,
    admit: Callable[[], None],
    parent: Instance | None = None,
    snapshot: Snapshot | None = None,
    spares: Sequence[Spare] = (),
) -> ForkReport:
    """Grow all children of `source`, which the caller holds locked (shared). Every child that fails is undone.

    `admit` refuses, inside of the transaction that records them, what the host has no room for. The children are `owner`'s, or where the
    operator forks, the source's. `parent` is whom they are forks of, where that is not `source`: a running machine, of which `source` is the
    capture. With a `snapshot`, which `source` stands for, they are grown from its files, and `parent` is the instance that it was made of, if
    that still lives. The first children are what the `spares` become, at most one each; a spare that keeps its lock has not become one.
    With `atomic`, one failure undoes all, and is raised.

    :raises CoppiceError: the plan is refused, or a child failed and the request is atomic
    """
    stages = Stages()
    named = source if snapshot else parent or source
    origin = rooms.layout.snapshot(snapshot.id) if snapshot else rooms.directory(source.id)
    children = plan(source, request, named, owner)
    if snapshot is not None:
        children = [grown_from(snapshot, child, parent) for child in children]
    started = {child.name: spare for child, spare in zip(children, spares, strict=False)}
    children = [
        msgspec.structs.replace(child, id=started[child.name].id) if child.name in started else child
        for child in children
    ]
    try:
        children = await in_thread(rooms.store.create, children, OPERATION, admit)
    except asyncio.CancelledError:
        await complete(_destroy_all(rooms, children))
        raise
    slots = asyncio.Semaphore(_PARALLEL_PER_CPU * (os.cpu_count() or 1))
    settled = 0

    async def child(instance: Instance, payload: bytes | None) -> ForkResult | CoppiceError:
        nonlocal settled
        async with slots:
            try:
                with os_errors(f"fork {instance.name}"):  # not a bug: it must not take the siblings with it
                    spare = started.get(instance.name)
                    async with _hold(rooms, instance, spare):
                        result: ForkResult | CoppiceError = await _grow(
                            rooms, origin, source, instance, request, payload, spare
                        )
            except CoppiceError as error:
                result = error
        settled += 1
        progress(Progress(stage="fork", done=settled, total=len(children)))
        return result

    payloads = request.payloads or (None,) * len(children)
    tasks = [asyncio.create_task(child(*each)) for each in zip(children, payloads, strict=True)]
    try:
        outcomes = await asyncio.gather(*tasks)
        failure = next((outcome for outcome in outcomes if isinstance(outcome, CoppiceError)), None)
        if request.atomic and failure is not None:
            raise failure
        if request.atomic:
            await in_thread(rooms.store.finish, children, OPERATION)
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
    )


@contextlib.asynccontextmanager
async def _hold(rooms: Rooms, child: Instance, spare: Spare | None) -> AsyncIterator[None]:
    """Hold a child for the length of the block. What has been a spare is held already, and is let go of at its end."""
    if spare is None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(locks.hold(rooms.layout.lock(child.id), what=child.name))
            except BaseException:  # it is recorded, and nobody else would undo that
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
    request: ForkRequest,
    payload: bytes | None,
    spare: Spare | None,
) -> ForkResult:
    """One child: directory, links, disk; then, if it is to run, VMM, identity, verification. Undone if it fails."""
    stages, target = Stages(), request.target
    done = not request.atomic  # else all are done together: should this process be killed before, none of them stays
    try:
        with stages.stage("place"):
            await in_thread(rooms.store.get, child.id)  # another process may have removed it before it was held
            if spare is None:
                placed = await in_thread(place, rooms, origin, source, child.id, target)
            else:
                placed = await in_thread(adopt, rooms, spare, source)
                if placed.mem_file is not None and placed.mem_file.sharing is Sharing.COPY:
                    # Its VMM has mapped the source's: a capture would look for its own in vain.
                    await rooms.driver.quit(rooms.directory(child.id), spare.process)
                    spare = None
        with_memory = placed.mem_file is not None
        child = msgspec.structs.replace(
            child,
            mem_file=placed.mem_file,
            disk_stamp=directories.disk_stamp(rooms.directory(child.id)) if with_memory else "",
        )
        if placed.mem_file and placed.mem_file.sharing is Sharing.COPY:
            _log.warning("%s: the mem-file was copied, not linked: %s", child.name, placed.mem_file.reason)
        memory = None
        if target is State.RUNNING:
            if with_memory:
                started = spare.process if spare else None
                child = await activate.restore(rooms, child, stages, payload, done=done, started=started)
            else:
                child = await activate.boot(rooms, child, stages, payload, done=done)
            with stages.stage("verify"):
                memory = await activate.verify_sharing(rooms, child)
        else:
            with stages.stage("sync"):  # it is kept, and its record may be durable any moment
                await in_thread(directories.make_durable, rooms.directory(child.id))
            child = msgspec.structs.replace(child, state=target)
            with stages.stage("record"):
                await in_thread(rooms.store.save, child, done=done)
    except BaseException:
        await complete(destroy.destroy(rooms, child))
        raise
    return ForkResult(
        name=child.name,
        ok=True,
        started_ahead=spare is not None,
        instance=child,
        sharing=memory.sharing if memory else directories.sharing_of(child.mem_file),
        sharing_reason=child.mem_file.reason if child.mem_file else "",
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
    # Also those that are whole, whose journal rows are gone: a host that dies now must not leave some of them, or half of one.
    with contextlib.suppress(HostCannot):  # no room for the journal: they go all the same
        await in_thread(rooms.store.begin_removal, children)
    await all_of(destroy.destroy(rooms, child) for child in children)
