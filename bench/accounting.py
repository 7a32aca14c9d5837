"""Measurements from the kernel: CPU time, bytes written, page cache, and the facts of the host."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

from bench.records import HostFacts
from coppice import __version__
from coppice.client import AsyncHost
from coppice.errors import HostCannot, VmmDied
from coppice.linux.extents import data_ranges
from coppice.model import MachineSpec

_TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")
_CHUNK = 1 << 20
_DROPPED = 0.01  # the fraction of a file that may stay cached: a page or two
_DROP_DEADLINE_S = 5.0
_DROP_PAUSE_S = 0.05  # no event tells when a page can be dropped

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Usage(NamedTuple):
    """CPU time and written bytes of this process and of the children that it waited for."""

    cpu_ms: float
    written_bytes: int

    @classmethod
    def now(cls) -> Usage:
        """Return the current usage. VMMs count once they are reaped, so take both readings
        before.
        """
        spent = os.times()
        cpu_s = spent.user + spent.system + spent.children_user + spent.children_system
        return cls(cpu_s * 1000, written_bytes(os.getpid()))

    def until(self, later: Usage) -> Usage:
        """Return the usage between the two readings."""
        return Usage(later.cpu_ms - self.cpu_ms, later.written_bytes - self.written_bytes)


def parse_cpu_ms(stat: str) -> float:
    """Return user and system time in ms from /proc/PID/stat: fields 14 and 15 (proc(5)), whole
    ticks.
    """
    fields = stat.rpartition(")")[2].split()  # field 2, the command, may contain blanks and parentheses
    return (int(fields[11]) + int(fields[12])) * _TICK_MS


def cpu_ms(pid: int) -> float:
    """Return user and system time of a process in ms, including all its threads.

    :raises VmmDied: there is no such process
    """
    try:
        return parse_cpu_ms(Path(f"/proc/{pid}/stat").read_text())
    except (FileNotFoundError, ProcessLookupError) as error:
        raise VmmDied(
            f"the VMM process {pid} ended while it was measured", hint="see `coppice logs --vmm NAME`"
        ) from error


def written_bytes(pid: int) -> int:
    """Return the bytes a process sent to storage (`write_bytes` in proc(5)); 0 if that is
    unreadable.
    """
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.partition(":")[2]) for line in lines if line.startswith("write_bytes:")), 0)


def available_bytes() -> int:
    """Return MemAvailable of this host (proc(5))."""
    return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024


def drop_from_cache(*paths: Path) -> None:
    """Drop these files from the page cache. Repeats for a while, since recently mapped pages go
    late.

    Pages that are still mapped or not yet written back stay; see `cached_part`.
    """
    give_up = time.monotonic() + _DROP_DEADLINE_S
    while True:
        for path in paths:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if time.monotonic() > give_up or all(cached_part(path) < _DROPPED for path in paths):
            return
        time.sleep(_DROP_PAUSE_S)


def read_into_cache(*paths: Path) -> None:
    """Read the data of these files into the page cache, without the holes, which would fill it with
    zeros.
    """
    for path in paths:
        with path.open("rb", buffering=0) as file:
            for start, length in data_ranges(file.fileno(), path.stat().st_size):
                for offset in range(start, start + length, _CHUNK):
                    os.pread(file.fileno(), min(_CHUNK, start + length - offset), offset)


def cached_part(path: Path) -> float:
    """Return the cached fraction of a file's data (not its holes), 0.0 to 1.0, by mincore(2).

    :raises HostCannot: mincore failed
    """
    size = path.stat().st_size
    resident = _resident(path)
    data = cached = 0
    with path.open("rb") as file:
        for begin, length in data_ranges(file.fileno(), size):
            pages = resident[begin // mmap.PAGESIZE : -(-(begin + length) // mmap.PAGESIZE)]
            data += len(pages)
            cached += sum(page & 1 for page in pages)
    return cached / data if data else 0.0


def cached_bytes(path: Path) -> int:
    """Return the bytes of a file that are in the page cache, holes that were read included.

    :raises HostCannot: mincore failed
    """
    return sum(page & 1 for page in _resident(path)) * mmap.PAGESIZE


def _resident(path: Path) -> bytes:
    """Return a byte for each page of a file; bit 0 tells whether it is cached."""
    size = path.stat().st_size
    resident = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file:
        # Writable, since ctypes takes the address of writable buffers only; nothing is written.
        with mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapping:
            start = ctypes.c_ubyte.from_buffer(mapping)
            status = _libc.mincore(ctypes.addressof(start), size, resident)
            del start  # the mapping cannot be closed while its address is held
        if status:
            reason = os.strerror(ctypes.get_errno())
            raise HostCannot(
                f"cannot read which pages of {path} are cached: {reason}",
                hint="run on Linux 5.2 or later, as the owner",
            )
    return bytes(resident)


def parse_mounts(mounts: str, path: str) -> str:
    """Return the file system type of the mount that holds `path`, from /proc/self/mounts."""
    best, found = "", "unknown"
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, found = point, kind
    return found


async def host_facts(host: AsyncHost) -> HostFacts:
    """Return the facts of this host, with the VMM and accelerator that `host` uses."""
    manifest = await host.local.rooms.drivers.chosen.manifest(MachineSpec())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return HostFacts(
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        coppice_version=__version__,
        cpu_model=names[0] if names else platform.machine(),
        cpu_threads=len(os.sched_getaffinity(0)),
        ram_bytes=memory,
        kernel=platform.release(),
        filesystem=parse_mounts(Path("/proc/self/mounts").read_text(), str(host.home.resolve())),
        driver=manifest.driver,
        vmm_version=manifest.vmm_version,
        accel=manifest.accel,
        load_average=os.getloadavg(),
        python=platform.python_version(),
    )
