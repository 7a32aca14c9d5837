"""The cost of a guest's memory in the kernel's accounts, and whether it really shares its mem-file
(invariant 5).

Unique memory is the anonymous and swapped part of a private guest-RAM mapping. Private_Dirty is not
used: it also counts pages of the shared file that only one process maps, 19 MiB against 0.5 MiB in
one measurement.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from coppice.linux.files import os_errors
from coppice.linux.maps import (
    FileIdentity,
    VmaUsage,
    identify,
    is_mapped_privately,
    likely_identity,
    maps_of,
    parse_smaps,
    private_parts,
    read_text,
    smaps_of,
    spans_of,
    total_anonymous,
)
from coppice.linux.pagemap import usages
from coppice.model import MemFile, MemoryReport, Sharing


class Backing(StrEnum):
    """The memory that backs a process's guest RAM."""

    PRIVATE = "private"  # the mem-file, MAP_PRIVATE: pages are shared until the guest writes them
    SHARED = "shared"  # the mem-file, MAP_SHARED: the guest writes into its own file
    COPY = "copy"  # other memory of the guest's size: the VMM allocated it, or the driver copied
    NONE = "none"  # no guest RAM found


class GuestRam(NamedTuple):
    """The mappings that are guest RAM."""

    backing: Backing
    ram: list[VmaUsage]


def classify(usages: list[VmaUsage], files: Collection[FileIdentity], size_bytes: int) -> GuestRam:
    """Find the guest RAM among a process's mappings, by the files of its memory, if any, and the
    guest's RAM size.
    """
    of_file = [usage for usage in usages if usage.vma.file in files]
    private = [usage for usage in of_file if usage.vma.private]
    # Prefer an exact size: QEMU's translation buffer is anonymous too, and may be larger than the
    # guest.
    large = [usage for usage in usages if usage.vma.length >= size_bytes and "w" in usage.vma.permissions]
    copy = sorted(large, key=lambda usage: (usage.vma.length == size_bytes, usage.rss_bytes))[-1:]
    for backing, ram in ((Backing.PRIVATE, private), (Backing.SHARED, of_file), (Backing.COPY, copy)):
        if ram:
            return GuestRam(backing, ram)
    return GuestRam(Backing.NONE, [])


def _account(pid: int, paths: Sequence[Path], size_bytes: int) -> tuple[GuestRam, int]:
    """Return the guest RAM of a process, and the anonymous and swapped bytes of all its mappings.

    The usual case is fast: the files of the memory are mapped privately. All mappings are read only
    if the process does not map these files.
    """
    files: list[FileIdentity] = []
    if paths:
        maps = read_text(pid, "maps")
        with os_errors(f"look at {paths[0]}"):
            files = [likely_identity(path.lstat()) for path in paths]
        if not maps_of(maps, files[0]):
            files = [identify(path) for path in paths]
        private = spans_of(private_parts(maps, files))
        if private and (ram := usages(pid, private)) is not None:
            return GuestRam(Backing.PRIVATE, ram), total_anonymous(read_text(pid, "smaps_rollup"))
    smaps = read_text(pid, "smaps")
    of_files = [usage for file in files for usage in smaps_of(smaps, file)]
    return classify(of_files or parse_smaps(smaps), files, size_bytes), total_anonymous(smaps)


def maps_privately(pid: int, path: str) -> bool:
    """Return whether a process maps a file privately, by the kernel's list of its mappings. Blocks.

    Unlike `memory_report`, it makes the kernel walk no page tables.

    Raises VmmDied if the process is gone, IntegrityError if the file is missing, HostCannot.
    """
    with os_errors(f"look at {path}"):
        likely = likely_identity(os.lstat(path))
    return is_mapped_privately(pid, likely) or is_mapped_privately(pid, identify(Path(path)))


def memory_at_rest(mem: MemFile, path: str, layers: int) -> MemoryReport:
    """Do as `memory_report` does for an instance that does not run: one look at one file.

    Raises IntegrityError if the file is missing, HostCannot.
    """
    try:
        info = os.lstat(path)
    except OSError:
        with os_errors(f"look at {path}"):
            raise
    return _of_file(info.st_size, info, mem.sharing, layers)


def _of_file(size: int, info: os.stat_result | None, sharing: Sharing, layers: int) -> MemoryReport:
    return MemoryReport(
        mapped_bytes=size,
        shared_bytes=0,
        unique_bytes=0,
        vmm_overhead_bytes=0,
        inode=None if info is None else info.st_ino,
        link_count=0 if info is None else info.st_nlink,
        layers=layers,
        sharing=sharing,
    )


def memory_report(
    pid: int | None, mem: MemFile | None, path: Path, layers: Sequence[Path] = (), *, memory_bytes: int | None = None
) -> MemoryReport:
    """Account the guest RAM of an instance, in bytes.

    If `pid` is None it does not run, and nothing is resident.

    `mem` is the record of the captured mem-file at `path`, or None for an instance that was never
    captured. Its `layers` lie over it. If the guest RAM is the instance's own file, mapped shared, the file's allocated bytes
    count as unique. If the process does not map the mem-file, all its resident guest RAM is unique,
    and `sharing` is `copy` regardless of the record. `memory_bytes` is the guest's RAM size, needed
    only for a VMM that boots on anonymous memory: it has no file yet.

    Raises VmmDied if the process is gone, IntegrityError if the file is missing and needed,
    HostCannot.
    """
    file_expected = mem is not None or memory_bytes is None
    info: os.stat_result | None = None
    with os_errors(f"look at {path}"):
        try:
            info = path.lstat()
        except FileNotFoundError:
            if file_expected:
                raise
    size = info.st_size if info is not None else memory_bytes or 0
    inode, links = (info.st_ino, info.st_nlink) if info is not None else (None, 0)
    sharing = mem.sharing if mem is not None else Sharing.OWN
    if pid is None:
        return _of_file(size, info, sharing, len(layers))
    found, all_anonymous = _account(pid, () if info is None else (path, *layers), size)
    rss, anonymous, swap = (
        sum(usage.rss_bytes for usage in found.ram),
        sum(usage.anonymous_bytes for usage in found.ram),
        sum(usage.swap_bytes for usage in found.ram),
    )
    # Without Private_Clean: a page of QEMU's program that only one process maps is page cache too.
    overhead = max(all_anonymous - anonymous - swap, 0)  # the guest runs between the two measurements
    unique, shared = anonymous + swap, max(rss - anonymous, 0)
    if found.backing is Backing.SHARED and info is not None:
        unique, shared = info.st_blocks * 512, 0
    elif found.backing is Backing.COPY:
        unique, shared = rss + swap, 0
        sharing = Sharing.COPY if info is not None else sharing
    return MemoryReport(
        mapped_bytes=sum(usage.vma.length for usage in found.ram),
        shared_bytes=shared,
        unique_bytes=unique,
        vmm_overhead_bytes=overhead,
        inode=inode,
        link_count=links,
        layers=len(layers),
        sharing=None if found.backing is Backing.NONE else sharing,
    )
