"""The overlay disk of a machine that is captured while it runs.

If the VMM can switch layers, nothing is copied: the machine goes on in a new, empty layer, and the
files that it wrote to until the pause are frozen and linked. Otherwise the topmost file is copied
in the pause. All but the switch is done before or after the pause (`prepare`, `share`): once the
machine writes to the new layer, nothing changes the files below it.

**The record names the new layer before the VMM writes to it**, durably, because a VMM that writes
to a layer without a record would lose it at the next start. An empty layer changes nothing, so the
recorded disk has the right content whether the VMM has switched or not. The same holds for a merged
layer: both disks are the same, and the old files stay until the record names the new one. While the
VMM runs, only the VMM knows which files it uses. So each capture asks it first, and corrects the
record if a call was interrupted. No file is frozen that the VMM may write to, and none is removed
that it uses.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from coppice.completion import in_thread
from coppice.machine import disk, volumes
from coppice.machine.rooms import Rooms
from coppice.model import Instance


async def with_true_layers(rooms: Rooms, instance: Instance) -> Instance:
    """Return the record of a running machine, corrected if an interrupted call has left it wrong. Idempotent.

    :raises VmmError: the VMM does not say which files it uses
    """
    driver, directory = rooms.driver(instance), rooms.directory(instance.id)
    if not driver.capabilities.switches_layers:
        return instance
    layers = disk.layers_of(await driver.disk_in_use(directory))
    if layers != instance.disk_layers:
        instance = msgspec.structs.replace(instance, disk_layers=layers)
        await in_thread(rooms.store.save, instance, durable=True)
    await in_thread(disk.remove_others, directory, layers)
    return instance


async def prepare(rooms: Rooms, instance: Instance) -> Instance:
    """Make and record the layer in which a running machine goes on after `take`. The guest runs meanwhile.

    If the disk would have too many layers, those below the topmost one are merged first. They are
    frozen, so that needs no help of the VMM, which then uses the merged one.

    :raises NoSpace: the disk is full
    :raises VmmError: the VMM refused
    """
    driver, directory = rooms.driver(instance), rooms.directory(instance.id)
    if not driver.capabilities.switches_layers:
        return instance
    instance = await with_true_layers(rooms, instance)
    layers = instance.disk_layers
    if len(layers) >= disk.MOST:
        layers = await in_thread(disk.merge_below, directory, layers, driver)
        await driver.replace_below(directory, disk.names(layers))
        await in_thread(rooms.store.save, msgspec.structs.replace(instance, disk_layers=layers), durable=True)
        await in_thread(disk.remove_others, directory, layers)
    size_bytes = instance.machine.overlay_bytes
    layers = await in_thread(disk.add_layer, directory, layers, size_bytes, driver, rooms.overlays)
    instance = msgspec.structs.replace(instance, disk_layers=layers)
    await in_thread(rooms.store.save, instance, durable=True)
    await driver.prepare_switch(directory, disk.names(layers))
    return instance


async def take(rooms: Rooms, instance: Instance, target: Path) -> disk.Layers:
    """Keep the disks of a paused machine, for which `prepare` was called, as they are now.

    :return: the layers of the overlay disk that the directory `target` gets; `share` completes it after the pause
    :raises NoSpace: the disk is full
    :raises VmmError: the VMM refused
    """
    driver, directory, layers = rooms.driver(instance), rooms.directory(instance.id), instance.disk_layers
    if driver.capabilities.switches_layers:
        await driver.switch_layer(directory, disk.names(layers))
        layers = layers[:-1]
    else:
        await in_thread(disk.copy_running, directory, target, layers)
    if volumes.written(directory, instance.machine):
        await in_thread(volumes.place, directory, target, instance.machine)
    return layers


async def share(rooms: Rooms, instance: Instance, target: Path, layers: disk.Layers) -> None:
    """Complete the disks in the directory `target` after `take`. The machine may run.

    :raises NoSpace: the disk is full
    :raises VmmError: the VMM refused
    """
    driver, directory = rooms.driver(instance), rooms.directory(instance.id)
    if driver.capabilities.switches_layers:
        await driver.finish_switch(directory, disk.names(instance.disk_layers))
        await in_thread(disk.share_running, directory, target, layers)
    await in_thread(volumes.place, directory, target, instance.machine)
