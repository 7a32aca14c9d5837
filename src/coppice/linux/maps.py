"""Memory mappings of a process, from /proc/PID/maps and /proc/PID/smaps, and those of guest RAM.

A mapping is identified by the (device, inode) of its file. On btrfs and some overlay mounts,
/proc/PID/maps shows another device number than stat(2). `identify` therefore maps the file in this
process and reads its own maps.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from coppice.errors import CoppiceError, HostCannot, VmmDied
from coppice.linux.clone import open_source
from coppice.linux.files import os_errors

_HEADER = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ([-rwxsp]{4}) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ([0-9]+)", re.MULTILINE
)
_PIECE = 1 << 16  # more than the kernel returns at once
_KILOBYTES = re.compile(rb" +([0-9]+) kB$", re.MULTILINE)


class FileIdentity(NamedTuple):
    """A file's identity in /proc/PID/maps: device as `major:minor` in hexadecimal, and inode."""

    device: str
    inode: int


class Vma(NamedTuple):
    """One mapping. The inode of `file` is 0 for anonymous memory."""

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
    """Parse /proc/PID/maps; ignore all other lines."""
    return [_vma(match) for match in _HEADER.finditer(text)]


def parse_smaps(text: bytes) -> list[VmaUsage]:
    """Parse /proc/PID/smaps. Unknown fields and lines are ignored; a missing field counts as 0."""
    headers = list(_HEADER.finditer(text))
    ends = [header.start() for header in headers[1:]] + [len(text)]
    return [_usage(header, text[header.end() : end]) for header, end in zip(headers, ends, strict=False)]


def maps_of(text: bytes, file: FileIdentity) -> list[Vma]:
    """Return the mappings of one file in the text of /proc/PID/maps.

    Other mappings are not parsed: a VMM has hundreds, and this runs after each restore.
    """
    return [_vma(header) for header in _headers_of(text, file)]


def is_mapped_privately(pid: int, file: FileIdentity) -> bool:
    """Return whether a process maps a file privately. Blocks.

    Reads /proc/PID/maps only as far as needed: guest RAM comes before the VMM's libraries.

    Raises what `read_text` raises.
    """
    text = b""
    try:
        with open(f"/proc/{pid}/maps", "rb", buffering=0) as maps:
            while more := maps.read(_PIECE):
                text += more
                if any(vma.private for vma in maps_of(text, file)):
                    return True
    except OSError as error:
        raise process_error(pid, f"read /proc/{pid}/maps", error) from error
    if not text:
        raise _ended(pid)
    return False


class Part(NamedTuple):
    """A range of addresses with one file behind it, mapped privately."""

    start: int
    end: int
    offset: int
    file: FileIdentity


def private_parts(text: bytes, files: Collection[FileIdentity]) -> list[Part]:
    """Return the private mappings of some files in the text of /proc/PID/maps, in order of address.

    Neighbours that continue the same file are joined. Fast: guest RAM on layers is thousands of mappings.
    """
    names = {f"{file.device} {file.inode}".encode(): file for file in files}
    line = rb"^([0-9a-f]+)-([0-9a-f]+) ...p ([0-9a-f]+) (" + b"|".join(map(re.escape, names)) + rb") "
    parts: list[Part] = []
    start = end = offset = 0
    file = b""
    for from_text, to_text, offset_text, name in re.findall(line, text, re.MULTILINE):
        next_start, next_offset = int(from_text, 16), int(offset_text, 16)
        if next_start != end or name != file or next_offset - offset != next_start - start:
            if file:
                parts.append(Part(start, end, offset, names[file]))
            start, offset, file = next_start, next_offset, name
        end = int(to_text, 16)
    if file:
        parts.append(Part(start, end, offset, names[file]))
    return parts


def spans_of(parts: Iterable[Part], offset_of: Callable[[Part], int] | None = None) -> list[Vma]:
    """Return where guest RAM is, from the private mappings of a base file and its layers.

    Neighbours are joined into one span, whichever files they map; with `offset_of`, the offset of a
    part in guest RAM, only if their offsets are consecutive too. Each is named by its first file.
    """
    spans: list[Vma] = []
    for part in parts:
        offset = offset_of(part) if offset_of else 0
        last = spans[-1] if spans else None
        if last and last.end == part.start and (offset_of is None or last.offset + last.length == offset):
            spans[-1] = last._replace(end=part.end)
        else:
            spans.append(Vma(part.start, part.end, "rw-p", offset, part.file))
    return spans


def smaps_of(text: bytes, file: FileIdentity) -> list[VmaUsage]:
    """Return the mappings of one file in the text of /proc/PID/smaps."""
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
        if header is not None and _vma(header).file == file:  # else the match is part of another file's path
            yield header
        at = text.find(name, at + 1)


def total_anonymous(text: bytes) -> int:
    """Return the anonymous and swapped bytes of all mappings in the text of smaps or
    smaps_rollup.
    """
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
    """Return a field in bytes."""
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
    """Return the mappings of a process. Raises what `read_text` raises."""
    return parse_maps(read_text(pid, "maps"))


def read_text(pid: int, name: Literal["maps", "smaps", "smaps_rollup"]) -> bytes:
    """Return a /proc file about a process's mappings.

    The last two make the kernel walk page tables.

    Raises VmmDied if the process is gone, HostCannot if the kernel denies access.
    """
    try:
        text = Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError as error:
        raise process_error(pid, f"read /proc/{pid}/{name}", error) from error
    if not text:
        raise _ended(pid)
    return text


def _ended(pid: int) -> VmmDied:
    """Return the error for a process without memory: one that is gone, or a zombie."""
    return VmmDied(f"Process {pid} has ended", hint="see its log with `coppice logs --vmm NAME`")


def process_error(pid: int, action: str, error: OSError) -> CoppiceError:
    """Return the error for a failed read of another process: it has ended, or access is denied."""
    if isinstance(error, FileNotFoundError | ProcessLookupError):
        return _ended(pid)
    if isinstance(error, PermissionError):
        return HostCannot(
            f"Cannot {action}: {error.strerror}",
            hint="run as the user who started the VMM, or as root if kernel.yama.ptrace_scope is not 0",
        )
    return HostCannot(f"Cannot {action}: {error.strerror or error}", hint="see the kernel's log with `dmesg`")


def likely_identity(status: os.stat_result) -> FileIdentity:
    """Return the name of a file in /proc/PID/maps if maps shows the same device as stat(2).

    A mapping with this name maps the file; the file may also be mapped under another name.
    """
    return FileIdentity(f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino)


def identify(path: Path) -> FileIdentity:
    """Return the name of a file in /proc/PID/maps, found by mapping its first page here.

    Raises IntegrityError if the file is missing, HostCannot if it is empty or not a regular file.
    """
    with os_errors(f"map {path}"), open_source(path) as fd:
        try:
            view = mmap.mmap(fd, 1, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except ValueError as error:  # mmap's own check: the file is empty
            raise HostCannot(f"{path} is empty, so nothing can map it", hint="capture the instance again") from error
        with view:
            anchor = ctypes.c_char.from_buffer(view)
            address = ctypes.addressof(anchor)
            del anchor  # the mapping cannot be closed while something points into it
            own = Path("/proc/self/maps").read_bytes()
    # The mapping may have been merged with a neighbour of the same file, but never moved.
    mappings = (_vma(match) for match in _HEADER.finditer(own))
    return next(vma.file for vma in mappings if vma.start <= address < vma.end)
