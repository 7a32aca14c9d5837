"""Records and machines of the size that the tests use, so that a test names only what it is about."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from coppice.model import MIB, Instance, MachineSpec, ProcessSpec, State
from coppice.names import new_id

MEMORY_BYTES = 64 * MIB
OVERLAY_BYTES = 16 * MIB
MACHINE = MachineSpec(cpus=1, memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES, kernel="fake-kernel")


def make_instance(name: str = "vm", state: State = State.STOPPED, **changes: Any) -> Instance:
    """An instance's record as a store would hold it, with `changes` made to it."""
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
