"""The end of a machine's process: find out, and record it.

The agent prints a line on the console when the process ends. A console that has not grown since the
last look therefore means no news, and a look at a quiet machine costs no more than two small files.
The text of the console is not trusted: the agent is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from coppice.completion import in_thread
from coppice.errors import Busy, CoppiceError, NotFound
from coppice.machine.rooms import Rooms
from coppice.model import MIB, Instance, ProcessEnd, State
from coppice.state import locks

ASK_S: Final = 2.0
_AT_ONCE: Final = 16
_MAYBE_FULL_BYTES: Final = 32 * MIB  # of a console: a VMM writes no more than some limit, and so not the agent's line


def may_end(instance: Instance) -> bool:
    """Return whether the process of a machine runs as far as its record says."""
    return instance.state is State.RUNNING and bool(instance.process.argv) and instance.process_end is None


def has_news(directory: Path) -> bool:
    """Return whether a machine's console has grown since its agent was last asked, or may be full. Blocks."""
    from coppice.machine import console  # a list without running machines does not need it

    try:
        seen = int((directory / console.SEEN).read_bytes())
    except (OSError, ValueError):
        seen = 0
    size = console.size(directory)
    return size != seen or size >= _MAYBE_FULL_BYTES


async def ask(rooms: Rooms, instance: Instance) -> ProcessEnd | None:
    """Return the end of a Running machine's process as its agent tells it. None: it runs.

    :raises CoppiceError: the agent does not answer
    """
    from coppice.machine import console

    directory = rooms.directory(instance.id)
    size = await in_thread(console.size, directory)  # before the question: the line comes after the end
    async with rooms.ports(instance).control(ASK_S) as control:
        end = (await control.health()).process_end
    if end is None:
        with contextlib.suppress(OSError):  # the machine was removed, or the disk is full
            await in_thread((directory / console.SEEN).write_text, str(size))
    return end


async def record(rooms: Rooms, instance: Instance, end: ProcessEnd) -> Instance:
    """Record the end of a machine's process, unless the machine has changed meanwhile. Return its record.

    :raises Busy: another operation holds the machine
    :raises NotFound: the machine is gone
    """
    lock = rooms.layout.lock(instance.id)
    descriptor = locks.try_lock(lock)
    if descriptor is None:
        raise Busy(f"{instance.name} is being changed", hint="wait, then try again")
    try:
        with locks.of_record(lock, instance.name):
            current, _ = await rooms.store.look_up(instance.id)
            if not may_end(current) or current.vmm != instance.vmm:
                return current
            changed = msgspec.structs.replace(current, process_end=end)
            await in_thread(rooms.store.save, changed)
            return changed
    finally:
        locks.release(descriptor)


async def learn(rooms: Rooms, instance: Instance) -> Instance:
    """Ask whether the process of a Running machine has ended, and record that.

    A machine whose agent does not answer in time is returned as it is recorded.

    :raises NotFound: the machine is gone
    """
    try:
        end = await ask(rooms, instance)
    except CoppiceError:
        return instance
    if end is None:
        return instance
    try:
        return await record(rooms, instance, end)
    except Busy:  # a later look records it
        return msgspec.structs.replace(instance, process_end=end)


async def look(rooms: Rooms, instances: Sequence[Instance]) -> list[Instance]:
    """Return the machines with the ends of their processes. Ask those whose consoles have news.

    A machine that was removed meanwhile is left out.
    """
    running = [instance for instance in instances if may_end(instance)]
    asked = await in_thread(_with_news, rooms, running) if running else set()
    slots = asyncio.Semaphore(_AT_ONCE)

    async def each(instance: Instance) -> Instance | None:
        if instance.id not in asked:
            return instance
        try:
            async with slots:
                return await learn(rooms, instance)
        except NotFound:
            return None

    found = await asyncio.gather(*map(each, instances)) if asked else instances
    return [instance for instance in found if instance is not None]


def _with_news(rooms: Rooms, instances: Sequence[Instance]) -> set[str]:
    return {instance.id for instance in instances if has_news(rooms.directory(instance.id))}
