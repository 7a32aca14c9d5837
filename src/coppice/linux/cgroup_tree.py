"""Make and remove control groups of version 2 in a subtree that this process may use.

See Documentation/admin-guide/cgroup-v2.rst. A user gets a subtree from systemd (`Delegate=yes`);
root may use the topmost group. Processes may be only in groups that pass no controller on, so the
new groups are siblings of this process's group, not below it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from coppice.errors import HostCannot
from coppice.linux.cgroups import own_directories

PREFIX: Final = "coppice-"
_ROOT: Final = Path("/")
_EMPTY_S: Final = 5.0
_HINT: Final = (
    "run as root, or in a delegated group: `systemd-run --user --scope -p Delegate=yes coppice ...`; "
    "`coppice doctor` shows whether there is one"
)


def delegated(controllers: Iterable[str], root: Path = _ROOT, *, enable: bool = True) -> Path:
    """Return the topmost group in which this process can make groups with these controllers. Blocks.

    :param root: where proc and the control groups are mounted
    :param enable: the group passes the controllers on from now on; else only its rights are checked
    :raises HostCannot: there is none; the message has the reason
    """
    wanted = set(controllers)
    directories = list(own_directories(root))
    if not directories:
        raise _refused("this host has no control groups of version 2")
    reason = "this user may write to none of its control groups"
    for directory in reversed(directories):
        lacking = wanted - _words(directory / "cgroup.controllers")
        if lacking:
            reason = f"{directory} has no controller {' and '.join(sorted(lacking))}"
            continue
        if not all(os.access(directory / name, os.W_OK) for name in ("", "cgroup.procs", "cgroup.subtree_control")):
            continue
        missing = wanted - _words(directory / "cgroup.subtree_control")
        try:
            if missing and enable:
                _write(directory / "cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(missing)))
        except OSError as error:
            reason = f"{directory} cannot pass on its controllers: {error.strerror}"
            if error.errno == errno.EBUSY:
                reason += " (there are processes in it)"
            continue
        return directory
    raise _refused(reason)


def create(group: Path, settings: Mapping[str, str]) -> None:
    """Make a group, and write its files. Blocks. A group that exists gets the settings.

    :raises HostCannot: the kernel refuses
    """
    try:
        group.mkdir(exist_ok=True)
        for name, value in settings.items():
            _write(group / name, value)
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        raise HostCannot(f"cannot limit a VMM by the control group {group}: {error.strerror}", hint=_HINT) from error


def remove(group: Path) -> None:
    """Remove a group, and end the processes in it. Blocks. Idempotent.

    :raises HostCannot: a process in it does not end, or this user may not remove it
    """
    end = time.monotonic() + _EMPTY_S
    while True:
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise HostCannot(
                    f"cannot remove the control group {group}: {error.strerror}",
                    hint=f"see its processes with `cat {group}/cgroup.procs`, then run `coppice gc`",
                ) from error
        with contextlib.suppress(OSError):
            _write(group / "cgroup.kill", "1")  # from Linux 5.14 on
        _await_empty(group, end - time.monotonic())


def _await_empty(group: Path, deadline_s: float) -> None:
    """Wait until no process is in a group, or for a change of its events. The kernel counts a
    process until it has ended.
    """
    with contextlib.suppress(OSError):
        events = os.open(group / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if b"populated 0" not in os.read(events, 4096):
                poll = select.poll()
                poll.register(events, select.POLLPRI | select.POLLERR)
                poll.poll(max(deadline_s, 0) * 1000)
        finally:
            os.close(events)


def numbers(group: Path, file: str) -> dict[str, int]:
    """Return the keys and numbers of a group's file; a file of one number has the key "". Blocks."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in (group / file).read_text().splitlines():
            key, _, value = line.rpartition(" ")
            if value.isdigit():
                found[key] = int(value)
    return found


def device_of(directory: Path, root: Path = _ROOT) -> str:
    """Return the disk under a directory as the io controller names it: "8:0", not a partition. Blocks.

    :raises HostCannot: the directory is on no disk
    """
    number = directory.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    device = root / "sys/dev/block" / name
    if not device.exists():
        raise HostCannot(
            f"{directory} is on a file system without a disk of its own, which cannot be limited",
            hint="leave out the limit of I/O, or move the data directory to ext4 or xfs",
        )
    if (device / "partition").exists():
        name = (device.resolve().parent / "dev").read_text().strip()
    return name


def _words(path: Path) -> set[str]:
    try:
        return set(path.read_text().split())
    except OSError:
        return set()


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _refused(reason: str) -> HostCannot:
    return HostCannot(f"the resources of a VMM cannot be limited here: {reason}", hint=_HINT)
