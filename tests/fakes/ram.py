"""RAM of a fake machine, read and written in the VMM process itself, so that tests detect any lost
page.

Page 0 is a recognisable pattern; the guest's state is JSON from page 1 on; the warm pages after it
only occupy memory.
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
SCRATCH_OFFSET: Final = 256 * PAGE_SIZE  # written by `dirty`

_LENGTH = struct.Struct("<I")


class GuestState(Record, frozen=True, kw_only=True):
    """The guest's state. `generation` counts its changes, and a vmstate names its generation."""

    generation: int = 0
    serial: int = 0
    hostname: str = "unnamed"
    machine_id: str = ""
    boot_id: str = ""
    mac: str = ""
    address: str = ""
    entropy: str = ""
    clock_ns: int = 0
    clock_late_ns: int = 0  # the lag of the time when the guest's clock was set
    frozen: bool = False
    argv: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()  # "0 ro /srv/data"
    remembered: dict[str, str] = {}
    sessions_ended: int = 0
    payload: bytes | None = None  # the first part that fits
    payload_size: int = 0


def make_ram(path: Path, size_bytes: int) -> None:
    """Make the sparse RAM file of a machine that was just switched on."""
    with path.open("xb") as file:
        file.truncate(size_bytes)
        file.write(PATTERN)
        file.write(_encode(GuestState()))
        file.seek(WARM_OFFSET)
        file.write(b"\x5a" * WARM_PAGES * PAGE_SIZE)


def write_first(ram: Ram) -> None:
    """Write the initial contents of RAM into zeros."""
    ram.write(0, PATTERN)
    ram.write(STATE_OFFSET, _encode(GuestState()))
    ram.write(WARM_OFFSET, b"\x5a" * WARM_PAGES * PAGE_SIZE)


def _encode(state: GuestState) -> bytes:
    text = msgspec.json.encode(state)
    if len(text) > STATE_MAX - _LENGTH.size:
        raise ValueError("the fake guest's state has outgrown its pages")
    return _LENGTH.pack(len(text)) + text


class Ram:
    """RAM of the machine of one VMM process. Methods raise ProcessLookupError, or read nothing,
    after its end.
    """

    def __init__(self, pid: int) -> None:
        self._path = f"/proc/{pid}/mem"

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of guest RAM."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, length, ADDRESS + offset)
        finally:
            os.close(fd)

    def write(self, offset: int, data: bytes) -> None:
        """Store bytes: in the file if it is mapped shared, in private pages if it is mapped
        privately.
        """
        fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.pwrite(fd, data, ADDRESS + offset) != len(data):
                raise ProcessLookupError
        finally:
            os.close(fd)

    @property
    def state(self) -> GuestState:
        """Return the guest's current state in RAM."""
        stored = self.read(STATE_OFFSET, STATE_MAX)
        if len(stored) < _LENGTH.size:
            raise ProcessLookupError
        length = _LENGTH.unpack_from(stored)[0]
        return msgspec.json.decode(stored[_LENGTH.size : _LENGTH.size + length], type=GuestState)

    def change(self, **changes: object) -> GuestState:
        """Change fields of the state; return the new state."""
        state = self.state
        state = msgspec.structs.replace(state, generation=state.generation + 1, **changes)
        self.write(STATE_OFFSET, _encode(state))
        return state

    def dirty(self, pages: int) -> None:
        """Write this many pages that nothing else uses."""
        self.write(SCRATCH_OFFSET, os.urandom(pages * PAGE_SIZE))
