"""The disks of a machine that is captured while it runs.

If the VMM can switch layers, nothing is copied: the machine goes on in new, empty layers, and the
files that it wrote to until the pause are frozen and linked. Otherwise the topmost files are copied
in the pause. All but the switch is done before or after the pause (`prepare`, `share`): once the
machine writes to the new layers, nothing changes the files below them.

**The record names a new layer before the VMM writes to it**, durably, because a VMM that writes
to a layer without a record would lose it at the next start. An empty layer changes nothing, so the
recorded disks have the right content whether the VMM has switched or not. The same holds for a merged
layer: both disks are the same, and the old files stay until the record names the new one. While the
VMM runs, only the VMM knows which files it uses. So each capture asks it first, and corrects the
record if a call was interrupted. No file is frozen that the VMM may write to, and none is removed
that it uses.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from coppice.completion import in_thread
from coppice.errors import VmmError
from coppice.machine import disk, disks, volumes
from coppice.machine.disk import Disk, Layers
from coppice.machine.rooms import Rooms
from coppice.model import Instance


async def with_true_layers(rooms: Rooms, instance: Instance) -> Instance:
    """Return the record of a running machine, corrected if an interrupted call has left it wrong. Idempotent.

    :raises VmmError: the VMM does not say which files it uses
    """
    driver, directory = rooms.driver(instance), rooms.directory(instance.id)
    if not driver.capabilities.switches_layers:
        return instance
    in_use = {files[0]: files for files in await driver.disks_in_use(directory)}
    true = [each.made_of(in_use.get(each.files[0], ())) for each in disks.of(instance)]
    if lacking := [each.name for each in true if each.files[0] not in in_use]:
        raise VmmError(f"the VMM has no disk {lacking[0]}", hint="see its log with `coppice logs --vmm NAME`")
    if disks.recorded(true) != instance.disk_layers:
        instance = await _record(rooms, instance, true)
    await in_thread(disks.remove_others, directory, instance)
    return instance


async def prepare(rooms: Rooms, instance: Instance) -> Instance:
    """Make and record the layers in which a running machine goes on after `take`. The guest runs meanwhile.

    :raises NoSpace: the disk is full
    :raises VmmError: the VMM refused
    """
    driver, directory = rooms.driver(instance), rooms.directory(instance.id)
    if not driver.capabilities.switches_layers:
        return instance
    instance = await _merge(rooms, await with_true_layers(rooms, instance))
    found = [await in_thread(disk.add_layer, directory, each, driver, rooms.overlays) for each in disks.of(instance)]
    instance = await _record(rooms, instance, found)
    for each in found:
        await driver.prepare_switch(directory, each.files)
    return instance


async def _merge(rooms: Rooms, instance: Instance) -> Instance:
    """Merge the layers below the topmost one of each full disk of a machine with a VMM. The guest runs meanwhile.

    They are frozen, so that needs no help of the VMM, which then uses the merged one.

    :param instance: its record, with its true layers
    :raises NoSpace: the disk is full
    :raises VmmError: the VMM refused
    """
    driver, directory, found = rooms.driver(instance), rooms.directory(instance.id), disks.of(instance)
    for number, each in enumerate(found):
        if each.is_full:
            found[number] = merged = await in_thread(disk.merge_below, directory, each, driver)
            await driver.replace_below(directory, merged.files)
            instance = await _record(rooms, instance, found)
            await in_thread(disks.remove_others, directory, instance)
    return instance


async def _record(rooms: Rooms, instance: Instance, found: list[Disk]) -> Instance:
    instance = msgspec.structs.replace(instance, disk_layers=disks.recorded(found))
    await in_thread(rooms.store.save, instance, durable=True)
    return instance


async def take(rooms: Rooms, instance: Instance, target: Path) -> dict[str, Layers]:
    """Keep the disks of a paused machine, for which `prepare` was called, as they are now.

    :return: the layers of the disks that the directory `target` gets; `share` completes it after the pause
    :raises NoSpace: the disk is full
    :raises VmmError: the VMM refused
    """
    driver, directory, found = rooms.driver(instance), rooms.directory(instance.id), disks.of(instance)
    if driver.capabilities.switches_layers:
        await driver.switch_layers(directory, [each.files for each in found])
        return disks.recorded(each.below for each in found)
    for each in found:
        await in_thread(disk.copy_running, directory, target, each)
    return instance.disk_layers


async def share(rooms: Rooms, instance: Instance, target: Path) -> None:
    """Complete the disks in the directory `target` after `take`. The machine may run.

    :raises NoSpace: the disk is full
    :raises VmmError: the VMM refused
    """
    driver, directory = rooms.driver(instance), rooms.directory(instance.id)
    if driver.capabilities.switches_layers:
        for each in disks.of(instance):
            await driver.finish_switch(directory, each.files)
            await in_thread(disk.share_running, directory, target, each.below)
    await in_thread(volumes.link_readonly, directory, target, instance.machine)
