"""RAM of a fake machine, read and written in the VMM process itself, as a vCPU would: so whatever a capture or a fork loses of it is missed.

Page 0 is a recognisable pattern; the guest's state is JSON from page 1 on; the warm pages behind it only take room.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

import msgspec

from coppice.model import PAGE_SIZE, Record

ADDRESS: Final = 0x2_0000_0000  # RAM_ADDRESS of fake_vmm.c
PATTERN: Final = b"COPPICE FAKE RAM".ljust(PAGE_SIZE, b"\xc0")
STATE_OFFSET: Final = PAGE_SIZE
STATE_MAX: Final = 15 * PAGE_SIZE
WARM_OFFSET: Final = 16 * PAGE_SIZE
WARM_PAGES: Final = 64
SCRATCH_OFFSET: Final = 256 * PAGE_SIZE  # what `dirty` writes

_LENGTH = struct.Struct("<I")


class GuestState(Record, frozen=True, kw_only=True):
    """All that the guest knows. `generation` counts the changes: a vmstate names the one that it belongs to."""

    generation: int = 0
    serial: int = 0
    hostname: str = "unnamed"
    machine_id: str = ""
    boot_id: str = ""
    mac: str = ""
    address: str = ""
    entropy: str = ""
    clock_ns: int = 0
    frozen: bool = False
    argv: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()  # "0 ro /srv/data"
    remembered: dict[str, str] = {}
    sessions_ended: int = 0
    payload: bytes | None = None  # as much as there is room for
    payload_size: int = 0


def make_ram(path: Path, size_bytes: int) -> None:
    """The sparse file of a machine that was just switched on."""
    with path.open("xb") as file:
        file.truncate(size_bytes)
        file.write(PATTERN)
        file.write(_encode(GuestState()))
        file.seek(WARM_OFFSET)
        file.write(b"\x5a" * WARM_PAGES * PAGE_SIZE)


def _encode(state: GuestState) -> bytes:
    text = msgspec.json.encode(state)
    if len(text) > STATE_MAX - _LENGTH.size:
        raise ValueError("the fake guest's state has outgrown its pages")
    return _LENGTH.pack(len(text)) + text


class Ram:
    """RAM of the machine of one VMM process. Raises ProcessLookupError, or reads nothing, when it has ended."""

    def __init__(self, pid: int) -> None:
        self._path = f"/proc/{pid}/mem"

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of guest RAM."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, length, ADDRESS + offset)
        finally:
            os.close(fd)

    def write(self, offset: int, data: bytes) -> None:
        """Store bytes: in the file, where it is mapped shared; in private pages, where it is mapped privately."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.pwrite(fd, data, ADDRESS + offset) != len(data):
                raise ProcessLookupError
        finally:
            os.close(fd)

    @property
    def state(self) -> GuestState:
        """The guest's state as it is in RAM now."""
        stored = self.read(STATE_OFFSET, STATE_MAX)
        if len(stored) < _LENGTH.size:
            raise ProcessLookupError
        length = _LENGTH.unpack_from(stored)[0]
        return msgspec.json.decode(stored[_LENGTH.size : _LENGTH.size + length], type=GuestState)

    def change(self, **changes: object) -> GuestState:
        """Change fields of the state; returns the new one."""
        state = self.state
        state = msgspec.structs.replace(state, generation=state.generation + 1, **changes)
        self.write(STATE_OFFSET, _encode(state))
        return state

    def dirty(self, pages: int) -> None:
        """Write so many pages that nothing else uses."""
        self.write(SCRATCH_OFFSET, os.urandom(pages * PAGE_SIZE))
