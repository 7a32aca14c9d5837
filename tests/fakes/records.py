"""Small records and machines, so that a test names only its relevant fields."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from coppice.model import MIB, Capture, Instance, MachineSpec, Manifest, MemFile, ProcessSpec, State
from coppice.names import new_id

MEMORY_BYTES = 64 * MIB
OVERLAY_BYTES = 16 * MIB
MACHINE = MachineSpec(cpus=1, memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES, kernel="fake-kernel")


def make_capture(mem_file: MemFile) -> Capture:
    """Return a capture of this memory, with defaults for all other fields."""
    manifest = Manifest(
        driver="fake",
        vmm_version="1",
        machine="fake",
        accel="none",
        cpu_model="none",
        cpu_flags="",
        kernel=MACHINE.kernel,
        memory_bytes=mem_file.size_bytes,
        cpus=1,
    )
    return Capture(mem_file=mem_file, manifest=manifest, captured_at=time.time())


def make_instance(name: str = "vm", state: State = State.STOPPED, **changes: Any) -> Instance:
    """Return an instance's record with `changes`."""
    instance = Instance(
        id=new_id(),
        name=name,
        state=state,
        created_at=time.time(),
        driver="fake",
        image="sha256:" + "0" * 64,
        image_name="tiny",
        machine=MACHINE,
        process=ProcessSpec(),
        hostname=name,
    )
    return msgspec.structs.replace(instance, **changes)
