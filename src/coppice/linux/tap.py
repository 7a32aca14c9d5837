"""TAP devices by ioctl(2).

A persistent device outlives its maker; the process that opens it gets its frames.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from coppice.linux import netns

_DEVICE: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x400454CA
_TUNSETPERSIST: Final = 0x400454CB
# No packet information, and a header for offloads: the flags that QEMU and Firecracker use.
_FLAGS: Final = 0x0002 | 0x1000 | 0x4000


def create(name: str) -> None:
    """Make a TAP in the caller's namespace that persists as long as the namespace. Blocks.

    :raises OSError: the kernel has no TUN, or this process may not use it
    """
    descriptor = _attach(name)
    try:
        fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
    finally:
        os.close(descriptor)


def open_in(namespace: Path, name: str) -> int:
    """Open the TAP `name` of a namespace; return its descriptor, which works in every namespace.

    Blocks.

    :raises OSError: there is no such TAP, or a process has it open
    """
    return netns.inside(namespace, lambda: _attach(name))


def counters(name: str) -> tuple[int, int]:
    """Return the bytes that the process behind a TAP has sent into it, and those that it got. The TAP is in the
    caller's namespace. Blocks.

    :raises FileNotFoundError: there is no such TAP
    """
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        found, _, numbers = line.partition(":")
        if found.strip() == name:
            fields = numbers.split()
            return int(fields[0]), int(fields[8])  # what the kernel received from it, and what it transmitted to it
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def _attach(name: str) -> int:
    descriptor = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _FLAGS))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
