"""Find captures that this host can no longer load, for example after a VMM update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from coppice.errors import CoppiceError
from coppice.model import Instance, MachineSpec, Manifest, Snapshot, State

if TYPE_CHECKING:
    from coppice.vmm.registry import Drivers

_HOLD_A_CAPTURE = (State.STANDBY, State.TEMPLATE)
TSC_TOLERANCE = 0.002  # each process takes its own, quick measurement


def differences(then: Manifest, now: Manifest) -> str:
    """Return the differences that prevent loading a vmstate, as text; empty if there are none."""
    return "; ".join(
        f"{field.replace('_', ' ')} was {before or 'none'}, is {after or 'none'}"
        for field in Manifest.__struct_fields__
        if (before := getattr(then, field)) != (after := getattr(now, field))
        and not (field == "tsc_khz" and abs(before - after) <= TSC_TOLERANCE * before)
    )


def manifest_of(holder: Instance | Snapshot) -> Manifest | None:
    """Return the manifest of an instance's or snapshot's loadable capture, or None if it has none.

    The capture of a running machine does not count: it is never loaded again.
    """
    if holder.capture is None or (isinstance(holder, Instance) and holder.state not in _HOLD_A_CAPTURE):
        return None
    return holder.capture.manifest


async def unloadable(drivers: Drivers, holders: Iterable[Instance | Snapshot]) -> dict[str, str]:
    """Return the reasons why captures cannot be loaded on this host, by the id of their holder.

    Each VMM with captures is asked once, and each manifest is compared once: forks have the same.
    """
    reasons: dict[str, str] = {}
    here: dict[str, Manifest | CoppiceError] = {}
    compared: dict[tuple[str, Manifest, str, int, int], str] = {}
    for holder in holders:
        then = manifest_of(holder)
        if then is None:
            continue
        driver, machine = holder.driver, holder.machine
        if driver not in here:
            try:
                here[driver] = await drivers.named(driver).manifest(machine)
            except CoppiceError as error:
                here[driver] = error
        key = (driver, then, machine.kernel, machine.memory_bytes, machine.cpus)
        if key not in compared:
            now = here[driver]
            compared[key] = now.message if isinstance(now, CoppiceError) else differences(then, _for(now, machine))
        if reason := compared[key]:
            reasons[holder.id] = reason
    return reasons


def _for(here: Manifest, machine: MachineSpec) -> Manifest:
    """Return the manifest of another machine on this host."""
    return msgspec.structs.replace(here, kernel=machine.kernel, memory_bytes=machine.memory_bytes, cpus=machine.cpus)
