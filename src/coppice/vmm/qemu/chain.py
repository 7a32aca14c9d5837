"""The layers of the disks of a running QEMU: a new one on top, and one in place of several.

QEMU has dropped root and can open no files, so it gets each file as an open descriptor. The node of
a file has the file's name, at the start as well as later. So QEMU itself can always be asked for
the file that it writes to, whatever the host process has seen of an earlier call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from coppice.errors import VmmError
from coppice.linux.files import os_errors
from coppice.vmm.driver import OVERLAY_DISK

if TYPE_CHECKING:
    from coppice.vmm.qemu.monitor import Monitor

_WRITABLE: Final = " rw"


async def in_use(qmp: Monitor) -> tuple[tuple[str, ...], ...]:
    """Return the names of the files of each disk, from the raw one on.

    Only `query-blockstats` tells the nodes of a chain by name: other commands tell files, which are
    descriptors after a switch.
    """
    found = []
    for disk in await qmp.execute("query-blockstats"):
        names: list[str] = []
        node: dict[str, Any] | None = disk
        while node is not None:
            names.insert(0, str(node.get("node-name", "")))
            node = node.get("backing")
        found.append(tuple(names))
    return tuple(found)


async def _require_written(qmp: Monitor, base: str, expected: str) -> None:
    """Refuse to go on if QEMU writes to another file of the disk over `base` than expected."""
    now = next((names[-1] for names in await in_use(qmp) if names[0] == base), "none of its files")
    if now != expected:
        raise VmmError(f"QEMU writes to {now} and not to {expected}", hint="try again")


async def flush(qmp: Monitor) -> None:
    """Write back the overlay disk, and the tables of the layers of all disks.

    `stop` does that too, but does not report a failure.

    :raises VmmError: QEMU could not
    """
    for names in await in_use(qmp):
        if len(names) == 1 and names[0] != OVERLAY_DISK:
            continue
        line = f'qemu-io {names[-1]} "flush"'
        if said := await qmp.execute("human-monitor-command", {"command-line": line}):
            raise VmmError(
                f"QEMU could not write back a disk: {str(said).strip()}", hint="check the free space with `df`"
            )


async def prepare(qmp: Monitor, directory: Path, disk: Sequence[str]) -> None:
    """Do as `VmmDriver.prepare_switch` does."""
    *_, old, new = disk
    await _require_written(qmp, disk[0], old)
    await _drop(qmp, new)  # of an earlier call that was interrupted
    await _add_layer(qmp, new, None, await _add_file(qmp, directory, new, os.O_RDWR))


async def switch(qmp: Monitor, disks: Sequence[Sequence[str]]) -> None:
    """Do as `VmmDriver.switch_layers` does."""
    actions = [{"type": "blockdev-snapshot", "data": {"node": old, "overlay": new}} for *_, old, new in disks]
    await qmp.execute("transaction", {"actions": actions})


async def finish(qmp: Monitor, directory: Path, disk: Sequence[str]) -> None:
    """Do as `VmmDriver.finish_switch` does.

    The forks share the files below. QEMU would reopen a file by its name, which it cannot, and go on
    with a descriptor that can write: a guest that controls QEMU could change the disks of all forks.
    An earlier call may have been interrupted, so all of them are looked at.
    """
    *below, new = disk
    await _require_written(qmp, disk[0], new)
    nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
    writable = {node["node-name"] for node in nodes if not node["ro"]}
    writable |= {name.rpartition(".")[0] for name in writable}  # the node of an open file: see `_add_file`
    for under, name in zip((None, *below), below, strict=False):
        if name in writable or name == below[-1]:
            await _reopen(qmp, name, under, await _add_file(qmp, directory, name, os.O_RDONLY))
    await _tidy(qmp, disk)


async def replace(qmp: Monitor, directory: Path, disk: Sequence[str]) -> None:
    """Do as `VmmDriver.replace_below` does."""
    base, merged, top = disk
    await _drop(qmp, merged)  # of an earlier call that was interrupted
    await _add_layer(qmp, merged, base, await _add_file(qmp, directory, merged, os.O_RDONLY))
    await _reopen(qmp, top, merged, await _add_file(qmp, directory, top, os.O_RDWR))
    await _tidy(qmp, disk)


async def _add_layer(qmp: Monitor, name: str, below: str | None, file: _File) -> None:
    node = {"driver": "qcow2", "node-name": name, "read-only": file.read_only, "backing": below}
    await qmp.execute("blockdev-add", {**node, "discard": "unmap", "file": file.node})


async def _reopen(qmp: Monitor, name: str, below: str | None, file: _File) -> None:
    """Let a node use another file node, or another node below it."""
    node: dict[str, Any] = {"driver": "raw", "node-name": name, "read-only": file.read_only, "discard": "unmap"}
    if below is not None:
        node |= {"driver": "qcow2", "backing": below}
    await qmp.execute("blockdev-reopen", {"options": [{**node, "file": file.node}]})


async def _tidy(qmp: Monitor, disk: Sequence[str]) -> None:
    """Remove nodes that nothing uses, and close descriptors of other files than the disk's, and those that can
    write to files below the topmost one. QEMU keeps descriptors that it uses open until their nodes are gone.
    """
    prefix = Path(disk[0]).stem + "."
    for node in await qmp.execute("query-named-block-nodes", {"flat": True}):
        if (name := node["node-name"]).startswith(prefix) and name not in disk:
            await _drop(qmp, name)
    kept = {*disk, disk[-1] + _WRITABLE}
    for fdset in await qmp.execute("query-fdsets"):
        files = [each.get("opaque", "") for each in fdset["fds"]]
        if any(file.startswith(prefix) and file not in kept for file in files):
            await qmp.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})


async def _drop(qmp: Monitor, node: str) -> None:
    """Remove a node unless something uses it. QEMU itself removes those of its command line."""
    with contextlib.suppress(VmmError):
        await qmp.execute("blockdev-del", {"node-name": node})


class _File(NamedTuple):
    """The node of an open file."""

    node: str
    read_only: bool


async def _add_file(qmp: Monitor, directory: Path, name: str, flags: int) -> _File:
    """Open a file, pass it to QEMU, and make a node of it.

    QEMU keeps the descriptor besides: it may need another one of the same file (see `_tidy`).
    """
    with os_errors(f"open the disk {directory / name}"):
        descriptor = os.open(directory / name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        qmp.send_file(descriptor)
        opaque = name if flags == os.O_RDONLY else f"{name}{_WRITABLE}"
        fdset = await qmp.ask("add-fd", "fdset-id", int, {"opaque": opaque})
    finally:
        os.close(descriptor)
    file = _File(f"{name}.{fdset}", flags == os.O_RDONLY)
    node = {"driver": "file", "node-name": file.node, "filename": f"/dev/fdset/{fdset}", "locking": "off"}
    await _drop(qmp, file.node)  # its set was removed, and the number used again
    await qmp.execute("blockdev-add", {**node, "read-only": file.read_only})
    return file
