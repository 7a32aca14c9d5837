"""The rights of VMM processes: own users, few capabilities, few files.

A guest that controls its VMM must reach nothing but its own files. Each VMM of a root host has its
own user id. Landlock closes all files outside the instance's directory but devices, programs and
libraries; it needs no root, so it also protects the files of a user who runs VMMs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from stat import S_IMODE
from typing import Final

from coppice.errors import HostCannot
from coppice.linux.files import os_errors
from coppice.vmm.driver import Launch
from coppice.vmm.process import may_trace_any
from coppice.vmm.starting import Rights

KVM: Final = "/dev/kvm"
TUN: Final = "/dev/net/tun"
NOBODY: Final = 65534
_MOST_FILES: Final = 4096
_IDS: Final = 1 << 31
_DEVICES: Final = (KVM, TUN, "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/dev/full")
# Programs, their libraries and data, the kernel's tables, and files that C libraries read.
_PROGRAMS: Final = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/opt", "/nix/store", "/gnu/store")
_TABLES: Final = (
    "/proc", "/sys/bus", "/sys/class", "/sys/devices", "/sys/kernel/mm", "/sys/module",
    "/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/ld-musl-x86_64.path", "/etc/localtime", "/etc/qemu",
    "/etc/resolv.conf", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager",
)  # fmt: skip


def rights(launch: Launch, program: str) -> Rights:
    """Return the rights of a VMM that may keep its user. It may fill its disks and RAM, but not the
    host's disk with console output.
    """
    return Rights(
        restricted=True,
        cgroup=launch.cgroup,
        network_namespace=next((nic.namespace for nic in launch.nics), ""),
        largest_file=max(
            launch.machine.memory_bytes, *(disk.largest_bytes for disk in launch.disks if not disk.readonly)
        ),
        most_files=_MOST_FILES,
        readable=_readable(program, launch.directory.parent),
        writable=(".", *_DEVICES),
    )


@functools.lru_cache(maxsize=16)
def _readable(program: str, instances: Path) -> tuple[str, ...]:
    """Return the paths that a VMM may read, without trees that have the directory of instances in them."""
    executable = Path(program).resolve()
    beside = executable.parent.parent if executable.parent.name == "bin" else executable
    own = instances.resolve()
    trees = [path for path in (*_PROGRAMS, str(beside)) if not own.is_relative_to(_resolved(path))]
    return (*dict.fromkeys((*trees, program, str(executable), *_TABLES)),)


@functools.cache
def _resolved(tree: str) -> Path:
    return Path(tree).resolve()


def own_user(own: int | None) -> int | None:
    """Return the user id that a VMM drops root to, or None if this process is not root.

    Each VMM has its own id, so that none can signal or trace another. These users own no files.

    :raises HostCannot: this process could not see whether such a VMM is alive
    """
    if os.geteuid() != 0:
        return None
    if not _traces():
        raise HostCannot(
            "root has no CAP_SYS_PTRACE here, and could not inspect a VMM that has dropped root",
            hint="add the capability to the container: `docker run --cap-add SYS_PTRACE`",
        )
    return NOBODY if own is None or _mapped_ids() < _IDS else own


@functools.cache
def _traces() -> bool:
    """Return whether this process may inspect those of other users. No process gains a capability later."""
    return may_trace_any()


@functools.cache
def _mapped_ids() -> int:
    """Return how many user ids exist here: few in some user namespaces. That never changes for a process."""
    return sum(int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines())


def groups_for(program: str, devices: Iterable[str]) -> tuple[int, ...] | None:
    """Return the groups with which any user can run a program and open devices; None if that takes
    root.
    """
    groups: list[int] = []
    try:
        if not Path(program).stat().st_mode & 0o001:
            return None
        for device in devices:
            found = Path(device).stat()
            if found.st_mode & 0o006 == 0o006:
                continue
            if found.st_mode & 0o060 != 0o060:
                return None
            groups.append(found.st_gid)
    except OSError:
        return None
    return tuple(dict.fromkeys(groups))


def grant(launch: Launch, user: int, written: Sequence[str]) -> None:
    """Let a user work in an instance's directory: open its files, write its disks and logs, and make
    sockets. Blocks. Idempotent.

    The owner stays the same. So the VMM can neither remove nor replace a file that it has not made
    itself (the directory is sticky), nor make an immutable file writable.

    :param written: more names of files that the VMM writes; a missing one is made
    """
    directory = launch.directory
    with os_errors(f"let the VMM work in {directory}"):
        os.chown(directory, -1, user)
        directory.chmod(0o1730)
        for disk in launch.disks:
            if not disk.readonly:
                give(directory, disk.path, user)
        for name in written:
            give(directory, name, user, os.O_CREAT)


def give(directory: Path, name: str, group: int, flags: int = 0) -> None:
    """Let a group write a file of a directory. Blocks.

    :param flags: more flags to open the file with
    :raises OSError: it cannot be opened, or is a link
    """
    descriptor = os.open(directory / name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o600)
    try:
        os.fchown(descriptor, directory.stat().st_uid, group)
        os.fchmod(descriptor, 0o660)
    finally:
        os.close(descriptor)


def group_of(directory: Path) -> int | None:
    """Return the group that works in an instance's directory, if `grant` has let one in. Blocks."""
    found = directory.stat()
    return found.st_gid if S_IMODE(found.st_mode) == 0o1730 else None
