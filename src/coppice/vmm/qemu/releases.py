"""Options of QEMU that changed between releases. Every choice by release is made here.

Sources: QEMU's manual, "Deprecated features" and "Removed features". Each new form is used from the
first release that has it, so that no supported release warns about its command line or refuses it:

* 8.2: ``readonly=on,rom=off`` of a RAM file. Without it the file is opened for writing.
* 8.2: ``-incoming file:``. A plain file behind ``fd:`` is deprecated in 9.1 and refused by 11.
* 9.1: ``-run-with user=``. ``-runas`` is deprecated in 9.1 and gone in 10.0.
* 11.1: ``-object monitor-qmp``. ``-mon`` is deprecated there.
"""

from __future__ import annotations

from coppice.vmm import driver as files

Release = tuple[int, int]
"""Major and minor number."""

READ_ONLY_RAM = (8, 2)
INCOMING_FILE = (8, 2)
RUN_WITH_USER = (9, 1)
MONITOR_OBJECT = (11, 1)

LAYER_FORMAT = "qcow2-l2"
LAYER_OPTIONS = {"version": "v3", "cluster-size": 65536, "extended-l2": True}
LAYER_PART = 65536 // 32
"""A layer's clusters have 32 parts each (5.2), so a small write copies at most 2 KiB from below."""


def private_memory(release: Release) -> str:
    """Return the options of `-object` for a private mapping of the mem-file.

    From 8.2 on QEMU opens the file for reading only. Then not even a guest that controls QEMU can
    write to the memory that all forks share.
    """
    return ",readonly=on,rom=off" if release >= READ_ONLY_RAM else ""


def opens_vmstate(release: Release) -> bool:
    """Return whether QEMU opens the device state itself; an older release inherits a descriptor."""
    return release >= INCOMING_FILE


def incoming(vmstate_fd: int | None) -> str:
    """Return the source of the device state for `-incoming`; `vmstate_fd` is None if QEMU opens the
    file itself.

    QEMU opens the file before it drops root, as it does with the disks.
    """
    return f"file:{files.VMSTATE}" if vmstate_fd is None else f"fd:{vmstate_fd}"


def run_as(release: Release, user: int) -> tuple[str, str]:
    """Return the option that makes QEMU drop root to `user`."""
    return ("-run-with", f"user={user}:{user}") if release >= RUN_WITH_USER else ("-runas", f"{user}:{user}")


def monitor(release: Release, chardev: str) -> tuple[str, str]:
    """Return the option that puts QEMU's control protocol on a character device."""
    if release >= MONITOR_OBJECT:
        return "-object", f"monitor-qmp,id=monitor,chardev={chardev}"
    return "-mon", f"chardev={chardev},mode=control"
