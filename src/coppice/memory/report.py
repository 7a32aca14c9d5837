"""What a guest's memory costs, as the kernel accounts it, and whether it really shares its mem-file (invariant 5).

Unique is the anonymous and swapped part of a private guest-RAM mapping. Private_Dirty is not: it also counts pages of
the shared file that only one process happens to map, 19 MiB against 0.5 MiB in one measurement.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from coppice.disk.atomic import os_errors
from coppice.memory.maps import (
    FileIdentity,
    VmaUsage,
    identify,
    likely_identity,
    maps_of,
    parse_smaps,
    read_maps,
    read_text,
    smaps_of,
    total_anonymous,
)
from coppice.memory.pagemap import usages
from coppice.model import MemFile, MemoryReport, Sharing


class Backing(StrEnum):
    """What the guest RAM of a process is made of."""

    PRIVATE = "private"  # the mem-file, MAP_PRIVATE: pages are shared until the guest writes them
    SHARED = "shared"  # the mem-file, MAP_SHARED: the guest writes into the file, which is its own
    COPY = "copy"  # other memory of the guest's size: the VMM allocated it, or the driver copied
    NONE = "none"  # no guest RAM to be seen


class GuestRam(NamedTuple):
    """The mappings that are guest RAM."""

    backing: Backing
    ram: list[VmaUsage]


def classify(usages: list[VmaUsage], identity: FileIdentity | None, size_bytes: int) -> GuestRam:
    """Tell the guest RAM of a process from its other mappings, by the mem-file it may map and the guest's RAM size."""
    of_file = [usage for usage in usages if usage.vma.file == identity]
    private = [usage for usage in of_file if usage.vma.private]
    # The exact size goes first: QEMU's translation buffer is anonymous too, and may be larger than the guest.
    large = [usage for usage in usages if usage.vma.length >= size_bytes and "w" in usage.vma.permissions]
    copy = sorted(large, key=lambda usage: (usage.vma.length == size_bytes, usage.rss_bytes))[-1:]
    for backing, ram in ((Backing.PRIVATE, private), (Backing.SHARED, of_file), (Backing.COPY, copy)):
        if ram:
            return GuestRam(backing, ram)
    return GuestRam(Backing.NONE, [])


def _account(pid: int, path: Path, info: os.stat_result | None, size_bytes: int) -> tuple[GuestRam, int]:
    """The guest RAM of a process, and the anonymous and swapped bytes of all that it has mapped.

    What is usual goes fast: the mem-file, mapped privately. Only for a process that does not map it, all of its mappings have to be looked at.
    """
    identity = None
    if info is not None:
        maps, identity = read_text(pid, "maps"), likely_identity(info)
        vmas = maps_of(maps, identity)
        if not vmas:
            identity = identify(path)
            vmas = maps_of(maps, identity)
        private = [vma for vma in vmas if vma.private]
        if private and (ram := usages(pid, private)) is not None:
            return GuestRam(Backing.PRIVATE, ram), total_anonymous(read_text(pid, "smaps_rollup"))
    smaps = read_text(pid, "smaps")
    of_file = smaps_of(smaps, identity) if identity else []
    return classify(of_file or parse_smaps(smaps), identity, size_bytes), total_anonymous(smaps)


def mapping_is_shared(pid: int, path: Path, expected: MemFile) -> bool:
    """Whether the process maps the whole expected mem-file privately, so that its untouched pages cost nothing.

    False where a driver silently copied: no mapping of that inode, only a part of it, or other memory instead.

    Raises VmmDied if the process is gone, IntegrityError if the file is missing, HostCannot.
    """
    with os_errors(f"look at {path}"):
        inode = path.lstat().st_ino
    identity = identify(path)
    mapped = sum(vma.length for vma in read_maps(pid) if vma.file == identity and vma.private)
    return inode == expected.inode and mapped >= expected.size_bytes


def memory_report(pid: int | None, mem: MemFile | None, path: Path, *, memory_bytes: int | None = None) -> MemoryReport:
    """Account the guest RAM of an instance, in bytes; with `pid` None it does not run, and has nothing resident.

    `mem` is the record of the captured mem-file at `path`, or None for an instance that never was captured. Guest RAM
    in the instance's own file, mapped shared, counts what the file has allocated as unique. If the process does not map
    the mem-file, all that is resident of its guest RAM is unique, and `sharing` says `copy` whatever the record says.
    `memory_bytes` is the guest's RAM size, needed only for a VMM that boots on anonymous memory: it has no file yet.

    Raises VmmDied if the process is gone, IntegrityError if the file is missing and needed, HostCannot.
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
        return MemoryReport(
            mapped_bytes=size,
            shared_bytes=0,
            unique_bytes=0,
            vmm_overhead_bytes=0,
            inode=inode,
            link_count=links,
            sharing=sharing,
        )
    found, all_anonymous = _account(pid, path, info, size)
    rss, anonymous, swap = (
        sum(usage.rss_bytes for usage in found.ram),
        sum(usage.anonymous_bytes for usage in found.ram),
        sum(usage.swap_bytes for usage in found.ram),
    )
    # Not Private_Clean: a page of QEMU's program that only one process happens to map is page cache all the same.
    overhead = max(all_anonymous - anonymous - swap, 0)  # the guest runs on between the two looks
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
        sharing=None if found.backing is Backing.NONE else sharing,
    )
