"""Find the private pages of a process in private file mappings, and count its pages of each kind.

A page of a MAP_PRIVATE mapping that was written is anonymous: present or swapped, and not the
file's. Linux 6.7 and later report this by the PAGEMAP_SCAN ioctl, older kernels by
/proc/PID/pagemap, eight bytes a page. Both give the same ranges. Facts:
Documentation/admin-guide/mm/pagemap.rst and include/uapi/linux/fs.h of the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from coppice.linux.maps import Vma, VmaUsage, process_error
from coppice.model import PAGE_SIZE

PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
PAGE_IS_WRITTEN = 1 << 1  # not protected by a userfaultfd
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4

_PROTECT, _REQUIRE_OBSERVED = 1 << 0, 1 << 1  # PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC

_SCAN = struct.Struct("=12Q")  # struct pm_scan_arg
_REGIONS = 4096  # struct page_region: start, end, categories
# ENOTTY and EINVAL: the kernel is older than 6.7; EPERM: a seccomp filter that does not know the
# ioctl.
_NO_SCAN = frozenset({errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EPERM})

_ENTRY_BYTES = 8
_READ_BYTES = 1 << 20  # bytes of pagemap, which cover 512 MiB of memory
# Top byte of an entry: bit 63 present, bit 62 swapped, bit 61 file page or shared anonymous.
_TO_PRIVATE = bytes(int(bool(top & 0xC0) and not top & 0x20) for top in range(256))


class PrivateRange(NamedTuple):
    """A run of private pages: its offset in the mem-file, its address in the process, and its
    length in bytes.
    """

    offset: int
    address: int
    length: int


def private_ranges(pid: int, vmas: Iterable[Vma]) -> list[PrivateRange]:
    """Return the private pages of the given mappings, as maximal ranges in file order.

    The process must not run meanwhile, or pages that it writes may be missed. A kernel without
    the ioctl is served through /proc/PID/pagemap.

    Raises VmmDied if the process is gone, HostCannot if the kernel denies access.
    """
    fd = _open(pid)
    ordered = sorted(vmas, key=lambda vma: vma.offset)
    try:
        try:
            return _file_ranges(ordered, lambda vma: _scan_private(fd, vma))
        except OSError as error:
            if error.errno not in _NO_SCAN:
                raise
        return _file_ranges(ordered, lambda vma: _walk(fd, vma.start, vma.end))
    except OSError as error:
        raise process_error(pid, f"read the page map of process {pid}", error) from error
    finally:
        os.close(fd)


def protect_written(pid: int, vmas: Sequence[Vma]) -> list[PrivateRange]:
    """Return the private pages that a userfaultfd does not protect against writes, as maximal ranges
    in file order, and protect them.

    All mappings must be of one userfaultfd with asynchronous write protection (see
    `coppice.linux.written`). The process may run meanwhile.

    Raises VmmDied if the process is gone, HostCannot if the kernel refuses or a mapping is not observed.
    """
    fd = _open(pid)
    try:
        return _file_ranges(
            vmas,
            lambda vma: (
                (start, end)
                for start, end, _ in _scan(
                    fd,
                    vma,
                    of=PAGE_IS_FILE,
                    must=PAGE_IS_WRITTEN,
                    told=PAGE_IS_FILE,
                    flags=_PROTECT | _REQUIRE_OBSERVED,
                )
            ),
        )
    except OSError as error:
        raise process_error(pid, f"protect pages of process {pid}", error) from error
    finally:
        os.close(fd)


def private_and_written(pid: int, vmas: Sequence[Vma]) -> tuple[list[PrivateRange], list[PrivateRange]]:
    """Return all private pages, and those of them that may have changed since `protect_written`; the
    process must not run meanwhile. Raises as `protect_written` does.

    A page that is not in memory counts as changed: to the kernel a protected page that was discarded
    looks the same.
    """
    fd = _open(pid)
    try:
        told = PAGE_IS_WRITTEN | PAGE_IS_SWAPPED
        runs = {vma: list(_scan(fd, vma, of=PAGE_IS_FILE, told=told, flags=_REQUIRE_OBSERVED)) for vma in vmas}
    except OSError as error:
        raise process_error(pid, f"read the page map of process {pid}", error) from error
    finally:
        os.close(fd)
    every = _file_ranges(vmas, lambda vma: ((start, end) for start, end, _ in runs[vma]))
    return every, _file_ranges(vmas, lambda vma: ((start, end) for start, end, kind in runs[vma] if kind))


def usages(pid: int, vmas: Sequence[Vma]) -> list[VmaUsage] | None:
    """Return the usage of each private file mapping, as smaps would; None if the kernel has no
    PAGEMAP_SCAN.

    smaps lists all mappings, and a VMM has hundreds: the ioctl takes a tenth of the time. The
    process may run meanwhile.

    Raises VmmDied if the process is gone, HostCannot if the kernel denies access.
    """
    fd = _open(pid)
    try:
        return [_usage(fd, vma) for vma in vmas]
    except OSError as error:
        if error.errno in _NO_SCAN:
            return None
        raise process_error(pid, f"read the page map of process {pid}", error) from error
    finally:
        os.close(fd)


def _open(pid: int) -> int:
    try:
        return os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise process_error(pid, f"open /proc/{pid}/pagemap", error) from error


def _usage(fd: int, vma: Vma) -> VmaUsage:
    of_kind = dict.fromkeys((0, PAGE_IS_FILE, PAGE_IS_SWAPPED), 0)
    for start, end, kind in _scan(fd, vma, of=0, told=PAGE_IS_FILE | PAGE_IS_SWAPPED):
        of_kind[PAGE_IS_SWAPPED if kind & PAGE_IS_SWAPPED else kind] += end - start
    anonymous, swapped = of_kind[0], of_kind[PAGE_IS_SWAPPED]
    return VmaUsage(vma, of_kind[PAGE_IS_FILE] + anonymous, anonymous, swapped)


def merge(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join (start, end) runs that follow each other without a gap.

    The input is in order and does not overlap.
    """
    start = end = -1
    for next_start, next_end in runs:
        if next_start != end:
            if end > start:
                yield start, end
            start = next_start
        end = next_end
    if end > start:
        yield start, end


def private_runs(entries: bytes) -> Iterator[tuple[int, int]]:
    """Yield (first index, count) of each run of private pages in raw pagemap entries (8 bytes,
    little endian).
    """
    flags = entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_TO_PRIVATE)
    start = flags.find(1)
    while start >= 0:
        end = flags.find(0, start)
        if end < 0:
            end = len(flags)
        yield start, end - start
        start = flags.find(1, end)


def _file_ranges(vmas: Sequence[Vma], scan: Callable[[Vma], Iterator[tuple[int, int]]]) -> list[PrivateRange]:
    return [
        PrivateRange(start - vma.start + vma.offset, start, end - start)
        for vma in vmas
        for start, end in merge(scan(vma))
    ]


def _scan_private(fd: int, vma: Vma) -> Iterator[tuple[int, int]]:
    """Yield (start, end) addresses of private pages by PAGEMAP_SCAN."""
    # All matches have PAGE_IS_FILE clear. Reporting only this bit merges present and swapped pages
    # into one region.
    return ((start, end) for start, end, _ in _scan(fd, vma, of=PAGE_IS_FILE, told=PAGE_IS_FILE))


def _scan(fd: int, vma: Vma, *, of: int, told: int, must: int = 0, flags: int = 0) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, kind) of runs of pages that are present or swapped, have none of the
    bits `of`, and all of `must`.

    `kind` has those bits of `told` that the pages have.

    The kernel's `walk_end` is not used. It lags behind when a walk needed more than one of the
    kernel's own buffers of 512 regions and then came to its end (seen with Linux 6.18): resuming
    from there finds the last regions twice.
    """
    regions = array("Q", bytes(_REGIONS * 24))
    vector, _ = regions.buffer_info()
    start = vma.start
    while start < vma.end:
        request = bytearray(
            _SCAN.pack(
                *(_SCAN.size, flags, start, vma.end, 0, vector, _REGIONS, 0),
                *(of, of | must, PAGE_IS_PRESENT | PAGE_IS_SWAPPED),  # inverted, all of, any of
                told,
            )
        )
        count = fcntl.ioctl(fd, PAGEMAP_SCAN, request, True)
        for index in range(0, count * 3, 3):
            yield regions[index], regions[index + 1], regions[index + 2]
        if count < _REGIONS:  # only a full result stops the walk early
            return
        start = regions[count * 3 - 2]


def _walk(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) addresses of private pages from the entries of /proc/PID/pagemap."""
    while start < end:
        wanted = min((end - start) // PAGE_SIZE * _ENTRY_BYTES, _READ_BYTES)
        entries = os.pread(fd, wanted, start // PAGE_SIZE * _ENTRY_BYTES)
        if len(entries) < _ENTRY_BYTES:  # the process ended during the read
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        for first, count in private_runs(entries):
            yield start + first * PAGE_SIZE, start + (first + count) * PAGE_SIZE
        start += len(entries) // _ENTRY_BYTES * PAGE_SIZE
