"""Memory mappings of a process, from /proc/PID/maps and /proc/PID/smaps; which of them are guest RAM.

A mapping is known by the (device, inode) of its file. On btrfs and some overlay mounts /proc/PID/maps shows another
device number than stat(2) does, so the identity to look for is read where it will be compared: from a mapping of our
own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from coppice.disk.atomic import os_errors
from coppice.disk.clone import open_source
from coppice.errors import CoppiceError, HostCannot, VmmDied

_HEADER = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ([-rwxsp]{4}) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ([0-9]+)", re.MULTILINE
)
_KILOBYTES = re.compile(rb" +([0-9]+) kB$", re.MULTILINE)


class FileIdentity(NamedTuple):
    """What /proc/PID/maps calls a file: device as `major:minor` in hexadecimal, and inode."""

    device: str
    inode: int


class Vma(NamedTuple):
    """One mapping. `file` has inode 0 where the memory is anonymous."""

    start: int
    end: int
    permissions: str
    offset: int
    file: FileIdentity

    @property
    def length(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def private(self) -> bool:
        """Whether writes go to pages of the process's own (MAP_PRIVATE)."""
        return self.permissions.endswith("p")


class VmaUsage(NamedTuple):
    """One mapping and the bytes that the kernel accounts to it."""

    vma: Vma
    rss_bytes: int
    anonymous_bytes: int
    swap_bytes: int


def parse_maps(text: bytes) -> list[Vma]:
    """Parse /proc/PID/maps; anything that is not a mapping line is passed over."""
    return [_vma(match) for match in _HEADER.finditer(text)]


def parse_smaps(text: bytes) -> list[VmaUsage]:
    """Parse /proc/PID/smaps. Unknown fields and unknown lines are passed over; a missing field counts as 0."""
    headers = list(_HEADER.finditer(text))
    ends = [header.start() for header in headers[1:]] + [len(text)]
    return [_usage(header, text[header.end() : end]) for header, end in zip(headers, ends, strict=False)]


def maps_of(text: bytes, file: FileIdentity) -> list[Vma]:
    """The mappings of one file in the text of /proc/PID/maps. No other is parsed: a VMM has hundreds, and this runs after each restore."""
    return [_vma(header) for header in _headers_of(text, file)]


def smaps_of(text: bytes, file: FileIdentity) -> list[VmaUsage]:
    """The mappings of one file in the text of /proc/PID/smaps."""
    found = []
    for header in _headers_of(text, file):
        following = _HEADER.search(text, header.end())
        found.append(_usage(header, text[header.end() : following.start() if following else len(text)]))
    return found


def _headers_of(text: bytes, file: FileIdentity) -> Iterator[re.Match[bytes]]:
    name = f" {file.device} {file.inode} ".encode()
    at = text.find(name)
    while at >= 0:
        header = _HEADER.match(text, text.rfind(b"\n", 0, at) + 1)
        if header is not None and _vma(header).file == file:  # else it is part of another file's path
            yield header
        at = text.find(name, at + 1)


def total_anonymous(text: bytes) -> int:
    """Anonymous and swapped bytes of all mappings in the text of /proc/PID/smaps, or of smaps_rollup."""
    values = (_KILOBYTES.match(rest) for key in (b"\nAnonymous:", b"\nSwap:") for rest in text.split(key)[1:])
    return sum(int(value[1]) * 1024 for value in values if value)


def _usage(header: re.Match[bytes], block: bytes) -> VmaUsage:
    return VmaUsage(
        _vma(header),
        rss_bytes=_field(block, b"\nRss:"),
        anonymous_bytes=_field(block, b"\nAnonymous:"),
        swap_bytes=_field(block, b"\nSwap:"),
    )


def _field(block: bytes, key: bytes) -> int:
    """A field in bytes."""
    at = block.find(key)
    number = _KILOBYTES.match(block, at + len(key)) if at >= 0 else None
    return int(number[1]) * 1024 if number else 0


def _vma(match: re.Match[bytes]) -> Vma:
    return Vma(
        start=int(match[1], 16),
        end=int(match[2], 16),
        permissions=match[3].decode(),
        offset=int(match[4], 16),
        file=FileIdentity(match[5].decode(), int(match[6])),
    )


def read_maps(pid: int) -> list[Vma]:
    """The mappings of a process. Raises as `read_text` does."""
    return parse_maps(read_text(pid, "maps"))


def read_text(pid: int, name: Literal["maps", "smaps", "smaps_rollup"]) -> bytes:
    """What the kernel tells of a process's mappings. For the last two it walks the page tables.

    Raises VmmDied if the process is gone, HostCannot if the kernel does not let us look.
    """
    try:
        text = Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError as error:
        raise process_error(pid, f"read /proc/{pid}/{name}", error) from error
    if not text:  # a zombie has no memory any more
        raise VmmDied(f"Process {pid} has ended", hint="see what it said with `coppice logs --vmm NAME`")
    return text


def process_error(pid: int, action: str, error: OSError) -> CoppiceError:
    """The error for a failed look into another process: it is gone, or we are not allowed to."""
    if isinstance(error, FileNotFoundError | ProcessLookupError):
        return VmmDied(f"Process {pid} has ended", hint="see what it said with `coppice logs --vmm NAME`")
    if isinstance(error, PermissionError):
        return HostCannot(
            f"Cannot {action}: {error.strerror}",
            hint="run as the user who started the VMM, and where kernel.yama.ptrace_scope is not 0 as root",
        )
    return HostCannot(f"Cannot {action}: {error.strerror or error}", hint="see the kernel's log with `dmesg`")


def likely_identity(status: os.stat_result) -> FileIdentity:
    """How /proc/PID/maps names a file where it names the device that stat(2) does. A mapping of that name is of that file, but there may be one of another."""
    return FileIdentity(f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino)


def identify(path: Path) -> FileIdentity:
    """How /proc/PID/maps would name the file, found by mapping its first page here.

    Raises IntegrityError if the file is missing, HostCannot if it is empty or not a regular file.
    """
    with os_errors(f"map {path}"), open_source(path) as fd:
        try:
            view = mmap.mmap(fd, 1, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except ValueError as error:  # the module's own check: the file is empty
            raise HostCannot(f"{path} is empty, so nothing can map it", hint="capture the instance again") from error
        with view:
            anchor = ctypes.c_char.from_buffer(view)
            address = ctypes.addressof(anchor)
            del anchor  # the mapping cannot be closed while something points into it
            own = Path("/proc/self/maps").read_bytes()
    # The mapping may have been merged with a neighbour of the same file, but never moved.
    mappings = (_vma(match) for match in _HEADER.finditer(own))
    return next(vma.file for vma in mappings if vma.start <= address < vma.end)
