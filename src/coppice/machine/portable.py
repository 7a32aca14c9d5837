"""What of an instance goes to another data directory: the record without what belongs to its host, and
the files of its memory and disk. All functions block.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from coppice.errors import DigestMismatch, ImageError
from coppice.linux.files import os_errors, sync
from coppice.machine import directory as directories
from coppice.machine import disk, disks
from coppice.memory import layers, memfile
from coppice.model import Capture, Instance, MachineSpec, MemFile, Sharing, State
from coppice.vmm import driver as files
from coppice.vmm.driver import VmmDriver

M = TypeVar("M", bound=MemFile)
_CURE = "export the template again; do not trust an archive that was changed"
_LARGEST_VMSTATE = 1 << 30
_LARGEST_LAYER_NUMBER = 1 << 20


def paths(directory: Path, instance: Instance) -> list[Path]:
    """Return the files of a captured instance: its memory, device state and disk."""
    memory = directories.memory_paths(directory, instance.capture) if instance.capture else []
    return [*memory, directory / files.VMSTATE, *disks.paths(directory, disks.of(instance))]


def digests(capture: Capture) -> dict[str, str | None]:
    """Return the recorded digests of the files of a capture, by their names."""
    memory = (path.name for path in directories.memory_paths(Path(), capture))
    recorded = {name: file.sha256 for name, file in zip(memory, capture.memory, strict=True)}
    return {**recorded, files.VMSTATE: capture.vmstate_sha256}


def record(instance: Instance) -> Instance:
    """Return the record of a template of the instance, without what belongs to its host."""
    if instance.capture is None:
        raise AssertionError("an instance at rest has a capture")
    capture = msgspec.structs.replace(
        instance.capture,
        mem_file=_anywhere(instance.capture.mem_file),
        layers=tuple(_anywhere(layer) for layer in instance.capture.layers),
        disk_stamp="",
    )
    return Instance(
        id="",
        name=instance.name,
        state=State.TEMPLATE,
        created_at=instance.created_at,
        driver=instance.driver,
        image=instance.image,
        image_name=instance.image_name,
        machine=instance.machine,
        process=instance.process,
        hostname=instance.hostname,
        tags=instance.tags,
        egress=instance.egress,
        limits=instance.limits,
        capture=capture,
        disk_layers=instance.disk_layers,
        identified=instance.identified,
    )


def require_sound(template: Instance, sizes: Mapping[str, int]) -> None:
    """Refuse the record of a foreign template whose parts contradict each other.

    :param sizes: of its files, by their names
    :raises ImageError: they do
    """
    capture, machine = template.capture, template.machine
    if template.state is not State.TEMPLATE or capture is None:
        raise ImageError("the archive has no captured memory", hint=_CURE)
    overlay, *volumes = disks.of(template)
    numbers = overlay.layers  # in any order: the layer of a merge has a higher number than the one above it
    valid = len(set(numbers)) == len(numbers) and all(0 < number < _LARGEST_LAYER_NUMBER for number in numbers)
    if (
        len(capture.layers) > layers.MOST
        or len(numbers) > disk.MOST
        or not valid
        or volumes
        or template.disk_layers != disks.recorded([overlay])
    ):
        raise ImageError("the archive has impossible layers of memory or disk", hint=_CURE)
    made_with, memory = capture.manifest, directories.memory_paths(Path(), capture)
    expected = {path.name: file.size_bytes for path, file in zip(memory, capture.memory, strict=True)}
    expected |= {files.MEMORY: machine.memory_bytes, files.OVERLAY_DISK: machine.overlay_bytes}
    consistent = (
        set(sizes) == {path.name for path in paths(Path(), template)}
        and all(sizes[name] == size for name, size in expected.items())
        and 0 < sizes[files.VMSTATE] <= _LARGEST_VMSTATE
        and _hardware(template) == (made_with.driver, made_with.kernel, made_with.memory_bytes, made_with.cpus)
    )
    if not consistent:
        raise ImageError("the files of the archive are not those of its template", hint=_CURE)


def _hardware(template: Instance) -> tuple[str, str, int, int]:
    machine: MachineSpec = template.machine
    return template.driver, machine.kernel, machine.memory_bytes, machine.cpus


def require_layers(directory: Path, template: Instance, driver: VmmDriver) -> None:
    """Refuse layers of memory or disk, in an instance's directory, that no host has made.

    :raises IntegrityError: they are not valid
    """
    if template.capture is None:
        raise AssertionError("`require_sound` has seen a capture")
    (overlay,) = disks.of(template)  # it has no volumes
    for path in overlay.paths(directory)[1:]:
        driver.check_layer(path, overlay.size_bytes)
    layers.check_foreign_map(directory / files.MEMORY, template.capture.layers, template.machine.memory_bytes)


def arrived(directory: Path, instance: Instance, template: Instance, found: Mapping[str, str]) -> Instance:
    """Return the complete record of an imported template, whose files are in its directory. They are durable.

    :param instance: its record so far, with its kernel
    :param template: its record in the archive
    :param found: the digests of its files
    :raises DigestMismatch: a file is not the one that was captured
    """
    if template.capture is None:
        raise AssertionError("`require_sound` has seen a capture")
    capture, layers_of_disks = template.capture, template.disk_layers
    for name, recorded in digests(capture).items():
        if recorded not in (None, found[name]):
            raise DigestMismatch(f"{name} in the archive is not the one that was captured", hint=_CURE)
    base, *above = directories.memory_paths(directory, capture)
    capture = msgspec.structs.replace(
        capture,
        mem_file=_here(base, capture.mem_file, found),
        layers=tuple(_here(path, layer, found) for path, layer in zip(above, capture.layers, strict=True)),
        manifest=msgspec.structs.replace(capture.manifest, kernel=instance.machine.kernel),
        vmstate_sha256=found[files.VMSTATE],
    )
    capture = directories.captured_here(capture, directory, layers_of_disks)
    with os_errors(f"make {directory} durable"):
        sync(directory)
        sync(directory.parent)
    return msgspec.structs.replace(instance, state=State.TEMPLATE, capture=capture, disk_layers=layers_of_disks)


def _anywhere(file: M) -> M:
    return msgspec.structs.replace(file, inode=0, device=0, sharing=Sharing.OWN, reason="")


def _here(path: Path, file: M, found: Mapping[str, str]) -> M:
    here = memfile.describe(path)
    return msgspec.structs.replace(file, inode=here.inode, device=here.device, sharing=here.sharing, reason="", sha256=found[path.name])  # fmt: skip
