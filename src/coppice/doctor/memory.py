"""Checks of memory: its size, and whether the kernel permits sharing, counting and capture."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from pathlib import Path

from coppice.linux.files import number_of
from coppice.linux.mounts import Mount, read_mounts
from coppice.linux.pagemap import PAGEMAP_SCAN
from coppice.model import GIB, MIB, Check
from coppice.vmm.process import may_trace_any

_FAIL_BELOW = 512 * MIB
_WARN_BELOW = 2 * GIB
_DEFAULT_MAX_MAP_COUNT = 65530
_STRICT = 2
_SYSCTL = Path("/proc/sys")


def available() -> Check:
    """Check the memory available to guests."""
    return judge_available(meminfo_bytes(Path("/proc/meminfo").read_text(), "MemAvailable"))


def meminfo_bytes(text: str, key: str) -> int:
    """Return a value of /proc/meminfo in bytes; 0 if it is missing."""
    match = re.search(rf"^{re.escape(key)}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def judge_available(free_bytes: int) -> Check:
    """Judge available memory: a guest touches 100 MiB in its boot, a fork a few MiB more."""
    detail = f"{free_bytes / GIB:.1f} GiB available"
    cure = "end other programs on this host, or run smaller and fewer guests"
    if free_bytes >= _WARN_BELOW:
        return Check(name="memory", status="ok", detail=detail)
    return Check(name="memory", status="fail" if free_bytes < _FAIL_BELOW else "warn", detail=detail, cure=cure)


def overcommit() -> Check:
    """Check how the kernel counts mapped memory that is not used yet."""
    return judge_overcommit(number_of(_SYSCTL / "vm/overcommit_memory"))


def judge_overcommit(value: int | None) -> Check:
    """Refuse strict counting (2), which charges each fork for all of its guest's memory."""
    name = "vm.overcommit_memory"
    if value == _STRICT:
        return Check(
            name=name,
            status="fail",
            detail="2: each fork is charged for the whole memory of its guest, shared or not",
            cure="sysctl -w vm.overcommit_memory=1",
        )
    return Check(name=name, status="ok", detail=str(value))


def max_map_count() -> Check:
    """Check how many mappings a process may have."""
    return judge_max_map_count(number_of(_SYSCTL / "vm/max_map_count"))


def judge_max_map_count(value: int | None) -> Check:
    """Warn below the kernel's default: QEMU needs hundreds of mappings, and ends without them."""
    name = "vm.max_map_count"
    if value is not None and value < _DEFAULT_MAX_MAP_COUNT:
        cure = f"sysctl -w vm.max_map_count={_DEFAULT_MAX_MAP_COUNT}"
        return Check(name=name, status="warn", detail=f"{value} is below the kernel's default", cure=cure)
    return Check(name=name, status="ok", detail=str(value))


def pagemap_scan() -> Check:
    """Try the ioctl on one page of this process."""
    # struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages and four masks.
    # An empty range is valid.
    argument = bytearray(struct.pack("=12Q", 96, *([0] * 11)))
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, PAGEMAP_SCAN, argument)
    except OSError as error:
        return judge_pagemap_scan(error.errno)
    finally:
        os.close(fd)
    return judge_pagemap_scan(None)


def judge_pagemap_scan(code: int | None) -> Check:
    """Judge the ioctl's errno; None if it worked."""
    name = "PAGEMAP_SCAN"
    if code is None:
        return Check(name=name, status="ok", detail="works: private pages of a guest are found fast")
    reason = "this kernel is older than 6.7" if code in (errno.ENOTTY, errno.EINVAL) else os.strerror(code)
    detail = f"not available ({reason}): a capture of a fork reads the whole page map, a millisecond for each GiB or so"
    return Check(name=name, status="warn", detail=detail, cure="run Linux 6.7 or later for faster captures of forks")


def smaps() -> Check:
    """Check whether memory sharing can be verified and reported."""
    Path("/proc/self/smaps_rollup").read_bytes()
    return judge_smaps(read_mounts(), root=os.geteuid() == 0)


def judge_smaps(mounts: list[Mount], *, root: bool) -> Check:
    """Warn about /proc with hidepid, which hides even some of a user's own processes."""
    hiding = next(
        (option for mount in mounts if mount.type == "proc" for option in mount.options if _hides(option)), None
    )
    if hiding and not root:
        detail = f"/proc is mounted with {hiding}: the memory of a VM may not be readable"
        return Check(name="smaps", status="warn", detail=detail, cure="mount -o remount,hidepid=0 /proc")
    return Check(name="smaps", status="ok", detail="readable: sharing is verified, not assumed")


def _hides(option: str) -> bool:
    return option.startswith("hidepid=") and option not in ("hidepid=0", "hidepid=off")


def ptrace() -> Check:
    """Check whether a host process may read the memory of a VM that another one started."""
    return judge_ptrace(
        number_of(_SYSCTL / "kernel/yama/ptrace_scope"), root=os.geteuid() == 0, capable=may_trace_any()
    )


def judge_ptrace(scope: int | None, *, root: bool, capable: bool) -> Check:
    """Judge the limits on ptrace. The capture of a fork reads its memory with process_vm_readv.

    :param scope: ptrace_scope of the Yama security module; None without it
    :param capable: whether this process has CAP_SYS_PTRACE, which root needs: a VMM that root
        starts drops to another user
    """
    name = "ptrace"
    if root and not capable:
        detail = "root has no CAP_SYS_PTRACE here, as in most containers: no machine can be started"
        return Check(name=name, status="fail", detail=detail, cure="docker run --cap-add SYS_PTRACE ...")
    allowed = not scope or (root and scope < 3)
    if allowed:
        return Check(name=name, status="ok", detail="the memory of running forks can be captured")
    if scope == 3:
        detail = "kernel.yama.ptrace_scope is 3: running forks cannot be captured, only machines that were booted"
        return Check(
            name=name, status="warn", detail=detail, cure="set kernel.yama.ptrace_scope=1 in /etc/sysctl.d and reboot"
        )
    detail = f"kernel.yama.ptrace_scope is {scope}: a fork can be captured only by the process that started it"
    return Check(name=name, status="warn", detail=detail, cure="sysctl -w kernel.yama.ptrace_scope=0, or run as root")
